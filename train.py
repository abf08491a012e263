"""Train PyramidFlow on one class of good images and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network
    python train.py --cls all                                          # every class, one after the other
    python train.py --resume saveDir/tile-20260101-120000              # go on with a stopped run
    torchrun --nproc_per_node=4 train.py --cls tile                    # one run on four GPUs

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration import Calibration, calibrate
from checkpoint import fill_encoder, load_checkpoint
from dataset import AnomalyClass, list_classes, open_class, recognise
from evaluation import DivergedError, TestSet, features_in_order, mean_row, result_table
from hardware import (
    Clock,
    apply_precision,
    choose_device,
    choose_precision,
    describe_environment,
    keep_freed_memory,
)
from loading import FeatureSource, ImageStore, training_plan
from metrics import Metrics, evaluate_maps
from model import PyramidFlow, latent_template, training_loss
from parallel import World
from run import LAST_FILE, Run, State, check_tensorboard, load_state
from settings import Settings, augmentation, flags_without_effect, model_config, parse_settings, resumed
from util import (
    InputError,
    Interrupted,
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
STEPS_TOGETHER = 10  # likewise of several processes: torchrun kills those that do not stop in 30 s
SECONDS_BETWEEN_SAVES = 600.0  # of an unfinished epoch


def main(arguments: list[str] | None = None) -> None:
    settings, given = parse_settings(__doc__, arguments)
    stored = None
    if settings.resume:
        stored = load_state(Path(settings.resume))
        settings = resumed(stored["settings"], given, settings.resume)
    device = choose_device(settings.gpu)
    world = World.join(device)
    if settings.cls == "all":
        train_all_classes(settings, device, world)
    else:
        train_one_class(settings, device, world, stored)
    world.leave()


def train_all_classes(settings: Settings, device: torch.device, world: World) -> None:
    """One run for each class of the data set, then a table of all."""
    datapath = Path(settings.datapath)
    classes = list_classes(datapath, recognise(datapath, settings.dataset))
    if not classes:
        raise InputError(f"no classes in --datapath {datapath}; name a data set's folder")
    rows, failed = [], []
    for name in classes:  # before the first one is trained
        check_class(replace(settings, cls=name), world)
    try:
        for name in classes:
            try:
                row = train_one_class(replace(settings, cls=name), device, world)
                rows.append((name, f"{row['epoch']} (last)", row))
            except DivergedError as error:
                failed.append(f"{name}: {error}")
    finally:
        if world.is_main and rows:
            print("\n" + result_table([*rows, *mean_row(rows)]))
    if failed:
        raise DivergedError("; ".join(failed))


def train_one_class(
    settings: Settings, device: torch.device, world: World, stored: dict | None = None
) -> dict:
    """A whole run, or what is left of it; the metrics of the last epoch.

    Args:
        stored: what a stopped run had saved.
    """
    training = Training.prepare(settings, device, world, stored)
    state = State(1, [], torch.get_rng_state()) if stored is None else State(**stored["state"])
    run = None
    if world.is_main:
        environment = describe_environment(device)
        start = Run.start if stored is None else Run.resume
        run = start(training.settings, training.about(), environment, state)
        for line in training.remarks():
            run.log.info(line)
    with StopRequest() as stop, run or contextlib.nullcontext():
        try:
            fit(training, run, state, stop)
        except KeyboardInterrupt:
            how = f"; {run.how_to_resume}" if run else ""
            raise Interrupted(f"stopped in epoch {state.epoch}{how}") from None
    return state.rows[-1]


def fit(training: Training, run: Run | None, state: State, stop: StopRequest) -> None:
    """Train and evaluate, epoch by epoch; then thresholds, pictures and the table.

    Args:
        run: where results are written; None in all processes but one.
    """
    settings = training.settings

    def save() -> None:
        if run:
            run.save_state(training.state_dict())

    save()
    while state.epoch <= settings.epochs:
        clock = Clock(training.device)
        with clock.part("training"):
            training.train_one_epoch(state, save, stop)
        save()  # an evaluation that is stopped costs no step
        if state.epoch % settings.evalEvery == 0 or state.epoch == settings.epochs:
            template, metrics = training.evaluate(clock)
            state.add_row(metrics, clock)
            if run:
                run.record(training.content(template), clock)
        elif run:
            run.log.info(f"epoch {state.epoch}: loss {state.mean_loss:.4f}, {clock}")
        state.begin_next_epoch()
        save()
    if run:
        calibration = run.calibrate(training.calibrate)
        template = training.restore(load_checkpoint(run.folder / LAST_FILE))
        test_set = replace(training.test_set, world=World())  # the other processes are done
        run.finish(training.model, template, test_set, calibration)


@dataclass
class Training:
    """One class, one model, and what trains it.

    Attributes:
        settings: the flags, with the precision that `auto` stands for here.
        data: the class.
        device: where everything is computed.
        model: with its optimiser.
        flow: the model's, with gradients averaged over the processes.
        train_set: features of the training images.
        test_set: the test images.
        world: the processes that share the work.
    """

    settings: Settings
    data: AnomalyClass
    device: torch.device
    model: PyramidFlow
    optimizer: torch.optim.Optimizer
    flow: nn.Module
    train_set: FeatureSource
    test_set: TestSet
    world: World

    @classmethod
    def prepare(
        cls, settings: Settings, device: torch.device, world: World, stored: dict | None = None
    ) -> Training:
        """Read the data and build the model: a new one, or as it was `stored`.

        Raises:
            InputError: something is missing, or does not fit together.
        """
        config = model_config(settings)
        precision = choose_precision(settings.precision, device)
        settings = replace(settings, precision=precision)
        data = check_class(settings, world)
        if settings.resume is None:
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
        model.to(device).compute_networks_in(apply_precision(settings.precision))
        optimizer = make_optimizer(model)
        if stored is not None:
            restore_state(model, optimizer, stored, len(data.train), world.size)
        store = ImageStore(
            data.train, config.image_size, settings.cache, device, settings.numWorkers,
            "training images", world,
        )  # fmt: skip
        train_set = FeatureSource(store, model.encode, constant=model.encoder_is_constant)
        test_set = TestSet.load(data, model, settings.cache, settings.numWorkers, device, world)
        flow = world.wrap(model.flow)
        return cls(settings, data, device, model, optimizer, flow, train_set, test_set, world)

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
        plan = self.world.share(plan, equal=True)
        done, losses = len(state.losses), []
        saved = time.monotonic()
        self.model.train()
        batches = progress(self.train_set.batches(plan[done:]), f"epoch {state.epoch}", len(plan), done)
        with stop.deferred() if stop else contextlib.nullcontext():
            for number, features in enumerate(batches, done + 1):
                losses.append(self.step(features))
                asked = stop is not None and stop.asked
                if not (self._looks_up(number, asked) or number == len(plan)):
                    continue
                self.check_finite(state.add(losses))
                stopping = self.world.any(asked)
                if stopping or self.world.any(time.monotonic() - saved > SECONDS_BETWEEN_SAVES):
                    self.world.average(self.model.buffers())
                    save()
                    saved = time.monotonic()
                if stopping:
                    raise KeyboardInterrupt
        self.world.average(self.model.buffers())  # in training nothing reads the running statistics
        state.losses = self.world.average_numbers(state.losses)

    def _looks_up(self, number: int, stop_asked: bool) -> bool:
        """Whether losses and stop requests are looked at after this step.

        Several processes look up at the same steps.  On CUDA it is seldom, because the host waits for it.
        """
        if self.device.type == "cpu" or (self.world.size == 1 and stop_asked):
            return True
        return number % (STEPS_TOGETHER if self.world.size > 1 else STEPS_BETWEEN_CHECKS) == 0

    def check_finite(self, problem: str | None) -> None:
        """Raises DivergedError in all processes if one of them has a problem."""
        if self.world.any(problem is not None):
            raise DivergedError(problem or "the loss is no longer finite in another process")

    def step(self, features: Tensor) -> Tensor:
        """One step on a batch; the loss, still on the device."""
        settings = self.settings
        return optimise(
            self.model, self.optimizer, features, settings.loss, settings.template, self.flow
        )

    def evaluate(self, clock: Clock) -> tuple[tuple[Tensor, ...], Metrics]:
        """The template of the training images, and the metrics of the test images against it.

        Raises:
            DivergedError: a score is not finite.
        """
        self.model.eval()
        with clock.part("template"):
            template = self.template()
        with clock.part("test"):
            maps = self.test_set.anomaly_maps(self.model, template)
        with clock.part("metrics"):
            metrics = evaluate_maps(maps, self.test_set.truth)
        return template, metrics

    def template(self) -> tuple[Tensor, ...]:
        """The latent template (1,C,H/2^i,W/2^i), alike in all processes."""
        config = self.model.config
        if self.settings.template == "zero":
            sizes = [config.level_size(i) for i in range(config.num_level)]
            return tuple(torch.zeros(1, config.channels, *size, device=self.device) for size in sizes)
        features = features_in_order(self.train_set, config, "template", self.world)
        return latent_template(self.model, features, self.world.total)

    def calibrate(self, content: dict) -> Calibration:
        """Scores of good images with the weights and the template of a checkpoint."""
        template = self.restore(content)
        features = features_in_order(self.train_set, self.model.config, "good scores")
        return calibrate(self.model, template, features, self.settings.template == "mean")

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
            "processes": self.world.size,
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


def check_class(settings: Settings, world: World) -> AnomalyClass:
    """The class, if its files and the flags fit together.

    Raises:
        InputError: they do not.
    """
    model_config(settings)
    data = open_class(Path(settings.datapath), settings.cls, settings.dataset)
    check_batch_size(settings, len(data.train), world.size)
    return data


def check_batch_size(settings: Settings, num_images: int, num_processes: int) -> None:
    if num_images < 2:
        raise InputError(f"class {settings.cls} has {num_images} training images; add some, at least 2")
    pairs = settings.loss != "likelihood" and settings.template == "mean"
    if settings.batchSize < 2 and pairs:
        raise InputError("--batchSize 1: the loss compares pairs of images; use at least 2")
    if settings.batchSize > num_images:
        raise InputError(
            f"--batchSize {settings.batchSize} is more than the {num_images} training images; use 2 to "
            f"{num_images}"
        )
    if settings.batchSize * num_processes > num_images:
        raise InputError(
            f"{num_processes} processes with --batchSize {settings.batchSize} need at least as many images, "
            f"there are {num_images}; start fewer"
        )


def make_optimizer(model: PyramidFlow) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, **ADAM, fused=True)


def optimise(
    model: PyramidFlow,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    loss: str = "fourier",
    template: str = "mean",
    flow: nn.Module | None = None,
) -> Tensor:
    """One step of the optimiser; the loss, still on the device: nothing here waits for it.

    Args:
        features, loss, template, flow: as in `model.training_loss`.
    """
    value = training_loss(model, features, loss, template, flow)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRADIENT_NORM)
    optimizer.step()
    return value.detach()


def restore_state(
    model: PyramidFlow,
    optimizer: torch.optim.Optimizer,
    stored: dict,
    num_images: int,
    num_processes: int,
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
    if stored.get("processes") != num_processes:
        raise InputError(
            f"--resume: the run had {stored.get('processes')} processes, now there are {num_processes}; start "
            "as many"
        )
    try:
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError("--resume: the stored state does not fit its settings; start again") from None


if __name__ == "__main__":
    run_script(main)
