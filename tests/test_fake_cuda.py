"""Where no GPU is: on tensors that only pretend to be on one, nothing mixes devices, and kernels are counted.

Under FakeTensorMode operators compute shapes, types and devices, and refuse tensors of different devices.  What
such a tensor would hold, nobody knows, so the numbers are for tests/test_cuda.py, which needs a GPU.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import scorer
import train
from benchmarks.measuring import DEFAULT_MODELS
from dataset import normalize
from model import CONTRASTS, LOSSES, TEMPLATES, VOLUME_NORMS, PyramidFlow, PyramidFlowConfig, training_loss
from scorer import Latents, Scorer, Statistics, lay_out

# What the default FNF with its 16 blocks launches: bars that may be lowered, and raised for a reason only.
MOST_SCORING, MOST_FORWARD = 340, 400
MOST_BACKWARD = {True: 1390, False: 510}  # by memory saving
SMALL = {"encoder": "none", "num_level": 3, "num_stack": 1, "num_channel": 4, "image_size": (32, 32)}
NO_KERNEL = ("empty", "alias", "view", "device", "promote_types", "is_same_size", "_local_scalar")


class Kernels(TorchDispatchMode):
    """Counts the operators that launch something, and collects those that mix devices.

    A number that is read from the host, a tensor of no dimensions, may be on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.mixed = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if not (function.is_view or any(word in name for word in NO_KERNEL)):
            self.counts[name] += 1
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device for x in tensors if x.dim()}) > 1 and name != "_to_copy":
            self.mixed.append(name)
        return result

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@pytest.fixture
def kernels_seen(monkeypatch):
    """Inside of this, tensors pretend to be on a GPU; nothing may mix devices."""
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    matrices = kernels.up_matrix, kernels.blur_matrix, kernels.summing_matrix
    for kept in matrices:  # fake ones are of one mode alone
        kept.cache_clear()
    with FakeTensorMode(), Kernels() as seen:
        yield seen
    for kept in matrices:
        kept.cache_clear()
    assert not seen.mixed


def gradients(outputs, inputs, grad_outputs=None, allow_unused=False) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad, whose own engine would ask the driver for streams: the nodes, the latest first."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    edges = [torch.autograd.graph.get_gradient_edge(y) for y in outputs]
    waiting, found = defaultdict(dict), {}  # of each node the gradients of its outputs, by number
    for edge, grad in zip(edges, grad_outputs or map(torch.ones_like, outputs), strict=True):
        add_gradient(waiting[edge.node], edge.output_nr, grad)
    while waiting:
        node = max(waiting, key=lambda n: -1 if hasattr(n, "variable") else n._sequence_nr())
        given = waiting.pop(node)
        if hasattr(node, "variable"):
            found[node.variable] = given[0]
            continue
        for (then, number), grad in backward_of(node, given):
            if then is not None and grad is not None:
                expected = then._input_metadata[number]
                grad = grad.sum_to_size(expected.shape).to(expected.dtype)  # of what was broadcast, or cast
                add_gradient(waiting[then], number, grad)
    assert allow_unused or all(x in found for x in inputs)
    return tuple(found.get(x) for x in inputs)


@torch.no_grad()
def backward_of(node, given: dict[int, Tensor]) -> list:
    """(edge, gradient) of all inputs of an operator, or of an autograd.Function, where some are no tensors."""
    grads = [given.get(i) for i in range(len(node._input_metadata))]
    if callable(node):
        results = node(*grads)
        return list(zip(node.next_functions, as_tuple(results), strict=True))
    results = zip(as_tuple(node.apply(*grads)), node.needs_input_grad, strict=True)
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return list(zip(edges, [grad for grad, needed in results if needed], strict=True))


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def add_gradient(given: dict[int, Tensor], number: int, grad: Tensor) -> None:
    given[number] = given[number] + grad if number in given else grad


def on_cuda(module: nn.Module) -> nn.Module:
    """The module, with parameters and buffers that pretend to be there."""
    for part in module.modules():
        for kept in (part._buffers, part._parameters):
            kept.update({name: pretend(x) for name, x in kept.items() if x is not None})
    return module


def pretend(x: Tensor) -> Tensor:
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y


def fake_model(config: PyramidFlowConfig | None = None, **changes) -> PyramidFlow:
    """Small, unless a configuration is given."""
    config = replace(config or PyramidFlowConfig(**SMALL), **changes)
    with unset_fake_temporarily():
        model = PyramidFlow(config)
    return on_cuda(model)


def fake_images(model: PyramidFlow, count: int = 2) -> Tensor:
    """uint8 (B,h,w,3)."""
    return torch.empty(count, *model.config.image_size, 3, dtype=torch.uint8, device="cuda")


class FakeImages:
    """What scorer.py reads of dataset.Images that keeps its images on the device."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batches):
        return (self.images[batch.to("cuda")] for batch in batches)


def fake_scorer(model: PyramidFlow, num_template: int = 1, **changes) -> Scorer:
    sizes = [model.config.level_size(i) for i in range(model.config.num_level)]
    shapes = [(num_template, model.config.channels, *size) for size in sizes]
    templates = tuple(lay_out(torch.empty(shape, device="cuda")) for shape in shapes)
    return Scorer(model.eval(), templates, **changes)


def take_step(model: PyramidFlow, loss="fourier", template="mean") -> None:
    """All of train.train_one_epoch for a batch, but for what reads the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(model, train.parse_arguments([]))
    latents, logdets = model.train()(normalize(fake_images(model)), loss == "likelihood")
    value = training_loss(model, latents, logdets, loss, template)
    for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
        assert (grad.device, grad.shape) == (parameter.device, parameter.shape)
        parameter.grad = grad
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)  # as it does by itself on CUDA
    optimizer.step()


# ------------------------------------------------------------------------------ the instruments


def test_the_stand_in_for_autograd_gives_its_gradients():
    """On numbers: of the whole training loss, through operators, Functions, and inside of a Function's own."""
    model = PyramidFlow(PyramidFlowConfig(**SMALL)).double().train()
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    parameters = list(model.flow.parameters())
    loss = training_loss(model, *model(torch.randn(2, 3, 32, 32, dtype=torch.float64)))
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(gradients(loss, parameters), expected)


def test_a_tensor_of_the_cpu_is_noticed():
    with FakeTensorMode(), Kernels() as seen:
        x = torch.empty(3, device="cuda")
        x.add(1).view(3, 1)
        x[torch.tensor([0, 2])]
        assert seen.total == 2
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(3)
    assert seen.mixed == ["index"]


# ------------------------------------------------------------------------- nothing mixes devices


@pytest.mark.usefixtures("kernels_seen")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("volume_norm", VOLUME_NORMS)
def test_a_training_step(volume_norm, save_memory, precision):
    model = fake_model(volume_norm=volume_norm, save_memory=save_memory).compute_networks_in(precision)
    take_step(model)


@pytest.mark.usefixtures("kernels_seen")
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, template, contrast):
    take_step(fake_model(contrast=contrast), loss, template)


@pytest.mark.usefixtures("kernels_seen")
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder(training):
    model = fake_model(encoder="resnet18", image_size=(64, 64)).train(training)
    features = model.encode(normalize(fake_images(model)))
    assert (features.device.type, features.shape) == ("cuda", (2, 64, 16, 16))


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("changes", [{}, {"num_template": 5, "num_typical": 3, "smooth": 1.0}])
def test_maps_of_one_template_and_of_a_bank(kernels_seen, changes, contrast):
    model = fake_model(contrast=contrast)
    sigma = tuple(torch.empty(4, device="cuda") for _ in range(3)) if changes else None
    maps, scores = fake_scorer(model, **changes, sigma=sigma).score(fake_images(model, 3))
    assert (maps.device.type, scores.device.type) == ("cuda", "cuda")
    assert maps.shape[0] == len(scores) == 3
    assert "_cdist_forward" not in kernels_seen.counts  # on CUDA a block of threads for each number


@pytest.mark.usefixtures("kernels_seen")
def test_the_image_of_a_template():
    image = fake_scorer(fake_model()).image_template()
    assert (image.device.type, image.shape) == ("cuda", (3, 32, 32))


@pytest.mark.usefixtures("kernels_seen")
@pytest.mark.parametrize("free", [0, 2**40])
def test_template_and_whitening_of_good_images(free, monkeypatch):
    monkeypatch.setattr(scorer, "free_memory", lambda device: free)
    model = fake_model().eval()
    latents = Latents(model, FakeImages(fake_images(model, 5)))
    statistics = Statistics.of(latents, bank=True)
    tensors = (*statistics.mean, *statistics.sigma, statistics.coarse, *latents.select([4, 0]))
    assert {x.device.type for x in tensors} == {"cuda"}


# ------------------------------------------------------------------------------- kernels, counted


def test_the_kernels_of_a_score(kernels_seen):
    scorer = fake_scorer(fake_model(DEFAULT_MODELS["fnf"]))
    scorer.score(fake_images(scorer.model))  # the matrices of the blur are made once
    kernels_seen.counts.clear()
    scorer.score(fake_images(scorer.model))
    assert kernels_seen.total <= MOST_SCORING, kernels_seen.counts


@pytest.mark.parametrize("save_memory", [True, False])
def test_the_kernels_of_a_training_step(kernels_seen, save_memory):
    """Forward pass and loss; backward pass, clipping and optimizer."""
    model = fake_model(DEFAULT_MODELS["fnf"], save_memory=save_memory).train()
    images, parameters = fake_images(model), list(model.flow.parameters())
    training_loss(model, *model(normalize(images)))  # the matrices of the blur are made once
    kernels_seen.counts.clear()
    loss = training_loss(model, *model(normalize(images)))
    forward = kernels_seen.total
    assert forward <= MOST_FORWARD, kernels_seen.counts
    torch.autograd.grad(loss, parameters)
    assert kernels_seen.total - forward <= MOST_BACKWARD[save_memory], kernels_seen.counts


def test_the_kernels_of_clipping_and_optimizer_do_not_grow_with_the_parameters(kernels_seen):
    model = fake_model(DEFAULT_MODELS["fnf"])
    parameters = list(model.flow.parameters())
    optimizer = train.make_optimizer(model, train.parse_arguments([]))
    for _ in range(2):  # the first makes the optimizer's state
        for p in parameters:
            p.grad = torch.empty_like(p)
        kernels_seen.counts.clear()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
    assert kernels_seen.total < 20, kernels_seen.counts
