"""What every script needs and the method does not: errors, flags, seeding, progress, logging, files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

LOG_INTERVAL_S = 30.0  # between lines of a progress bar that is written to a file


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and names the remedy."""

    exit_code = 2


class Interrupted(InputError):
    """The user stopped the work; the message says how to go on."""

    exit_code = 130


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; an InputError becomes one line on stderr and its exit code."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(_fail(f"{name}: error: {error}", error.exit_code))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(
            _fail(f"{name}: error: out of memory; use smaller images or batches, or a smaller model", 2)
        )
    except OSError as error:  # a full disk, a folder that went away
        sys.exit(_fail(f"{name}: error: {error}", 1))
    except KeyboardInterrupt:
        sys.exit(_fail(f"{name}: interrupted", 130))


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


class StopRequest:
    """While it is active, Ctrl-C, SIGTERM and a lost terminal ask for a stop instead of stopping at once.

    Work that can end in good order looks at `asked` between its steps, inside `with stop.deferred():`.
    Elsewhere, and the second time, KeyboardInterrupt is raised.
    """

    def __init__(self):
        self.asked = False
        self._deferred = False
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number, frame) -> None:
        if self.asked or not self._deferred:
            raise KeyboardInterrupt
        self.asked = True


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Parser(argparse.ArgumentParser):
    """Prints the description as written, and an error as one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` on, within 18 digits."""

    def convert(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} on")
        return int(text)

    return convert


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def size_text(size: Iterable[int]) -> str:
    """(height, width) as in --imageSize, with an x."""
    return "x".join(str(n) for n in size)


# ----------------------------------------------------------------------------------- progress


def progress(
    items: Iterable, description: str, total: int | None = None, initial: int = 0, unit: str = "it"
) -> tqdm:
    """A progress bar on stderr; where stderr is a file, a line every few seconds instead."""
    options = {"desc": description, "total": total, "initial": initial, "unit": unit, "leave": False}
    if sys.stderr.isatty():
        return tqdm(items, **options, dynamic_ncols=True)
    return tqdm(
        items, **options, ncols=79, ascii=True, file=_Lines(),
        mininterval=LOG_INTERVAL_S, maxinterval=LOG_INTERVAL_S, delay=LOG_INTERVAL_S,
    )  # fmt: skip


class _Lines:
    """Turns the carriage returns of a progress bar into lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


# ---------------------------------------------------------------------------------- run folder


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
        raise InputError(f"cannot write to {flag} {save_dir} ({error.strerror}); name another") from None
    raise InputError(f"{flag} {save_dir} holds too many runs of this second")


def check_writable(save_dir: Path, flag: str = "--saveDir") -> None:
    """Fail now rather than after the data is read.

    Raises:
        InputError: nothing can be made in `save_dir`.
    """
    existing = save_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {flag} {save_dir} ({error.strerror}); name another") from None


def start_log(path: Path, environment: list[str]) -> logging.Logger:
    """A logger to stdout and to a file, which no other process may log to at the same time.

    What this process writes to the file starts with versions and hardware.

    Raises:
        InputError: another process logs to the file.
    """
    logger = logging.getLogger(f"pyramidflow.{path.parent.name}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    file = logging.FileHandler(path, encoding="utf-8")
    console = logging.StreamHandler(sys.stdout)
    if not lock(file.stream):
        raise InputError(f"another process is writing to {path.parent}; wait for it, or stop it")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers = [file]
    for line in environment:
        logger.info(line)
    logger.handlers = [file, console]
    return logger


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys; None becomes an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
