"""Whether a change made a step or inference slower: an old tree against this one, taking turns in one run.

    git worktree add /tmp/before HEAD~1
    python -m benchmarks.compare /tmp/before --model fnf res18

Each tree has its own process.  Both do a training step, with and without memory saving, or inference on the same
images, at --precision; a ratio is the median of the paired ratios of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from benchmarks import measuring
from util import PRECISIONS, InputError, choose_precision, markdown_table, run_script

JOBS = ("step, memory saving", "step, no saving", "inference")
HERE = Path(__file__).absolute().parent.parent


def main() -> None:
    parser = measuring.make_parser(__doc__)
    parser.add_argument("tree", type=Path, help="another checkout of this repository")
    models = sorted(measuring.DEFAULT_MODELS)
    parser.add_argument("--model", nargs="+", choices=models, default=models, help="default models")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    args = parser.parse_args()
    if not (args.tree / "train.py").is_file():
        parser.error(f"{args.tree} has no train.py; choose another checkout of this repository")
    device = measuring.prepare(args)
    measuring.report(args.out, "compare", device, compare(args, device))


def compare(args: argparse.Namespace, device: torch.device) -> str:
    """Markdown of both trees' times."""
    precision, rows = choose_precision(args.precision, device), []
    for model, job in itertools.product(args.model, JOBS):
        times = [[], []]
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(tree, model, job, precision, str(device))) for tree in (args.tree, HERE)
            ]
            for round_ in range(args.repeats + 1):
                for i in (1, 0) if round_ % 2 else (0, 1):
                    times[i].append(workers[i].seconds())
        old, new = (seconds[1:] for seconds in times)  # the first round warms up
        ratios = [a / b for a, b in zip(new, old, strict=True)]
        cells = [f"{median(old):.4g}", f"{median(new):.4g}", f"{median(ratios):.3f}"]
        rows.append([model, job, *cells, f"{min(ratios):.3f} to {max(ratios):.3f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    return f"""\
Seconds of a training step, optimizer included, and of inference per image, {precision}; medians of
{args.repeats} rounds in which both trees take turns. New / old: the median of paired ratios, and their range;
below 1 the new tree is faster.

{markdown_table(["model", "job", "old (s)", "new (s)", "new / old", "range"], rows)}"""


class Worker:
    """A process that does one job in one tree, as often as it is asked to."""

    def __init__(self, tree: Path, *job: str):
        self._what = f"{tree}: {', '.join(job)}"
        command = [sys.executable, HERE / "benchmarks" / "worker.py", tree.absolute(), *job]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(list(map(str, command)), **pipes)

    def seconds(self) -> float:
        """Do it once.

        Raises:
            InputError: the process ended; it has said why.
        """
        try:
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            raise InputError(f"{self._what}: failed as said above; choose another tree") from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None:  # it may be in the middle of a job
            self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    run_script(main)
