"""Many trainings: one after the other, side by side on several GPUs, or on a Slurm cluster.

    python jobs.py FOLDER FLAGS...   # one of them: train.py with these flags, unless FOLDER has the result

A job whose result is there is not run again.  One that fails or is killed is tried once more, from where it
stopped; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from metrics import METRICS
from runs import RESULT_FILE, STATE_FILE
from util import InputError, first_line, lock, run_script

ROOT = Path(__file__).parent
ATTEMPTS = 2
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 120.0  # a step of a large model on a CPU; the signal is seen after it
SLURM_MINUTES = 24 * 60


@dataclass
class Job:
    """One training, by train.py with the flags; the run's folder is made in the job's own."""

    name: str
    flags: list[str]
    folder: Path
    attempts: int = field(default=0, compare=False)

    @property
    def log(self) -> Path:
        return self.folder / "output.txt"

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "jobs.py"), str(self.folder), *self.flags]

    def training_flags(self) -> list[str]:
        """The flags of train.py that start the training, or resume the newest whole state of it."""
        states = self.folder.glob(f"*/{STATE_FILE}")
        for path in sorted(states, key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(InputError):  # damaged, or of another version
                train.stopped_run(path.parent)
                return ["--resume", str(path.parent)]
        return [*self.flags, "--saveDir", str(self.folder)]

    def result(self) -> dict | None:
        """The finished run's result.json, with its `folder`; a damaged one does not count."""
        for path in sorted(self.folder.glob(f"*/{RESULT_FILE}")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                result = json.loads(path.read_text(encoding="utf-8"))
                epochs = [result["last"], *(row for name, row in result.items() if name.startswith("best_"))]
                if all(map(_is_whole, epochs)):
                    return {**result, "folder": path.parent}
        return None

    def is_running(self) -> bool:
        """Whether a process works on the job: one that an earlier start left, or one started by hand."""
        return _is_locked(self.log) or any(map(_is_locked, self.folder.glob("*/log.txt")))

    def reason(self) -> str:
        """Why it failed: the last line of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def _is_whole(row: dict) -> bool:
    """Whether it is an epoch's part of a result.json."""
    numbers = [row[name] for name in METRICS]
    return {"score", "epoch"} <= row.keys() and all(isinstance(x, (float, int, type(None))) for x in numbers)


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("a") as file:
        return not lock(file)


def run_job(job: Job) -> None:
    """Run the job in this process, which keeps its log locked; a process that is at it is waited for."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as file:
        while not lock(file) or any(map(_is_locked, job.folder.glob("*/log.txt"))):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        if job.result() is None:
            flags = job.training_flags()
            if flags[0] == "--resume":  # a damaged result would make it a finished run
                (Path(flags[1]) / RESULT_FILE).unlink(missing_ok=True)
            sys.argv = ["train.py", *flags]
            run_script(train.main)


@dataclass(frozen=True)
class Machines:
    """Where jobs run.

    Attributes:
        gpus: the GPUs to use, as in CUDA_VISIBLE_DEVICES; empty: the CPU.
        jobs: how many at once; 0: one on each GPU, one on the CPU, all on a cluster.
        slurm: sbatch's options, partition=gpu and the like; None: this machine.
    """

    gpus: tuple[str, ...] = ()
    jobs: int = 0
    slurm: dict[str, str] | None = None

    def places(self, num_jobs: int) -> list[str | None]:
        """The GPU of each job that runs at the same time; None: no matter which, or the CPU."""
        if self.slurm is not None:
            return [None] * (self.jobs or num_jobs)
        if not self.gpus:
            return [None] * max(1, self.jobs)
        return [self.gpus[i % len(self.gpus)] for i in range(self.jobs or len(self.gpus))]


def run_jobs(
    jobs: Sequence[Job], machines: Machines, folder: Path, report: Callable[[Job, str], None],
    check: Callable[[], None] = lambda: None,
) -> list[Job]:  # fmt: skip
    """Run what has no result yet; the jobs that failed.

    Args:
        folder: for Slurm's files.
        check: called now and then, may raise KeyboardInterrupt.
        report: told of every job that "starts", is "done", "failed, once more: ..." or "failed: ...".

    Raises:
        InputError: there is no Slurm, or it does not know an option.
        KeyboardInterrupt: after the running jobs have stopped.
    """
    waiting, running, failed = deque(job for job in jobs if job.result() is None), [], []
    if not waiting:
        return []
    free = deque(machines.places(len(waiting)))
    submit = slurm(machines.slurm, folder) if machines.slurm is not None else this_machine(len(free))
    try:
        while waiting or running:
            start(waiting, free, running, submit, report)
            check()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for job, place, process in [entry for entry in running if entry[-1].done()]:
                running.remove((job, place, process))
                free.append(place)
                if job.result() is not None:
                    report(job, "done")
                    continue
                again = job.attempts < ATTEMPTS
                report(job, f"failed{', once more' * again}: {job.reason()}")
                (waiting if again else failed).append(job)
    finally:
        for *_, process in running:
            process.cancel()
        for *_, process in running:
            if isinstance(process, Process):
                process.finish()
    return failed


def start(waiting: deque, free: deque, running: list, submit: Callable, report: Callable) -> None:
    """Move jobs from `waiting` to `running`, as (job, place, process), while there are places."""
    while waiting and free:
        job = waiting[0]
        what = "is running since an earlier start; waiting for it" if job.is_running() else "starts"
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            process = submit(job, free[0])
        except InputError:
            if not running:
                raise
            return  # a cluster that takes no more for now
        job.attempts += 1
        running.append((waiting.popleft(), free.popleft(), process))
        report(job, what)


class Process(subprocess.Popen):
    """A job on this machine, in a session of its own: Ctrl-C reaches it once, from here."""

    def __init__(self, job: Job, environment: dict[str, str]):
        self._log = job.log
        with job.log.open("a") as file:
            super().__init__(
                job.command(), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def done(self) -> bool:
        if self.poll() is None:
            return False
        if self.returncode < 0:  # it had no last words
            with self._log.open("a") as file:
                file.write(f"killed by signal {-self.returncode}\n")
        return True

    def cancel(self) -> None:
        self.terminate()

    def finish(self) -> None:
        try:
            self.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.kill()


def this_machine(num_places: int) -> Callable[[Job, str | None], Process]:
    """What starts a job on a GPU; the threads are shared out among the jobs at once."""

    def submit(job: Job, gpu: str | None) -> Process:
        threads = str(max(1, torch.get_num_threads() // num_places))
        own = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu or ""}
        # Idle threads make room for the other jobs.
        return Process(job, {"GOMP_SPINCOUNT": "1000", **os.environ, **own})

    return submit


def slurm(options: dict[str, str], folder: Path) -> Callable:
    """What submits a job to Slurm.

    Raises:
        InputError: submitit is missing, or there is no Slurm here, or it does not know an option.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError(f"--slurm needs the package {error.name}: pip install submitit") from None

    class Training(submitit.helpers.Checkpointable, submitit.helpers.CommandFunction):
        """Where Slurm takes the machine away, it is submitted again, and resumes where it stopped."""

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(**slurm_parameters(options))
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise InputError(f"--slurm: {first_line(error)}") from None

    def submit(job: Job, _):
        try:
            return executor.submit(Training(job.command()))
        except submitit.core.utils.FailedJobError as error:
            raise InputError(f"--slurm: {first_line(error)}") from None

    return submit


def slurm_parameters(options: dict[str, str]) -> dict[str, object]:
    """submitit's names for sbatch's options; `time` in minutes."""
    options = {key.replace("-", "_"): value for key, value in options.items()}
    minutes = int(options.pop("time", SLURM_MINUTES))
    return {"timeout_min": minutes, **{f"slurm_{key}": value for key, value in options.items()}}


def shown(command: Sequence[str]) -> str:
    """A command, as it can be pasted into a shell."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    run_job(Job("", sys.argv[2:], Path(sys.argv[1])))
