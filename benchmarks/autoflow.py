"""One chain of coupling blocks on autoFlow, torch.utils.checkpoint, memcnn and FrEIA: time and memory of a step.

    python -m benchmarks.autoflow      # peers: pip install -r requirements-bench.txt

The table goes to a new folder, to --out, or by --record over the one in benchmarks/records/.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from autoFlow import CouplingModule
from benchmarks import measuring
from benchmarks.measuring import BATCH, MIB
from util import apply_precision, markdown_table, run_script

CHANNELS, DEPTH, SIDE = 64, 8, 128
PEERS = {
    "SequentialNF": "memory saving, log-det",
    "SequentialNet": "log-det",
    "checkpoint": "saves part",
    "memcnn": "memory saving",
    "FrEIA": "log-det",
}


def main() -> None:
    args = measuring.make_parser(__doc__).parse_args()
    device = measuring.prepare(args)
    measuring.report(args.out, "autoflow", device, peer_table(args.repeats, device))


def peer_table(repeats: int, device: torch.device) -> str:
    """Step time and memory of one chain of coupling blocks on each library, same weights."""
    torch.manual_seed(0)
    apply_precision("fp32")
    networks = nn.ModuleList(coupling_network(CHANNELS) for _ in range(DEPTH)).to(device)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, device=device, requires_grad=True)
    steps, failed, gradients = {}, {}, {}
    for name in PEERS:
        try:
            step = training_step(build_chain(name, list(networks), x.shape[1:]), networks, x)
            step()
        except Exception as error:  # a peer may fail in any way; its row says how
            failed[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            continue
        steps[name] = step
        gradients[name] = torch.cat([p.grad.flatten() for p in networks.parameters()])
    memory = {name: measuring.step_memory(step, networks, device) for name, step in steps.items()}
    times, reference = measuring.interleaved_times(steps, repeats, device), gradients["SequentialNet"]
    rows = [[name, PEERS[name], failed.get(name, ""), "", "", ""] for name in PEERS]
    for row in rows:
        if (name := row[0]) in steps:
            ratio = measuring.median_ratio(times[name], times["SequentialNet"])
            difference = float((gradients[name] - reference).abs().max() / reference.abs().max())
            row[2:4] = f"{1e3 * median(times[name]):.4g}", f"{ratio:.2f}"
            row[4:6] = f"{memory[name] / MIB:.0f}", f"{difference:.0e}"
    header = ["library", "offers", "step (ms)", "ratio", "activations (MiB)", "difference"]
    return f"""\
One chain of {DEPTH} affine coupling blocks, {CHANNELS} channels, {SIDE}x{SIDE}, batch {BATCH},
float32, same weights. Median of {repeats} interleaved steps; ratios are medians of paired ratios to
SequentialNet. Memory: peak of living tensors in a step without weights and their gradients. Difference:
of weight gradients, largest, relative to the largest gradient.

{markdown_table(header, rows)}"""


def training_step(chain: Callable[[Tensor], Tensor], networks: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        networks.zero_grad(set_to_none=True)
        x.grad = None
        chain(x).square().mean().backward()

    return step


def build_chain(name: str, networks: list[nn.Module], size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Image (B,C,H,W) -> output of the chain, as the named library runs it.

    Args:
        size: (C,H,W).

    Raises:
        Exception: whatever the library raises when it is imported or set up.
    """
    if name in measuring.CHAINS:
        chain = measuring.CHAINS[name](*[Coupling((i + 1) % 2, net) for i, net in enumerate(networks)])
        return lambda x: torch.cat(chain(x.chunk(2, dim=1))[0], dim=1)
    if name == "memcnn":
        import memcnn

        blocks = [memcnn.InvertibleModuleWrapper(CatCoupling(n), keep_input=False) for n in networks]
        chain = nn.Sequential(*blocks)
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

    chain = FrEIA.framework.SequenceINN(*size)
    for network in networks:
        chain.append(FreiaCoupling, network=network)
    return lambda x: chain(x, jac=False)[0]


def coupling_network(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels // 2, channels, 3, padding=1),
        nn.LeakyReLU(0.01),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class Coupling(CouplingModule):
    """Affine coupling of two halves of the channels, (B,C/2,H,W) each."""

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
    """The same map on one tensor, which the peers want; the halves swap places."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.coupling = Coupling(1, network)

    def forward(self, x: Tensor) -> Tensor:
        (a, b), _ = self.coupling(x.chunk(2, dim=1))
        return torch.cat([b, a], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, dim=1)
        return torch.cat(self.coupling.inverse((a, b))[0], dim=1)


if __name__ == "__main__":
    run_script(main)
