"""One side of benchmarks.compare: does a job in the tree it is given, once for each line of its stdin.

Nothing of this tree is imported at the top: the modules are those of the tree that is measured.
"""

import sys
import time
from pathlib import Path

import torch


def main() -> None:
    tree, model, job, precision, gpu = sys.argv[1:]
    sys.path[0], device = tree, torch.device(gpu)
    find = present_job if (Path(tree) / "benchmarks").is_dir() else job_of_92cfed0
    run, num_images = find(model, job, precision, device)
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    for _ in sys.stdin:
        wait()
        start = time.perf_counter()
        run()
        wait()
        print((time.perf_counter() - start) / num_images, flush=True)


def present_job(model: str, job: str, precision: str, device: torch.device):
    """What does the job once, and the number of images by which its time is divided."""
    from benchmarks.speed import Inference, TrainingStep
    from util import keep_freed_memory

    keep_freed_memory()
    if job == "inference":
        run = Inference(model, precision, device)
        return run, run.num_images
    return TrainingStep(model, precision, job == "step, memory saving", device), 1


def job_of_92cfed0(model: str, job: str, precision: str, device: torch.device):
    """The same in the layout of that commit, whose benchmark starts from normalized images."""
    from benchmark_speed import Case, Inference, TrainingStep
    from hardware import keep_freed_memory
    from loading import normalise

    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    case = Case(model, precision, job == "step, memory saving")
    work = Inference(model, precision, device) if job == "inference" else TrainingStep(case, device)
    images = (64 * work._images + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    def run() -> None:
        work._images = normalise(images)
        work()

    return run, work.num_images if job == "inference" else 1


if __name__ == "__main__":
    main()
