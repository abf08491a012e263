"""autoFlow: normalizing flows whose training memory does not grow with depth, in one file.

A chain of invertible modules needs no stored activations: on the way back each block's input is
rebuilt from its output.  `SequentialNF` does that under ordinary autograd, tracks the Jacobian's
log-determinant where it is asked for, and leaves everything else to PyTorch.  Needs torch only.

A RealNVP fitted to points along a noisy sine, whose best possible mean log-likelihood is -1.63:

>>> import torch
>>> from torch import nn
>>> from autoFlow import CouplingModule, SequentialNF
>>> class AffineCoupling(CouplingModule):
...     def __init__(self, target):
...         super().__init__(target)
...         self.network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
...     def transform_parameters(self, inputs):  # inputs[self.target] is None here
...         log_scale, shift = self.network(inputs[1 - self.target]).chunk(2, dim=1)
...         return log_scale.tanh(), shift
...     def couple(self, x, log_scale, shift):
...         return x * log_scale.exp() + shift
...     def decouple(self, y, log_scale, shift):
...         return (y - shift) * (-log_scale).exp()
...     def log_det(self, log_scale, shift):
...         return log_scale
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(1000, 1)
>>> data = (x, torch.sin(2 * x) + 0.3 * torch.randn(1000, 1))
>>> flow = SequentialNF(*[AffineCoupling(i % 2) for i in range(4)])
>>> def log_likelihood():
...     z, log_dets = flow(data, logdets=(torch.zeros_like(x), torch.zeros_like(x)))
...     normal = torch.distributions.Normal(0.0, 1.0)
...     return sum(normal.log_prob(z_i) + d_i for z_i, d_i in zip(z, log_dets)).mean()
>>> optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
>>> for step in range(200):
...     loss = -log_likelihood()
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
>>> -1.70 < log_likelihood().item() < -1.58
True
>>> z, _ = flow(data)
>>> rebuilt, _ = flow.inverse(z)
>>> torch.allclose(rebuilt[1], data[1], atol=1e-4)
True

Reference: PyramidFlow (Lei et al., CVPR 2023), section "Implementation"; Gomez et al., The Reversible
Residual Network, NeurIPS 2017, for backpropagation by inversion.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = [
    "CouplingModule",
    "InvertibleModule",
    "ReconstructionError",
    "SequentialNF",
    "SequentialNet",
    "reconstruction_errors",
]

Tensors = tuple[Tensor, ...]
LogDets = Tensors | None
Around = Callable[[Sequence["InvertibleModule"], bool], AbstractContextManager]
NOTHING = contextlib.nullcontext()


# ------------------------------------------------------------------------------------ modules


class InvertibleModule(nn.Module, ABC):
    """A bijection between tuples of tensors.  This is the whole contract:

    - `forward(inputs, logdets)` and `inverse(outputs, logdets)` undo each other, in training mode
      and in eval mode alike, as long as parameters and random state are the same.  States keep
      their dtype (float32 under autocast too) and are never changed in place.
    - `logdets` is None, and then None comes back and nothing is computed for it; or a tuple of
      tensors, of shapes the modules of one chain agree on.  `forward` **adds** log|det dy/dx| to
      them, `inverse` **subtracts** it.  A module neither reads nor scales what is there.
    - State: parameters; buffers that `forward`, but not `inverse`, may update while training
      (running statistics); random numbers.  When a chain computes a module again for the backward
      pass, it shows it the same random numbers and copies of its buffers, so that statistics
      change once per step.
    - A tensor that a module leaves alone is returned as the same object: a chain then knows that
      it depends on nothing this module learns.
    """

    @abstractmethod
    def forward(self, inputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        """Return (outputs, logdets + log|det d outputs / d inputs|)."""

    @abstractmethod
    def inverse(self, outputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        """Return (inputs, logdets - log|det d outputs / d inputs|)."""

    def undo_and_recompute(
        self, results: Tensors, logdets: LogDets, reverse: bool, needs_grad: Sequence[bool]
    ) -> tuple[Tensors, Tensors, LogDets]:
        """Rebuild what led to `results`, and compute `results` from it again with a graph.

        Override it where undoing and recomputing share work, as `CouplingModule` does: the
        backward pass then runs the module's network once instead of twice.

        Args:
            results: outputs of `forward`, or of `inverse` if `reverse`; without a graph.
            logdets: passed to the recomputation.
            reverse: which direction gave the results.
            needs_grad: for each argument, whether its gradient is wanted.

        Returns:
            (arguments, results, logdets): the arguments as leaves with `requires_grad` as asked,
            the results and log-dets as a graph over them and the parameters.
        """
        device = results[0].device
        random_state = _random_state(device)
        with torch.no_grad():
            rebuilt, _ = _apply(self, results, None, not reverse)
        arguments = tuple(_leaf(x, need) for x, need in zip(rebuilt, needs_grad, strict=True))
        _set_random_state(random_state, device)
        with torch.enable_grad():
            results, logdets = _apply(self, arguments, logdets, reverse)
        return arguments, results, logdets


class CouplingModule(InvertibleModule):
    """One tensor of the tuple is transformed with parameters computed from the others.

    y[target] = couple(x[target], *transform_parameters(x without target)), y[other] = x[other].

    Subclasses give four short methods; direction, log-dets, autocast and the fused backward step are
    done here.  A training step costs four units of network work in a `SequentialNF` (forward 1,
    recompute 1, backward 2): the parameters that undo the block are those its gradient needs.

    Args:
        target: index of the tensor that is transformed.

    Attributes:
        cast_parameters: cast what `transform_parameters` returns to the target's dtype, so that states
            keep theirs under autocast.  False leaves that to `couple`, `decouple` and `log_det`.
    """

    cast_parameters = True

    def __init__(self, target: int):
        super().__init__()
        self.target = target

    @abstractmethod
    def transform_parameters(self, inputs: tuple[Tensor | None, ...]) -> Tensors:
        """Parameters of the transform from all tensors but the target, which is None in `inputs`.

        The only part that runs under the caller's autocast.
        """

    @abstractmethod
    def couple(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Transform x = inputs[target]; bijective in x."""

    @abstractmethod
    def decouple(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """Undo `couple`."""

    @abstractmethod
    def log_det(self, *parameters: Tensor) -> Tensor:
        """What is added to logdets[target]; broadcasts to the shape of that."""

    def forward(self, inputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        return self._transform(inputs, logdets, self._parameters_of(inputs), reverse=False)

    def inverse(self, outputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        with _stand_in_buffers(self):
            parameters = self._parameters_of(outputs)
        return self._transform(outputs, logdets, parameters, reverse=True)

    def undo_and_recompute(self, results, logdets, reverse, needs_grad):
        leaves = list(map(_leaf, results, needs_grad))
        with torch.enable_grad():
            parameters = self._parameters_of(leaves)
        with torch.no_grad():
            rebuilt, _ = self._transform(results, None, parameters, not reverse)
        leaves[self.target] = _leaf(rebuilt[self.target], needs_grad[self.target])
        with torch.enable_grad():
            results, logdets = self._transform(leaves, logdets, parameters, reverse)
        return tuple(leaves), results, logdets

    def _parameters_of(self, tensors: Sequence[Tensor]) -> Tensors:
        others = tuple(None if i == self.target else x for i, x in enumerate(tensors))
        dtype = tensors[self.target].dtype
        parameters = self.transform_parameters(others)
        if isinstance(parameters, Tensor):
            raise TypeError(f"{type(self).__name__}.transform_parameters must return a tuple of tensors")
        if not self.cast_parameters:
            return tuple(parameters)
        return tuple(parameter.to(dtype) for parameter in parameters)

    def _transform(self, tensors, logdets, parameters, reverse):
        target = self.target
        transform = self.decouple if reverse else self.couple
        tensors = list(tensors)
        with torch.autocast(tensors[target].device.type, enabled=False):
            tensors[target] = transform(tensors[target], *parameters)
            if logdets is not None:
                term = self.log_det(*parameters)
                logdets = list(logdets)
                logdets[target] = logdets[target] - term if reverse else logdets[target] + term
        return tuple(tensors), None if logdets is None else tuple(logdets)


# ------------------------------------------------------------------------------------- chains


class _Chain(InvertibleModule):
    """Modules one after the other; `chain[i]`, `len(chain)` and iteration as in nn.Sequential.

    Args:
        modules: the blocks, in forward order.
        around: gives a context, of the modules and of whether they are inverted, in which each pass over them
            runs: what they have in common can be computed there at once.  A backward pass that rebuilds the
            inputs inverts what it went through.
    """

    def __init__(self, *modules: InvertibleModule, around: Around = lambda modules, reverse: NOTHING):
        super().__init__()
        self._around = around
        for i, module in enumerate(modules):
            if not isinstance(module, InvertibleModule):
                raise TypeError(f"module {i} is a {type(module).__name__}, not an InvertibleModule")
            self.add_module(str(i), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> InvertibleModule:
        return list(self._modules.values())[operator.index(index)]

    def __iter__(self) -> Iterator[InvertibleModule]:
        return iter(self._modules.values())

    def _in_order(self, reverse: bool) -> list[tuple[str, InvertibleModule]]:
        modules = list(self._modules.items())  # named_children() would skip repetitions
        return modules[::-1] if reverse else modules

    def _run_plainly(self, values: Tensors, logdets: LogDets, reverse: bool):
        with self._around(list(self), reverse):
            return _run(self._in_order(reverse), tuple(values), logdets, reverse)


class SequentialNet(_Chain):
    """The chain under plain autograd: every activation is stored.  For comparison, for second-order
    gradients, and where memory does not matter."""

    def forward(self, inputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        return self._run_plainly(inputs, logdets, reverse=False)

    def inverse(self, outputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        return self._run_plainly(outputs, logdets, reverse=True)


class SequentialNF(_Chain):
    """The chain with memory-saving backpropagation: of all activations only the last output is kept.

    Gradients are those of `SequentialNet` up to rounding (see `reconstruction_errors`) for every
    input and every parameter that requires a gradient when the chain is called.  Both directions
    save memory.  Without gradients (`torch.no_grad`) it is a plain loop.

    Args:
        modules, around: as of every chain.
        preserve_rng_state: show each block the same random numbers again in the backward pass.
            Without random modules False saves a little time.

    Raises:
        RuntimeError: in the backward pass with `create_graph=True`; second-order gradients need
            `SequentialNet`.
            And where parameters, or a block's mode, changed between forward and backward pass: the
            blocks could not be undone.
        TypeError: a module changed the dtype of the states.
    """

    def __init__(self, *modules: InvertibleModule, preserve_rng_state: bool = True, **options):
        super().__init__(*modules, **options)
        self.preserve_rng_state = preserve_rng_state

    def forward(self, inputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        return self._run_saving_memory(inputs, logdets, reverse=False)

    def inverse(self, outputs: Tensors, logdets: LogDets = None) -> tuple[Tensors, LogDets]:
        return self._run_saving_memory(outputs, logdets, reverse=True)

    def _run_saving_memory(self, values, logdets, reverse):
        if not torch.is_grad_enabled():
            return self._run_plainly(values, logdets, reverse)
        num_logdets = None if logdets is None else len(logdets)
        order, around = self._in_order(reverse), functools.partial(self._around, list(self))
        call = _Call(order, around, reverse, len(values), num_logdets, self.preserve_rng_state)
        parameters = [p for p in self.parameters() if p.requires_grad]
        results = _BackpropagationByInversion.apply(call, *values, *(logdets or ()), *parameters)
        outputs, logdets = results[: call.num_outputs], results[call.num_outputs :]
        return outputs, None if num_logdets is None else logdets


@dataclass
class _Call:
    """What one call of a SequentialNF remembers beside its output: nothing as large as a state."""

    order: list[tuple[str, InvertibleModule]]
    around: Callable[[bool], AbstractContextManager]
    reverse: bool
    num_inputs: int
    num_logdets: int | None
    preserve_rng_state: bool
    num_outputs: int = 0
    needs_grad: list[list[bool]] = field(default_factory=list)  # of each block's arguments
    random_states: list[list[Tensor]] = field(default_factory=list)
    logdet_shapes: list[torch.Size] = field(default_factory=list)
    parameter_ids: list[int] = field(default_factory=list)
    fingerprints: list[list] = field(default_factory=list)
    autocast: dict = field(default_factory=dict)


class _BackpropagationByInversion(torch.autograd.Function):
    """All blocks as one node of the autograd graph, so gradients reach parameters the ordinary way
    (accumulation, `torch.autograd.grad`, DistributedDataParallel)."""

    boxed_grads_call = True  # `backward` may let go of a gradient; torch that does not know it keeps all

    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor) -> Tensors:
        values, rest = tensors[: call.num_inputs], tensors[call.num_inputs :]
        logdets, parameters = rest[: call.num_logdets or 0], rest[call.num_logdets or 0 :]
        logdets = None if call.num_logdets is None else logdets
        device = values[0].device
        call.autocast = _autocast_settings(device)
        call.parameter_ids = [id(p) for p in parameters]
        needs_grad = [x.requires_grad for x in values]
        wanted = set(call.parameter_ids)
        with torch.autocast(**call.autocast), call.around(call.reverse):
            for name, module in call.order:
                call.needs_grad.append(needs_grad)
                if call.preserve_rng_state:
                    call.random_states.append(_random_state(device))
                arguments = values
                values, logdets = _run([(name, module)], arguments, logdets, call.reverse)
                needs_grad = _results_need_grad(module, arguments, values, needs_grad, wanted)
        call.fingerprints = [_fingerprint(module) for _, module in call.order]
        call.num_outputs = len(values)
        call.logdet_shapes = [x.shape for x in logdets or ()]
        ctx.call = call
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        return values + (logdets or ())

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("SequentialNF has no second-order gradients (create_graph=True): use SequentialNet")
        call, values = ctx.call, ctx.saved_tensors
        boxed = grads[0] if isinstance(grads[0], list) else list(grads)
        value_grads, logdet_grads = boxed[: call.num_outputs], tuple(boxed[call.num_outputs :])
        # From here on the output and its gradient live no longer than the last block needs them.
        boxed.clear()
        if hasattr(ctx, "maybe_clear_saved_tensors"):  # which it does unless the graph is retained
            ctx.maybe_clear_saved_tensors()
        needed = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(call.parameter_ids) :]
        wanted = {i for i, need in zip(call.parameter_ids, needed, strict=True) if need}
        found: dict[int, Tensor] = {}
        device = values[0].device
        with (
            _random_state_kept(device, call.preserve_rng_state),
            torch.autocast(**call.autocast),
            call.around(not call.reverse),
        ):
            for i in reversed(range(len(call.order))):
                name, module = call.order[i]
                parameters = [p for p in module.parameters() if id(p) in wanted]
                if not parameters and not any(call.needs_grad[i]):
                    value_grads = [None] * call.num_inputs
                    break  # nothing from here back learns
                if _fingerprint(module) != call.fingerprints[i]:
                    raise RuntimeError(
                        f"block {name} ({type(module).__name__}) was changed between forward and backward "
                        "pass (parameters in place, or train()/eval()), so it cannot be undone"
                    )
                if call.preserve_rng_state:
                    _set_random_state(call.random_states[i], device)
                values, value_grads = _backpropagate_block(
                    module, call, i, values, value_grads, logdet_grads, parameters, found
                )
        input_grads = (None, *value_grads, *logdet_grads)
        return input_grads + tuple(found.get(i) for i in call.parameter_ids)


def _backpropagate_block(
    module: InvertibleModule,
    call: _Call,
    index: int,
    results: Tensors,
    result_grads: Sequence[Tensor | None],
    logdet_grads: Sequence[Tensor | None],
    parameters: list[nn.Parameter],
    found: dict[int, Tensor],
) -> tuple[Tensors, list[Tensor | None]]:
    """One block backwards: (arguments, their gradients); adds the parameters' gradients to `found`."""
    needs_grad = call.needs_grad[index]
    zeros = None
    if any(grad is not None for grad in logdet_grads):
        zero = results[0].new_zeros(())
        zeros = tuple(zero.expand(shape) for shape in call.logdet_shapes)
    with _stand_in_buffers(module), _gradient_hooks_suspended(parameters):
        arguments, recomputed, terms = module.undo_and_recompute(results, zeros, call.reverse, needs_grad)
        targets = [x for x, need in zip(arguments, needs_grad, strict=True) if need] + parameters
        pairs = list(zip(recomputed, result_grads, strict=True))
        if terms is not None:
            pairs += zip(terms, logdet_grads, strict=True)
        pairs = [(x, grad) for x, grad in pairs if grad is not None and x.requires_grad]
        if pairs and targets:
            outputs, grads = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, targets, grads, allow_unused=True)
        else:
            grads = [None] * len(targets)
    grads = iter(grads)
    argument_grads = [next(grads) if need else None for need in needs_grad]
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            key = id(parameter)
            found[key] = found[key] + grad if key in found else grad
    return tuple(x.detach() for x in arguments), argument_grads


# ------------------------------------------------------------------------------------ helpers


def _apply(module: InvertibleModule, values: Tensors, logdets: LogDets, reverse: bool):
    return module.inverse(values, logdets) if reverse else module(values, logdets)


def _run(order, values: Tensors, logdets: LogDets, reverse: bool) -> tuple[Tensors, LogDets]:
    for name, module in order:
        dtypes = {x.dtype for x in values}
        values, logdets = _apply(module, values, logdets, reverse)
        if not {x.dtype for x in values} <= dtypes:
            raise TypeError(
                f"block {name} ({type(module).__name__}) turned {dtypes} states into "
                f"{ {x.dtype for x in values} }; cast its network's output back (under autocast too)"
            )
    return values, logdets


def _fingerprint(module: nn.Module) -> list:
    """What undoing relies on: the mode, the versions of parameters, and of buffers that eval mode reads."""
    return [
        (
            m.training,
            [p._version for p in m._parameters.values() if p is not None],
            [b._version for b in m._buffers.values() if b is not None and not m.training],
        )
        for m in module.modules()
    ]


def _results_need_grad(module, arguments, results, needs_grad, wanted) -> list[bool]:
    """Which results depend on something that requires a gradient; untouched tensors are seen as such."""
    passed = {id(x): need for x, need in zip(arguments, needs_grad, strict=True)}
    touched = any(needs_grad) or any(id(p) in wanted for p in module.parameters())
    return [passed.get(id(x), touched) for x in results]


def _leaf(x: Tensor, needs_grad: bool) -> Tensor:
    return x.detach().requires_grad_(needs_grad)


@contextlib.contextmanager
def _stand_in_buffers(module: nn.Module):
    """Let `module` read and update copies of its buffers; its own stay as they are.

    Copies, not save-and-restore: writing a buffer back would invalidate graphs that hold it.
    """
    own = [(m, k, b) for m in module.modules() for k, b in m._buffers.items() if b is not None]
    for owner, key, buffer in own:
        owner._buffers[key] = buffer.clone()
    try:
        yield
    finally:
        for owner, key, buffer in own:
            owner._buffers[key] = buffer


@contextlib.contextmanager
def _gradient_hooks_suspended(parameters: list[nn.Parameter]):
    """Tensor hooks run when the chain's gradient leaves it, not for each block's share as well."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hook in hooks:
            parameter._backward_hooks = hook


def _autocast_settings(device: torch.device) -> dict:
    # No cache: casts made without a graph must not be served to the recomputation, which needs one.
    return {
        "device_type": device.type,
        "enabled": torch.is_autocast_enabled(device.type),
        "dtype": torch.get_autocast_dtype(device.type),
        "cache_enabled": False,
    }


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextlib.contextmanager
def _random_state_kept(device: torch.device, enabled: bool):
    states = _random_state(device) if enabled else None
    try:
        yield
    finally:
        if enabled:
            _set_random_state(states, device)


# ---------------------------------------------------------------------------------- debugging


@dataclass
class ReconstructionError:
    """How well one block's input is rebuilt from its output: max |rebuilt - x| / max |x|.

    Attributes:
        name: the block's name in the chain.
        float32, float64: the block alone, rebuilt from its true output in that precision.
        accumulated: in float32, from the chain's last output back to here: what gradients see.
    """

    name: str
    float32: float
    float64: float
    accumulated: float


@torch.no_grad()
def reconstruction_errors(
    chain: SequentialNF | SequentialNet, inputs: Tensors, bound: float = 1e-3
) -> list[ReconstructionError]:
    """Measure what `SequentialNF` relies on: that inverting the blocks gives their inputs back.

    The error is rounding times the block's condition: it grows with the spread of the scales
    (exp(s) near 0 multiplies the error of the shift on the way back), with the condition number of
    the linear maps, with the size of shifts compared to states, and adds up over blocks.  A float64
    error that is large too means that `inverse` is wrong.  Remedies: clamp the scales, keep linear
    maps near orthogonal, use float64, or `SequentialNet`.

    Args:
        chain: any chain; it is left as it is, statistics and random state included.
        inputs: its inputs, of representative size.
        bound: a warning names each block whose float32 or accumulated error is above.

    Returns:
        One `ReconstructionError` per block, in forward order.
    """
    with _random_state_kept(inputs[0].device, enabled=True):
        alone32, accumulated = _block_errors(chain, inputs, torch.float32)
        alone64, _ = _block_errors(chain, inputs, torch.float64)
    names = list(chain._modules)
    errors = [ReconstructionError(*row) for row in zip(names, alone32, alone64, accumulated, strict=True)]
    for error in errors:
        worst = max(error.float32, error.accumulated)
        if not worst <= bound:  # a NaN is above every bound
            warnings.warn(
                f"block {error.name} ({type(chain.get_submodule(error.name)).__name__}) is rebuilt "
                f"with relative error {worst:.1e} (float64: {error.float64:.1e}), bound {bound:.1e}",
                stacklevel=3,  # past torch.no_grad, to the caller
            )
    return errors


def _block_errors(chain, inputs, dtype) -> tuple[list[float], list[float]]:
    """Per block: the error of its own inverse, and that of the inverse from the chain's end."""
    blocks = [copy.deepcopy(block).to(dtype) for block in chain]
    states = [tuple(x.detach().to(dtype) for x in inputs)]
    random_states = []
    device = inputs[0].device
    for block in blocks:
        random_states.append(_random_state(device))
        states.append(block(states[-1])[0])
    alone, accumulated, rebuilt = [], [], states[-1]
    for i in reversed(range(len(blocks))):
        own = []
        for results in (states[i + 1], rebuilt):
            _set_random_state(random_states[i], device)
            own.append(blocks[i].inverse(results)[0])
        alone.append(_relative_error(own[0], states[i]))
        accumulated.append(_relative_error(own[1], states[i]))
        rebuilt = own[1]
    return alone[::-1], accumulated[::-1]


def _relative_error(rebuilt: Tensors, true: Tensors) -> float:
    tiny = torch.finfo(true[0].dtype).tiny
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(tiny) for a, b in zip(rebuilt, true, strict=True)]
    return float(torch.stack(errors).max())
