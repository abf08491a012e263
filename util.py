"""What every script needs and the method does not: errors, flags, device, files, several processes."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import difflib
import functools
import json
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
NUM_WORKERS = min(os.cpu_count() or 1, 8)
MOST_SHOWN = 500  # characters of what a file or the command line holds
LOG_INTERVAL_S = 30.0  # between lines of a progress bar that is written to a file
PATIENCE = timedelta(days=1)  # the other processes wait while one draws the figures
NO_ENGINE = "unable to find an engine"  # cuDNN, where no workspace fits, and seldom else
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's mallopt
UORDBLKS, FORDBLKS = 7, 8  # places of the bytes in use, and that are free, in its mallinfo2


# ------------------------------------------------------------------------------------- errors


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and names the remedy."""

    exit_code = 2


class Interrupted(InputError):
    """The user stopped the work; the message says how to resume."""

    exit_code = 130


class DivergedError(InputError):
    """Training left the finite numbers; what was saved before stays."""

    exit_code = 1

    def __init__(self, what: str):
        super().__init__(
            f"{what}; checkpoints of earlier epochs, if any, are untouched; try another --seed, --volumeNorm "
            "or a smaller --lr"
        )


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what the user can mend becomes one line on stderr and an exit code."""
    quiet_pillow()
    with contextlib.suppress(AttributeError):  # no stdout, or a test's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        _fail(f"error: {error}", error.exit_code)
    except BrokenPipeError:  # `| head -1`: nobody reads what else there is to say
        _leave_stdout()
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        doubt = f" ({first_line(error)})" if NO_ENGINE in str(error) else ""
        _fail(f"error: out of memory{doubt}; use smaller images or batches, or a smaller model", 2)
    except OSError as error:  # a full disk, a folder that went away
        _leave_stdout()
        _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def quiet_pillow() -> None:
    """Pillow warns of oddities in a file, which do not matter if it can be read, and are an error if not."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _leave_stdout() -> None:
    """What could not be printed is not tried again when the process ends."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, as a test's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", NO_ENGINE)
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(f"{Path(sys.argv[0]).name}: {message}".splitlines())
    print(line, file=sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    sys.exit(code)


class StopSignals:
    """While it is active, Ctrl-C, SIGTERM and a lost terminal raise KeyboardInterrupt at once.

    Python prints and swallows what is raised inside some callbacks: it is not printed, and `check` between
    steps raises it again.  Libraries make another error of it, in whose place it leaves.
    """

    def __init__(self):
        self.asked = False
        self._previous: dict = {}
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> StopSignals:
        sys.unraisablehook = self._report
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        if self.asked and kind is not None and issubclass(kind, Exception):
            raise KeyboardInterrupt from None

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def _handle(self, number, frame) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def _report(self, swallowed) -> None:
        if swallowed.exc_type is not KeyboardInterrupt:
            self._unraisable(swallowed)


# -------------------------------------------------------------------------------------- flags


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints the description as written, and behind each flag's help its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if action.help is None or default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{action.help} [{shown.lower() if default is True else shown}]" if shown else action.help


class Parser(argparse.ArgumentParser):
    """Prints an error as one line; flags are never abbreviated."""

    def __init__(self, **options):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        unknown = unknown.split()[0] if unknown.split() else ""
        if unknown.startswith("-"):
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1, 0.7)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {shortened(message)} (see --help)\n")


def shortened(text: str) -> str:
    """One line of a text, which a value out of a file may have made endless."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def first_line(error: Exception) -> str:
    """What an error says in the first line, or what it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_plain(x: object) -> bool:
    """Whether it can be a flag's value: None, a truth value, a number of usual size, or a text."""
    if isinstance(x, int):
        return abs(x) < 10**18
    return x is None or isinstance(x, (float, str))


def whole_number(minimum: int, maximum: int = 10**18) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` to `maximum`."""
    limits = f"from {minimum} on" if maximum == 10**18 else f"from {minimum} to {maximum}"

    def convert(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return convert


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low`, or `above` it, to `high`."""
    limits = f"{'above' if above else 'from'} {low:g}" + ("" if high == math.inf else f" to {high:g}")

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return convert


fraction = number(0, 1)


def boolean(text: str) -> bool:
    """An argparse type: true or false, as a word."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(values)}")
    return values[text.lower()]


def add_running_flags(parser: argparse._ActionsContainer) -> None:
    """The flags that all scripts have which run a model."""
    add = parser.add_argument
    add("--gpu", default="0", help="index of the CUDA device (1, cuda:1), or cpu")
    text = "of the flow's k x k convolutions; auto: the fastest that keeps the metrics"
    add("--precision", choices=PRECISIONS, default="auto", help=text)
    add("--numWorkers", type=whole_number(1), default=NUM_WORKERS, help="threads that read images")


def count_images(count: int) -> str:
    """As in "no images", "1 image", "2 images"."""
    return f"{count or 'no'} image{'s' * (count != 1)}"


def size_text(size: Iterable[int]) -> str:
    """(height, width) as in --imageSize, with an x."""
    return "x".join(str(n) for n in size)


# ------------------------------------------------------------------------------- device, precision


def choose_device(gpu: str) -> torch.device:
    """`--gpu`: an index, "cuda", "cuda:1" or "cpu".  Index 0 without any CUDA device falls back to the CPU.

    Under torchrun each process takes the GPU of its number.

    Raises:
        InputError: no such device.
    """
    if gpu == "cpu":
        return torch.device("cpu")
    index = {"cuda": "0"}.get(gpu, gpu.removeprefix("cuda:"))
    count = torch.cuda.device_count()
    if count and dist.is_torchelastic_launched():
        index = os.environ["LOCAL_RANK"]
    if index.isdecimal() and int(index) < count:
        return torch.device("cuda", int(index))
    if gpu == "0":
        return torch.device("cpu")
    have = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
    raise InputError(f"--gpu {gpu}: no such CUDA device (this machine has: {have}); or use --gpu cpu")


def why_no_cuda() -> str:
    """Why this process has no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    return "no NVIDIA driver or no GPU was found"


def without_cuda(device: torch.device, gpu: str) -> list[str]:
    """A line that says why it runs on the CPU, if that was not asked for by --gpu."""
    if device.type != "cpu" or gpu == "cpu":
        return []
    return [f"no CUDA device ({why_no_cuda()}): running on the CPU"]


def describe_environment(device: torch.device) -> list[str]:
    """Versions and hardware, a line each."""
    named = [line.split(":")[1].strip() for line in _read_lines("/proc/cpuinfo") if "model name" in line]
    cpu = named[0] if named else platform.processor() or platform.machine()
    features = ", ".join(cpu_features()) or "neither AVX-512 nor AMX"
    lines = [
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {metadata.version('torchvision')}, numpy {np.__version__}",
        f"cpu {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {features}, {platform.system()}",
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


@functools.cache
def mkl_is_slow() -> bool:
    """Whether MKL, PyTorch's library for float32 products and functions, takes long: on AMD's CPUs."""
    return any(line.startswith("vendor_id") and "AMD" in line for line in _read_lines("/proc/cpuinfo"))


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def choose_precision(asked: str, device: torch.device, trained_in: str | None = None) -> str:
    """`--precision`, with auto settled: "fp32", "tf32" or "bf16".

    auto is the fastest that leaves the metrics where fp32 has them (docs/precision.md): bf16 where the
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
    multiplies_bfloat16 = ampere if on_cuda else {"AVX-512 BF16", "AMX"} & set(cpu_features())
    return "bf16" if multiplies_bfloat16 else "fp32"


def apply_precision(precision: str) -> torch.dtype | None:
    """Set cuDNN's switch, by which fp32 and tf32 differ; the dtype for `PyramidFlow.compute_networks_in`.

    Matrix products are never in TF32, which some containers ask for by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.bfloat16 if precision == "bf16" else None


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors instead of giving it back to the system each time.

    A large tensor would otherwise be made of fresh pages, and touching those takes several times as long
    as computing what is written to them.  Elsewhere than on Linux nothing happens.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def freed_memory() -> int:
    """Bytes that glibc keeps of freed tensors, for the next ones; 0 where it does not say.

    Not those that were never written to, which the system counts as available.
    """
    libc, statistics = _glibc(), _read_lines("/proc/self/statm")
    if libc is None or not statistics or not hasattr(libc, "mallinfo2"):  # glibc has it from 2.33 on
        return 0
    libc.mallinfo2.restype = MallocInfo
    numbers = libc.mallinfo2().numbers
    resident = int(statistics[0].split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return max(0, min(numbers[FORDBLKS], resident - numbers[UORDBLKS]))


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    is_there = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL("libc.so.6") if is_there else None


def start_on(gpu: str) -> torch.device:
    """The device of --gpu; if it is the CPU because there is no CUDA, the reason is printed."""
    device = choose_device(gpu)
    for line in without_cuda(device, gpu):
        print(line, flush=True)
    keep_freed_memory()
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine and the process's memory limit.

    What was freed, and is kept, counts.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = _read_lines("/proc/meminfo")
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limit, used, lines = (_read_lines(f"/sys/fs/cgroup/memory.{x}") for x in ("max", "current", "stat"))
    if limit and used and limit[0].isdecimal():
        cached = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
        free.append(int(limit[0]) - int(used[0]) + sum(cached))
    return max(0, min(free)) + freed_memory() if free else 2**32  # a machine that does not say


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


# --------------------------------------------------------------------------- several processes
#
# torchrun starts several processes of one training.  In a process that is alone these do nothing.


def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun started; each has its own GPU, or all use the CPU."""
    if dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and prints; the others only compute."""
    return rank() == 0


def share(items: Sequence, equal: bool = False) -> list:
    """This process's part of the items; `equal`: all get as many, and what is left over is dropped."""
    count = len(items) // world_size() * world_size() if equal else len(items)
    return list(items[rank() : count : world_size()])


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, with gradients that are averaged over the processes."""
    if world_size() == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def total(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world_size() > 1:
        for x in tensors:
            dist.all_reduce(x)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the processes."""
    if world_size() > 1:
        for x in tensors:
            if x.is_floating_point():
                dist.all_reduce(x)
                x /= world_size()


def gather(part: Tensor, count: int) -> Tensor:
    """(count,...) in the order of the items that `share` had divided."""
    if world_size() == 1:
        return part
    padded = part.new_zeros(-(-count // world_size()), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


# ----------------------------------------------------------------------------------- progress


def progress(items: Iterable, description: str, total: int | None = None, unit: str = "it") -> tqdm:
    """A progress bar on stderr; where stderr is a file, a line every few seconds instead."""
    options = {"desc": description, "total": total, "unit": unit, "leave": False}
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, **options, dynamic_ncols=True)
    return tqdm(
        items, **options, ncols=99, ascii=True, file=_Lines(),
        mininterval=LOG_INTERVAL_S, maxinterval=LOG_INTERVAL_S, delay=LOG_INTERVAL_S,
    )  # fmt: skip


class _Lines:
    """Turns the carriage returns of a progress bar into lines."""

    def write(self, text: str) -> None:
        if sys.stderr is not None and (line := text.strip()):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()


# -------------------------------------------------------------------------------- logs, tables


def start_log(path: Path, environment: list[str]) -> logging.Logger:
    """A logger to stdout and to a file, which no other process may log to at the same time.

    What this process writes to the file starts with versions and hardware.

    Raises:
        InputError: another process logs to the file.
    """
    logger = logging.getLogger(f"pyramidflow.{path.parent.name}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    if not lock(file.stream):
        raise InputError(f"another process is writing to {path.parent}; wait for it, or stop it")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers = [file]
    for line in environment:
        logger.info(line)
    logger.handlers = [file, _Console(sys.stdout or open(os.devnull, "w"))]  # noqa: SIM115
    return logger


class _Console(logging.StreamHandler):
    """Raises what goes wrong: a reader that went away ends the program."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A table that can be pasted; cells are shown by `str`."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


# -------------------------------------------------------------------------------------- files


def create_run_folder(save_dir: Path, name: str, flag: str = "--saveDir") -> Path:
    """Make `<save_dir>/<name>-<date-time>[-n]`, a folder that did not exist before.

    Raises:
        InputError: it cannot be written to.
    """
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        for n in range(1, 10_000):
            folder = save_dir / (stem if n == 1 else f"{stem}-{n}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise _cannot_write(save_dir, flag, error) from None
    raise InputError(f"{flag} {save_dir} holds too many runs of this second")


def check_writable(save_dir: Path, flag: str = "--saveDir") -> None:
    """Fail now rather than after the data is read.

    Raises:
        InputError: nothing can be made in `save_dir`.
    """
    folders = (save_dir.absolute(), *save_dir.absolute().parents)
    try:
        with tempfile.TemporaryFile(dir=next(folder for folder in folders if folder.exists())):
            pass
    except OSError as error:
        raise _cannot_write(save_dir, flag, error) from None


def _cannot_write(save_dir: Path, flag: str, error: OSError) -> InputError:
    return InputError(f"cannot write to {flag} {save_dir} ({error.strerror}); choose another")


def lock(file: IO) -> bool:
    """Keep other processes from locking the same open file until it is closed; False if one has.

    Where the system has no such locks, everybody gets one.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems
    return True


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")  # names have 255 bytes
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict], columns: Sequence[str] | None = None) -> None:
    """Rows of equal keys, the columns unless they are given; None becomes an empty cell."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_tensors(path: Path, content: dict) -> None:
    """Write tensors and plain values atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # of torch's writer, after the file could not be written
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def is_dense(x: object) -> bool:
    """Whether it is a tensor that has its numbers side by side in memory, as they are."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta and not x.is_quantized


def load_tensors(path: Path) -> object:
    """`torch.load` of tensors and plain values only; nothing in the file is executed.

    Raises:
        InputError: missing, damaged (also where only a checksum tells), or with anything else inside.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for developers
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):  # torch.load does not look at checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("checksum")
    except Exception as error:  # torch.load raises nearly anything on damaged files
        problems = {
            FileNotFoundError: "does not exist; choose a file that does",
            IsADirectoryError: "is a folder; choose a file in it, of a run last.pt",
            PermissionError: "cannot be read (permission denied); change its permissions",
        }
        if isinstance(error, OSError) and error.strerror:
            otherwise = f"cannot be read ({error.strerror}); mend that, or use another file"
        else:
            otherwise = "cannot be read as tensors and plain values; it is damaged or not a .pt file, use another"
        raise InputError(f"{path} {problems.get(type(error), otherwise)}") from None
    return content
