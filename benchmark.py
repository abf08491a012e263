"""Measure what the README claims, on this machine.

    python benchmark.py memory      # Fig. 5: activation memory over depth, three ways of backpropagation
    python benchmark.py autoflow    # one chain of coupling blocks on autoFlow, checkpoint, memcnn, FrEIA
    python benchmark.py autoflow --model res18 --repeats 3

Tables are printed and written to --out with hardware, versions and date.  Peers: pip install -r
requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.utils.checkpoint
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autoFlow import CouplingModule, SequentialNet, SequentialNF
from hardware import choose_device, describe_environment
from model import PyramidFlow, PyramidFlowConfig, pair_loss
from util import (
    InputError,
    Parser,
    atomic_path,
    run_script,
    whole_number,
)

MIB = 2**20
CHAINS = ("SequentialNF", "SequentialNet", "checkpoint")
# Paper, Fig. 5: GB while training by number of half-stacks, with autoFlow and with autograd.
PAPER_FIG5 = {2: (2.65, 2.63), 4: (2.69, 2.91), 8: (2.76, 3.51), 16: (2.90, 4.69), 32: (3.17, 7.03)}
FIG5_CONFIG = PyramidFlowConfig(encoder="none", num_level=8, num_channel=24, image_size=(256, 256))
DEFAULT_MODELS = {
    "fnf": PyramidFlowConfig(encoder="none", image_size=(256, 256)),
    "res18": PyramidFlowConfig(encoder="resnet18", image_size=(1024, 1024)),
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("memory", "autoflow"))
    parser.add_argument("--gpu", default="0", help="index of the CUDA device, or cpu [0]")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="folder [docs/benchmarks]"
    )
    parser.add_argument(
        "--repeats", type=whole_number(1), default=7, help="interleaved repetitions of a timing [7]"
    )
    parser.add_argument(
        "--maxStacks", type=whole_number(1), default=16, help="memory: deepest model [16]"
    )
    parser.add_argument(
        "--model", choices=sorted(DEFAULT_MODELS), default="fnf", help="autoflow: default model"
    )
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one measurement, in its own process
    arguments = parser.parse_args()
    device = choose_device(arguments.gpu)
    if arguments.case:
        chain, stacks = arguments.case
        print(json.dumps(asdict(measure_memory(chain, int(stacks), device))))
    elif arguments.what == "memory":
        benchmark_memory(arguments, device)
    else:
        benchmark_autoflow(arguments, device)


def report(arguments: argparse.Namespace, name: str, device: torch.device, body: str) -> Path:
    """Print a table under hardware, versions and date, and write it to <out>/<name>-<device>.md."""
    command = f"python benchmark.py {' '.join(sys.argv[1:])}"
    head = [f"`{command}`, {date.today()}", *describe_environment(device)]
    text = "\n".join(f"- {line}" for line in head) + "\n\n" + body + "\n"
    print("\n" + text)
    path = arguments.out / f"{name}-{device.type}.md"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise InputError(
            f"cannot write to --out {arguments.out} ({error.strerror}); name another"
        ) from None
    print(f"written to {path}")
    return path


# ------------------------------------------------------------------------------------- memory


@dataclass
class Memory:
    """MiB of one training step.

    Attributes:
        activations: peak of all tensors that live at once, without weights and their gradients.
        saved: what autograd stores between forward and backward pass.
        resident: growth of the process's peak resident size; 0 on CUDA.
    """

    activations: float
    saved: float
    resident: float


def benchmark_memory(arguments: argparse.Namespace, device: torch.device) -> None:
    rows: dict[int, dict[str, Memory]] = {}
    stacks = 1
    while stacks <= arguments.maxStacks:
        rows[stacks] = {chain: measure_in_own_process(chain, stacks, arguments.gpu) for chain in CHAINS}
        print(f"{stacks} stacks measured", file=sys.stderr, flush=True)
        stacks *= 2
    path = report(arguments, "memory", device, memory_table(rows))
    save_memory_picture(path.with_suffix(".png"), rows)


def measure_in_own_process(chain: str, stacks: int, gpu: str) -> Memory:
    """So that one case's peak does not hide another's."""
    command = [sys.executable, __file__, "memory", "--gpu", gpu, "--case", chain, str(stacks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{chain} with {stacks} stacks failed ({reason}); lower --maxStacks")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measure_memory(chain: str, stacks: int, device: torch.device) -> Memory:
    """One training step of Fig. 5's model, after one that warms up."""
    torch.manual_seed(0)
    config = PyramidFlowConfig(**{**FIG5_CONFIG.to_dict(), "num_stack": stacks})
    model = PyramidFlow(config).to(device).train()
    if chain != "SequentialNF":
        model.flow = {"SequentialNet": SequentialNet, "checkpoint": CheckpointedNet}[chain](*model.flow)
    images = torch.randn(2, 3, *config.image_size, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        pair_loss(model.pyramid, model(images)[0]).backward()

    before = _peak_resident()
    step()
    resident = _peak_resident() - before - sum(p.grad.nbytes for p in model.flow.parameters())
    saved = saved_bytes(model, images)
    if device.type == "cuda":
        activations = _cuda_peak(step, device)
        resident = 0
    else:
        model.zero_grad(set_to_none=True)
        with AllocationRecorder() as recorder:
            step()
        activations = recorder.peak(without=[p.grad for p in model.flow.parameters()])
    return Memory(activations / MIB, saved / MIB, resident / MIB)


def _cuda_peak(step: Callable[[], None], device: torch.device) -> int:
    """Peak above what lived before, which the last step's gradients belong to."""
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - start


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saved_bytes(model: PyramidFlow, images: Tensor) -> int:
    """Storage that autograd packs in the forward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = model(images)
    assert results[0][0].requires_grad
    return sum(sizes.values())


class AllocationRecorder(TorchDispatchMode):
    """Counts the storage that operators return, from its creation to its release."""

    def __enter__(self):
        self._events: list[tuple[int, int]] = []  # (storage number, +bytes or -bytes)
        self._numbers: dict[int, int] = {}  # address of a living storage -> its number
        self._count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_iter(results):
            if isinstance(x, Tensor):
                self._track(x.untyped_storage(), known)
        return results

    def _track(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self._numbers or key in known:
            return
        number, size = self._count, storage.nbytes()
        self._count += 1
        self._numbers[key] = number
        self._events.append((number, size))

        def release() -> None:
            self._numbers.pop(key, None)
            self._events.append((number, -size))

        weakref.finalize(storage, release)

    def peak(self, without: list[Tensor]) -> int:
        """Most bytes alive at once, leaving out the storages of the given tensors."""
        excluded = {self._numbers.get(x.untyped_storage()._cdata) for x in without}
        level = highest = 0
        for number, change in self._events:
            if number not in excluded:
                level += change
                highest = max(highest, level)
        return highest


class CheckpointedNet(SequentialNet):
    """Every block under torch.utils.checkpoint: its input is kept, its inside recomputed."""

    def forward(self, inputs, logdets=None):
        for block in self:
            inputs, logdets = torch.utils.checkpoint.checkpoint(
                block, inputs, logdets, use_reentrant=False
            )
        return inputs, logdets


def memory_table(rows: dict[int, dict[str, Memory]]) -> str:
    lines = [
        "Training step of PyramidFlow with 8 levels, 24 channels, 256x256, batch 2, float32 (Fig. 5).",
        "MiB: peak of all living tensors without weights and weight gradients / stored by autograd in the forward",
        "pass / growth of the process. Paper: GB of the whole process on its GPU, autoFlow / autograd.",
        "",
        "| stacks | " + " | ".join(CHAINS) + " | paper |",
        "|---|" + "---|" * (len(CHAINS) + 1),
    ]
    for stacks, row in rows.items():
        cells = [f"{m.activations:.0f} / {m.saved:.0f} / {m.resident:.0f}" for m in row.values()]
        paper = " / ".join(f"{x:.2f}" for x in PAPER_FIG5.get(2 * stacks, ()))
        lines.append(f"| {stacks} | {' | '.join(cells)} | {paper} |")
    if {2, 16} <= rows.keys():
        ratio = rows[16]["SequentialNF"].activations / rows[2]["SequentialNF"].activations
        lines += ["", f"SequentialNF, activations at 16 stacks / at 2 stacks: {ratio:.3f} (bar: 1.05)"]
    return "\n".join(lines)


def save_memory_picture(path: Path, rows: dict[int, dict[str, Memory]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for chain in CHAINS:
        axes.plot(
            list(rows), [row[chain].activations / 1024 for row in rows.values()], marker="o", label=chain
        )
    axes.set(
        xlabel="stacks",
        ylabel="activation memory (GiB)",
        title="training step, L=8, C=24, 256x256, batch 2",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), list(map(str, rows)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"written to {path}")


# ----------------------------------------------------------------------------------- autoflow

CHANNELS, DEPTH, SIDE, BATCH = 64, 8, 128, 2


def benchmark_autoflow(arguments: argparse.Namespace, device: torch.device) -> None:
    body = [peer_table(arguments.repeats, device), "", default_model_ratio(arguments, device)]
    report(arguments, f"autoflow-{arguments.model}", device, "\n".join(body))


def coupling_network() -> nn.Sequential:
    half = CHANNELS // 2
    return nn.Sequential(
        nn.Conv2d(half, CHANNELS, 3, padding=1),
        nn.LeakyReLU(0.01),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    )


class Coupling(CouplingModule):
    """Affine coupling of two halves of 32 channels."""

    def __init__(self, target: int, network: nn.Module):
        super().__init__(target)
        self.network = network

    def transform_parameters(self, inputs):
        log_scale, shift = self.network(inputs[1 - self.target]).chunk(2, dim=1)
        return 0.5 * log_scale.tanh(), shift

    def couple(self, x, log_scale, shift):
        return x * log_scale.exp() + shift

    def decouple(self, y, log_scale, shift):
        return (y - shift) * (-log_scale).exp()

    def log_det(self, log_scale, shift):
        return log_scale


class CatCoupling(nn.Module):
    """The same map on one tensor of 64 channels, which the peers want; the halves swap places."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        log_scale, shift = self.parameters_of(a)
        return torch.cat([b * log_scale.exp() + shift, a], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, dim=1)
        log_scale, shift = self.parameters_of(a)
        return torch.cat([a, (b - shift) * (-log_scale).exp()], dim=1)

    def parameters_of(self, a: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.network(a).chunk(2, dim=1)
        return 0.5 * log_scale.tanh(), shift


def build_peer(name: str, networks: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Image (B,64,H,W) -> output of the chain, as the named library runs it.

    Raises:
        Exception: whatever the library raises when it is imported or set up.
    """
    if name in ("SequentialNF", "SequentialNet", "checkpoint"):
        kind = {
            "SequentialNF": SequentialNF,
            "SequentialNet": SequentialNet,
            "checkpoint": CheckpointedNet,
        }
        chain = kind[name](*[Coupling((i + 1) % 2, net) for i, net in enumerate(networks)])
        return lambda x: torch.cat(chain(x.chunk(2, dim=1))[0], dim=1)
    if name == "memcnn":
        import memcnn

        wrapped = [
            memcnn.InvertibleModuleWrapper(CatCoupling(net), keep_input=False) for net in networks
        ]
        chain = nn.Sequential(*wrapped)
        return lambda x: chain(x.clone())  # it frees the tensor it is given
    import FrEIA.framework
    import FrEIA.modules

    class FreiaCoupling(FrEIA.modules.InvertibleModule):
        def __init__(self, dims_in, network):
            super().__init__(dims_in)
            self.coupling = CatCoupling(network)

        def forward(self, x, c=None, rev=False, jac=True):
            function = self.coupling.inverse if rev else self.coupling
            return (function(x[0]),), torch.zeros(len(x[0]))

        def output_dims(self, dims):
            return dims

    chain = FrEIA.framework.SequenceINN(CHANNELS, SIDE, SIDE)
    for net in networks:
        chain.append(FreiaCoupling, network=net)
    return lambda x: chain(x, jac=False)[0]


PEERS = ("SequentialNF", "SequentialNet", "checkpoint", "memcnn", "FrEIA")
PEER_ABILITIES = {
    "SequentialNF": "memory saving, log-det",
    "SequentialNet": "log-det",
    "checkpoint": "saves part",
    "memcnn": "memory saving",
    "FrEIA": "log-det",
}


def peer_table(repeats: int, device: torch.device) -> str:
    """Step time and memory of one chain of coupling blocks on each library, same weights."""
    torch.manual_seed(0)
    networks = nn.ModuleList(coupling_network() for _ in range(DEPTH)).to(device)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, device=device, requires_grad=True)
    steps, failed, gradients = {}, {}, {}
    for name in PEERS:
        try:
            run = build_peer(name, list(networks))
            steps[name] = _training_step(run, networks, x)
            steps[name]()
            gradients[name] = torch.cat([p.grad.flatten() for p in networks.parameters()])
        except Exception as error:  # a peer may fail in any way; its row says how
            steps.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    memory = {name: step_memory(step, networks, device) for name, step in steps.items()}
    times = interleaved_times(steps, repeats, device)
    lines = [
        f"One chain of {DEPTH} affine coupling blocks, {CHANNELS} channels, {SIDE}x{SIDE}, batch {BATCH},",
        f"float32, same weights. Median of {repeats} interleaved steps; ratios are medians of paired ratios to",
        "SequentialNet. Memory: peak of living tensors in a step without weights and their gradients. Difference:",
        "of weight gradients, largest, relative to the largest gradient.",
        "",
        "| library | offers | step (ms) | ratio | activations (MiB) | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name in PEERS:
        if name in failed:
            lines.append(f"| {name} | {PEER_ABILITIES[name]} | failed: {failed[name]} | | | |")
            continue
        ratio = _median_ratio(times[name], times["SequentialNet"])
        reference = gradients["SequentialNet"]
        difference = float((gradients[name] - reference).abs().max() / reference.abs().max())
        lines.append(
            f"| {name} | {PEER_ABILITIES[name]} | {1e3 * statistics.median(times[name]):.0f} | {ratio:.2f} | "
            f"{memory[name] / MIB:.0f} | {difference:.0e} |"
        )
    return "\n".join(lines)


def _training_step(
    run: Callable[[Tensor], Tensor], networks: nn.Module, x: Tensor
) -> Callable[[], None]:
    def step() -> None:
        networks.zero_grad(set_to_none=True)
        x.grad = None
        run(x).square().mean().backward()

    return step


def step_memory(step: Callable[[], None], networks: nn.Module, device: torch.device) -> int:
    """Bytes: peak of living tensors in a step, without weights and their gradients."""
    if device.type == "cuda":
        return _cuda_peak(step, device)
    networks.zero_grad(set_to_none=True)
    with AllocationRecorder() as recorder:
        step()
    return recorder.peak(without=[p.grad for p in networks.parameters()])


def interleaved_times(
    steps: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, one after the other in every round, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):  # the first warms up
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def default_model_ratio(arguments: argparse.Namespace, device: torch.device) -> str:
    """Training step of the default model with memory saving against without."""
    config = DEFAULT_MODELS[arguments.model]
    images = torch.randn(2, 3, *config.image_size, device=device)
    steps = {}
    for save_memory in (True, False):
        torch.manual_seed(0)
        model = PyramidFlow(PyramidFlowConfig(**{**config.to_dict(), "save_memory": save_memory}))
        model.to(device).train()

        def step(model=model) -> None:
            model.zero_grad(set_to_none=True)
            pair_loss(model.pyramid, model(images)[0]).backward()

        steps["SequentialNF" if save_memory else "SequentialNet"] = step
    times = interleaved_times(steps, arguments.repeats, device)
    ratio = _median_ratio(times["SequentialNF"], times["SequentialNet"])
    seconds = {name: statistics.median(t) for name, t in times.items()}
    return (
        f"Training step of the default model ({arguments.model}, {config.image_size[0]}x{config.image_size[1]}, "
        "batch 2): "
        f"SequentialNF {seconds['SequentialNF']:.3f} s, SequentialNet {seconds['SequentialNet']:.3f} s, "
        f"median of {arguments.repeats} paired ratios {ratio:.2f} (theory 1.33, bar 1.40)"
    )


if __name__ == "__main__":
    run_script(main)
