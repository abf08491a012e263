"""Measure what the README claims, on this machine.

    python benchmark.py step         # training step and inference in every precision; the convolutions alone
    python benchmark.py epoch        # a whole epoch on a data set of MVTec's size, by its parts
    python benchmark.py precision --checkpoint saveDir/screw-.../last.pt --datapath ../mvtec_anomaly_detection
    python benchmark.py memory       # Fig. 5: activation memory over depth, three ways of backpropagation
    python benchmark.py autoflow     # one chain of coupling blocks on autoFlow, checkpoint, memcnn, FrEIA

Tables are printed and written to --out with hardware, versions and date.  autoflow's peers: pip install -r
requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmark_autoflow import benchmark_autoflow, benchmark_memory, measure_memory
from benchmark_speed import benchmark_epoch, benchmark_precision, benchmark_step
from hardware import PRECISIONS, choose_device, keep_freed_memory
from measuring import DEFAULT_MODELS
from util import Parser, run_script, whole_number

BENCHMARKS = {
    "step": benchmark_step,
    "epoch": benchmark_epoch,
    "precision": benchmark_precision,
    "memory": benchmark_memory,
    "autoflow": benchmark_autoflow,
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=tuple(BENCHMARKS))
    parser.add_argument("--gpu", default="0", help="index of the CUDA device, or cpu [0]")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="folder [docs/benchmarks]"
    )
    parser.add_argument(
        "--repeats", type=whole_number(1), default=7, help="interleaved repetitions of a timing [7]"
    )
    parser.add_argument(
        "--model", nargs="+", choices=sorted(DEFAULT_MODELS), default=["fnf"],
        help="step, epoch: default models [fnf]",
    )  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="epoch: [auto]")
    parser.add_argument("--datapath", type=Path, help="epoch, precision: a real data set [generated]")
    parser.add_argument("--cls", help="epoch, precision: its class")
    parser.add_argument("--checkpoint", type=Path, help="precision: a trained model")
    parser.add_argument(
        "--maxStacks", type=whole_number(1), default=16, help="memory: deepest model [16]"
    )
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one measurement, in its own process
    arguments = parser.parse_args()
    device = choose_device(arguments.gpu)
    if arguments.what == "precision" and not (arguments.checkpoint and arguments.datapath):
        parser.error("precision needs --checkpoint and --datapath")
    if arguments.what == "epoch" and arguments.datapath and not arguments.cls:
        parser.error("epoch with --datapath needs --cls")
    if arguments.case:
        chain, stacks = arguments.case
        print(json.dumps(asdict(measure_memory(chain, int(stacks), device))))
        return
    torch.backends.cudnn.benchmark = True  # as train.py
    if arguments.what != "memory":
        keep_freed_memory()
    BENCHMARKS[arguments.what](arguments, device)


if __name__ == "__main__":
    run_script(main)
