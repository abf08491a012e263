"""Attacks on the program: what users run must survive the night, and what they load must not run.

    python tests/attack.py                            # all classes of attacks, about 35 minutes on two cores
    python tests/attack.py --only kills files --scale 10
    python tests/attack.py --only kills --number 17   # one attack again, with the same --seed

Each class prints `class of attack | tried | survived`, and each failure how to repeat it; the exit code is 1 if
there was one.  Full and read-only disks need root, which may mount.

Commands run in children of this process, which has imported the program once: a fork costs no seconds.
"""

# ruff: noqa: E402 (the program is found by its path first)
from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest
from spoil import (
    Code,
    odd_data,
    odd_images,
    pipeline_content,
    spoil_bytes,
    spoil_image,
    spoil_onnx,
    spoil_tensors,
    spoil_text,
    write_official,
)

import dataset
import evaluate
import export
import fit
import metrics
import predict
import reproduce
import runs
import train
import util
from scorer import LAST_FILE, Scorer
from tools import convert_official
from verdict import read_roi

PROGRAMS = {
    "train": train.main, "predict": predict.main, "fit": fit.main, "export": export.main,
    "evaluate": evaluate.main, "reproduce": reproduce.main,
}  # fmt: skip
RUNNING = ["--gpu", "cpu", "--precision", "fp32"]
# What commands import when they need it, and a fork has already.
LATER_IMPORTS = (
    "matplotlib.pyplot", "sklearn.metrics", "skimage.measure", "onnx", "onnxscript", "onnxruntime",
    "torch.onnx._internal.exporter", "torch._dynamo", "torch.export",
)  # fmt: skip
COUNTS = {"kills": 240, "disks": 60, "files": 1200, "images": 58, "silence": 27, "surroundings": 13, "tables": 4}
HANG_S, LIMIT_S = 10, 300  # of one file, of one command
MOST_MEMORY = 2 * 2**30
GOODBYE = ("interrupted", "stopped")


# ------------------------------------------------------------------------- commands in children


@dataclass
class Ended:
    """How a command ended: exit code (negative: the signal), stdout, stderr, seconds, bytes of memory."""

    code: int
    out: str
    err: str
    seconds: float = 0.0
    memory: int = 0

    def problem(self, codes: tuple[int, ...] = (0,)) -> str | None:
        """What is wrong with it, in a line; None: nothing."""
        last = " / ".join(self.err.splitlines()[-2:])[-300:]
        if "Traceback" in self.err + self.out or "Logging error" in self.err:
            return f"traceback: {last}"
        if self.code not in codes:
            return f"exit code {self.code}: {last}"
        if self.code == 2 and self.err.count("\n") != 1:
            return f"{self.err.count(chr(10))} lines on stderr: {last}"
        return None


def run(
    argv: list, place: Path, during: Callable[[int], None] = lambda pid: None,
    before: Callable[[], None] = lambda: None,
) -> Ended:  # fmt: skip
    """Run a command of the program in a child.

    Args:
        argv: name of the script, then its arguments.
        place: folder for its output.
        during: called with the child's pid while it runs.
        before: called in the child.
    """
    texts, start = [place / f".{argv[0]}.{name}" for name in ("out", "err")], time.perf_counter()
    pid = os.fork()
    if not pid:
        _be(argv, texts, before)
    during(pid)
    code, memory = _wait(pid)
    out, err = (text.read_text(errors="replace") for text in texts)
    return Ended(code, out, err, time.perf_counter() - start, memory)


def _be(argv: list, texts: list[Path], before: Callable[[], None]) -> None:
    """The child's life: never returns."""
    code = 1
    try:
        os.setsid()
        for number, path in enumerate(texts, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, errors="strict") for n in (1, 2))  # noqa: SIM115
        sys.argv = [f"{argv[0]}.py", *map(str, argv[1:])]
        before()
        util.run_script(PROGRAMS[argv[0]])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _wait(pid: int) -> tuple[int, int]:
    """Exit code and memory of a child, which is killed after `LIMIT_S`."""
    end = time.monotonic() + LIMIT_S
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def send(pid: int, after: float, number: int) -> None:
    """A signal after so many seconds, to a process that may have ended."""
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Base:
    """What attacks start from: small data, and what commands that nobody disturbed have written.

    Attributes:
        place: folder for all of it.
        seconds: of each command.
    """

    def __init__(self, place: Path):
        self.place, self.data = place, place / "data"
        self.good, self.test = self.data / "widget" / "train" / "good", self.data / "widget" / "test"
        conftest.make_class(self.data, num_train=8, num_test=1)  # a picture of each takes long
        self.seconds: dict[str, float] = {}
        for module in LATER_IMPORTS:
            importlib.import_module(module)
        self.whole("train")

    def whole(self, name: str) -> Path:
        """The folder of a command that ran to its end."""
        folder = self.place / name
        if not folder.exists():
            folder.mkdir()
            ended = run(first(self, name, folder), self.place)
            if ended.problem():
                raise SystemExit(f"undisturbed {name}: {ended.problem()}")
            self.seconds[name] = ended.seconds
        return folder

    @property
    def run(self) -> Path:
        return run_folder(self.place / "train")

    @property
    def onnx(self) -> Path:
        return self.whole("export") / "new.onnx"

    @cached_property
    def image(self) -> np.ndarray:
        return dataset.read_image(next(self.test.glob("hole/*")))


# ----------------------------------------------------------------- commands that can be continued


def first(base: Base, name: str, folder: Path) -> list:
    """The command that starts a piece of work in a folder."""
    if name == "train":
        flags = ["--epochs", 3, "--datapath", base.data, "--saveDir", folder / "runs"]
        return ["train", *conftest.SMALL, *flags]
    if name == "predict":
        return ["predict", base.run, base.data / "widget" / "train", "--out", folder / "out", *RUNNING]
    if name == "fit":
        return ["fit", base.run, base.good, "--out", folder / "new.pt", *RUNNING]
    if name == "export":
        return ["export", base.run, folder / "new.onnx"]
    flags = ["--datapath", base.data, "--classes", "widget", "--encoder", "none", "--epochs", 1]
    size = ["--imageSize", 32, "--numLayer", 2, "--numStack", 1, "--numChannel", 4, "--kernelSize", 3]
    return ["reproduce", "table3", *flags, "--out", folder / "out", "--", *size, *RUNNING]


def again(base: Base, name: str, folder: Path) -> list | None:
    """The command that goes on after the work was stopped; None: nothing is left to do."""
    start = first(base, name, folder)
    if name == "train":
        found = run_folder(folder)
        if found is None:
            return start
        return None if (found / runs.RESULT_FILE).exists() else ["train", "--resume", found]
    if name == "predict":
        marker = folder / "out" / predict.MARKER
        if not marker.exists():
            return start
        return None if json.loads(marker.read_text())["finished"] else [*start, "--resume"]
    done = {"fit": "new.pt", "export": "new.onnx", "reproduce": "out/table3/table.md"}[name]
    return None if (folder / done).exists() else start


def run_folder(folder: Path) -> Path | None:
    """The newest run that can be resumed."""
    found = [path.parent for path in folder.glob(f"runs/*/{runs.STATE_FILE}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def finish(base: Base, name: str, folder: Path) -> str | None:
    """Go on until all is done, and compare with the undisturbed work; what is wrong."""
    for _ in range(3):
        if (command := again(base, name, folder)) is None:
            break
        if problem := run(command, base.place).problem():
            return f"does not go on: {problem}"
    else:
        return "is not done after three commands that ended well"
    if name == "train" and (stray := list(run_folder(folder).rglob(".*.tmp"))):
        return f"left behind: {stray[0]}"
    return torn(folder) or different(base, name, folder)


def different(base: Base, name: str, folder: Path) -> str | None:
    """What of the results differs from the undisturbed ones, to the bit."""
    whole = base.whole(name)
    if name == "train":
        mine, theirs = run_folder(folder), run_folder(whole)
        for path in sorted(theirs.glob("*.pt")):
            if not equal(*(util.load_tensors(run / path.name) for run in (mine, theirs))):
                return f"{path.name} differs"
        rows = [[_timeless(row) for row in _rows(run / "metrics.csv")] for run in (mine, theirs)]
        same = rows[0] == rows[1] and len({(run / "result.json").read_text() for run in (mine, theirs)}) == 1
        return None if same else "metrics.csv or result.json differ"
    if name == "reproduce":
        rows = [_timeless(*_rows(f / "out/table3/results.csv")[:1]) for f in (folder, whole)]
        return None if rows[0] == rows[1] else "results.csv differs"
    if name == "fit":
        contents = [util.load_tensors(f / "new.pt") for f in (folder, whole)]
        return None if equal(*contents) else "new.pt differs"
    kept = {".png", ".tiff", ".csv", ".onnx"}
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.suffix in kept} for f in (folder, whole)]
    differing = [str(p) for p in files[0].keys() | files[1].keys() if files[0].get(p) != files[1].get(p)]
    return f"{min(differing)} differs" if differing else None


def _rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("seconds", "folder")}


def equal(x: object, y: object) -> bool:
    """Whether nested contents are equal to the bit, but for times and places."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        skipped = {"seconds", "saveDir", "resume"}
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x.keys() - skipped)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


def torn(folder: Path) -> str | None:
    """A file under its final name that is not whole."""
    for path in sorted(folder.rglob("*")):
        check = WHOLE.get(path.suffix)
        if check is None or path.name.endswith(".tmp") or not path.is_file() or path.name == predict.ROWS:
            continue
        try:
            check(path)
        except Exception as error:
            return f"torn: {path.name} ({error})"
    return None


def _ends_with(end: str, path: Path) -> None:
    if not path.read_text().endswith(end):
        raise ValueError(f"does not end with {end!r}")


def _decodes(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


WHOLE = {
    ".pt": util.load_tensors, ".onnx": lambda path: export._check_digest(path.read_bytes()),
    ".json": lambda path: json.loads(path.read_text()), ".csv": partial(_ends_with, "\n"),
    ".html": partial(_ends_with, "</html>"), ".png": _decodes, ".tiff": _decodes,
}  # fmt: skip


# -------------------------------------------------------------------------------- class: kills


def kills(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """A signal at a random moment, once or several times; then the command that goes on."""
    names = ["train"] * 11 + ["predict"] * 5 + ["fit"] * 2 + ["export"] * 3
    name = "reproduce" if number % 40 == 39 else rng.choice(names)
    base.whole(name)
    deadly = rng.random() < 0.85
    kind = signal.SIGKILL if deadly else rng.choice((signal.SIGINT, signal.SIGTERM))
    for _ in range(rng.choice((1, 1, 1, 2))):
        command = again(base, name, place)
        if command is None:
            break
        ended = attempt(base, rng, name, command, kind)
        codes = (0, 130, -kind) if name != "reproduce" else (0, 1, 130, -kind)
        if problem := ended.problem(codes) or torn(place):
            return f"{name}, {kind.name}: {problem}"
        if number % 7 == 3 and name == "train" and (problem := twice(base, place)):
            return f"train: {problem}"
    problem = finish(base, name, place)
    return f"{name}, {kind.name}: {problem}" if problem else None


def attempt(base: Base, rng: random.Random, name: str, command: list, kind: int) -> Ended:
    """Run a command that gets a signal: after a random time, or at a random write to the disk."""
    if name == "reproduce":
        return run(command, base.place, partial(_kill_jobs, rng, base.seconds[name], kind))
    if rng.random() < 1 / 3:
        hook = partial(_at_write, rng.randint(1, 40), rng.random() < 0.5, kind)
        return run(command, base.place, before=hook)
    after = 1.1 * base.seconds[name] * rng.random() ** 2  # the pictures at the end take the most time
    after = after if kind == signal.SIGKILL else max(after, 0.1)  # so long a child takes to be one
    return run(command, base.place, lambda pid: send(pid, after, kind))


def _at_write(count: int, before: bool, kind: int) -> None:
    """In a child: the signal comes with the count-th file that is flushed or put in its place."""
    left = [count]

    def counting(original: Callable, *given, **options):
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), kind)
        result = original(*given, **options)
        if left[0] == 0:
            os.kill(os.getpid(), kind)
        return result

    os.fsync, os.replace = partial(counting, os.fsync), partial(counting, os.replace)


def _kill_jobs(rng: random.Random, seconds: float, kind: int, pid: int) -> None:
    """A signal to reproduce.py, its job, or both."""
    time.sleep(rng.uniform(0.3, 1.05) * seconds)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        victims = rng.choice(([pid], children, [*children, pid])) if kind == signal.SIGKILL else [pid]
        for victim in map(int, victims):
            os.kill(victim, kind)


def twice(base: Base, place: Path) -> str | None:
    """Two processes resume one run: the second one is told."""
    found = run_folder(place)
    if found is None or again(base, "train", place) is None:
        return None
    with (found / "log.txt").open("a") as file:
        util.lock(file)
        ended = run(["train", "--resume", found], base.place)
    told = ended.problem((2,)) is None and "another process is writing" in ended.err
    return None if told else f"a second process on the run was not refused: {ended.err}"


# -------------------------------------------------------------------------------- class: disks


def disks(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """Full, read-only and vanishing disks, odd names, and a clock that jumps."""
    kinds = (full, full, full, read_only, vanishing, odd_names, clock)
    return kinds[number % len(kinds)](base, rng, number, place)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(1, size // 4096)}p", "tmpfs"]
    if subprocess.run([*mount, disk], capture_output=True, check=False).returncode:
        raise SkipError("only root may mount disks")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def full(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    name = rng.choice(("train", "train", "train", "predict", "predict", "fit", "export"))
    size = sum(4096 * (1 + p.stat().st_size // 4096) for p in base.whole(name).rglob("*"))
    with small_disk(place, int(rng.uniform(0.02, 1.1) * size)) as disk:
        ended = run(first(base, name, disk), base.place)
        if problem := ended.problem((0, 1, 2)) or torn(disk):
            return f"full disk, {name}: {problem}"
        if ended.code == 1 and ended.err.count("\n") != 1:
            return f"full disk, {name}: more than one line: {ended.err[-300:]}"
        remount(disk, f"size={2**27}")
        if problem := finish(base, name, disk):
            return f"full disk, {name}: {problem}"
    return None


def read_only(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    name = rng.choice(("train", "predict", "fit", "export"))
    with small_disk(place, 2**27) as disk:
        remount(disk, "ro")
        ended = run(first(base, name, disk), base.place)
    problem = ended.problem((2,))
    return f"read-only disk, {name}: {problem}" if problem else None


def vanishing(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    name = rng.choice(("train", "train", "predict", "fit"))
    folder = place / "folder"
    folder.mkdir()
    base.whole(name)  # it is timed
    after = rng.uniform(0.05, 0.9) * base.seconds[name]

    def vanish(pid: int) -> None:
        time.sleep(after)
        while folder.exists():  # a file may be made in it meanwhile
            shutil.rmtree(folder, ignore_errors=True)

    ended = run(first(base, name, folder), base.place, vanish)
    problem = ended.problem((0, 1, 2))
    return f"vanishing folder, {name}: {problem}" if problem else None


def odd_names(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    odd = rng.choice((
        "a b", "ä ö ü", "a\nb", "a'b\"c", "$(touch x)", "a%sb", "{a}", "日本", "-a", "a" * 200, "*", "a;b", "<b>&",
    ))  # fmt: skip
    data, folder = place / "data", place / odd
    shutil.copytree(base.data / "widget", data / odd)
    kind = rng.choice((odd, "a", os.fsdecode(b"not\xffutf8"), "ß" * 120))
    (data / odd / "test" / "hole").rename(data / odd / "test" / kind)
    (data / odd / "ground_truth" / "hole").rename(data / odd / "ground_truth" / kind)
    flags = ["--datapath", data, "--saveDir", folder / "runs", "--epochs", 1]
    ended = run(["train", *conftest.SMALL[2:], f"--cls={odd}", *flags], base.place)
    if problem := ended.problem():
        return f"odd name {odd!r}, {kind!r}, train: {problem}"
    model = run_folder(folder) / LAST_FILE
    out = folder / "out"
    ended = run(["predict", model, data / odd / "test", "--out", out, *RUNNING], base.place)
    if problem := ended.problem() or torn(folder):
        return f"odd name {odd!r}, {kind!r}, predict: {problem}"
    return None if len(_rows(out / "scores.csv")) == 2 else f"odd name {odd!r}: not 2 scores"


def clock(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """It jumps back by an hour, and the process is killed."""
    jump = partial(_jump, rng.uniform(0, base.seconds["train"]))
    kill = partial(send, after=rng.uniform(0.3, 1) * base.seconds["train"], number=signal.SIGKILL)
    ended = run(first(base, "train", place), base.place, kill, jump)
    problem = ended.problem((0, -signal.SIGKILL)) or torn(place) or finish(base, "train", place)
    return f"clock: {problem}" if problem else None


def _jump(after: float) -> None:
    start, real = time.time(), time.time
    time.time = lambda: real() - 3600 * (real() - start > after)
    util.datetime = type("Earlier", (datetime,), {"now": lambda: datetime.fromtimestamp(time.time())})


class SkipError(Exception):
    """An attack cannot be made here."""


# -------------------------------------------------------------------------------- class: files


def files(base: Base, seed: int, numbers: list[int], place: Path) -> Iterator[tuple[int, str | None]]:
    """Damaged and crafted files: each is loaded or refused, in time, in little memory, and nothing runs."""
    loaders = load_files(base, place)
    kinds = [name for name, (weight, *_) in loaders.items() for _ in range(weight)]
    by_kind: dict[str, list[int]] = {}
    for number in numbers:
        by_kind.setdefault(kinds[number % len(kinds)], []).append(number)
    for kind, left in by_kind.items():
        _, whole, spoil, load = loaders[kind]
        while left:  # a child that dies is replaced
            reader, writer = socket.socketpair()
            pid = os.fork()
            if not pid:
                reader.close()
                _load_all(left, seed, place / kind, (whole, spoil, load), writer)
            writer.close()
            with reader.makefile() as lines:
                for line in lines:
                    number, problem = json.loads(line)
                    left.remove(number)
                    yield number, problem and f"{kind}: {problem}"
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if left:
                ends = {-signal.SIGALRM: f"hangs for {HANG_S} s", -signal.SIGKILL: "killed for memory"}
                yield left.pop(0), f"{kind}: {ends.get(code, f'the process ended with {code}')}"


def _load_all(numbers: list[int], seed: int, place: Path, kind: tuple, answers: socket.socket) -> None:
    """In a child, which never returns: an answer for each number."""
    whole, spoil, load = kind
    try:
        place.mkdir(exist_ok=True)
        noise = os.open(place / "noise", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(noise, number)
        sys.stdout = sys.stderr = open(noise, "w", buffering=1)  # noqa: SIM115
        import resource  # not on Windows

        util.quiet_pillow()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 3 * MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for number in list(numbers):
            rng, memory, said = random.Random(f"{seed} files {number}"), _peak(), os.fstat(noise).st_size
            try:
                path = spoil(whole, rng, place)
            except Exception as error:
                problem = f"in the attack: {type(error).__name__}: {error}"
            else:
                signal.alarm(HANG_S)
                problem = _outcome(load, path, noise, said, memory)
                signal.alarm(0)
            answers.sendall((json.dumps([number, problem]) + "\n").encode())
    except BaseException as error:
        print(error, file=sys.stderr)
    finally:
        os._exit(0)


def _peak() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _outcome(load: Callable[[Path], object], path: Path, noise: int, said: int, memory: int) -> str | None:
    """What is wrong with how a file was loaded; None: nothing, it was loaded, or refused in a line."""
    lines = 0
    try:
        load(path)
    except util.InputError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            return f"a long message: {str(error)[:200]!r}"
    except SystemExit:  # argparse has said it
        lines = 1
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:150]} ({Path(where.filename).name}:{where.lineno})"
    printed = os.pread(noise, 10**6, said).decode(errors="replace")
    if printed.count("\n") != lines or len(printed) > 2000:
        return f"prints {printed[:200]!r}"
    if (grown := _peak() - memory) > MOST_MEMORY:
        return f"{grown / 2**30:.1f} GiB of memory"
    if os.path.exists(Code.canary):
        os.rmdir(Code.canary)
        return "EXECUTED"
    return None


def load_files(base: Base, place: Path) -> dict[str, tuple]:
    """By kind of file: how many of them, a whole one, what spoils it, and what the program does with it."""
    Code.canary = str(place / "canary")
    image = torch.from_numpy(dataset.read_image(next(base.good.iterdir()), (32, 32)))[None]
    flags = [*map(str, conftest.SMALL), "--imageSize", "64"]
    encoder = train.PyramidFlow(train.model_config(train.parse_arguments([*flags, "--encoder", "resnet18"])))
    weights, official, picture, mask, pipeline = make_files(base, place, encoder)
    truth = partial(dataset.TestImage, picture, "hole")

    def score(path: Path) -> None:
        Scorer.load(path, "cpu", "fp32").inspect(base.image)

    def infer(path: Path) -> None:
        export.OnnxScorer(path).inspect(base.image)

    def resume(path: Path) -> None:
        content = train.stopped_run(path.parent)
        args = train.resumed_arguments(content["settings"], ["--resume", str(path.parent)])
        config, data = train.model_config(args), train.check_class(args)
        model = train.PyramidFlow(config)
        optimizer = train.make_optimizer(model, args)
        state = runs.State(args, model, optimizer, train.make_scheduler(optimizer, args, 4), data)
        state.restore(content)
        latents, logdets = model.train()(dataset.normalize(image.expand(2, -1, -1, -1)))
        train.training_loss(model, latents, logdets, args.loss, args.template).backward()
        optimizer.step()

    def initialize(path: Path) -> None:
        runs.fill_encoder(encoder, str(path))
        if not all(x.isfinite().all() for x in encoder.stem.state_dict().values()):
            raise ValueError("weights that are not finite were taken")

    def configure(path: Path) -> None:
        train.model_config(train.parse_arguments(["--config", str(path)]))

    def convert(path: Path) -> None:
        convert_official.load_official(path, "pixel", (32, 32))

    def augment(path: Path) -> None:
        dataset.Augmentation.create(str(path), "widget", (32, 32), 0)

    return {
        "checkpoint": (5, base.run / "last.pt", spoil_tensors, score),
        "state": (4, base.run / "state.pt", spoil_tensors, resume),
        "ONNX": (4, base.onnx, spoil_onnx, infer),
        "encoder weights": (2, weights, spoil_tensors, initialize),
        "configuration": (2, base.run / "config.json", spoil_text, configure),
        "official file": (2, official, spoil_tensors, convert),
        "augmentation": (1, pipeline, spoil_text, augment),
        "image": (4, picture, spoil_image, lambda path: dataset.read_image(path, (32, 32))),
        "mask": (2, mask, spoil_image, lambda path: dataset.read_mask(truth(path))),
        "roi": (1, mask, spoil_image, read_roi),
    }


def make_files(base: Base, place: Path, encoder: train.PyramidFlow) -> list[Path]:
    """Encoder weights, an official file, an image, a mask and a pipeline, all of them whole."""
    names = ("resnet18.pth", "official.npz", "picture.png", "mask.png", "pipeline.json")
    weights, official, picture, mask, pipeline = paths = [place / name for name in names]
    parts = {"0": "conv1", "1": "bn1", "4": "layer1"}
    torch.save({parts[k[0]] + k[1:]: v for k, v in encoder.stem.state_dict().items()}, weights)
    write_official(official, Scorer.load(base.run / "last.pt").model)
    Image.fromarray(base.image).save(picture)
    Image.fromarray(base.image[..., 0]).save(mask)
    pipeline.write_text(json.dumps(pipeline_content()))
    return paths


# ------------------------------------------------------------------------------- class: images


def images(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """Images that are unusual or none: predicted and trained on, in one line where they are refused."""
    cases = odd_images(Image.fromarray(base.image), base.place / "canary")
    if number // 2 >= len(cases):
        return _many(base, place, 500 if number % 2 else 5000)
    name, (make, is_good) = list(cases.items())[number // 2]
    folder = place / "data" / "widget" / "train" / "good"
    shutil.copytree(base.data, place / "data")
    path = folder / name if isinstance(name, str) else folder / os.fsdecode(name)
    make(path)
    start = time.perf_counter()
    if number % 2:
        argv = ["train", *conftest.SMALL, "--datapath", place / "data", "--saveDir", place / "runs"]
        codes = (0,) if is_good else (2,)
        ended = run([*argv, "--epochs", 1], base.place)
    else:
        ended = run(["predict", base.run, folder, "--out", place / "out", *RUNNING], base.place)
        codes = (0,) if is_good else (1,)
    problem = ended.problem(codes)
    if not problem and time.perf_counter() - start > 6 * HANG_S:
        problem = "takes too long"
    if not problem and ended.memory > MOST_MEMORY + _peak():
        problem = f"{ended.memory / 2**30:.1f} GiB"
    if not problem and (base.place / "canary").exists():
        problem = "EXECUTED"
    return f"{name!r}, {('predict', 'train')[number % 2]}: {problem}" if problem else None


def _many(base: Base, place: Path, count: int) -> str | None:
    """So many images take no more memory than a few."""
    memory, one = [], next(base.good.iterdir()).read_bytes()
    for n in (100, count):
        folder = place / f"{n}"
        folder.mkdir()
        for i in range(n):
            (folder / f"{i}.png").write_bytes(one)
        flags = ["--write", "none", "--out", place / f"out{n}", *RUNNING]
        ended = run(["predict", base.run, folder, *flags], base.place)
        if problem := ended.problem():
            return f"{n} images: {problem}"
        memory.append(ended.memory)
    grown = memory[1] - memory[0]
    return f"{count} images: {grown / 2**20:.0f} MiB more" if grown > 150 * 2**20 else None


# ------------------------------------------------------------------------------ class: silence


def silence(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """What is odd and might be overlooked is said or refused; metrics are scikit-learn's on degenerate scores."""
    if number % 3 == 2:
        return _degenerate_metrics(rng)
    cases = list(odd_data().items())
    name, (change, words) = cases[(number - number // 3) % len(cases)]
    shutil.copytree(base.data, place / "data")
    more = change(place / "data" / "widget") or []
    flags = ["--datapath", place / "data", "--saveDir", place / "runs", "--epochs", 1, *more]
    ended = run(["train", *conftest.SMALL, *flags], base.place)
    problem = ended.problem((0, 1, 2))
    if not problem and not any(word in ended.out + ended.err for word in words):
        problem = f"nothing is said of it, exit code {ended.code}"
    found = run_folder(place)
    if not problem and found:
        state = util.load_tensors(found / runs.STATE_FILE)["model"]
        problem = None if all(x.isfinite().all() for x in state.values()) else "the last state is not finite"
    return f"{name}: {problem}" if problem else None


def _degenerate_metrics(rng: random.Random) -> str | None:
    """Scores that are all equal, or of few values, infinite ranges aside: the same as scikit-learn's."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    count = rng.randint(2, 30)
    labels = torch.tensor([1, 0] + [rng.randint(0, 1) for _ in range(count)], dtype=torch.bool)
    values = rng.choice(([0.0], [0.0, 1.0], [1e-30, 1e30]))
    scores = torch.tensor([rng.choice(values) for _ in labels])
    if rng.random() < 0.5:
        scores = torch.zeros(len(labels))
    masks = labels[:, None, None].expand(-1, *dataset.MASK_SIZE)
    maps = scores[:, None, None].expand(-1, *dataset.MASK_SIZE).contiguous()
    truth = metrics.GroundTruth.from_masks(labels, masks.contiguous(), torch.device("cpu"))
    got = metrics.evaluate_maps(maps, truth, 0.3, scores)
    wanted = {
        "image_auroc": roc_auc_score(labels, scores), "image_ap": average_precision_score(labels, scores),
        "pixel_auroc": roc_auc_score(labels, scores), "pixel_ap": average_precision_score(labels, scores),
    }  # fmt: skip
    differing = [f"{k} {getattr(got, k)} for {v}" for k, v in wanted.items() if abs(getattr(got, k) - v) > 1e-6]
    return f"metrics: {', '.join(differing)}" if differing else None


# ------------------------------------------------------------------------- class: surroundings


def surroundings(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """Real processes, where something that is usually there is missing."""
    python, out = sys.executable, place / "runs"
    small = " ".join(map(str, [*conftest.SMALL, "--epochs", 1]))
    train_it = f"{python} {ROOT}/train.py {small} --datapath {base.data} --saveDir {out}"
    predict_it = f"{python} {ROOT}/predict.py {base.run} {base.test} --out {place}/out --gpu cpu"
    demo = f"{python} {ROOT}/demo.py --dataOnly --out {place}/demo"
    umlauts = place / "dätä"
    shutil.copytree(base.data / "widget", umlauts / "Würfel")
    cases = {
        "no HOME": (f"env -u HOME {train_it}", 0), "empty environment": (f"env -i {predict_it}", 0),
        "HOME that is not there": (f"HOME=/nowhere XDG_CACHE_HOME=/nowhere {train_it}", 0),
        "closed stdout": (f"{train_it} >&-", 0), "closed stderr": (f"{train_it} 2>&-", 0),
        "closed stdin, stdout and stderr": (f"{predict_it} <&- >&- 2>&-", 0),
        "| head -1": (f"{train_it} | head -1; test ${{PIPESTATUS[0]}} -eq 141 -o ${{PIPESTATUS[0]}} -eq 0", 0),
        "| head -1, prediction": (f"{predict_it} | head -1", 0),
        "locale C": (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii {train_it} "
                     f"--cls Würfel --datapath {umlauts}", 0),
        "another folder": (f"cd {place} && {python} {os.path.relpath(ROOT, place)}/train.py {small} --datapath "
                           f"{os.path.relpath(base.data, place)} --saveDir runs", 0),
        "one thread": (f"OMP_NUM_THREADS=1 {train_it} --numWorkers 1", 0),
        "two demos at once": (f"{demo} & {demo} && wait $!", 0),
        "read-only source": (f"{_read_only_source(place)} && {python} {place}/source/train.py "
                             f"{small} --datapath {base.data} --saveDir {out}; code=$?; umount -l {place}/source; "
                             "exit $code", 0),
    }  # fmt: skip
    name, (command, code) = list(cases.items())[number % len(cases)]
    done = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, check=False, timeout=LIMIT_S)
    ended = Ended(done.returncode, *(text.decode(errors="replace") for text in (done.stdout, done.stderr)))
    problem = ended.problem((code,)) or torn(place)
    if not problem and name == "two demos at once" and len(list((place / "demo").rglob("*.png"))) != 144:
        problem = "not 144 images"
    return f"{name}: {problem}" if problem else None


def _read_only_source(place: Path) -> str:
    copy = place / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "demo_data", "saveDir", "tests", "docs"))
    (place / "source").mkdir()
    return f"mount --bind {copy} {place}/source && mount -o remount,bind,ro {place}/source"


# ------------------------------------------------------------------------------- class: tables


def tables(base: Base, rng: random.Random, number: int, place: Path) -> str | None:
    """reproduce.py: two at once, a damaged job, a job that always fails, and one that outlived a kill."""
    command, out = first(base, "reproduce", place), place / "out"
    base.whole("reproduce")
    name = ("two at once", "a damaged job", "a job that fails", "an orphan")[number % 4]
    if name == "two at once":
        out.mkdir()
        with (out / "lock").open("a") as file:
            util.lock(file)
            ended = run(command, base.place)
        problem = ended.problem((2,))
    elif name == "a damaged job":
        shutil.copytree(base.whole("reproduce") / "out", out)
        job = next((out / "jobs").iterdir())
        for path in (*job.glob("*/result.json"), *job.glob("*/state.pt")):
            if path.name == "result.json" or rng.random() < 0.5:
                path.write_bytes(spoil_bytes(path.read_bytes(), rng)[: path.stat().st_size // 2])
        problem = run(command, base.place).problem() or different(base, "reproduce", place)
    elif name == "a job that fails":
        data = place / "data"
        shutil.copytree(base.data, data)
        shutil.copytree(base.data / "widget", data / "broken")
        (data / "broken" / "train" / "good" / "000.png").write_text("no image")
        at = command.index("--classes")
        command[at + 1 : at + 2] = ["broken", "widget"]
        command[command.index("--datapath") + 1] = data
        ended = run(command, base.place)
        table = (out / "table3" / "table.md").read_text()
        problem = ended.problem((1,))
        if not problem and ("000.png" not in table or "| widget |" not in table):
            problem = "the table does not say which and why"
    else:
        orphan = partial(send, after=0.7 * base.seconds["reproduce"], number=signal.SIGKILL)
        run(command, base.place, orphan)
        problem = run(command, base.place).problem() or different(base, "reproduce", place)
    return f"{name}: {problem}" if problem else None


# -------------------------------------------------------------------------------------- the script

ATTACKS = {
    "kills": kills, "disks": disks, "images": images, "silence": silence, "surroundings": surroundings,
    "tables": tables,
}  # fmt: skip


def attack(name: str, base: Base, seed: int, numbers: list[int]) -> Iterator[tuple[int, str | None]]:
    """What went wrong in each attack of a class, None if nothing did."""
    place = base.place / "attack"
    if name == "files":
        place.mkdir()
        yield from files(base, seed, numbers, place)
        shutil.rmtree(place)
        return
    for number in numbers:
        place.mkdir()
        try:
            yield number, ATTACKS[name](base, random.Random(f"{seed} {name} {number}"), number, place)
        except SkipError as reason:
            print(f"{name} {number}: skipped, {reason}", flush=True)
        except Exception as error:
            traceback.print_exc()
            yield number, f"{type(error).__name__} in the attack: {error}"
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = util.Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=COUNTS, default=list(COUNTS), help="classes of attacks")
    parser.add_argument("--scale", type=util.number(0, above=True), default=1.0, help="of the number of attacks")
    parser.add_argument("--seed", type=util.whole_number(0), default=0)
    parser.add_argument("--number", type=util.whole_number(0), help="only this attack of --only")
    args = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # a process that forks has one thread
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        base = Base(Path(folder))
        for name in args.only:
            count, start = max(1, round(COUNTS[name] * args.scale)), time.monotonic()
            numbers = list(range(count)) if args.number is None else [args.number]
            tried = survived = 0
            for number, problem in attack(name, base, args.seed, numbers):
                tried, survived = tried + 1, survived + (problem is None)
                if problem:
                    repeat = f"--only {name} --seed {args.seed} --number {number}"
                    print(f"FAILED {problem}\n       python tests/attack.py {repeat}", flush=True)
            rows.append((name, tried, survived))
            failed += tried - survived
            duration = timedelta(seconds=round(time.monotonic() - start))
            print(f"{name}: {survived} of {tried} survived, {duration}", flush=True)
    print("\n" + util.markdown_table(("class of attack", "tried", "survived"), rows))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
