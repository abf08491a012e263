"""Instruments of the benchmarks: times that drift cannot bend, peaks of memory, and the records."""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hardware import describe_environment
from model import PyramidFlowConfig
from util import InputError, atomic_path

MIB = 2**20
DEFAULT_MODELS = {
    "fnf": PyramidFlowConfig(encoder="none", image_size=(256, 256)),
    "res18": PyramidFlowConfig(encoder="resnet18", image_size=(1024, 1024)),
}


def report(out: Path, name: str, device: torch.device, body: str) -> Path:
    """Print a table under hardware, versions and date, and write it to <out>/<name>-<device>.md."""
    command = f"python benchmark.py {' '.join(sys.argv[1:])}"
    head = [f"`{command}`, {date.today()}", *describe_environment(device)]
    text = "\n".join(f"- {line}" for line in head) + "\n\n" + body + "\n"
    print("\n" + text)
    path = out / f"{name}-{device.type}.md"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to --out {out} ({error.strerror}); name another") from None
    print(f"written to {path}")
    return path


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


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def step_memory(step: Callable[[], None], networks: nn.Module, device: torch.device) -> int:
    """Bytes: peak of living tensors in a step, without weights and their gradients."""
    networks.zero_grad(set_to_none=True)
    if device.type == "cuda":
        peak = cuda_peak(step, device)
        return peak - sum(p.grad.nbytes for p in networks.parameters() if p.grad is not None)
    with AllocationRecorder() as recorder:
        step()
    return recorder.peak(without=[p.grad for p in networks.parameters()])


def cuda_peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes: peak above what lived before."""
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - start


def peak_resident() -> int:
    """Bytes of the process's memory at its largest."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
