"""Activation memory over depth, three ways of backpropagation (Fig. 5 of the paper).

    python -m benchmarks.memory --maxStacks 16

A table and a picture go to a new folder, to --out, or by --record over those in benchmarks/records/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import measuring
from benchmarks.measuring import BATCH, MIB
from model import PyramidFlow, PyramidFlowConfig, pair_loss
from util import InputError, apply_precision, atomic_path, choose_device, markdown_table, run_script, whole_number

FIG5_CONFIG = PyramidFlowConfig(encoder="none", num_level=8, num_channel=24, image_size=(256, 256))
# Paper, Fig. 5: GB while training by number of half-stacks, with autoFlow and with autograd.
PAPER_FIG5 = {2: (2.65, 2.63), 4: (2.69, 2.91), 8: (2.76, 3.51), 16: (2.90, 4.69), 32: (3.17, 7.03)}

Memory = tuple[float, float | None]  # MiB: peak of living activations, growth of the process, on the CPU


def main() -> None:
    parser = measuring.make_parser(__doc__)
    parser.add_argument("--maxStacks", type=whole_number(1), default=16, help="of the deepest model")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one measurement, in its own process
    args = parser.parse_args()
    if args.case:
        chain, stacks = args.case
        print(json.dumps(measure(chain, int(stacks), choose_device(args.gpu))))
        return
    device, rows, stacks = measuring.prepare(args), {}, 1
    while stacks <= args.maxStacks:
        if device.type == "cuda":  # whose peak is counted anew each time
            rows[stacks] = {chain: measure(chain, stacks, device) for chain in measuring.CHAINS}
        else:
            rows[stacks] = {chain: measure_in_own_process(chain, stacks, args.gpu) for chain in measuring.CHAINS}
        print(f"{stacks} stacks measured", file=sys.stderr, flush=True)
        stacks *= 2
    path = measuring.report(args.out, "memory", device, memory_table(rows))
    save_picture(path.with_suffix(".png"), rows)


def measure_in_own_process(chain: str, stacks: int, gpu: str) -> Memory:
    """So that one case's peak does not hide another's."""
    command = [sys.executable, "-m", "benchmarks.memory", "--gpu", gpu, "--case", chain, str(stacks)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{chain} with {stacks} stacks failed ({reason}); lower --maxStacks")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def measure(chain: str, stacks: int, device: torch.device) -> Memory:
    """One training step of Fig. 5's model, after one that warms up."""
    torch.manual_seed(0)
    apply_precision("fp32")
    torch.backends.cudnn.benchmark = False  # what it tries out takes memory, too
    model = PyramidFlow(replace(FIG5_CONFIG, num_stack=stacks)).to(device).train()
    model.flow = measuring.CHAINS[chain](*model.flow)
    images = torch.randn(BATCH, 3, *FIG5_CONFIG.image_size, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        pair_loss(model.pyramid, model(images)[0]).backward()

    before = measuring.peak_resident()
    step()
    growth = measuring.peak_resident() - before - sum(p.grad.nbytes for p in model.flow.parameters())
    peak = measuring.step_memory(step, model.flow, device) / MIB
    return peak, None if device.type == "cuda" else growth / MIB


def memory_table(rows: dict[int, dict[str, Memory]]) -> str:
    """Markdown of the measurements, by number of stacks and chain."""
    cells = []
    for stacks, row in rows.items():
        ours = [" / ".join(f"{x:.0f}" for x in both if x is not None) for both in row.values()]
        cells.append([stacks, *ours, " / ".join(f"{x:.2f}" for x in PAPER_FIG5.get(2 * stacks, ()))])
    ratio = ""
    if {2, 16} <= rows.keys():
        deep, flat = (rows[stacks]["SequentialNF"][0] for stacks in (16, 2))
        ratio = f"\n\nSequentialNF, activations at 16 stacks / at 2 stacks: {deep / flat:.3f} (bar: 1.05)"
    return f"""\
Training step of PyramidFlow with 8 levels, 24 channels, 256x256, batch 2, float32 (Fig. 5).
MiB: peak of all living tensors without weights and weight gradients / on the CPU growth of the process's memory.
Paper: GB of the whole process on its GPU, autoFlow / autograd.

{markdown_table(["stacks", *measuring.CHAINS, "paper"], cells)}{ratio}"""


def save_picture(path: Path, rows: dict[int, dict[str, Memory]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for chain in measuring.CHAINS:
        axes.plot(list(rows), [row[chain][0] / 1024 for row in rows.values()], marker="o", label=chain)
    title = "training step, L=8, C=24, 256x256, batch 2"
    axes.set(xlabel="stacks", ylabel="activation memory (GiB)", title=title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), list(map(str, rows)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
