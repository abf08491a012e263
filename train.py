"""Train PyramidFlow on good images of one class and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls screw --encoder none --score bank            # parts at any angle
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network
    python train.py --good my_parts/good --encoder none --holdout 0.2  # a folder of good images is enough
    python train.py --cls tile wood carpet                             # one after the other; also: all
    python train.py --config saveDir/tile-.../config.json --seed 1     # the flags of another run
    python train.py --resume saveDir/tile-20260101-120000              # what a stopped run still lacks
    torchrun --nproc_per_node=4 train.py --cls tile                    # one run on four GPUs

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
import yaml
from torch import Tensor, nn

import dataset
import figures
import report
import spectral
import util
from dataset import AnomalyClass, Augmentation, Images, TestImage, normalize, training_order
from fit import add_score_flags, check_score_flags, options_of_flags, region_of_flags, with_map_size
from metrics import (
    METRICS,
    TABLE_METRICS,
    GroundTruth,
    Metrics,
    evaluate_maps,
    mean_row,
    metric_labels,
    result_table,
)
from model import (
    CONTRASTS,
    ENCODER_BNS,
    ENCODERS,
    LOSSES,
    TEMPLATES,
    VOLUME_NORMS,
    PyramidFlow,
    PyramidFlowConfig,
    coupling_schedule,
    load_encoder_weights,
    training_loss,
)
from scorer import LAST_FILE, Scorer, TestSet, fit_all, load_checkpoint, save_checkpoint, score_all
from util import Clock, DivergedError, InputError, Interrupted, Parser, StopSignals, number, whole_number
from verdict import FALSE_ALARM, LOWEST_RATE, Scored, named_thresholds

STATE_FILE, RESULT_FILE = "state.pt", "result.json"
STEPS_BETWEEN_LOOKS = 50  # at the loss, for which the host waits on CUDA
FIRST_LOOKS = (1, 10)  # after the step that prepares much, and when the log says how long the run takes
# Flags that came after the first trainings: what these wrote lacks them, and has their defaults.
ADDED_FLAGS = ("good", "bad", "masks", "holdout", "falseAlarm", "imageScore", "mapSize", "roi")

# The official program's choices by class, where a flag says auto.
AUTO_NUM_LAYER = {"metal_nut": 8, "carpet": 8, "transistor": 8, "screw": 2}
AUTO_SVN = ("carpet", "grid", "bottle", "transistor")
AUTO_IMAGE_SIZE = {"none": 256, "resnet18": 1024, "resnet34": 1024}

# What may change when a run is resumed: where it computes, where its data are, and how long it goes on.
FREE_ON_RESUME = (
    "resume", "config", "datapath", "good", "bad", "masks", "gpu", "numWorkers", "cache", "tensorboard", "epochs",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, stored = parse_arguments(argv), None
    if args.resume is not None:
        stored = load_state(Path(args.resume))
        args = resumed_arguments(stored["settings"], argv)
    device = util.choose_device(args.gpu)
    util.join_processes(device)
    util.keep_freed_memory()
    if len(args.cls) > 1 or args.cls == ["all"]:
        train_classes(args, device)
    else:
        train_class(args, device, stored)
    util.leave_processes()


def train_class(args: Namespace, device: torch.device, stored: dict | None = None) -> dict:
    """A whole run, or what is left of it; the metrics of the last epoch.

    Args:
        stored: what a stopped run had saved.
    """
    data, asked, args = check_class(args), args, settle(args, device)
    config, reading = model_config(args), (args.cache, device, args.numWorkers)
    model = make_model(config, args, device, is_new=stored is None)
    augment = Augmentation.create(args.augment, args.cls[0], config.image_size, args.seed)
    train_set = Images(data.train, config.image_size, *reading, "training images")
    test_set = TestSet.load(data, config, args.cache, args.numWorkers, device, region_of_flags(args, config))
    held_out = Images(data.held_out, config.image_size, *reading, "held-out images")
    steps = len(util.share(range(len(data.train) // args.batchSize), equal=True))  # of an epoch
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, steps)
    state = State(args, model, optimizer, scheduler, data)
    state.restore(stored)

    network, evaluated = util.data_parallel(model), None
    with Run(args, config, data, state, device) as run, StopSignals() as stop:
        run.say(remarks(asked, args, config, data, device, augment))
        pace = Pace(steps * (args.epochs + 1 - state.epoch), args.batchSize * util.world_size(), run.say)
        for epoch in range(state.epoch, args.epochs + 1):
            clock = Clock(device)
            with clock.part("training"):
                order = util.share(training_order(len(train_set), args.batchSize), equal=True)
                batches = train_set.batches(order, augment, epoch)
                bar = util.progress(batches, f"epoch {epoch}/{args.epochs}", len(order))
                loss = train_one_epoch(network, model, optimizer, scheduler, bar, args, stop, pace)
            util.average(model.buffers())  # in training nothing reads the running statistics
            if epoch % args.evalEvery == 0 or epoch == args.epochs:
                evaluated = evaluate(model, train_set, test_set, args, clock, held_out)
                state.add_rows([scorer for scorer, _ in evaluated], epoch, loss, clock)
                pace.evaluated(clock, evaluations_left(args, epoch))
                run.record(evaluated[-1][0])
            run.say([epoch_line(epoch, loss, state.rows, args, clock)])
            check_finite(model)
            state.epoch = epoch + 1
            run.save_state()
            stop.check()
        evaluated = evaluated or evaluate(model, train_set, test_set, args, Clock(device), held_out)
        run.finish(evaluated[-1][0], *what_to_show(test_set, train_set, held_out, evaluated))
    return state.rows[-1]


def train_one_epoch(
    network: nn.Module,
    model: PyramidFlow,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterable[Tensor],
    args: Namespace,
    stop: StopSignals,
    pace: Pace | None = None,
) -> float:
    """One pass over the training images; the mean loss.

    Args:
        network: the model, or its DistributedDataParallel.
        batches: uint8 (B,h,w,3) on the device.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = LossMeter(batches, pace)
    model.train()
    for images in batches:
        latents, logdets = network(normalize(images), args.loss == "likelihood")
        loss = training_loss(model, latents, logdets, args.loss, args.template)  # Sec. 3.4
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clipNorm)
        optimizer.step()
        scheduler.step()
        losses.add(loss)
        stop.check()
    return losses.mean()


def evaluate(
    model: PyramidFlow, train_set: Images, test_set: TestSet, args: Namespace, clock: Clock,
    held_out: Images | None = None,
) -> list[tuple[Scorer, Scored]]:  # fmt: skip
    """Scorers of the weights as they are, with the maps of the test images; --score's comes last.

    Without test images all metrics are None.

    Raises:
        DivergedError: a score is not finite.
    """
    options, roi = options_of_flags(args).with_papers, test_set.truth.roi
    with clock.part("template"):
        scorers = fit_all(model, train_set, options, args.template, args.cls[0], vars(args), held_out, roi)
    if not len(test_set.images):
        for option, scorer in zip(options, scorers, strict=True):
            scorer.metrics = {"score": option.score, **asdict(Metrics())}
        return [(scorer, scorer.empty_scores()) for scorer in scorers]
    with clock.part("test"):
        scored = score_all(scorers, test_set.images)
    with clock.part("metrics"):
        for option, scorer, (maps, scores) in zip(options, scorers, scored, strict=True):
            metrics = evaluate_maps(maps, test_set.truth, args.proLimit, scores)
            scorer.metrics = {"score": option.score, **asdict(metrics)}
    return list(zip(scorers, scored, strict=True))


def what_to_show(
    test_set: TestSet, train_set: Images, held_out: Images, evaluated: list[tuple[Scorer, Scored]]
) -> tuple[TestSet, Scored, Scorer, str]:
    """Test set, scores, scorer and name for the figures: of good images where there are no test images.

    Of training images the maps are those of the first scorer, the paper's: in a bank an image would be
    compared with itself.
    """
    scorer, scored = evaluated[-1]
    if len(test_set.images):
        return test_set, scored, scorer, "test images"
    if held_out:
        images, shown, scored = held_out, "held-out images", scorer.score_all(held_out, "figures")
    else:
        images, shown = train_set, "training images, each left out of the template"
        scorer = evaluated[0][0]
        maps = scorer.score_all(images, "figures").maps
        scored = Scored(maps, torch.tensor(scorer.calibration.image_scores, device=maps.device))
    good = [TestImage(path, "good", None) for path in images.paths]
    data = AnomalyClass(scorer.class_name, [], good)
    truth = GroundTruth.from_masks(data.defective, None, scorer.device)
    return TestSet(data, images, truth), scored, scorer, shown


def check_finite(model: PyramidFlow) -> None:
    """Raises DivergedError if the last step of an epoch, whose loss nobody sees, broke the weights."""
    if not all(x.isfinite().all() for x in model.state_dict().values()):
        raise DivergedError("the weights are no longer finite")


class LossMeter:
    """Collects losses on the device, and looks at them now and then: shown on the bar, and checked.

    Args:
        bar: the progress bar of the batches.
        pace: of the run, shown with the loss.
    """

    def __init__(self, bar, pace: Pace | None = None):
        self._bar, self._losses, self._waiting, self._pace = bar, [], [], pace
        self._device = torch.device("cpu")
        if pace:
            pace.start()

    def add(self, loss: Tensor) -> None:
        self._waiting.append(loss.detach())
        self._device = loss.device
        often = loss.device.type == "cpu" or len(self._waiting) == STEPS_BETWEEN_LOOKS
        if often or len(self._losses) + len(self._waiting) in FIRST_LOOKS:
            self._look()

    def mean(self) -> float:
        """The mean loss of all steps, over all processes."""
        self._look()
        mean = torch.tensor(self._losses, dtype=torch.float64, device=self._device).mean()
        util.average([mean])
        return float(mean)

    def _look(self) -> None:
        losses = torch.stack(self._waiting).tolist() if self._waiting else []  # the host waits
        self._waiting.clear()
        if self._pace:
            self._pace.add(len(losses))
        for loss in losses:
            self._losses.append(loss)
            if not math.isfinite(loss):
                raise DivergedError(f"the loss became {loss} at step {len(self._losses)} of the epoch")
        if losses and hasattr(self._bar, "set_postfix_str"):
            pace = f", {self._pace}" if self._pace else ""
            self._bar.set_postfix_str(f"loss {losses[-1]:.4f}{pace}", refresh=False)


class Pace:
    """How fast a run trains, and how long it will take.

    Args:
        steps: that are left, of all epochs.
        images: of each step, over all processes.
        say: takes lines for the log.
    """

    def __init__(self, steps: int, images: int, say: Callable[[list[str]], None]):
        self._left, self._images, self._say = steps, images, say
        self._done, self._timed, self._seconds, self._mark = 0, 0, 0.0, None
        self._evaluations = 0.0  # seconds

    def start(self) -> None:
        """The clock runs from now on: an epoch begins."""
        self._mark = time.perf_counter()

    def add(self, steps: int) -> None:
        """So many steps have been done since the last call, or since the start."""
        now, before = time.perf_counter(), self._done
        if before:  # the first step prepares much: kernels are chosen, memory is got
            self._timed, self._seconds = self._timed + steps, self._seconds + now - self._mark
        self._left, self._done, self._mark = self._left - steps, before + steps, now
        if before < FIRST_LOOKS[-1] <= self._done:
            self._say([f"about {duration(self.seconds_left)} of training are left, without evaluations"])

    def evaluated(self, clock: Clock, left: int) -> None:
        """An epoch was evaluated, and `left` more will be."""
        spent = sum(seconds for name, seconds in clock.seconds.items() if name != "training")
        if left and not self._evaluations and self._timed:
            total = self.seconds_left + spent * left
            plural = "s" * (left != 1)
            self._say([f"about {duration(total)} are left, {left} evaluation{plural} included"])
        self._evaluations = spent * left

    @property
    def seconds_left(self) -> float:
        return self._left * self._seconds / max(1, self._timed) + self._evaluations

    def __str__(self) -> str:
        if not self._timed:
            return "?"
        rate = self._timed * self._images / max(self._seconds, 1e-9)
        return f"{rate:.3g} images/s, {duration(self.seconds_left)} left"


def duration(seconds: float) -> str:
    """Two units of time: 2 h 05 min, 3 min 20 s, 7 s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def evaluations_left(args: Namespace, epoch: int) -> int:
    """Of the epochs after this one."""
    later = range(epoch + 1, args.epochs + 1)
    return sum(e % args.evalEvery == 0 or e == args.epochs for e in later)


def make_model(config: PyramidFlowConfig, args: Namespace, device: torch.device, is_new: bool) -> PyramidFlow:
    """The seeded model on its device; of a new run with the weights that it starts from.

    Raises:
        InputError: the weights cannot be had, or do not fit; or the memory is too small for the model.
    """
    if is_new:
        check_memory(config, args.batchSize, device)
    util.seed_everything(args.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    model = PyramidFlow(config)
    if is_new:
        fill_encoder(model, args.encoderWeights)
        initialize(model, args.init)
    return model.to(device).compute_networks_in(util.apply_precision(args.precision))


def check_memory(config: PyramidFlowConfig, batch_size: int, device: torch.device) -> None:
    """Raises InputError if not even weights, their gradients and Adam's moments, and one pyramid fit."""
    with torch.device("meta"):
        model = PyramidFlow(config)
    pixels = sum(math.prod(config.level_size(i)) for i in range(config.num_level))
    state = sum(x.nbytes for x in model.state_dict().values())
    need = state + 3 * sum(p.nbytes for p in model.parameters()) + 4 * batch_size * config.channels * pixels
    free = util.free_memory(device)
    if need > free:
        raise InputError(
            f"a training of this model takes more than {need / 2**30:.3g} GiB of memory, {free / 2**30:.3g} "
            "are free; use a smaller --numStack, --numChannel, --kernelSize, --imageSize or --batchSize"
        )


def make_optimizer(model: PyramidFlow, args: Namespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (args.beta1, args.beta2)
    return torch.optim.Adam(parameters, args.lr, betas, args.eps, weight_decay=args.weightDecay, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each step, as a share of --lr.

    Args:
        steps: of an epoch.
    """
    last, warmup = max(1, steps * args.epochs), steps * args.warmup

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if args.scheduler == "cosine":
            return rising * (1 + math.cos(math.pi * min(step, last) / last)) / 2
        return rising * (0.1 if args.scheduler == "step" and step >= 2 / 3 * last else 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_classes(args: Namespace, device: torch.device) -> None:
    """One run for each class, then a table of all; a class that fails does not stop the others."""
    if folder := folder_of_good(args):
        raise InputError(f"{folder} holds good images of one class; give --cls one name, or leave it out")
    datapath, classes = Path(args.datapath), args.cls
    if "all" in classes:
        classes = dataset.list_classes(datapath, dataset.recognize(datapath, args.dataset))
    if not classes:
        raise InputError(f"no classes in --datapath {datapath}; choose a data set's folder")
    runs, rows, failed = [], [], []
    for name in classes:  # before the first one is trained
        one = Namespace(**{**vars(args), "cls": [name]})
        try:
            check_class(one)
            runs.append(one)
        except InputError as error:
            if "all" not in args.cls:
                raise
            failed.append(f"{name}: {error}")
            print(f"left out: {failed[-1]}", file=sys.stderr)
    try:
        for one in runs:
            try:
                row = train_class(one, device)
                rows.append((one.cls[0], f"{row['epoch']} (last)", row))
            except Interrupted:
                raise
            except InputError as error:
                failed.append(f"{one.cls[0]}: {error}")
    finally:
        if util.is_main() and rows:
            print("\n" + result_table([*rows, *mean_row(rows)], args.proLimit))
    if failed:
        raise InputError("; ".join(failed))


# -------------------------------------------------------------------------- what a run writes


class State:
    """All that changes while a run trains; saved after each epoch, it is all that resuming needs.

    Attributes:
        epoch: the next one, from 1.
        rows: metrics of the evaluated epochs.
    """

    def __init__(self, args, model, optimizer, scheduler, data: AnomalyClass):
        self.epoch, self.rows = 1, []
        images, processes = fingerprint(data.train), util.world_size()
        self._fixed = {"settings": vars(args), "training_images": images, "processes": processes}
        self._parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def add_rows(self, scorers: list[Scorer], epoch: int, loss: float, clock: Clock) -> None:
        """Take the metrics of this epoch from the scorers, which get its number and loss."""
        seconds = round(sum(clock.seconds.values()), 2)
        for scorer in scorers:
            scorer.metrics = {"epoch": epoch, "loss": loss, **scorer.metrics, "seconds": seconds}
            self.rows.append(scorer.metrics)

    def content(self) -> dict:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        rest = {"epoch": self.epoch, "rows": self.rows, "random_state": torch.get_rng_state()}
        return {**self._fixed, **parts, **rest}

    def restore(self, stored: dict | None) -> None:
        """Take what `content` gave; None: nothing.

        Raises:
            InputError: it does not fit the flags, or the training images are not the same.
        """
        if stored is None:
            return
        remedies = {
            "training_images": "give the data the run was started with by --datapath",
            "processes": f"start {stored['processes']} processes",
        }
        for key, remedy in remedies.items():
            if stored[key] != self._fixed[key]:
                name = key.replace("_", " ")
                raise InputError(f"--resume: the {name} are not those of the run; {remedy}")
        names = ("epoch", "loss", "score", *asdict(Metrics()), "seconds")  # rows of old runs lack some
        try:
            check_moments(self._parts["model"], stored["optimizer"])
            for name, part in self._parts.items():
                part.load_state_dict(stored[name])
            self.epoch = stored["epoch"]
            self.rows = [{**dict.fromkeys(names), **row} for row in stored["rows"]]
            torch.set_rng_state(stored["random_state"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError("--resume: the state does not fit its settings; start again") from None


def check_moments(model: PyramidFlow, stored: dict) -> None:
    """Raises ValueError unless Adam's moments have their parameters' shapes, which its kernels trust."""
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    for index, moments in stored["state"].items():
        wanted = {"exp_avg": shapes[index], "exp_avg_sq": shapes[index], "step": ()}
        for name, shape in wanted.items():
            x = moments[name]
            if x.shape != shape or x.dtype != torch.float32 or x.layout != torch.strided:
                raise ValueError(name)


def fingerprint(paths: Iterable[Path]) -> str:
    """Of image files, by names and sizes."""
    names = [f"{path.name}:{path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


class Run:
    """One run's folder, and the log; in all processes but one it does nothing."""

    def __init__(self, args, config: PyramidFlowConfig, data: AnomalyClass, state: State, device):
        self.args, self.state, self.has_test = args, state, bool(data.test)
        self.folder = self.log = self._board = None
        if not util.is_main():
            return
        is_new = args.resume is None
        folder = util.create_run_folder(Path(args.saveDir), args.cls[0]) if is_new else Path(args.resume)
        self.folder = folder
        self.log = util.start_log(folder / "log.txt", util.describe_environment(device))
        if is_new:
            parts = {"training": data.train, "test": data.test, "held_out": data.held_out}
            counts = {f"{name}_images": len(images) for name, images in parts.items()}
            settings = {"settings": vars(args), "model": config.to_dict(), **counts}
            util.write_json(folder / "config.json", settings)
            self.save_state()
        elif load_state(folder)["epoch"] != state.epoch:  # now that no other process writes to it
            raise InputError(f"--resume {folder}: another process resumed it meanwhile; start again")
        for unfinished in folder.rglob(".*.tmp"):  # of a write that was killed
            unfinished.unlink()
        self.say([f"run folder {folder}" + (f", from epoch {state.epoch}" if args.resume else "")])
        self._board = open_tensorboard(folder) if args.tensorboard else None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Raises Interrupted, which says how to resume, in the place of KeyboardInterrupt."""
        how = f"; resume with: python train.py --resume {shlex.quote(str(self.folder))}"
        for handler in self.log.handlers if self.log else ():
            handler.close()
        if kind is KeyboardInterrupt:
            raise Interrupted(f"stopped in epoch {self.state.epoch}{how if self.log else ''}") from None

    def say(self, lines: Iterable[str]) -> None:
        for line in lines if self.log else ():
            self.log.info(line)

    def save_state(self) -> None:
        """All that `--resume` needs, in one file that is always whole."""
        if self.log:
            save_checkpoint(self.folder / STATE_FILE, self.state.content())

    def record(self, scorer: Scorer) -> None:
        """The rows go to metrics.csv, the scorer to last.pt, and to best_*.pt where it is the best."""
        if not self.log:
            return
        scorer.save(self.folder / LAST_FILE)
        for metric in self._selection():
            if self._best(metric) is scorer.metrics:
                scorer.save(self.folder / f"best_{metric}.pt")
        util.write_csv(self.folder / "metrics.csv", list(map(self._shown, self.state.rows)))
        for key, value in scorer.metrics.items() if self._board else ():
            if isinstance(value, float):
                self._board.add_scalar(key, value, scorer.metrics["epoch"])

    def finish(self, scorer: Scorer, test_set: TestSet, scored: Scored, drawn: Scorer, shown: str) -> None:
        """The figures of the last epoch, result.json, and the table.

        Args:
            scorer: of the last epoch.
            test_set, scored, drawn, shown: as `what_to_show` gives them.
        """
        if not self.log:
            return
        pictures, rows, limit = self.folder / "pictures", self._rows(self.args.score), self.args.proLimit
        figures.save_evaluation(pictures, test_set, scored, drawn, limit, shown)
        figures.save_curves(pictures / "curves.png", rows, limit)
        given = (self.state.rows, vars(self.args), limit)
        report.save_evaluation(self.folder / report.FILE, test_set, scored, scorer, *given)
        for path in sorted(pictures.rglob("*.png")) if self._board else ():
            name = str(path.relative_to(pictures).with_suffix(""))
            self._board.add_image(name, figures.read(path), rows[-1]["epoch"], dataformats="HWC")
        if self._board:
            self._board.close()
        thresholds = named_thresholds(scorer.metrics, scorer.calibration)
        util.write_json(self.folder / RESULT_FILE, {**self._result(), "thresholds": thresholds})
        checkpoint = shlex.quote(str(self.folder / LAST_FILE))
        self.say([f"\n{self._table()}"] if self.has_test else [])
        self.say([f"\n{scorer.calibration.describe()}", f"written to {self.folder}"])
        self.say([f"to use it: python predict.py {checkpoint} IMAGES --out predictions"])

    def _shown(self, row: dict) -> dict:
        """Without test images, without metrics."""
        return row if self.has_test else {k: v for k, v in row.items() if k not in asdict(Metrics())}

    def _rows(self, score: str) -> list[dict]:
        return [row for row in self.state.rows if row["score"] == score]

    def _result(self) -> dict:
        """Of result.json: the last epoch, and the best by each metric that is defined."""
        last = self._rows(self.args.score)[-1]
        rows = {"last": last}
        if self.args.score != "paper":
            rows["last_paper"] = self._rows("paper")[-1]
        for metric in ("pixel_auroc", "pixel_pro", "image_auroc"):
            if last[metric] is not None:
                rows[f"best_{metric}"] = {**self._best(metric), "chosen_on": f"test set, by {metric}"}
        shown = {name: self._shown({**row}) for name, row in rows.items()}
        for row in shown.values():
            del row["seconds"]
        return {"class": self.args.cls[0], "seed": self.args.seed, "score": self.args.score, **shown}

    def _table(self) -> str:
        """The last epoch with each score, and the best epochs."""
        labels = metric_labels(self.args.proLimit)
        scores = dict.fromkeys(("paper", self.args.score))
        rows = [(row, "last") for score in scores for row in self._rows(score)[-1:]]
        rows += [(self._best(metric), f"best {labels[metric]}*") for metric in self._selection()]
        mark = " ({score})" if len(scores) > 1 else ""
        lines = [(self.args.cls[0], f"{row['epoch']} ({label}){mark.format(**row)}", row) for row, label in rows]
        note = "Percent. *chosen on the test set, as the official program does; quote the last epoch."
        return f"{result_table(lines, self.args.proLimit)}\n\n{note}"

    def _selection(self) -> list[str]:
        """Metrics by which a best checkpoint is kept: those that are defined."""
        last = self._rows(self.args.score)[-1]
        defined = [m for m in ("pixel_auroc", "pixel_pro") if last[m] is not None]
        return defined or [m for m in ("image_auroc",) if last[m] is not None]

    def _best(self, metric: str) -> dict:
        rows = self._rows(self.args.score)
        return max(rows, key=lambda row: -1 if row[metric] is None else row[metric])


def remarks(
    asked: Namespace, args: Namespace, config: PyramidFlowConfig, data: AnomalyClass, device, augment
) -> list[str]:
    """What a user should know before it starts; `asked` are the flags, `args` has auto settled."""
    about = f"class {data.name}:"
    lines = [f"{about} {warning}" for warning in data.warnings] + util.without_cuda(device, args.gpu)
    if not data.test:
        lines.append(f"{about} no test images: no metrics can be had, thresholds come from good images alone")
    elif not any(not image.defective for image in data.test):
        lines.append(f"{about} no good test images; --holdout 0.2 gives some")
    held_out = f", {len(data.held_out)} good ones held out," if data.held_out else ""
    lines.append(
        f"{about} {len(data.train)} training and {len(data.test)} test images{held_out} at "
        f"{util.size_text(config.image_size)}; encoder {config.encoder}, {config.num_level} levels, "
        f"{config.num_stack} stacks, {config.volume_norm}, {args.precision}, "
        + (f"augmented by {augment.description}" if augment else "not augmented")
    )
    by_class = {"numLayer": (config.num_level, 4), "volumeNorm": (config.volume_norm, "CVN")}
    lines += [
        f"--{flag} auto is {value} for a class called {data.name}, as in the official program"
        for flag, (value, usual) in by_class.items()
        if getattr(args, flag) == "auto" and value != usual
    ]
    if asked.saveMemory == "auto":
        need = activation_bytes(config, args.batchSize, args.precision, device) / 2**30
        how = "true: rebuilt by inversion" if args.saveMemory else "false: kept"
        lines.append(f"--saveMemory auto is {how} are activations that take about {need:.2g} GiB")
    unread = ("encoderBN", "encoderWeights") if args.encoder == "none" else ("numChannel",)
    set_ = [flag for flag in unread if getattr(args, flag) != make_parser().get_default(flag)]
    return lines + [f"--{flag} has no effect with --encoder {args.encoder}" for flag in set_]


def epoch_line(epoch: int, loss: float, rows: list[dict], args: Namespace, clock: Clock) -> str:
    """Of the log: the metrics where they were taken."""
    line = f"epoch {epoch}: loss {loss:.4f}"
    if rows and rows[-1]["epoch"] == epoch:
        labels, row = metric_labels(args.proLimit), rows[-1]
        keys = TABLE_METRICS if any(row[key] is not None for key in METRICS) else ()
        line += "".join(f", {labels[key]} {util.percent(row[key])}" for key in keys)
    return f"{line}, {clock}"


def open_tensorboard(folder: Path):
    """Raises InputError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


# -------------------------------------------------------------------------------------- flags


def make_parser() -> Parser:
    """All flags, with the official names and defaults where the official program has them."""
    parser = Parser(description=__doc__)
    for add_flags in (add_data_flags, add_model_flags, add_training_flags, add_other_flags):
        add_flags(parser)
    return parser


def auto_or(convert: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type: auto, or what `convert` takes."""
    return lambda text: "auto" if text == "auto" else convert(text)


# fmt: off
def add_data_flags(parser: Parser) -> None:
    """Which images there are, and how they are read."""
    add = parser.add_argument_group("data").add_argument
    add("--cls", nargs="+", default=["tile"], metavar="CLASS", help="folders of --datapath, one run each; or all")
    add("--datapath", default="../mvtec_anomaly_detection",
        help="folder of MVTec AD, AD 2 or LOCO, BTAD, VisA, Real-IAD, or data in MVTec's layout")
    add("--good", metavar="DIR",
        help="folder of good images, instead of --datapath, which may also be one; its name is the class's")
    add("--bad", metavar="DIR", help="with --good: folder of defective test images")
    add("--masks", metavar="DIR", help="with --bad: folder of their masks, NAME_mask.png or NAME.png")
    add("--holdout", type=auto_or(number(0, dataset.MOST_HOLDOUT)), default="auto", metavar="SHARE",
        help="of the good images that thresholds come from, and nothing else; auto: 0.1 of 50 or more if there "
        "are no good test images, else 0")
    add("--dataset", choices=dataset.DATASETS, default="auto", help="layout; auto recognizes it")
    add("--imageSize", type=auto_or(whole_number(1, 2**14)), nargs="+", default=["auto"], metavar="N",
        help="input size, one number or H W; auto: 256 with --encoder none, else 1024")
    add("--augment", default="auto", metavar="{auto,none,flips,turns,FILE}",
        help="auto: flips and turns for MVTec's five textures; flips, turns: for any class; or a pipeline "
        "serialized by albumentations")
    add("--cache", choices=dataset.CACHES, default="auto",
        help="decoded images: ram, kept; none, read each time; auto: by free memory")


def add_model_flags(parser: Parser) -> None:
    """The architecture, and the weights it starts from."""
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=ENCODERS, default="resnet18", help="none: fixed 1x1 convolution (FNF)")
    add("--encoderBN", choices=ENCODER_BNS, default="batch",
        help="the encoder's BatchNorm while training: the batch's statistics, or frozen")
    add("--encoderWeights", metavar="PATH", help="file with torchvision's names, instead of a download")
    add("--numLayer", choices=("auto", *"2345678"), default="auto", metavar="{auto,2..8}",
        help="levels of the pyramid; auto: by class")
    add("--volumeNorm", choices=("auto", *VOLUME_NORMS), default="auto", help="normalization; auto: by class")
    add("--kernelSize", type=whole_number(1, 99), default=7, help="of the coupling blocks' convolutions, odd")
    add("--numChannel", type=whole_number(1, 1024), default=16, help="channels with --encoder none")
    add("--numStack", type=whole_number(1, 256), default=4, help="repetitions of the coupling blocks' schedule")
    add("--init", metavar="LAST.pt", help="start from the weights of a checkpoint")


def add_training_flags(parser: Parser) -> None:
    """The optimizer, and the paper's ablations."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole_number(1), default=15, help="passes over the training images")
    add("--batchSize", type=whole_number(1), default=2, help="images per step")
    add("--seed", type=whole_number(0), default=0, help="of weights, order and augmentation")
    add("--lr", type=number(0, above=True), default=2e-4, help="Adam's learning rate")
    add("--beta1", type=number(0, 0.9999), default=0.5, help="Adam's first beta")
    add("--beta2", type=number(0, 0.99999), default=0.9, help="Adam's second beta")
    add("--eps", type=number(0, above=True), default=1e-4, help="Adam's epsilon")
    add("--weightDecay", type=number(0), default=1e-5, help="Adam's weight decay")
    add("--clipNorm", type=number(0, above=True), default=1.0, help="largest norm of the gradient")
    add("--scheduler", choices=("constant", "cosine", "step"), default="constant",
        help="of the learning rate; cosine: to zero; step: a tenth for the last third")
    add("--warmup", type=number(0), default=0.0, metavar="EPOCHS", help="in which the learning rate rises")
    add("--saveMemory", type=auto_or(util.boolean), default="auto", metavar="{auto,true,false}",
        help="backpropagate by inversion: memory does not grow with depth; auto: where the activations would "
        "take half of the free memory")

    add = parser.add_argument_group("ablations", "of the paper's Table 2").add_argument
    add("--loss", choices=LOSSES, default="fourier",
        help="spatial: without the Fourier transform; likelihood: of a Gaussian, for --volumeNorm none")
    add("--template", choices=TEMPLATES, default="mean",
        help="what latents are contrasted with: each other and their mean; or zero, in training and in the score")
    add("--contrast", choices=CONTRASTS, default="latent",
        help="latent: differences are composed; composed: compose, then difference")


def add_other_flags(parser: Parser) -> None:
    """The score, where it runs, and what it writes."""
    group = parser.add_argument_group("score")
    add_score_flags(group)
    group.add_argument("--falseAlarm", type=number(LOWEST_RATE, 1), default=FALSE_ALARM, metavar="RATE",
        help="share of good images that the default threshold may call defective")
    group.add_argument("--proLimit", type=number(0, 1, above=True), default=0.3,
        help="false-positive rate up to which the second PRO integrates")

    group = parser.add_argument_group("running")
    util.add_running_flags(group)
    add = group.add_argument
    add("--evalEvery", type=whole_number(1), default=1, help="epochs from evaluation to evaluation; also the last")
    add("--saveDir", default="saveDir", help="folder in which the run's folder is made")
    add("--resume", metavar="RUN",
        help="folder of a run to resume; its settings come with it; with more --epochs also a finished one")
    add("--config", metavar="FILE", help="yaml or json of flags, as a run's config.json; the command line wins")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (pip install tensorboard)")
# fmt: on


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """All flags: of the command line, of its --config, and defaults."""
    parser = make_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parser.parse_args(argv).config
    words = [*(config_arguments(parser, Path(config)) if config else ()), *argv]
    args = parser.parse_args(words)
    if (folder := folder_of_good(args)) and "cls" not in given_flags(words):
        name = folder.resolve().name
        args.cls = ["images" if name in ("", "all") else name]
    return args


def folder_of_good(args: Namespace) -> Path | None:
    """The folder that holds the good images itself: --good, or a --datapath that holds images and no classes."""
    if args.good is not None:
        return Path(args.good)
    return Path(args.datapath) if dataset.is_flat(Path(args.datapath), args.dataset) else None


def open_data(args: Namespace) -> AnomalyClass:
    """The files of the class, as the flags say.

    Raises:
        InputError: they do not fit together, or something is missing.
    """
    folder = folder_of_good(args)
    bad, masks = (None if path is None else Path(path) for path in (args.bad, args.masks))
    if masks and not bad:
        raise InputError("--masks belong to the images of --bad; give both")
    if folder is None:
        if bad:
            raise InputError("--bad needs the folder of the good images; give it by --good")
        data = dataset.open_class(Path(args.datapath), args.cls[0], args.dataset, need_test=False)
    else:
        data = dataset.open_folders(args.cls[0], folder, bad, masks)
    return dataset.hold_out(data, args.holdout, args.seed)


def config_arguments(parser: Parser, path: Path) -> list[str]:
    """The flags in a yaml or json file, as on the command line.

    Raises:
        InputError: it cannot be read, or names something that is no flag.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))  # json is yaml
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not yaml or json"
        raise InputError(f"--config {path}: cannot be read ({reason}); choose another file") from None
    given = given.get("settings", given) if isinstance(given, dict) else given
    if not isinstance(given, dict):
        raise InputError(f"--config {path}: not a table of flags such as `epochs: 15`; choose another file")
    return flag_words(parser, given, f"--config {path}")


def flag_words(parser: Parser, given: dict, where: str) -> list[str]:
    """Flags and their values, as on the command line; None and false switches are left out.

    Raises:
        InputError: something is no flag; `where` it stands is named.
    """
    actions, words = {action.dest: action for action in parser._actions}, []
    for name, value in given.items():
        if name not in actions or name == "help":
            raise InputError(f"{where}: {name!r} is no flag of train.py; see --help")
        is_switch = actions[name].nargs == 0
        if value is None or (value is False and is_switch):
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, (dict, list)) for v in values):
            raise InputError(f"{where}: {name} has a value that is no word or number; see --help")
        words += [f"--{name}", *(() if is_switch else map(str, values))]
    return words


def given_flags(argv: list[str] | None) -> dict[str, object]:
    """The flags that stand on the command line."""
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def model_config(args: Namespace) -> PyramidFlowConfig:
    """The architecture that the flags ask for, `auto` settled by class; --saveMemory auto counts as true.

    Raises:
        InputError: the flags do not fit together.
    """
    size, name = args.imageSize, args.cls[0]
    if size == ["auto"]:
        size = [AUTO_IMAGE_SIZE[args.encoder]]
    if len(size) > 2 or "auto" in size:
        raise InputError("--imageSize takes auto, one number, or two (height width)")
    num_level, volume_norm = args.numLayer, args.volumeNorm
    if num_level == "auto":
        num_level = AUTO_NUM_LAYER.get(name, 4)
    if volume_norm == "auto":
        volume_norm = "SVN" if name in AUTO_SVN else "CVN"
    try:
        config = PyramidFlowConfig(
            args.encoder, args.encoderBN, int(num_level), args.numStack, args.numChannel, args.kernelSize,
            volume_norm, image_size=(size[0], size[-1]), contrast=args.contrast,
            save_memory=args.saveMemory is not False,
        )  # fmt: skip
        return with_map_size(config, args.mapSize)
    except ValueError as error:
        raise InputError(str(error)) from None


def settle(args: Namespace, device: torch.device) -> Namespace:
    """The flags, with the precision and the way of backpropagation chosen where they are auto.

    Raises:
        InputError: the device does not have the precision.
    """
    precision, save_memory = util.choose_precision(args.precision, device), args.saveMemory
    if save_memory == "auto":
        need = activation_bytes(model_config(args), args.batchSize, precision, device)
        sharing = util.world_size() if device.type == "cpu" else 1
        save_memory = util.any_process(2 * need * sharing > util.free_memory(device))
    return Namespace(**{**vars(args), "precision": precision, "saveMemory": save_memory})


def activation_bytes(config: PyramidFlowConfig, batch_size: int, precision: str, device: torch.device) -> int:
    """Bytes at the peak of a training step under plain autograd, without weights and their gradients.

    A block (see `model.CouplingBlock`) keeps the state it makes and exp(s), in float32, and the hidden map
    and [s0, t], in the precision of the convolutions.  On top comes the gradient of one block, or of the loss.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    c, size = config.channels, dtype.itemsize
    pixels = [batch_size * h * w for h, w in map(config.level_size, range(config.num_level))]
    peak = 10 * c * pixels[0] * (batch_size - 1)  # of the loss: it grows with the pairs of images
    kept = 4 * c * sum(pixels)
    for kind, i in coupling_schedule(config.num_level) * config.num_stack:
        target = i if kind == "up" else i + 1
        level = i if kind == "down" else target  # of the hidden map
        out = level if config.volume_norm == "SVN" else target  # of [s0, t]
        kept += c * (4 * pixels[target] + 2 * size * pixels[level] + (2 * size + 4) * pixels[out])
        if out != target:  # every second pixel of exp(s) and t
            kept += c * (size + 4) * pixels[target]
        shape = (batch_size, *config.level_size(level))
        own, upsampled = kind != "up", kind != "down"
        for inputs, stride in (((own * c, upsampled * c), 1), ((2 * c, 0), 1 if out == level else 2)):
            of_input, of_gradient = convolution_bytes(config, shape, dtype, device, inputs, stride)
            kept += of_input
            peak = max(peak, of_gradient + c * (8 + 2 * size) * pixels[target])
    return kept + peak


def convolution_bytes(
    config: PyramidFlowConfig, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device,
    inputs: tuple[int, int], stride: int,
) -> tuple[int, int]:  # fmt: skip
    """What `kernels.conv2d` keeps beside the maps, and what its gradient takes for a while; bytes.

    Args:
        shape: (B,H,W) of its input.
        inputs: channels of it, and channels that are upsampled from half the size.
    """
    (batch, height, width), (own, upsampled), outputs = shape, inputs, 2 * config.channels
    channels, k = own + upsampled, config.kernel_size
    weight, number_ = torch.empty(outputs, channels, k, k, dtype=dtype), torch.empty((), dtype=dtype)
    x = number_.expand(batch, own, height, width) if own else None
    small = number_.expand(batch, upsampled, height // 2, width // 2) if upsampled else None
    way = spectral.choose_way(weight, x, small, stride) if device.type == "cpu" else "direct"
    if way != "direct":
        return spectral.memory_of(way, shape, channels, outputs, k, dtype.itemsize)
    folded = outputs * upsampled * (k + 1) ** 2 * dtype.itemsize  # the kernel for the upsampled map
    return folded + (dtype != torch.float32) * weight.nbytes, weight.nbytes


def check_class(args: Namespace) -> AnomalyClass:
    """The class, if its files and the flags fit together.

    Raises:
        InputError: they do not.
    """
    model_config(args)
    check_score_flags(args)
    if args.resume is None:
        util.check_writable(Path(args.saveDir))
    data = open_data(args)
    count, batch, processes = len(data.train), args.batchSize, util.world_size()
    of_pairs = args.loss != "likelihood" and args.template == "mean"
    for wrong, message in (
        (count < 2, f"class {data.name} has {count} training images; add some, at least 2"),
        (batch < 2 and of_pairs, "--batchSize 1: the loss compares pairs of images; use at least 2"),
        (batch > count, f"--batchSize {batch} is more than the {count} training images; use 2 to {count}"),
        (batch * processes > count,
         f"{processes} processes with --batchSize {batch} need at least as many images, there are {count}; "
         "start fewer"),
    ):  # fmt: skip
        if wrong:
            raise InputError(message)
    return data


# ------------------------------------------------------------------------------------- resume


def load_state(folder: Path) -> dict:
    """What `Run.save_state` wrote.

    Raises:
        InputError: the folder holds no run that can be resumed.
    """
    if not folder.is_dir() or str(folder) in ("", "."):
        raise InputError(f"--resume {folder}: no such folder; choose a run's folder, such as saveDir/tile-...")
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(f"--resume {folder}: no {path.name} in it; choose a run's folder, or start again")
    content, parser = load_checkpoint(path), make_parser()
    types = {"settings": dict, "training_images": str, "processes": int, "epoch": int, "rows": list,
             "model": dict, "optimizer": dict, "scheduler": dict, "random_state": Tensor}  # fmt: skip
    fits = all(isinstance(content.get(key), kind) for key, kind in types.items())
    if fits:
        later = {name: parser.get_default(name) for name in ADDED_FLAGS}
        content["settings"] = {**later, **content["settings"]}
        fits = content["settings"].keys() == {a.dest for a in parser._actions} - {"help"}
    if not fits:
        raise InputError(f"{path} is not the state of a run of this version; start again")
    return content


def resumed_arguments(stored: dict, argv: list[str] | None) -> Namespace:
    """The settings of a stopped run, with the flags that may change.

    Raises:
        InputError: a given flag contradicts the run's, or nothing is left to do.
    """
    given, parser = given_flags(argv), make_parser()
    where = f"--resume {given['resume']}"
    for name, value in given.items():
        if name not in FREE_ON_RESUME and not agrees(name, value, stored[name]):
            raise InputError(
                f"--{name} {value} contradicts the run in {given['resume']}, which has {stored[name]}; leave "
                "the flag out, or start a new run"
            )
    words = flag_words(parser, {**stored, "config": None, "resume": None}, where)
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    args, done = Namespace(**{**vars(parser.parse_args(words)), **free}), stored["epochs"]
    if (Path(args.resume) / RESULT_FILE).is_file() and args.epochs <= done:
        raise InputError(f"{where}: this run is finished after {done} epochs; give more --epochs")
    if args.epochs < done:
        raise InputError(f"--epochs {args.epochs}: the run has {done}; give as many, or more")
    return args


def agrees(name: str, given: object, stored: object) -> bool:
    """Whether a flag asks for what the run has: auto does, and one number for a square image."""
    if name in ("imageSize", "mapSize"):
        return (given[0], given[-1]) == (stored[0], stored[-1])
    return given == stored or (name in ("precision", "saveMemory") and given == "auto")


# ----------------------------------------------------------------------------- encoder weights


def fill_encoder(model: PyramidFlow, source: str | None) -> None:
    """Load ImageNet weights into the model's encoder, if it has one: from a file, or by download.

    Raises:
        InputError: the weights cannot be had, or do not fit.
    """
    encoder = model.config.encoder
    if encoder == "none":
        return
    try:
        weights = util.load_tensors(Path(source)) if source else download_encoder_weights(encoder)
        if not isinstance(weights, dict):
            raise ValueError("not a state dict")
        load_encoder_weights(model, weights)
    except ValueError as error:
        where = f"--encoderWeights {source}" if source else f"{encoder} weights"
        raise InputError(f"{where}: {error}; choose a state dict of torchvision's {encoder}") from None


def download_encoder_weights(encoder: str) -> dict[str, Tensor]:
    """ImageNet weights from torchvision, or from its cache.

    Raises:
        InputError: no network, or a damaged file.
    """
    weights = torchvision.models.get_model_weights(encoder).IMAGENET1K_V1
    interactive = sys.stderr is not None and sys.stderr.isatty()
    try:
        return weights.get_state_dict(progress=interactive, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy's page instead of the file, a damaged cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"cannot get {weights.url} ({reason}); give the file by --encoderWeights PATH, train without an "
            f"encoder by --encoder none, or remove a damaged copy from {cache}"
        ) from None


def initialize(model: PyramidFlow, checkpoint: str | None) -> None:
    """Take the weights of a checkpoint of the same architecture.

    Raises:
        InputError: it has another architecture; what differs is named.
    """
    if checkpoint is None:
        return
    other = Scorer.load(Path(checkpoint)).model
    mine, theirs = asdict(model.config), asdict(other.config)
    differing = [f"{k} {theirs[k]}" for k in mine if k not in ("save_memory", "map_size") and mine[k] != theirs[k]]
    if differing:
        raise InputError(f"--init {checkpoint}: it has {', '.join(differing)}; set the flags alike")
    model.load_state_dict(other.state_dict())


if __name__ == "__main__":
    util.run_script(main)
