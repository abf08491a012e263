"""Instruments of the benchmarks: times that drift cannot bend, peaks of memory, and the records."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autoFlow import SequentialNet, SequentialNF
from model import PyramidFlowConfig
from util import (
    Parser,
    check_writable,
    choose_device,
    create_run_folder,
    describe_environment,
    keep_freed_memory,
    whole_number,
    write_text,
)

MIB = 2**20
BATCH = 2  # images of a training step, as train.py has them
RECORDS = Path(__file__).with_name("records")
DEFAULT_MODELS = {
    "fnf": PyramidFlowConfig(encoder="none", image_size=(256, 256)),
    "res18": PyramidFlowConfig(encoder="resnet18", image_size=(1024, 1024)),
}


# ------------------------------------------------------------------------------ flags, records


def make_parser(description: str) -> Parser:
    """A parser with the flags that all benchmarks have."""
    parser = Parser(description=description)
    parser.add_argument("--gpu", default="0", help="index of the CUDA device, or cpu")
    parser.add_argument("--repeats", type=whole_number(1), default=7, help="interleaved repetitions of a timing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, help="folder of the tables; without it a new folder benchmark-<date-time>"
    )
    where.add_argument("--record", action="store_true", help=f"replace the tables in {RECORDS.name}/")
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    """The device that `--gpu` asks for; `args.out` becomes the folder that `report` writes to.

    Raises:
        InputError: there is no such device, or nothing can be written to the folder.
    """
    device = choose_device(args.gpu)
    keep_freed_memory()  # as train.py
    args.out = RECORDS if args.record else args.out or create_run_folder(Path(), "benchmark", "--out")
    check_writable(args.out, "--out")
    return device


def report(out: Path, name: str, device: torch.device, body: str) -> Path:
    """Print a text under command, date, versions and hardware, and write it to <out>/<name>-<device>.md."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"
    head = [f"`{command}`, {date.today()}", *describe_environment(device)]
    text = "".join(f"- {line}\n" for line in head) + f"\n{body}\n"
    path = out / f"{name}-{device.type}.md"
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"\n{text}\nwritten to {path}", flush=True)
    return path


# --------------------------------------------------------------------------------------- time


def interleaved_times(
    steps: dict[object, Callable[[], object]], repeats: int, device: torch.device
) -> dict[object, list[float]]:
    """Seconds of each step, one after the other in every round, so that drift hits all alike."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times: dict[object, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):  # the first warms up
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of paired ratios a / b."""
    return median(x / y for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------- memory


def step_memory(step: Callable[[], object], networks: nn.Module, device: torch.device) -> int:
    """Bytes: peak of living tensors in a step, without weights and their gradients."""
    networks.zero_grad(set_to_none=True)
    if device.type != "cuda":
        with AllocationRecorder() as recorder:
            step()
        return recorder.peak(without=[p.grad for p in networks.parameters()])
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    gradients = sum(p.grad.nbytes for p in networks.parameters() if p.grad is not None)
    return torch.cuda.max_memory_allocated(device) - before - gradients


def peak_resident() -> int:
    """Bytes of the process's memory at its largest."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def storages_of(values: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in nested values; a kernel that oneDNN laid out in its own way has none."""
    for x in tree_iter(values):
        if isinstance(x, Tensor) and not x.is_mkldnn:
            yield x.untyped_storage()


class AllocationRecorder(TorchDispatchMode):
    """Counts the storage that operators return, from its creation to its release.

    Kernels that oneDNN laid out in its own way, for the time of one convolution, are not counted.
    """

    def __enter__(self):
        self._events: list[tuple[int, int]] = []  # (storage number, +bytes or -bytes)
        self._numbers: dict[int, int] = {}  # address of a living storage -> its number
        self._count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(results):
            if storage._cdata not in given | self._numbers.keys():
                self._track(storage, self._count)
                self._count += 1
        return results

    def _track(self, storage: torch.UntypedStorage, number: int) -> None:
        key, size = storage._cdata, storage.nbytes()

        def release() -> None:
            self._numbers.pop(key, None)
            self._events.append((number, -size))

        self._numbers[key] = number
        self._events.append((number, size))
        weakref.finalize(storage, release)

    def peak(self, without: Sequence[Tensor]) -> int:
        """Most bytes alive at once, leaving out the storages of the given tensors."""
        excluded = {self._numbers.get(x.untyped_storage()._cdata) for x in without}
        level = highest = 0
        for number, change in self._events:
            if number not in excluded:
                level += change
                highest = max(highest, level)
        return highest


# ------------------------------------------------------------------------------------- chains


class CheckpointedNet(SequentialNet):
    """Every block under torch.utils.checkpoint: its input is kept, its inside recomputed."""

    def forward(self, inputs, logdets=None):
        for block in self:
            inputs, logdets = torch.utils.checkpoint.checkpoint(block, inputs, logdets, use_reentrant=False)
        return inputs, logdets


CHAINS = {"SequentialNF": SequentialNF, "SequentialNet": SequentialNet, "checkpoint": CheckpointedNet}
