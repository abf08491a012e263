"""SequentialNF gives the gradients of plain autograd, while keeping only its last output."""

import contextlib
import copy
import gc
import warnings

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autoFlow import CouplingModule, InvertibleModule, SequentialNet, SequentialNF, reconstruction_errors


class Coupling(CouplingModule):
    """Fused undo and recompute; a network with running statistics and, if asked for, dropout."""

    def __init__(self, target, width=4, dropout=0.0):
        super().__init__(target)
        self.network = nn.Sequential(
            nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2 * width)
        )
        self.calls = 0

    def transform_parameters(self, inputs):
        assert inputs[self.target] is None
        self.calls += 1
        log_scale, shift = self.network(inputs[1 - self.target]).chunk(2, dim=1)
        return log_scale.tanh(), shift

    def couple(self, x, log_scale, shift):
        return x * log_scale.exp() + shift

    def decouple(self, y, log_scale, shift):
        return (y - shift) * (-log_scale).exp()

    def log_det(self, log_scale, shift):
        return log_scale


class PlainCoupling(InvertibleModule):
    """The same bijection with `forward` and `inverse` only."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.coupling = Coupling(*args, **kwargs)

    def forward(self, inputs, logdets=None):
        return self.coupling(inputs, logdets)

    def inverse(self, outputs, logdets=None):
        return self.coupling.inverse(outputs, logdets)


class Mix(InvertibleModule):
    """Changes every tensor at once, by a learned factor."""

    def __init__(self):
        super().__init__()
        self.log_factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs, logdets=None):
        a, b = inputs
        if logdets is not None:
            logdets = tuple(x + self.log_factor for x in logdets)
        return (b * self.log_factor.exp(), (a + b) * self.log_factor.exp()), logdets

    def inverse(self, outputs, logdets=None):
        b, total = (x * (-self.log_factor).exp() for x in outputs)
        if logdets is not None:
            logdets = tuple(x - self.log_factor for x in logdets)
        return (total - b, b), logdets


def make_blocks(kind=Coupling, depth=4, **kwargs):
    torch.manual_seed(0)
    blocks = []
    for i in range(depth):
        blocks.append(kind(i % 2, **kwargs))
        if i == 1:
            blocks.append(Mix())
    return nn.ModuleList(blocks).double()


def make_pair(kind=Coupling, **kwargs):
    """The same chain twice: memory saving, and plain."""
    blocks = make_blocks(kind, **kwargs)
    return SequentialNF(*blocks), SequentialNet(*copy.deepcopy(blocks))


def make_inputs(requires_grad=True, batch=8, width=4):
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(batch, width, generator=generator, dtype=torch.float64, requires_grad=requires_grad)
        for _ in range(2)
    )


def zeros(inputs):
    return tuple(torch.zeros_like(x) for x in inputs)


def loss_of(results):
    values, logdets = results
    loss = sum((x**3).mean() for x in values)
    return loss if logdets is None else loss + sum((x * x.detach()).sum() for x in logdets)


def assert_same_gradients(chain, other):
    assert len(list(chain.parameters())) == len(list(other.parameters()))
    for (name, p), q in zip(chain.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("with_logdets", [False, True])
@pytest.mark.parametrize("inputs_need_grad", [False, True])
@pytest.mark.parametrize("kind", [Coupling, PlainCoupling])
def test_gradients_equal_plain_autograd(kind, inputs_need_grad, with_logdets, direction):
    results = []
    for chain in make_pair(kind):
        inputs = make_inputs(inputs_need_grad)
        outputs = getattr(chain, direction)(inputs, zeros(inputs) if with_logdets else None)
        loss_of(outputs).backward()
        results.append((chain, inputs, outputs))
    (chain, inputs, outputs), (other, other_inputs, other_outputs) = results
    assert (outputs[1] is None) == (not with_logdets)
    torch.testing.assert_close(outputs, other_outputs)
    assert_same_gradients(chain, other)
    for x, y in zip(inputs, other_inputs, strict=True):
        if inputs_need_grad:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [Coupling, PlainCoupling])
def test_inverse_undoes_forward_and_log_dets_cancel(kind):
    chain, _ = make_pair(kind)
    inputs = make_inputs(False)
    outputs, logdets = chain(inputs, zeros(inputs))
    rebuilt, logdets = chain.inverse(outputs, logdets)
    torch.testing.assert_close(rebuilt, inputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logdets, zeros(inputs), rtol=0, atol=1e-9)


def test_log_det_equals_the_jacobians():
    chain = SequentialNF(*make_blocks()).eval()
    inputs = make_inputs(False, batch=1)
    _, logdets = chain(inputs, zeros(inputs))

    def flat(x):
        outputs, _ = SequentialNet(*chain)(tuple(x.view(2, 1, 4)))
        return torch.cat([y.flatten() for y in outputs])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([x.flatten() for x in inputs]))
    torch.testing.assert_close(sum(x.sum() for x in logdets), torch.linalg.slogdet(jacobian)[1])


def test_gradient_of_a_chosen_input_only():
    for chain in make_pair():
        inputs = make_inputs()
        loss_of(chain(inputs)).backward(inputs=[inputs[0]])
        assert inputs[0].grad is not None
        assert inputs[1].grad is None
        assert all(p.grad is None for p in chain.parameters())


def test_autograd_grad_of_inputs_and_parameters():
    grads = []
    for chain in make_pair():
        inputs = make_inputs()
        first = next(chain.parameters())
        grads.append(torch.autograd.grad(loss_of(chain(inputs)), [inputs[1], first]))
    torch.testing.assert_close(grads[0], grads[1])


def test_a_log_det_that_no_loss_reads_is_not_computed_again(monkeypatch):
    calls = []
    log_det = Coupling.log_det
    monkeypatch.setattr(Coupling, "log_det", lambda *a: calls.append(1) or log_det(*a))
    chain, other = make_pair()
    inputs = make_inputs()
    for c in (chain, other):
        values, _ = c(inputs, zeros(inputs))
        values[0].sum().backward()  # neither values[1] nor the log-dets have a gradient
        assert len(calls) == 4
        calls.clear()
    assert_same_gradients(chain, other)
    chain(inputs)
    assert not calls


@pytest.mark.parametrize("change", ["parameter", "mode", "buffer"])
def test_a_change_between_forward_and_backward_is_an_error(change):
    chain, _ = make_pair()
    chain.train(change == "parameter")
    loss = loss_of(chain(make_inputs()))
    if change == "parameter":
        with torch.no_grad():
            chain[3].network[0].weight.add_(0.1)
    elif change == "mode":
        chain[3].train()
    else:
        chain[3].network[1].running_mean.add_(1.0)
    with pytest.raises(RuntimeError, match=r"block 3 \(Coupling\) was changed between"):
        loss.backward()


def test_a_single_tensor_of_parameters_is_refused():
    class Single(Coupling):
        def transform_parameters(self, inputs):
            return self.network(inputs[1 - self.target])

    with pytest.raises(TypeError, match=r"Single\.transform_parameters must return a tuple"):
        SequentialNF(Single(0).double())(make_inputs())


def test_log_dets_that_come_in_get_their_gradient():
    chain, _ = make_pair()
    inputs = make_inputs(False)
    logdets = tuple(x.requires_grad_() for x in zeros(inputs))
    _, out = chain(inputs, logdets)
    (2 * out[0].sum()).backward()
    torch.testing.assert_close(logdets[0].grad, torch.full_like(logdets[0], 2.0))
    assert logdets[1].grad is None


class PerSample(InvertibleModule):
    """Keeps one log-det per sample, of all states together."""

    def __init__(self):
        super().__init__()
        self.log_factor = nn.Parameter(torch.full((4,), 0.2))

    def forward(self, inputs, logdets=None):
        outputs = tuple(x * self.log_factor.exp() for x in inputs)
        return outputs, logdets and (logdets[0] + len(inputs) * self.log_factor.sum(),)

    def inverse(self, outputs, logdets=None):
        inputs = tuple(x * (-self.log_factor).exp() for x in outputs)
        return inputs, logdets and (logdets[0] - len(outputs) * self.log_factor.sum(),)


def test_log_dets_may_have_any_number_and_shape():
    blocks = [PerSample().double() for _ in range(3)]
    gradients = []
    for chain in (SequentialNF(*blocks), SequentialNet(*blocks)):
        chain.zero_grad(set_to_none=True)
        inputs = make_inputs()
        values, (total,) = chain(inputs, (torch.zeros(8, dtype=torch.float64),))
        torch.testing.assert_close(total.detach(), torch.full((8,), 3 * 2 * 4 * 0.2, dtype=torch.float64))
        (total.square().sum() + values[1].sum()).backward()
        gradients.append([p.grad for p in chain.parameters()])
    torch.testing.assert_close(*gradients)


def test_freezing_and_unfreezing_after_construction():
    chain, other = make_pair()
    for frozen in ([0, 1], [3], []):
        for c in (chain, other):
            c.zero_grad(set_to_none=True)
            for i, block in enumerate(c):
                block.requires_grad_(i not in frozen)
            loss_of(c(make_inputs(False))).backward()
        assert all(p.grad is None for i in frozen for p in chain[i].parameters())
        assert any(p.grad is not None for p in chain.parameters())
        assert_same_gradients(chain, other)


def test_blocks_before_the_first_trained_one_are_not_recomputed():
    chain, _ = make_pair()
    for block in list(chain)[:3]:
        block.requires_grad_(False)
    loss_of(chain(make_inputs(False))).backward()
    assert [block.calls for block in chain if isinstance(block, Coupling)] == [1, 1, 2, 2]


def test_a_block_that_occurs_twice_is_applied_twice_and_gets_the_sum():
    chains, inputs = [], make_inputs()
    for kind in (SequentialNF, SequentialNet):
        torch.manual_seed(0)
        mix, coupling = Mix().double(), Coupling(1).double()
        chain = kind(mix, coupling, mix)
        values, _ = chain(inputs)
        loss_of((values, None)).backward()
        chains.append(chain)
    twice = SequentialNF(mix, mix)
    torch.testing.assert_close(twice(inputs)[0], mix(mix(inputs)[0])[0])
    torch.testing.assert_close(twice.inverse(twice(inputs)[0])[0], inputs)
    assert_same_gradients(*chains)
    plain = sum((x**3).mean() for x in mix(coupling(mix(inputs)[0])[0])[0])
    torch.testing.assert_close(
        chains[0][0].log_factor.grad, torch.autograd.grad(plain, mix.log_factor)[0], rtol=1e-9, atol=1e-10
    )


def test_gradients_accumulate():
    chain, other = make_pair()
    for c in (chain, other):
        for _ in range(3):
            loss_of(c(make_inputs())).backward()
    assert_same_gradients(chain, other)


def test_backward_twice_through_a_retained_graph():
    chain, other = make_pair()
    for c in (chain, other):
        loss = loss_of(c(make_inputs()))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(chain, other)


@pytest.mark.parametrize("kind", [Coupling, PlainCoupling])
def test_dropout_sees_the_same_random_numbers(kind):
    chain, other = make_pair(kind, dropout=0.5)
    states = []
    for c in (chain, other):
        torch.manual_seed(5)
        loss_of(c(make_inputs())).backward()
        states.append(torch.get_rng_state())
    assert_same_gradients(chain, other)
    assert torch.equal(*states), "the backward pass must not disturb the random state"


@pytest.mark.parametrize("kind", [Coupling, PlainCoupling])
def test_statistics_change_once_per_step(kind):
    chain, other = make_pair(kind)
    for _ in range(2):
        for c in (chain, other):
            loss_of(c(make_inputs())).backward()
    for (name, b), c in zip(chain.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(b, c), name
    before = copy.deepcopy(dict(chain.named_buffers()))
    chain.inverse(make_inputs())
    for name, b in chain.named_buffers():
        assert torch.equal(b, before[name]), name


def test_gradient_hooks_run_once():
    chain, other = make_pair()
    seen = []
    for c in (chain, other):
        next(c.parameters()).register_hook(lambda grad: seen.append(1) or 2 * grad)
        loss_of(c(make_inputs())).backward()
    assert len(seen) == 2
    assert_same_gradients(chain, other)


def test_second_order_gradients_are_refused_by_name():
    chain, _ = make_pair()
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match=r"second-order gradients.*SequentialNet"):
        torch.autograd.grad(loss_of(chain(inputs)), inputs, create_graph=True)


@pytest.mark.parametrize("kind", [Coupling, PlainCoupling])
def test_autocast_runs_the_network_lower_and_keeps_states(kind):
    gradients = []
    for chain in make_pair(kind):
        chain.float().train(False)
        inputs = tuple(x.detach().float().requires_grad_() for x in make_inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values, _ = chain(inputs)
        assert {x.dtype for x in values} == {torch.float32}
        exact, _ = chain(inputs)
        assert not torch.equal(values[0], exact[0]), "autocast did not reach the network"
        loss_of((values, None)).backward()  # outside autocast: the recomputation enters it again
        gradients.append([p.grad for p in chain.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-3)


def test_autocast_cache_does_not_lose_gradients():
    """Casts cached by a memory-saving pass carry no graph; a plain pass must not pick them up."""
    chain = SequentialNF(*make_blocks().float()).eval()
    inputs = tuple(x.detach().float() for x in make_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chain(inputs)
        loss_of(SequentialNet(*chain)(inputs)).backward()
    assert all(p.grad is not None for p in chain.parameters())


def test_a_block_that_changes_the_dtype_is_named():
    class Lower(Mix):
        def forward(self, inputs, logdets=None):
            return (inputs[0], inputs[1].bfloat16()), logdets

    with pytest.raises(TypeError, match=r"block 1 \(Lower\)"):
        SequentialNF(Mix(), Lower())(make_inputs())


def test_only_invertible_modules_are_taken():
    with pytest.raises(TypeError, match="module 0 is a Linear"):
        SequentialNF(nn.Linear(2, 2))


def count_saved_bytes(chain, inputs):
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    own = {p.data_ptr() for p in chain.parameters()}
    saved = {}

    def pack(x):
        if x.data_ptr() not in own:
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = chain(inputs)
    assert results[0][0].requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("depth", [2, 8])
def test_only_the_last_output_is_kept(depth, direction):
    inputs = make_inputs(batch=64)
    chain = SequentialNF(*make_blocks(depth=depth))
    run = nn.Module()
    run.forward = getattr(chain, direction)
    run.parameters = chain.parameters
    size = sum(x.nbytes for x in inputs)
    assert count_saved_bytes(run, inputs) == size
    assert count_saved_bytes(SequentialNet(*chain), inputs) > 4 * depth * size


def test_no_activation_outlives_the_forward_pass():
    def alive():
        gc.collect()
        found = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        return {id(x): x for x in found if x.shape[:1] == (50,)}

    chain = SequentialNF(*make_blocks(depth=6))
    inputs = make_inputs(batch=50)
    before = alive()  # other tests' tensors, too
    outputs, _ = chain(inputs)
    storages = {x.data_ptr() for key, x in alive().items() if key not in before}
    assert storages <= {x.data_ptr() for x in (*inputs, *outputs)}


@pytest.mark.parametrize("kind", [SequentialNF, SequentialNet])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_context_around_every_pass(kind, direction):
    """It is told which way the modules are applied; a backward pass by inversion goes the other way."""
    seen, reverse = [], direction == "inverse"

    @contextlib.contextmanager
    def around(modules, inverted):
        seen.append((list(modules), inverted, torch.is_grad_enabled()))
        yield
        seen.append("closed")

    chain = kind(*make_blocks(), around=around)
    inputs = make_inputs()
    with torch.no_grad():
        getattr(chain, direction)(inputs)
    assert seen == [(list(chain), reverse, False), "closed"]
    seen.clear()
    sum(y.sum() for y in getattr(chain, direction)(inputs)[0]).backward()
    plainly = kind is SequentialNet
    assert seen[:2] == [(list(chain), reverse, plainly), "closed"]
    assert seen[2:] == ([] if plainly else [(list(chain), not reverse, False), "closed"])


def test_no_grad_is_a_plain_loop():
    chain, other = make_pair()
    with torch.no_grad():
        values, logdets = chain(make_inputs())
    assert logdets is None
    assert all(x.grad_fn is None for x in values)
    assert [block.calls for block in chain if isinstance(block, Coupling)] == [1] * 4
    torch.testing.assert_close(values, other(make_inputs())[0])


def test_a_step_runs_each_network_twice():
    chain = SequentialNF(*make_blocks())
    loss_of(chain(make_inputs())).backward()
    assert [block.calls for block in chain if isinstance(block, Coupling)] == [2] * 4


def train_replica(rank, file, shards, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    chain = DistributedDataParallel(SequentialNF(*make_blocks()).eval())
    loss_of(chain(shards[rank])).backward()
    if rank == 0:
        queue.put([p.grad.numpy() for p in chain.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_gradients(tmp_path):
    inputs = make_inputs(False)
    shards = [tuple(x[:4] for x in inputs), tuple(x[4:] for x in inputs)]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = torch.multiprocessing.spawn(
        train_replica, (str(tmp_path / "store"), shards, queue), nprocs=2, join=False
    )
    distributed = queue.get(timeout=120)
    while not workers.join():
        pass
    chain = SequentialNF(*make_blocks()).eval()
    (sum(loss_of(chain(shard)) for shard in shards) / 2).backward()
    for grad, p in zip(distributed, chain.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(grad), p.grad)


def test_reconstruction_errors_of_a_sound_chain():
    chain = SequentialNF(*make_blocks().float())
    before = copy.deepcopy(chain.state_dict())
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = reconstruction_errors(chain, tuple(x.float() for x in make_inputs()))
    assert [e.name for e in errors] == [str(i) for i in range(5)]
    assert all(e.float64 < 1e-12 < e.float32 < 1e-5 for e in errors if e.name != "2")
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in chain.state_dict().items())


def test_reconstruction_errors_name_the_bad_block():
    chain = SequentialNF(*make_blocks().float())
    with torch.no_grad():
        chain[3].network[-1].bias[4:] = 1e6  # a shift that swallows the state's digits
    with pytest.warns(UserWarning, match=r"block 3 \(Coupling\)"):
        errors = reconstruction_errors(chain, tuple(x.float() for x in make_inputs()))
    assert errors[3].float32 > 1e-3 > 1e-6 > errors[3].float64
