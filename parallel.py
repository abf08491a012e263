"""One training over several processes (torchrun): who this process is, and what it exchanges with the others.

A process that is alone does nothing here, so the code that calls this reads the same in both cases.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

SHARED_MEMORY = Path("/dev/shm")
PATIENCE = timedelta(days=1)  # the others wait while one reads the data, or draws the pictures


@dataclass(frozen=True)
class World:
    """The processes of one training.

    Attributes:
        rank, size: of this process, among all.
        local_rank: of this process, among those on the same machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Meet the other processes that torchrun started; each has its own GPU, or all use the CPU."""
        if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Writes files and prints; the others only compute."""
        return self.rank == 0

    def share(self, items: Sequence, equal: bool = False) -> list:
        """This process's part of the items; `equal`: all get as many, and what is left over is dropped."""
        count = len(items) // self.size * self.size if equal else len(items)
        return list(items[self.rank : count : self.size])

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients that are averaged over the processes."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over the processes."""
        if self.size > 1:
            for x in tensors:
                if x.is_floating_point():
                    dist.all_reduce(x)
                    x /= self.size

    def average_numbers(self, numbers: list[float]) -> list[float]:
        """The means over the processes of as many numbers in each."""
        if self.size == 1:
            return numbers
        lists = [None] * self.size
        dist.all_gather_object(lists, numbers)
        return [sum(column) / self.size for column in zip(*lists, strict=True)]

    def total(self, tensors: Sequence[Tensor], count: int) -> tuple[list[Tensor], int]:
        """Sums over the processes."""
        if self.size == 1:
            return list(tensors), count
        number = torch.tensor(count, device=tensors[0].device)
        for x in (*tensors, number):
            dist.all_reduce(x)
        return list(tensors), int(number)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = [None] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)

    def collect(self, part: Tensor, count: int) -> Tensor:
        """(count,...) in the order of the items that `share` had divided."""
        if self.size == 1:
            return part
        longest = -(-count // self.size)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def shared_bytes(self, size: tuple[int, ...]) -> tuple[Tensor, bool]:
        """An uninitialised uint8 tensor that all processes of this machine see, and whether this one fills it.

        The others see it filled after `wait`.  Where no folder has room for it, each has its own and fills it.
        """
        if self.size == 1:
            return torch.empty(size, dtype=torch.uint8), True
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        count = torch.Size(size).numel()
        for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            if not self.any(not folder.is_dir() or shutil.disk_usage(folder).free < 1.1 * count):
                break
        else:
            return torch.empty(size, dtype=torch.uint8), True
        path, fills = folder / f"pyramidflow-{names[0]}", self.local_rank == 0
        if fills:
            with path.open("wb") as file:
                file.truncate(count)
        self.wait()
        tensor = torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8).view(size)
        self.wait()
        if fills:
            path.unlink()  # the memory lives as long as somebody uses it
        return tensor, fills

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
