"""What the machine offers: device, precision of the convolutions, memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision

from util import InputError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's mallopt


def choose_device(gpu: str) -> torch.device:
    """`--gpu`: an index, or "cpu".  Index 0 without any CUDA device falls back to the CPU.

    Under torchrun each process takes the GPU of its number.

    Raises:
        InputError: no such device.
    """
    if gpu == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count and torch.distributed.is_torchelastic_launched():
        gpu = os.environ["LOCAL_RANK"]
    if gpu.isdecimal() and int(gpu) < count:
        return torch.device("cuda", int(gpu))
    if gpu == "0":
        return torch.device("cpu")
    have = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
    raise InputError(f"--gpu {gpu}: no such CUDA device (this machine has: {have}); or use --gpu cpu")


def describe_environment(device: torch.device) -> list[str]:
    """Versions and hardware, a line each."""
    cpu = next(
        (line.split(":")[1].strip() for line in _read_lines("/proc/cpuinfo") if "model name" in line),
        platform.processor() or platform.machine(),
    )
    features = ", ".join(cpu_features()) or "neither AVX-512 nor AMX"
    lines = [
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, numpy {np.__version__}",
        f"cpu {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {features}, "
        f"{platform.system()}",
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        lines.append(f"gpu {properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    return lines


@functools.cache
def cpu_features() -> list[str]:
    """Of AVX-512, AVX-512 BF16 and AMX, what this CPU has; on Linux."""
    flags = next((line.split() for line in _read_lines("/proc/cpuinfo") if line.startswith("flags")), [])
    names = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
    return [name for flag, name in names.items() if flag in flags]


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Clock:
    """Seconds of the named parts of some work on a device.

    Attributes:
        seconds: by name, in the order of first use.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"


# ---------------------------------------------------------------------------------- precision


def choose_precision(asked: str, device: torch.device, trained_in: str | None = None) -> str:
    """`--precision`, with auto settled: "fp32", "tf32" or "bf16".

    auto is the fastest that leaves the metrics where fp32 has them (README, "Precision"): bf16 where the
    device has instructions that multiply bfloat16, else fp32.

    Args:
        trained_in: the precision of a trained model; auto keeps fp32, and tf32 where the device has it.

    Raises:
        InputError: the device does not have it.
    """
    on_cuda = device.type == "cuda"
    ampere = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if not ampere and (asked == "tf32" or (asked == "bf16" and on_cuda)):
        raise InputError(f"--precision {asked} needs an NVIDIA GPU from Ampere on; use fp32, or auto")
    if asked != "auto":
        return asked
    if trained_in == "fp32" or (trained_in == "tf32" and ampere):
        return trained_in
    if on_cuda:
        return "bf16" if ampere else "fp32"
    return "bf16" if {"AVX-512 BF16", "AMX"} & set(cpu_features()) else "fp32"


def apply_precision(precision: str) -> torch.dtype | None:
    """Set cuDNN's switch, by which fp32 and tf32 differ; the dtype for `PyramidFlow.compute_networks_in`."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.bfloat16 if precision == "bf16" else None


# ------------------------------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors instead of giving it back to the system each time.

    A large tensor would otherwise be made of fresh pages, and touching those takes several times as long
    as computing what is written to them.  Elsewhere than on Linux nothing happens.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine and the process's memory limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [
        int(line.split()[1]) * 1024
        for line in _read_lines("/proc/meminfo")
        if line.startswith("MemAvailable")
    ]
    limit, used = (_read_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdecimal():
        cached = [
            int(line.split()[1])
            for line in _read_lines("/sys/fs/cgroup/memory.stat")
            if line.startswith("inactive_file ")
        ]
        free.append(int(limit[0]) - int(used[0]) + sum(cached))
    return max(0, min(free)) if free else 2**32  # a machine that does not say
