"""Many trainings: one after the other, side by side on several GPUs, or on a Slurm cluster, through submitit.

A job whose result is there is not run again.  One that fails or is killed is tried once more, from where it
stopped; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from run import RESULT_FILE, STATE_FILE
from util import InputError, lock

ROOT = Path(__file__).parent
ATTEMPTS = 2
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 120.0
SLURM_MINUTES = 24 * 60
LOCAL_MINUTES = 30 * 24 * 60  # submitit would stop a local job after five
INSTALL = "pip install submitit"


@dataclass
class Job:
    """One training.

    Attributes:
        name: of the job, for people.
        flags: of train.py.
        folder: of the job's own; the run's folder is made in it.
        attempts: so far.
    """

    name: str
    flags: list[str]
    folder: Path
    attempts: int = field(default=0, compare=False)

    def command(self) -> list[str]:
        """Start, or go on where an earlier try stopped."""
        stopped = sorted(self.folder.glob(f"*/{STATE_FILE}"), key=lambda path: path.stat().st_mtime)
        flags = (
            ["--resume", str(stopped[-1].parent)]
            if stopped
            else [*self.flags, "--saveDir", str(self.folder)]
        )
        return [sys.executable, str(ROOT / "train.py"), *flags]

    @property
    def log(self) -> Path:
        return self.folder / "output.txt"

    def run_folder(self) -> Path | None:
        """Where the result is, if there is one."""
        return next((path.parent for path in self.folder.glob(f"*/{RESULT_FILE}")), None)

    def result(self) -> dict | None:
        folder = self.run_folder()
        return None if folder is None else json.loads((folder / RESULT_FILE).read_text())


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
    jobs: Sequence[Job], machines: Machines, folder: Path, report: Callable[[Job, str], None]
) -> list[Job]:
    """Run what has no result yet; the jobs that failed.

    Args:
        folder: for submitit's files.
        report: told of every job that "starts", is "done", "failed", or "failed, once more".

    Raises:
        InputError: submitit is missing, or does not know an option.
        KeyboardInterrupt: after the running jobs have stopped.
    """
    waiting = deque(job for job in jobs if job.result() is None)
    if not waiting:
        return []
    places = machines.places(len(waiting))
    free, running, failed = deque(range(len(places))), {}, []
    submit = _submitter(machines, folder, threads=max(1, torch.get_num_threads() // len(places)))
    try:
        while waiting or running:
            while waiting and free:
                place = free.popleft()
                try:
                    handle = submit(waiting[0], places[place])
                except InputError:
                    if not running:
                        raise
                    free.append(place)  # a cluster that takes no more for now
                    break
                running[place] = waiting.popleft(), handle
                report(running[place][0], "starts")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for place, (job, handle) in list(running.items()):
                if not handle.done():
                    continue
                del running[place]
                free.append(place)
                if job.result() is not None:
                    report(job, "done")
                elif job.attempts < ATTEMPTS:
                    report(job, "failed, once more")
                    waiting.append(job)
                else:
                    report(job, "failed")
                    failed.append(job)
    finally:
        for _, handle in running.values():
            handle.cancel()
        for job, _ in running.values():
            _wait_until_stopped(job)
    return failed


def _wait_until_stopped(job: Job) -> None:
    """A training that was told to stop finishes its step and saves."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    for path in job.folder.glob("*/log.txt"):
        while time.monotonic() < deadline:
            with path.open("a") as file:
                if lock(file):
                    break
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _submitter(machines: Machines, folder: Path, threads: int):
    try:
        import cloudpickle
        import submitit
    except ImportError as error:
        raise InputError(f"running the jobs needs the package {error.name}: {INSTALL}") from None
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the job may not find this file
    on_slurm = machines.slurm is not None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm" if on_slurm else "local")
        parameters = slurm_parameters(machines.slurm) if on_slurm else {"timeout_min": LOCAL_MINUTES}
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:  # no Slurm here, an unknown option
        raise InputError(f"--slurm: {str(error).splitlines()[0]}") from None

    def submit(job: Job, gpu: str | None):
        job.folder.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = str(threads)
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads make room for the other jobs
        environment["CUDA_VISIBLE_DEVICES"] = gpu or ""
        try:
            with _sigint_reaches_children():
                handle = executor.submit(_Training(job, None if on_slurm else environment))
        except submitit.core.utils.FailedJobError as error:
            raise InputError(f"--slurm: {str(error).splitlines()[0]}") from None
        job.attempts += 1
        return handle

    return submit


@contextlib.contextmanager
def _sigint_reaches_children():
    """Where SIGINT is ignored (`nohup ... &`), so would be what stops a job: children inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def slurm_parameters(options: dict[str, str]) -> dict[str, object]:
    """submitit's names for sbatch's options; `time` in minutes."""
    options = {key.replace("-", "_"): value for key, value in options.items()}
    minutes = int(options.pop("time", SLURM_MINUTES))
    return {"timeout_min": minutes, **{f"slurm_{key}": value for key, value in options.items()}}


class _Training:
    """Runs a job in a process of its own; what the training prints goes to the job's log."""

    def __init__(self, job: Job, environment: dict[str, str] | None):
        self.job, self.environment = job, environment

    def __call__(self) -> int:
        process = None
        try:
            if self.environment is not None:  # Slurm's signals are submitit's
                for number in (signal.SIGINT, signal.SIGTERM):  # before there is anything to stop
                    signal.signal(number, _stop)
            with open(self.job.log, "a", encoding="utf-8") as file:
                # In a session of its own, so that Ctrl-C reaches it once: from here, as a request to stop.
                process = subprocess.Popen(
                    self.job.command(), stdout=file, stderr=subprocess.STDOUT, env=self.environment,
                    start_new_session=True,
                )  # fmt: skip
            return process.wait()
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()

    def checkpoint(self):
        """Slurm takes the machine away: the job is submitted again, and goes on where it stopped."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _stop(number, frame) -> None:
    raise KeyboardInterrupt


def shown(command: Sequence[str]) -> str:
    """As it can be pasted into a shell."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
