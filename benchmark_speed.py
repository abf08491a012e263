"""How fast training, evaluation and inference are, and what each precision does to the numbers."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

import train
from checkpoint import Trained
from convolution import MEMORY_FORMAT
from dataset import open_class
from evaluation import TestSet, evaluation_batch, percent
from hardware import Clock, apply_precision, choose_precision
from loading import ImageStore, normalise
from measuring import (
    DEFAULT_MODELS,
    MIB,
    interleaved_times,
    median_ratio,
    peak_resident,
    report,
    step_memory,
)
from metrics import METRIC_NAMES, evaluate_maps
from model import PyramidFlow, PyramidFlowConfig, anomaly_map, coupling_schedule, training_loss
from parallel import World
from run import State
from settings import Settings, parse_settings
from util import InputError

BATCH = 2
GENERATED_CLASS, GENERATED_SIDE = "generated", 1024
EPOCH_FLAGS = ["--augment", "none", "--numLayer", "4"]
NUM_TRAIN, NUM_TEST_GOOD, NUM_TEST_DEFECTIVE = 320, 41, 119  # as MVTec's screw


# --------------------------------------------------------------------------------------- step


@dataclass(frozen=True)
class Case:
    """One row of the table of steps."""

    model: str
    precision: str
    save_memory: bool


def benchmark_step(arguments: argparse.Namespace, device: torch.device) -> None:
    """Training step with and without memory saving, inference, memory, and the convolutions alone."""
    precisions = precisions_of(device)
    for name in arguments.model:
        cases = [Case(name, p, s) for p in precisions for s in (True, False)]
        steps = {case: TrainingStep(case, device) for case in cases}
        scores = {("score", p): Inference(name, p, device) for p in precisions}
        floors = {("floor", p): convolution_floor(DEFAULT_MODELS[name], p, device) for p in precisions}
        memory = {case: step.memory() for case, step in steps.items()}
        times = interleaved_times({**steps, **scores, **floors}, arguments.repeats, device)
        num_images = scores["score", "fp32"].num_images
        report(arguments.out, f"step-{name}", device, step_table(cases, times, memory, num_images))


def precisions_of(device: torch.device) -> tuple[str, ...]:
    return ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")


class TrainingStep:
    """A step of train.py on a batch of images, optimiser included."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        config = replace(DEFAULT_MODELS[case.model], save_memory=case.save_memory)
        self._precision, self._device = case.precision, device
        self._model = PyramidFlow(config).to(device).train()
        self._optimizer = train.make_optimizer(self._model)
        self._images = torch.randn(BATCH, 3, *config.image_size, device=device)

    def __call__(self) -> None:
        model = self._model.compute_networks_in(apply_precision(self._precision))
        train.optimise(model, self._optimizer, model.encode(self._images))

    def memory(self) -> int:
        """Bytes: peak of living tensors in a step, without weights, optimiser and gradients."""
        self()
        return step_memory(self, self._model.flow, self._device)


class Inference:
    """Anomaly maps of one batch, as large as evaluation takes it."""

    def __init__(self, name: str, precision: str, device: torch.device):
        torch.manual_seed(0)
        config = DEFAULT_MODELS[name]
        self._precision = precision
        self._model = PyramidFlow(config).to(device).eval()
        for block in self._model.flow:  # zero at first, and atan() of zeros is slower than of others
            block.affine.conv2.reset_parameters()
        self.num_images = evaluation_batch(config, device)
        self._images = torch.randn(self.num_images, 3, *config.image_size, device=device)
        sizes = [config.level_size(i) for i in range(config.num_level)]
        self._template = tuple(torch.zeros(1, config.channels, *size, device=device) for size in sizes)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        model = self._model.compute_networks_in(apply_precision(self._precision))
        return anomaly_map(model, model.encode(self._images), self._template)


def convolution_floor(
    config: PyramidFlowConfig, precision: str, device: torch.device
) -> Callable[[], None]:
    """The official program's k x k convolutions of one step without memory saving, and nothing else:
    forward, gradients of input and of kernel; same precision and layout, each at its full size."""
    dtype = apply_precision(precision) or torch.float32
    prepared = {}
    for shape in set(official_convolutions(config)):
        in_channels, out_channels, size = shape
        x, y = (
            torch.randn(BATCH, c, *size, device=device, dtype=dtype).to(memory_format=MEMORY_FORMAT)
            for c in (in_channels, out_channels)
        )
        k = config.kernel_size
        weight = torch.randn(out_channels, in_channels, k, k, device=device, dtype=dtype)
        weight = weight.to(memory_format=MEMORY_FORMAT)
        prepared[shape] = x.requires_grad_(), weight.requires_grad_(), y

    def floor() -> None:
        apply_precision(precision)  # sets cuDNN's switch for TF32
        for shape in official_convolutions(config):
            x, weight, grad = prepared[shape]
            y = F.conv2d(x, weight, padding=config.kernel_size // 2)
            torch.autograd.grad(y, (x, weight), grad)

    return floor


def official_convolutions(config: PyramidFlowConfig) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(input channels, output channels, size) of each convolution of a forward pass."""
    for kind, level in coupling_schedule(config.num_level) * config.num_stack:
        sources, at = {"up": (1, level), "down": (1, level), "dual": (2, level + 1)}[kind]
        size, width = config.level_size(at), 2 * config.channels
        yield sources * config.channels, width, size
        yield width, width, size


def step_table(cases: list[Case], times: dict, memory: dict[Case, int], num_images: int) -> str:
    config = DEFAULT_MODELS[cases[0].model]
    height, width = config.image_size
    lines = [
        f"Training step of {cases[0].model}, {height}x{width}, batch {BATCH}, optimiser included; medians of "
        f"{len(times[cases[0]])} interleaved",
        "rounds, ratios are medians of paired ratios. Floor: the official program's k x k convolutions alone,",
        "forward and backward, same precision and layout. Memory: peak of living tensors without weights, their",
        f"gradients and the optimiser. Inference to the anomaly map, in batches of {num_images}.",
        "",
        "| precision | memory saving | step (s) | / floor | / without saving | MiB | inference (images/s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        seconds = times[case]
        to_floor = median_ratio(seconds, times["floor", case.precision])
        to_without = median_ratio(seconds, times[replace(case, save_memory=False)])
        rate = num_images / statistics.median(times["score", case.precision])
        lines.append(
            f"| {case.precision} | {'on' if case.save_memory else 'off'} | {statistics.median(seconds):.3f} | "
            f"{to_floor:.2f} | {to_without:.2f} | {memory[case] / MIB:.0f} | {rate:.2f} |"
        )
    precisions = dict.fromkeys(case.precision for case in cases)
    floors = ", ".join(f"{p} {statistics.median(times['floor', p]):.3f} s" for p in precisions)
    return "\n".join([*lines, "", f"Floor: {floors}."])


# -------------------------------------------------------------------------------------- epoch


def benchmark_epoch(arguments: argparse.Namespace, device: torch.device) -> None:
    """A whole epoch as train.py runs it, on a real class or a generated one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        datapath, name = arguments.datapath, arguments.cls
        if datapath is None:
            datapath, name = folder, GENERATED_CLASS
            generate_class(datapath / name)
        for model in arguments.model:
            body = epoch_table(model, datapath, name, arguments.precision, device, folder)
            report(arguments.out, f"epoch-{model}", device, body)


def epoch_table(
    model: str, datapath: Path, name: str, precision: str, device: torch.device, folder: Path
) -> str:
    settings: Settings = parse_settings("", EPOCH_FLAGS)[0]
    config = DEFAULT_MODELS[model]
    if config.encoder != "none":  # random weights are as fast
        weights = folder / "encoder.pth"
        torch.save(getattr(torchvision.models, config.encoder)(weights=None).state_dict(), weights)
        settings = replace(settings, encoderWeights=str(weights))
    settings = replace(
        settings, cls=name, datapath=str(datapath), encoder=config.encoder, precision=precision,
        gpu="cpu" if device.type == "cpu" else str(device.index),
    )  # fmt: skip
    once, clock = Clock(device), Clock(device)
    with once.part("reading"):
        training = train.Training.prepare(settings, device, World())
    with clock.part("training"):
        training.train_one_epoch(State(1, [], torch.get_rng_state()))
    training.evaluate(clock)
    total = sum(clock.seconds.values())
    num_test = len(training.data.test)
    lines = [
        f"One epoch of {model} on class {name}: {len(training.data.train)} training images in batches of {BATCH}, "
        f"template, {num_test} test images, metrics;",
        f"4 levels, CVN, {training.settings.precision}, memory saving on.",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
        *(f"| {part} | {s:.2f} | {100 * s / total:.1f} % |" for part, s in clock.seconds.items()),
        f"| whole epoch | {total:.2f} | |",
        "",
        f"Before the first epoch, reading and resizing all images: {once.seconds['reading']:.1f} s. "
        f"Peak resident memory of the process: {peak_resident() / 2**30:.2f} GiB.",
    ]
    if device.type == "cuda":
        hours = 15 * 15 * total / 3600
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        lines.append(
            f"Peak GPU memory: {peak:.2f} GiB. Fifteen such classes at 15 epochs: {hours:.2f} h."
        )
    return "\n".join(lines)


def generate_class(folder: Path) -> None:
    """A class of as many images as MVTec's screw, 1024x1024, smooth with a dark square for a defect."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:GENERATED_SIDE, :GENERATED_SIDE] / GENERATED_SIDE
    counts = {"train/good": NUM_TRAIN, "test/good": NUM_TEST_GOOD, "test/square": NUM_TEST_DEFECTIVE}
    for part, count in counts.items():
        for i in range(count):
            a, b = rng.uniform(2, 30, 2)
            wave = 120 + 60 * np.sin(a * x) * np.cos(b * y)
            picture = np.stack([wave, wave * 0.9, wave * 0.7], axis=2).astype(np.uint8)
            if part == "test/square":
                top, left = rng.integers(0, GENERATED_SIDE - 100, 2)
                picture[top : top + 80, left : left + 60] = 20
                mask = np.zeros((GENERATED_SIDE, GENERATED_SIDE), np.uint8)
                mask[top : top + 80, left : left + 60] = 255
                _save(folder / "ground_truth" / "square" / f"{i:03}_mask.png", mask)
            _save(folder / part / f"{i:03}.png", picture)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, compress_level=1)


# ---------------------------------------------------------------------------------- precision


def benchmark_precision(arguments: argparse.Namespace, device: torch.device) -> None:
    """On one trained state: errors of loss and gradients against float64, and the metrics it gives."""
    trained = Trained.load(arguments.checkpoint, device, "fp32")
    data = open_class(arguments.datapath, arguments.cls or trained.class_name)
    if len(data.train) < 2 * BATCH:
        raise InputError(f"precision: class {data.name} needs at least {2 * BATCH} training images")
    model, config = trained.model, trained.model.config
    store = ImageStore(data.train[: 4 * BATCH], config.image_size, "ram", device, 2, "training images")
    images = torch.cat(list(store.batches([torch.arange(len(store))])))
    batches = [normalise(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    pairs, others = batches[::2], batches[1::2]
    test_set = TestSet.load(data, model, "ram", 2, device)
    exact = loss_and_gradient(model, pairs, torch.float64)
    other = loss_and_gradient(model, others, torch.float64)
    lines = [
        f"One trained state of class {data.name} (epoch {trained.metrics.get('epoch')}): relative errors of the",
        f"mean loss of {len(pairs)} batches of {BATCH} and of its gradient, against float64; metrics of all test",
        "images with the same weights and template, percent.",
        "",
        "| precision | loss | gradient | " + " | ".join(METRIC_NAMES.values()) + " |",
        "|---|---|---|" + "---|" * len(METRIC_NAMES),
    ]
    for precision in precisions_of(device):
        model.compute_networks_in(apply_precision(precision))
        loss, gradient = loss_and_gradient(model, pairs, torch.float32)
        maps = test_set.anomaly_maps(model, trained.template)
        values = vars(evaluate_maps(maps, test_set.truth))
        shown = " | ".join(percent(values[key]) for key in METRIC_NAMES)
        errors = f"{abs(loss / exact[0] - 1):.1e} | {_distance(gradient, exact[1]):.1e}"
        lines.append(f"| {precision} | {errors} | {shown} |")
    lines += [
        "",
        f"For comparison, the gradient of {len(others)} other batches, in float64, differs by "
        f"{_distance(other[1], exact[1]):.1e}.",
        f"`auto` on this machine: {choose_precision('auto', device)}.",
    ]
    name = "fnf" if config.encoder == "none" else config.encoder
    report(arguments.out, f"precision-{name}", device, "\n".join(lines))


def _distance(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def loss_and_gradient(
    model: PyramidFlow, batches: list[Tensor], dtype: torch.dtype
) -> tuple[float, Tensor]:
    """Mean loss of the batches in training mode, and its gradient as one float64 vector."""
    model.to(dtype).train()
    model.zero_grad(set_to_none=True)
    before = [b.clone() for b in model.buffers()]
    total = sum(training_loss(model, model.encode(batch.to(dtype))) for batch in batches) / len(batches)
    total.backward()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    gradient = torch.cat([p.grad.flatten().double() for p in model.flow.parameters()])
    model.to(torch.float32).eval()
    return float(total.detach()), gradient
