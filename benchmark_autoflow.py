"""What autoFlow saves and costs: memory over depth (Fig. 5 of the paper), and one chain on other libraries."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint
from matplotlib.figure import Figure
from torch import Tensor, nn

from autoFlow import CouplingModule, SequentialNet, SequentialNF
from measuring import (
    MIB,
    interleaved_times,
    median_ratio,
    peak_resident,
    report,
    step_memory,
)
from model import PyramidFlow, PyramidFlowConfig, pair_loss
from util import InputError, atomic_path

CHAINS = ("SequentialNF", "SequentialNet", "checkpoint")
# Paper, Fig. 5: GB while training by number of half-stacks, with autoFlow and with autograd.
PAPER_FIG5 = {2: (2.65, 2.63), 4: (2.69, 2.91), 8: (2.76, 3.51), 16: (2.90, 4.69), 32: (3.17, 7.03)}
SCRIPT = Path(__file__).with_name("benchmark.py")
FIG5_CONFIG = PyramidFlowConfig(encoder="none", num_level=8, num_channel=24, image_size=(256, 256))


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
    path = report(arguments.out, "memory", device, memory_table(rows))
    save_memory_picture(path.with_suffix(".png"), rows)


def measure_in_own_process(chain: str, stacks: int, gpu: str) -> Memory:
    """So that one case's peak does not hide another's."""
    command = [sys.executable, str(SCRIPT), "memory", "--gpu", gpu, "--case", chain, str(stacks)]
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

    before = peak_resident()
    step()
    resident = peak_resident() - before - sum(p.grad.nbytes for p in model.flow.parameters())
    saved = saved_bytes(model, images)
    activations = step_memory(step, model.flow, device)
    if device.type == "cuda":
        resident = 0
    return Memory(activations / MIB, saved / MIB, resident / MIB)


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
    report(arguments.out, "autoflow", device, peer_table(arguments.repeats, device))


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
        ratio = median_ratio(times[name], times["SequentialNet"])
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
