"""How fast training, evaluation and inference are, and what each precision does to the numbers.

    python -m benchmarks.speed step       # training step and inference in every precision; the convolutions alone
    python -m benchmarks.speed epoch      # a whole epoch on a data set of MVTec's size, by its parts
    python -m benchmarks.speed bank       # scoring by K templates against the paper's one: time, memory, file
    python -m benchmarks.speed precision --checkpoint saveDir/screw-.../last.pt --datapath DATA  # against float64

Tables are printed and written with hardware, versions and date: to a new folder, to --out, or by --record over
those in benchmarks/records/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import train
from benchmarks import measuring
from benchmarks.measuring import BATCH, MIB
from dataset import Images, normalize, open_class, training_order
from kernels import MEMORY_FORMAT
from metrics import METRICS, evaluate_maps, metric_labels
from model import PyramidFlow, PyramidFlowConfig, coupling_schedule, training_loss
from scorer import ScoreOptions, Scorer, TestSet, batch_size, lay_out
from util import (
    PRECISIONS,
    Clock,
    InputError,
    StopSignals,
    apply_precision,
    choose_precision,
    markdown_table,
    percent,
    progress,
    run_script,
    size_text,
)

GENERATED_CLASS, GENERATED_SIDE = "generated", 1024
NUM_TRAIN, NUM_TEST_GOOD, NUM_TEST_DEFECTIVE = 320, 41, 119  # as MVTec's screw
NUM_TEMPLATES = (1, 4, 16, 64)
EPOCH_FLAGS = ["--augment", "none", "--numLayer", "4"]


def main() -> None:
    parser = measuring.make_parser(__doc__)
    add = parser.add_argument
    add("what", choices=("step", "bank", "epoch", "precision"))
    models = sorted(measuring.DEFAULT_MODELS)
    add("--model", nargs="+", choices=models, default=["fnf"], help="step, bank, epoch: default models")
    add("--precision", nargs="+", choices=PRECISIONS, default=["auto"], help="epoch: one by one")
    add("--datapath", type=Path, help="epoch, precision: a real data set; without it epoch makes one")
    add("--cls", help="epoch, precision: its class")
    add("--checkpoint", type=Path, help="precision: a trained model")
    args = parser.parse_args()
    if args.what == "precision" and not (args.checkpoint and args.datapath):
        parser.error("precision needs --checkpoint and --datapath")
    if args.what == "epoch" and args.datapath and not args.cls:
        parser.error("epoch with --datapath needs --cls")
    benchmark = {
        "step": measure_steps,
        "bank": measure_banks,
        "epoch": measure_epochs,
        "precision": measure_errors,
    }
    benchmark[args.what](args, measuring.prepare(args))


# --------------------------------------------------------------------------------------- step


def measure_steps(args: argparse.Namespace, device: torch.device) -> None:
    """Training step with and without memory saving, inference, memory, and the convolutions alone."""
    precisions = precisions_of(device)
    for name in args.model:
        config = measuring.DEFAULT_MODELS[name]
        steps = {(p, s): TrainingStep(name, p, s, device) for p in precisions for s in (True, False)}
        scores = {(p, "score"): Inference(name, p, device) for p in precisions}
        floors = {(p, "floor"): convolution_floor(config, p, device) for p in precisions}
        memory = {case: step.memory() for case, step in steps.items()}
        times = measuring.interleaved_times({**steps, **scores, **floors}, args.repeats, device)
        num_images = scores["fp32", "score"].num_images
        measuring.report(args.out, f"step-{name}", device, step_table(name, times, memory, num_images))


def precisions_of(device: torch.device) -> tuple[str, ...]:
    return ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")


class TrainingStep:
    """An epoch of train.py that has one batch."""

    def __init__(self, name: str, precision: str, save_memory: bool, device: torch.device):
        torch.manual_seed(0)
        config = replace(measuring.DEFAULT_MODELS[name], save_memory=save_memory)
        self._precision, self._device = precision, device
        self._model = PyramidFlow(config).to(device)
        args = train.parse_arguments(["--saveMemory", str(save_memory)])
        optimizer = train.make_optimizer(self._model, args)
        scheduler = train.make_scheduler(optimizer, args, steps=1)
        batches = tqdm([random_images(BATCH, config, device)], disable=True)
        self._rest = optimizer, scheduler, batches, args, StopSignals()

    def __call__(self) -> None:
        network = self._model.compute_networks_in(apply_precision(self._precision))
        train.train_one_epoch(network, network, *self._rest)

    def memory(self) -> int:
        """Bytes: peak of living tensors in a step, without weights, optimizer and gradients."""
        self()
        return measuring.step_memory(self, self._model.flow, self._device)


class Inference:
    """Anomaly maps of one batch, as large as evaluation takes it."""

    def __init__(self, name: str, precision: str, device: torch.device, num_template: int | None = None):
        torch.manual_seed(0)
        config, self._precision = measuring.DEFAULT_MODELS[name], precision
        model = PyramidFlow(config).to(device).eval()
        for block in model.flow:  # zero at first, and atan() of zeros is slower than of others
            block.affine.conv2.reset_parameters()
        self.num_images = batch_size(config, device)
        self._images = random_images(self.num_images, config, device)
        sizes = [config.level_size(i) for i in range(config.num_level)]
        template = tuple(torch.zeros(1, config.channels, *size, device=device) for size in sizes)
        self.scorer = Scorer(model, template)
        if num_template is not None:  # a bank's cost does not depend on what is in it
            self.scorer.templates = tuple(
                lay_out(torch.randn(num_template, *t.shape[1:], device=device)) for t in template
            )
            self.scorer.num_typical = max(1, num_template // 2)
            self.scorer.sigma = tuple(torch.ones(config.channels, device=device) for _ in template)
            options = ScoreOptions("bank")
            self.scorer.smooth, self.scorer.image_score = options.smooth, options.image_score

    def __call__(self) -> Tensor:
        torch.backends.cudnn.benchmark = False  # as train.evaluate
        self.scorer.model.compute_networks_in(apply_precision(self._precision))
        return self.scorer.score(self._images)


def random_images(count: int, config: PyramidFlowConfig, device: torch.device) -> Tensor:
    return torch.randint(256, (count, *config.image_size, 3), dtype=torch.uint8, device=device)


def convolution_floor(config: PyramidFlowConfig, precision: str, device: torch.device) -> Callable[[], None]:
    """The official program's k x k convolutions of one step without memory saving, and nothing else:
    forward, gradients of input and of kernel; same precision and layout, each at its full size."""
    dtype = apply_precision(precision) or torch.float32
    k, prepared = config.kernel_size, {}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).to(memory_format=MEMORY_FORMAT)

    for in_channels, out_channels, size in set(official_convolutions(config)):
        x, weight = random(BATCH, in_channels, *size), random(out_channels, in_channels, k, k)
        grad = random(BATCH, out_channels, *size)
        prepared[in_channels, out_channels, size] = x.requires_grad_(), weight.requires_grad_(), grad

    def floor() -> None:
        apply_precision(precision)  # sets cuDNN's switch for TF32
        torch.backends.cudnn.benchmark = True
        for shape in official_convolutions(config):
            x, weight, grad = prepared[shape]
            torch.autograd.grad(F.conv2d(x, weight, padding=k // 2), (x, weight), grad)

    return floor


def official_convolutions(config: PyramidFlowConfig) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(input channels, output channels, size) of each convolution of a forward pass."""
    for kind, level in coupling_schedule(config.num_level) * config.num_stack:
        sources, at = {"up": (1, level), "down": (1, level), "dual": (2, level + 1)}[kind]
        size, width = config.level_size(at), 2 * config.channels
        yield sources * config.channels, width, size
        yield width, width, size


def step_table(name: str, times: dict, memory: dict, num_images: int) -> str:
    """Markdown of the measurements by (precision, memory saving or "score" or "floor")."""
    rows = []
    for (precision, saving), num_bytes in memory.items():
        seconds = times[precision, saving]
        ratios = [measuring.median_ratio(seconds, times[precision, other]) for other in ("floor", False)]
        rate = num_images / median(times[precision, "score"])
        cells = [f"{median(seconds):.4g}", *(f"{ratio:.2f}" for ratio in ratios)]
        saving = "on" if saving else "off"
        rows.append([precision, saving, *cells, f"{num_bytes / MIB:.0f}", f"{rate:.4g}"])
    header = ["precision", "memory saving", "step (s)", "/ floor", "/ without saving", "MiB"]
    floors = [f"{p} {median(times[p, 'floor']):.4g} s" for p, kind in times if kind == "floor"]
    size = size_text(measuring.DEFAULT_MODELS[name].image_size)
    return f"""\
Training step of {name}, {size}, batch {BATCH}, optimizer included; medians of {len(seconds)} interleaved
rounds, ratios are medians of paired ratios. Floor: the official program's k x k convolutions alone,
forward and backward, same precision and layout. Memory: peak of living tensors without weights, their
gradients and the optimizer. Inference to the anomaly map, in batches of {num_images}.

{markdown_table([*header, "inference (images/s)"], rows)}

Floor: {", ".join(floors)}."""


# --------------------------------------------------------------------------------------- bank


def measure_banks(args: argparse.Namespace, device: torch.device) -> None:
    """Scoring by K templates against the paper's score: time per image, memory of the templates, file."""
    for name in args.model:
        precision = choose_precision("auto", device)
        cases = {"paper": Inference(name, precision, device)}
        cases |= {k: Inference(name, precision, device, k) for k in NUM_TEMPLATES}
        times = measuring.interleaved_times(cases, args.repeats, device)
        rows = []
        for case, inference in cases.items():
            seconds = median(times[case]) / inference.num_images
            ratio = measuring.median_ratio(times[case], times["paper"])
            memory = sum(t.nbytes for t in inference.scorer.templates) / MIB
            rows.append(
                [case, f"{1000 * seconds:.0f}", f"{ratio:.2f}", f"{memory:.0f}", f"{_file_size(inference):.0f}"]
            )
        header = ["templates", "ms per image", "/ paper", "templates in memory (MiB)", "file (MiB)"]
        about = f"{name}, {precision}, batches of {cases['paper'].num_images}, medians of {args.repeats} rounds."
        measuring.report(args.out, f"bank-{name}", device, f"{about}\n\n{markdown_table(header, rows)}\n")


def _file_size(inference: Inference) -> float:
    """MiB of the scorer's file."""
    with tempfile.TemporaryDirectory() as folder:
        inference.scorer.save(Path(folder) / "a.pt")
        return (Path(folder) / "a.pt").stat().st_size / MIB


# -------------------------------------------------------------------------------------- epoch


def measure_epochs(args: argparse.Namespace, device: torch.device) -> None:
    """A whole epoch as train.py runs it, on a real class or a generated one."""
    with tempfile.TemporaryDirectory() as temporary:
        datapath, name = args.datapath, args.cls
        if datapath is None:
            datapath, name = Path(temporary), GENERATED_CLASS
            generate_class(datapath / name)
        for model in args.model:
            flags = ["--encoder", measuring.DEFAULT_MODELS[model].encoder, "--cls", name, *EPOCH_FLAGS]
            table = epoch_table([*flags, "--datapath", str(datapath)], args.precision, device)
            measuring.report(args.out, f"epoch-{model}", device, table)


def epoch_table(flags: list[str], precisions: list[str], device: torch.device) -> str:
    """Seconds of an epoch's parts in each precision.

    Args:
        flags: of train.py.
    """
    args = train.parse_arguments(flags)
    asked = (argparse.Namespace(**{**vars(args), "precision": p}) for p in precisions)
    settled = {args.precision: args for args in (train.settle(args, device) for args in asked)}
    config, data, clock = train.model_config(args), train.check_class(args), Clock(device)
    with clock.part("reading"):
        settings = config.image_size, args.cache, device, args.numWorkers, "training images"
        train_set = Images(data.train, *settings)
        test_set = TestSet.load(data, config, args.cache, args.numWorkers, device)
    columns = {p: one_epoch(args, train_set, test_set, device) for p, args in settled.items()}
    saving = ", ".join(f"{p} {'on' if args.saveMemory else 'off'}" for p, args in settled.items())
    parts = next(iter(columns.values()))
    rows = [[part, *(f"{column[part]:.2f}" for column in columns.values())] for part in parts]
    return f"""\
One epoch on class {data.name}: {len(data.train)} training images in batches of {BATCH}, template and thresholds,
{len(data.test)} test images, metrics; encoder {config.encoder}, {config.num_level} levels, {config.volume_norm},
memory saving: {saving}.  Seconds by precision.

{markdown_table(["part", *columns], rows)}

Before the first epoch, reading and resizing all images: {clock.seconds["reading"]:.1f} s.
Peak resident memory of the process: {measuring.peak_resident() / 2**30:.2f} GiB."""


def one_epoch(
    args: argparse.Namespace, train_set: Images, test_set: TestSet, device: torch.device
) -> dict[str, float]:
    """The parts' seconds, with random weights, which are as fast as others."""
    torch.manual_seed(0)
    model = PyramidFlow(train.model_config(args)).to(device)
    model.compute_networks_in(apply_precision(args.precision))
    order = training_order(len(train_set), args.batchSize)
    optimizer = train.make_optimizer(model, args)
    scheduler = train.make_scheduler(optimizer, args, len(order))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    with clock.part("training"):
        batches = progress(train_set.batches(order), "training", len(order))
        train.train_one_epoch(model, model, optimizer, scheduler, batches, args, StopSignals())
    train.evaluate(model, train_set, test_set, args, clock)
    parts = {**clock.seconds, "whole epoch": sum(clock.seconds.values())}
    if device.type == "cuda":
        parts["peak GPU memory (GiB)"] = torch.cuda.max_memory_allocated(device) / 2**30
    return parts


def generate_class(folder: Path) -> None:
    """A class of as many images as MVTec's screw, 1024x1024, smooth with a dark square for a defect."""
    size = (GENERATED_SIDE, GENERATED_SIDE)
    counts = {"train/good": NUM_TRAIN, "test/good": NUM_TEST_GOOD, "test/square": NUM_TEST_DEFECTIVE}
    for part in (*counts, "ground_truth/square"):
        (folder / part).mkdir(parents=True)

    def make(image: tuple[str, int]) -> None:
        part, i = image
        rng = np.random.default_rng([list(counts).index(part), i])
        coarse = rng.integers(60, 180, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        if part == "test/square":
            corner = tuple(rng.integers(0, GENERATED_SIDE - 100, 2).tolist())
            square, mask = Image.new("L", (60, 80), 255), Image.new("L", size)
            mask.paste(square, corner)
            image.paste((20, 20, 20), mask=mask)
            mask.save(folder / "ground_truth" / "square" / f"{i:03}_mask.png")
        image.save(folder / part / f"{i:03}.png", compress_level=1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, [(part, i) for part, count in counts.items() for i in range(count)]))


# ---------------------------------------------------------------------------------- precision


def measure_errors(args: argparse.Namespace, device: torch.device) -> None:
    """On one trained state: errors of loss and gradients against float64, and the metrics it gives."""
    scorer = Scorer.load(args.checkpoint, device, "fp32")
    model, config = scorer.model, scorer.config
    data = open_class(args.datapath, args.cls or scorer.class_name)
    if len(data.train) < 2 * BATCH:
        raise InputError(f"precision: class {data.name} needs at least {2 * BATCH} training images")
    images = Images(data.train[: 4 * BATCH], config.image_size, "ram", device, 2, "training images")
    order = torch.arange(len(images) // BATCH * BATCH).split(BATCH)
    batches = [normalize(batch) for batch in images.batches(list(order))]
    pairs, others = batches[::2], batches[1::2]
    test_set = TestSet.load(data, config, "ram", 2, device)
    exact = loss_and_gradient(model, pairs, torch.float64)
    other = loss_and_gradient(model, others, torch.float64)
    rows = []
    for precision in precisions_of(device):
        model.compute_networks_in(apply_precision(precision))
        loss, gradient = loss_and_gradient(model, pairs, torch.float32)
        values = vars(evaluate_maps(scorer.score_all(test_set.images).maps, test_set.truth))
        errors = f"{abs(loss / exact[0] - 1):.1e}", f"{_distance(gradient, exact[1]):.1e}"
        rows.append([precision, *errors, *(percent(values[key]) for key in METRICS)])
    difference = _distance(other[1], exact[1])
    body = f"""\
One trained state of class {data.name} (epoch {scorer.metrics.get("epoch")}): relative errors of the
mean loss of {len(pairs)} batches of {BATCH} and of its gradient, against float64; metrics of all test
images with the same weights and templates, percent.

{markdown_table(["precision", "loss", "gradient", *metric_labels().values()], rows)}

For comparison, the gradient of {len(others)} other batches, in float64, differs by {difference:.1e}.
`auto` on this machine: {choose_precision("auto", device)}."""
    name = "fnf" if config.encoder == "none" else config.encoder
    measuring.report(args.out, f"precision-{name}", device, body)


def _distance(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def loss_and_gradient(model: PyramidFlow, batches: list[Tensor], dtype: torch.dtype) -> tuple[float, Tensor]:
    """Mean loss of the batches in training mode, and its gradient as one float64 vector."""
    model.to(dtype).train()
    model.zero_grad(set_to_none=True)
    before = [b.clone() for b in model.buffers()]
    losses = [training_loss(model, *model(batch.to(dtype))) for batch in batches]
    loss = sum(losses) / len(losses)
    loss.backward()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    gradient = torch.cat([p.grad.flatten().double() for p in model.flow.parameters()])
    model.to(torch.float32).eval()
    return float(loss.detach()), gradient


if __name__ == "__main__":
    run_script(main)
