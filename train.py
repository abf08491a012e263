"""Train PyramidFlow on one class of good images and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network
    python train.py --resume saveDir/tile-20260101-120000              # go on with a stopped run

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calibration import Calibration, calibrate
from checkpoint import fill_encoder, load_checkpoint
from dataset import AnomalyClass, open_class
from evaluation import TestSet, features_in_order
from hardware import (
    Clock,
    choose_device,
    choose_precision,
    describe_environment,
    keep_freed_memory,
    network_dtype,
)
from loading import FeatureSource, ImageStore, training_plan
from metrics import Metrics, evaluate_maps
from model import PyramidFlow, fourier_loss, latent_template
from run import LAST_FILE, RESULT_FILE, Run, State, check_tensorboard, load_state
from settings import Settings, augmentation, flags_without_effect, model_config, parse_settings, resumed
from util import (
    InputError,
    StopRequest,
    check_writable,
    progress,
    run_script,
    seed_everything,
    size_text,
)

# The official program's optimiser.
ADAM = {"lr": 2e-4, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 1e-5}
MAX_GRADIENT_NORM = 1.0
STEPS_BETWEEN_CHECKS = 50  # of the loss on CUDA, where looking at it makes the host wait
SECONDS_BETWEEN_SAVES = 600.0  # of an unfinished epoch


class Interrupted(InputError):
    """The user stopped the run."""

    exit_code = 130


def main(arguments: list[str] | None = None) -> None:
    settings, given = parse_settings(__doc__, arguments)
    if settings.resume is None:
        training = Training.prepare(settings)
        run = Run.start(training.settings, training.about(), describe_environment(training.device))
    else:
        stored = load_state(Path(settings.resume))
        if (Path(settings.resume) / RESULT_FILE).is_file():
            raise InputError(f"--resume {settings.resume}: this run is finished; its result is there")
        training = Training.prepare(resumed(stored["settings"], given, settings.resume), stored)
        run = Run.resume(training.settings, stored["state"], describe_environment(training.device))
    for line in training.remarks():
        run.log.info(line)
    with StopRequest() as stop:
        try:
            fit(training, run, stop)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in epoch {run.state.epoch}; {run.how_to_resume}") from None


def fit(training: Training, run: Run, stop: StopRequest) -> None:
    """Train and evaluate, epoch by epoch; then thresholds, pictures and the table."""
    settings, state = training.settings, run.state
    run.save_state(training.state_dict())
    while state.epoch <= settings.epochs:
        clock = Clock(training.device)
        with clock.part("training"):
            training.train_one_epoch(state, lambda: run.save_state(training.state_dict()), stop)
        if state.epoch % settings.evalEvery and state.epoch < settings.epochs:
            run.log.info(f"epoch {state.epoch}: loss {state.mean_loss:.4f}, {clock}")
        else:
            template, metrics = training.evaluate(clock)
            run.record(metrics, training.content(template), clock)
        state.begin_next_epoch()
        run.save_state(training.state_dict())
    calibration = run.calibrate(training.calibrate)
    template = training.restore(load_checkpoint(run.folder / LAST_FILE))
    run.finish(training.model, template, training.test_set, calibration)


@dataclass
class Training:
    """One class, one model, and what trains it.

    Attributes:
        settings: the flags, with the precision that `auto` stands for here.
        data: the class.
        device: where everything is computed.
        model: with its optimiser.
        train_set: features of the training images.
        test_set: the test images.
    """

    settings: Settings
    data: AnomalyClass
    device: torch.device
    model: PyramidFlow
    optimizer: torch.optim.Optimizer
    train_set: FeatureSource
    test_set: TestSet

    @classmethod
    def prepare(cls, settings: Settings, stored: dict | None = None) -> Training:
        """Read the data and build the model: a new one, or as it was `stored`.

        Raises:
            InputError: something is missing, or does not fit together.
        """
        device = choose_device(settings.gpu)
        settings = replace(settings, precision=choose_precision(settings.precision, device))
        config = model_config(settings)
        data = open_class(Path(settings.datapath), settings.cls, settings.dataset)
        check_batch_size(settings, len(data.train))
        check_writable(Path(settings.saveDir))
        if settings.tensorboard:
            check_tensorboard()
        keep_freed_memory()
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape
        seed_everything(settings.seed)
        model = PyramidFlow(config)
        if stored is None:
            fill_encoder(model, settings.encoderWeights)
        model.to(device).compute_networks_in(network_dtype(settings.precision))
        optimizer = make_optimizer(model)
        if stored is not None:
            restore_state(model, optimizer, stored, len(data.train))
        store = ImageStore(
            data.train, config.image_size, settings.cache, device, settings.numWorkers, "training images"
        )
        train_set = FeatureSource(store, model.encode, constant=model.encoder_is_constant)
        test_set = TestSet.load(data, model, settings.cache, settings.numWorkers, device)
        return cls(settings, data, device, model, optimizer, train_set, test_set)

    def train_one_epoch(
        self, state: State, save: Callable[[], None] = lambda: None, stop: StopRequest | None = None
    ) -> None:
        """The steps of the epoch that are not done yet; `state` keeps up with them.

        Args:
            save: called every now and then, and before a stop.

        Raises:
            DivergedError: the loss is no longer finite.
            KeyboardInterrupt: a stop was asked for.
        """
        torch.set_rng_state(state.random_state)
        plan = training_plan(
            len(self.data.train), self.settings.batchSize, augmentation(self.settings, self.model.config)
        )
        done = len(state.losses)
        losses: list[Tensor] = []
        saved = time.monotonic()
        self.model.train()
        batches = progress(self.train_set.batches(plan[done:]), f"epoch {state.epoch}", len(plan), done)
        with stop.deferred() if stop else contextlib.nullcontext():
            for features in batches:
                losses.append(train_step(self.model, self.optimizer, features))
                if self.device.type == "cpu" or len(losses) == STEPS_BETWEEN_CHECKS:
                    state.add(losses)
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or (stop and stop.asked):
                    state.add(losses)
                    save()
                    saved = time.monotonic()
                if stop and stop.asked:
                    raise KeyboardInterrupt
            state.add(losses)

    def evaluate(self, clock: Clock) -> tuple[tuple[Tensor, ...], Metrics]:
        """The template of the training images, and the metrics of the test images against it.

        Raises:
            DivergedError: a score is not finite.
        """
        config = self.model.eval().config
        with clock.part("template"):
            template = latent_template(self.model, features_in_order(self.train_set, config, "template"))
        with clock.part("test"):
            maps = self.test_set.anomaly_maps(self.model, template)
        with clock.part("metrics"):
            metrics = evaluate_maps(maps, self.test_set.truth)
        return template, metrics

    def calibrate(self, content: dict) -> Calibration:
        """Scores of good images with the weights and the template of a checkpoint."""
        template = self.restore(content)
        features = features_in_order(self.train_set, self.model.config, "good scores")
        return calibrate(self.model, template, features)

    def restore(self, content: dict) -> tuple[Tensor, ...]:
        """Take the weights of a checkpoint of this run; its template is returned."""
        self.model.load_state_dict(content["model"])
        self.model.eval()
        return tuple(x.to(self.device) for x in content["template"])

    def content(self, template: tuple[Tensor, ...]) -> dict:
        """Of a checkpoint."""
        return {
            "class": self.data.name,
            "config": self.model.config.to_dict(),
            "settings": asdict(self.settings),
            "model": {name: x.cpu() for name, x in self.model.state_dict().items()},
            "template": [x.cpu() for x in template],
        }

    def about(self) -> dict:
        """For config.json."""
        return {
            "settings": asdict(self.settings),
            "model": self.model.config.to_dict(),
            "training_images": len(self.data.train),
            "test_images": len(self.data.test),
        }

    def state_dict(self) -> dict:
        """All that changes while training, and what it was started with."""
        return {
            "settings": asdict(self.settings),
            "training_images": len(self.data.train),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def remarks(self) -> list[str]:
        """What a user should know before it starts."""
        config, settings = self.model.config, self.settings
        lines = ["no CUDA device: running on the CPU"] * (
            self.device.type == "cpu" and settings.gpu != "cpu"
        )
        lines.append(
            f"class {self.data.name}: {len(self.data.train)} training and {len(self.data.test)} test images at "
            f"{size_text(config.image_size)}; encoder {config.encoder}, {config.num_level} levels, "
            f"{config.num_stack} stacks, {config.volume_norm}, {settings.precision}"
        )
        lines += [
            f"--{flag} has no effect with --encoder {settings.encoder}"
            for flag in flags_without_effect(settings)
        ]
        return lines


def check_batch_size(settings: Settings, num_images: int) -> None:
    if settings.batchSize < 2:
        raise InputError("--batchSize 1: the loss compares pairs of images; use at least 2")
    if settings.batchSize > num_images:
        raise InputError(
            f"--batchSize {settings.batchSize} is more than the {num_images} training images; "
            + (f"use 2 to {num_images}" if num_images > 1 else "add good images, at least 2 are needed")
        )


def make_optimizer(model: PyramidFlow) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, **ADAM, fused=True)


def restore_state(
    model: PyramidFlow, optimizer: torch.optim.Optimizer, stored: dict, num_images: int
) -> None:
    """Take weights and optimiser as `Training.state_dict` gave them.

    Raises:
        InputError: they do not fit, or the training images are not the same.
    """
    if stored.get("training_images") != num_images:
        raise InputError(
            f"--resume: the run has {stored.get('training_images')} training images, --datapath {num_images}; "
            "give the data it was started with"
        )
    try:
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError("--resume: the stored state does not fit its settings; start again") from None


def train_step(model: PyramidFlow, optimizer: torch.optim.Optimizer, features: Tensor) -> Tensor:
    """One step of the optimiser; the loss, still on the device: nothing here waits for it."""
    latents, _ = model.latents(features)
    loss = fourier_loss(model.pyramid, latents)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


if __name__ == "__main__":
    run_script(main)
