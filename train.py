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

import figures
import report
from dataset import (
    CACHES,
    DATASETS,
    MOST_HOLDOUT,
    AnomalyClass,
    Augmentation,
    Images,
    TestImage,
    hold_out,
    is_flat,
    list_classes,
    normalize,
    open_class,
    open_folders,
    recognize,
    training_order,
)
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
    load_encoder_weights,
    training_loss,
)
from scorer import (
    LAST_FILE,
    Scorer,
    TestSet,
    fit_all,
    load_checkpoint,
    save_checkpoint,
    score_all,
)
from util import (
    Clock,
    DivergedError,
    InputError,
    Interrupted,
    Parser,
    StopSignals,
    add_running_flags,
    apply_precision,
    average,
    boolean,
    check_writable,
    choose_device,
    choose_precision,
    create_run_folder,
    data_parallel,
    describe_environment,
    is_main,
    join_processes,
    keep_freed_memory,
    leave_processes,
    load_tensors,
    number,
    percent,
    progress,
    run_script,
    seed_everything,
    share,
    size_text,
    start_log,
    whole_number,
    without_cuda,
    world_size,
    write_csv,
    write_json,
)
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
    device = choose_device(args.gpu)
    join_processes(device)
    keep_freed_memory()
    if len(args.cls) > 1 or args.cls == ["all"]:
        train_classes(args, device)
    else:
        train_class(args, device, stored)
    leave_processes()


def train_class(args: Namespace, device: torch.device, stored: dict | None = None) -> dict:
    """A whole run, or what is left of it; the metrics of the last epoch.

    Args:
        stored: what a stopped run had saved.
    """
    args = Namespace(**{**vars(args), "precision": choose_precision(args.precision, device)})
    config, data = model_config(args), check_class(args)
    seed_everything(args.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    model = PyramidFlow(config)
    if stored is None:
        fill_encoder(model, args.encoderWeights)
        initialize(model, args.init)
    model.to(device).compute_networks_in(apply_precision(args.precision))
    augment = Augmentation.create(args.augment, args.cls[0], config.image_size, args.seed)
    train_set = Images(
        data.train, config.image_size, args.cache, device, args.numWorkers, "training images"
    )
    test_set = TestSet.load(
        data, config, args.cache, args.numWorkers, device, region_of_flags(args, config)
    )
    held_out = Images(
        data.held_out, config.image_size, args.cache, device, args.numWorkers, "held-out images"
    )
    steps = len(share(range(len(data.train) // args.batchSize), equal=True))
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, steps)
    state = State(args, model, optimizer, scheduler, data)
    state.restore(stored)

    network, evaluated = data_parallel(model), None
    with Run(args, config, data, state, device) as run, StopSignals() as stop:
        run.say(remarks(args, config, data, device, augment))
        pace = Pace(steps * (args.epochs + 1 - state.epoch), args.batchSize * world_size(), run.say)
        try:
            for epoch in range(state.epoch, args.epochs + 1):
                clock = Clock(device)
                with clock.part("training"):
                    order = share(training_order(len(train_set), args.batchSize), equal=True)
                    batches = train_set.batches(order, augment, epoch)
                    bar = progress(batches, f"epoch {epoch}/{args.epochs}", len(order))
                    loss = train_one_epoch(network, model, optimizer, scheduler, bar, args, stop, pace)
                average(model.buffers())  # in training nothing reads the running statistics
                if epoch % args.evalEvery == 0 or epoch == args.epochs:
                    evaluated = evaluate(model, train_set, test_set, args, clock, held_out)
                    state.add_rows([scorer for scorer, _ in evaluated], epoch, loss, clock)
                    pace.evaluated(clock, evaluations_left(args, epoch))
                    run.record(evaluated[-1][0])
                run.say([epoch_line(epoch, loss, state.rows, args, clock)])
                state.epoch = epoch + 1
                run.save_state()
                stop.check()
            evaluated = evaluated or evaluate(model, train_set, test_set, args, Clock(device), held_out)
            run.finish(evaluated[-1][0], *what_to_show(test_set, train_set, held_out, evaluated))
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in epoch {state.epoch}{run.how_to_resume()}") from None
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
        scorers = fit_all(
            model, train_set, options, args.template, args.cls[0], vars(args), held_out, roi
        )
    if not len(test_set.images):
        for option, scorer in zip(options, scorers, strict=True):
            scorer.metrics = {"score": option.score, **asdict(Metrics())}
        return [(scorer, scorer.empty_scores()) for scorer in scorers]
    with clock.part("test"):
        scored = score_all(scorers, test_set.images)
    for option, scorer, (maps, scores) in zip(options, scorers, scored, strict=True):
        with clock.part("metrics"):
            metrics = evaluate_maps(maps, test_set.truth, args.proLimit, scores)
        scorer.metrics = {"score": option.score, **asdict(metrics)}
    return list(zip(scorers, scored, strict=True))


def what_to_show(
    test_set: TestSet, train_set: Images, held_out: Images, evaluated: list[tuple[Scorer, Scored]]
) -> tuple:
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
        images, shown, scorer = (
            train_set,
            "training images, each left out of the template",
            evaluated[0][0],
        )
        maps = scorer.score_all(images, "figures").maps
        scored = Scored(maps, torch.tensor(scorer.calibration.image_scores, device=maps.device))
    paths = [TestImage(path, "good", None) for path in images.paths]
    data = AnomalyClass(scorer.class_name, [], paths)
    truth = GroundTruth.from_masks(data.defective, None, scorer.device)
    return TestSet(data, images, truth), scored, scorer, shown


class LossMeter:
    """Collects losses on the device, and looks at them now and then: shown on the bar, and checked.

    Args:
        bar: the progress bar of the batches.
        pace: of the run, shown with the loss.
    """

    def __init__(self, bar, pace: Pace | None = None):
        self._bar, self._losses, self._waiting, self._pace = bar, [], [], pace
        if pace:
            pace.start()

    def add(self, loss: Tensor) -> None:
        self._waiting.append(loss.detach())
        often = loss.device.type == "cpu" or len(self._waiting) == STEPS_BETWEEN_LOOKS
        if often or len(self._losses) + len(self._waiting) in FIRST_LOOKS:
            self._look()

    def mean(self) -> float:
        """The mean loss of all steps, over all processes."""
        device = self._waiting[0].device if self._waiting else "cpu"
        self._look()
        mean = torch.tensor(self._losses, dtype=torch.float64, device=device).mean()
        average([mean])
        return float(mean)

    def _look(self) -> None:
        losses = torch.stack(self._waiting).tolist() if self._waiting else []  # the host waits
        if self._pace:
            self._pace.add(len(losses))
        for loss in losses:
            self._losses.append(loss)
            if not math.isfinite(loss):
                raise DivergedError(f"the loss became {loss} at step {len(self._losses)} of the epoch")
            if hasattr(self._bar, "set_postfix_str"):
                pace = f", {self._pace}" if self._pace else ""
                self._bar.set_postfix_str(f"loss {loss:.4f}{pace}", refresh=False)
        self._waiting.clear()


class Pace:
    """How fast a run trains, and how long it will take.

    Args:
        steps: that are left, of all epochs.
        images: of each step, over all processes.
        say: takes lines for the log.
    """

    def __init__(self, steps: int, images: int, say: Callable[[list[str]], None]):
        self._left, self._images, self._say = steps, images, say
        self._timed, self._seconds, self._mark = 0, 0.0, None
        self._evaluations = 0.0  # seconds
        self._is_first, self._is_said = True, False

    def start(self) -> None:
        """The clock runs from now on: an epoch begins."""
        self._mark = time.perf_counter()

    def add(self, steps: int) -> None:
        """So many steps have been done since the last call, or since the start."""
        now = time.perf_counter()
        if not self._is_first:  # it prepares much: kernels are chosen, memory is got
            self._timed, self._seconds = self._timed + steps, self._seconds + now - self._mark
        self._left, self._mark, self._is_first = self._left - steps, now, False
        if self._timed + 1 >= FIRST_LOOKS[-1] and not self._is_said:
            self._is_said = True
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
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"


def evaluations_left(args: Namespace, epoch: int) -> int:
    """Of the epochs after this one."""
    later = range(epoch + 1, args.epochs + 1)
    return sum(e % args.evalEvery == 0 or e == args.epochs for e in later)


def make_optimizer(model: PyramidFlow, args: Namespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (args.beta1, args.beta2)
    return torch.optim.Adam(
        parameters, args.lr, betas, args.eps, weight_decay=args.weightDecay, fused=True
    )


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
        raise InputError(
            f"{folder} holds the good images of one class; give --cls one name, or leave it out"
        )
    datapath = Path(args.datapath)
    classes = (
        list_classes(datapath, recognize(datapath, args.dataset)) if "all" in args.cls else args.cls
    )
    if not classes:
        raise InputError(f"no classes in --datapath {datapath}; choose a data set's folder")
    runs = [Namespace(**{**vars(args), "cls": [name]}) for name in classes]
    for one in runs:  # before the first one is trained
        check_class(one)
    rows, failed = [], []

    def attempt(one: Namespace) -> None:
        try:
            row = train_class(one, device)
            rows.append((one.cls[0], f"{row['epoch']} (last)", row))
        except Interrupted:
            raise
        except InputError as error:
            failed.append(f"{one.cls[0]}: {error}")

    try:
        for one in runs:
            attempt(one)
    finally:
        if is_main() and rows:
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
        self._fixed = {
            "settings": vars(args),
            "training_images": fingerprint(data.train),
            "processes": world_size(),
        }
        self._parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def add_rows(self, scorers: list[Scorer], epoch: int, loss: float, clock: Clock) -> None:
        """Take the metrics of this epoch from the scorers, which get its number and loss."""
        seconds = round(sum(clock.seconds.values()), 2)
        for scorer in scorers:
            scorer.metrics = {"epoch": epoch, "loss": loss, **scorer.metrics, "seconds": seconds}
            self.rows.append(scorer.metrics)

    def content(self) -> dict:
        return {
            **self._fixed,
            **{name: part.state_dict() for name, part in self._parts.items()},
            "epoch": self.epoch,
            "rows": self.rows,
            "random_state": torch.get_rng_state(),
        }

    def restore(self, stored: dict | None) -> None:
        """Take what `content` gave; None: nothing.

        Raises:
            InputError: it does not fit the flags, or the training images are not the same.
        """
        if stored is None:
            return
        for key, remedy in (
            ("training_images", "give the data the run was started with by --datapath"),
            ("processes", f"start {stored['processes']} processes"),
        ):
            if stored[key] != self._fixed[key]:
                raise InputError(
                    f"--resume: the {key.replace('_', ' ')} are not those of the run; {remedy}"
                )
        try:
            check_moments(self._parts["model"], stored["optimizer"])
            for name, part in self._parts.items():
                part.load_state_dict(stored[name])
            names = (
                "epoch",
                "loss",
                "score",
                *asdict(Metrics()),
                "seconds",
            )  # rows of old runs lack some
            self.epoch = stored["epoch"]
            self.rows = [{**dict.fromkeys(names), **row} for row in stored["rows"]]
            torch.set_rng_state(stored["random_state"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                "--resume: the stored state does not fit its settings; start again"
            ) from None


def check_moments(model: PyramidFlow, stored: dict) -> None:
    """Raises ValueError unless Adam's moments have their parameters' shapes, which its kernels trust."""
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    for number_, moments in stored["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            x = moments[name]
            if x.shape != shapes[number_] or x.dtype != torch.float32 or x.layout != torch.strided:
                raise ValueError("moments")
        if moments["step"].shape != () or moments["step"].dtype != torch.float32:
            raise ValueError("step")


def fingerprint(paths: Iterable[Path]) -> str:
    """Of image files, by names and sizes."""
    names = [f"{path.name}:{path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


class Run:
    """One run's folder, and the log; in all processes but one it does nothing."""

    def __init__(self, args, config: PyramidFlowConfig, data: AnomalyClass, state: State, device):
        self.args, self.state, self.folder, self.log, self._board = args, state, None, None, None
        self.has_test = bool(data.test)
        if not is_main():
            return
        if args.resume is None:
            self.folder = create_run_folder(Path(args.saveDir), args.cls[0])
        else:
            self.folder = Path(args.resume)
        self.log = start_log(self.folder / "log.txt", describe_environment(device))
        if args.resume is None:
            parts = {"training": data.train, "test": data.test, "held_out": data.held_out}
            counts = {f"{name}_images": len(paths) for name, paths in parts.items()}
            write_json(
                self.folder / "config.json",
                {"settings": vars(args), "model": config.to_dict(), **counts},
            )
            self.save_state()
        elif load_state(self.folder)["epoch"] != state.epoch:  # now that no other process writes to it
            raise InputError(
                f"--resume {self.folder}: another process resumed it meanwhile; start again"
            )
        for unfinished in self.folder.rglob(".*.tmp"):  # of a write that was killed
            unfinished.unlink()
        self.say([f"run folder {self.folder}" + (f", from epoch {state.epoch}" if args.resume else "")])
        self._board = open_tensorboard(self.folder) if args.tensorboard else None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        for handler in self.log.handlers if self.log else ():
            handler.close()

    def say(self, lines: Iterable[str]) -> None:
        for line in lines if self.log else ():
            self.log.info(line)

    def how_to_resume(self) -> str:
        return (
            f"; resume with: python train.py --resume {shlex.quote(str(self.folder))}"
            if self.log
            else ""
        )

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
        write_csv(self.folder / "metrics.csv", list(map(self._shown, self.state.rows)))
        for key, value in scorer.metrics.items() if self._board else ():
            if isinstance(value, float):
                self._board.add_scalar(key, value, scorer.metrics["epoch"])

    def finish(
        self, scorer: Scorer, test_set: TestSet, scored: Scored, drawn: Scorer, shown: str
    ) -> None:
        """The figures of the last epoch, result.json, and the table.

        Args:
            scorer: of the last epoch.
            test_set, scored, drawn, shown: as `what_to_show` gives them.
        """
        if not self.log:
            return
        folder, rows = self.folder / "pictures", self._rows()
        figures.save_evaluation(folder, test_set, scored, drawn, self.args.proLimit, shown)
        figures.save_curves(folder / "curves.png", rows, self.args.proLimit)
        given = (self.state.rows, vars(self.args), self.args.proLimit)
        report.save_evaluation(self.folder / report.FILE, test_set, scored, scorer, *given)
        if self._board:
            for path in sorted(folder.rglob("*.png")):
                name = str(path.relative_to(folder).with_suffix(""))
                self._board.add_image(name, figures.read(path), rows[-1]["epoch"], dataformats="HWC")
            self._board.close()
        named = named_thresholds(scorer.metrics, scorer.calibration)
        write_json(self.folder / RESULT_FILE, {**self._result(), "thresholds": named})
        if self.has_test:
            self.say([f"\n{self._table()}"])
        self.say([f"\n{scorer.calibration.describe()}", f"written to {self.folder}"])
        checkpoint = shlex.quote(str(self.folder / LAST_FILE))
        self.say([f"to use it: python predict.py {checkpoint} IMAGES --out predictions"])

    def _shown(self, row: dict) -> dict:
        """Without test images, without metrics."""
        return row if self.has_test else {k: v for k, v in row.items() if k not in asdict(Metrics())}

    def _rows(self, score: str | None = None) -> list[dict]:
        return [row for row in self.state.rows if row["score"] == (score or self.args.score)]

    def _result(self) -> dict:
        last = self._rows()[-1]
        shown = {"last": last}
        if self.args.score != "paper":
            shown["last_paper"] = self._rows("paper")[-1]
        for metric in ("pixel_auroc", "pixel_pro", "image_auroc"):
            if last[metric] is not None:
                shown[f"best_{metric}"] = {**self._best(metric), "chosen_on": f"test set, by {metric}"}
        shown = {
            name: {k: v for k, v in self._shown(row).items() if k != "seconds"}
            for name, row in shown.items()
        }
        return {"class": self.args.cls[0], "seed": self.args.seed, "score": self.args.score, **shown}

    def _table(self) -> str:
        """The last epoch with each score, and the best epochs."""
        name, labels = self.args.cls[0], metric_labels(self.args.proLimit)
        scores = dict.fromkeys(("paper", self.args.score))
        marks = {score: f" ({score})" if len(scores) > 1 else "" for score in scores}
        rows = [
            (name, f"{row['epoch']} (last){marks[s]}", row) for s in scores for row in self._rows(s)[-1:]
        ]
        for metric in self._selection():
            row = self._best(metric)
            rows.append((name, f"{row['epoch']} (best {labels[metric]}*){marks[self.args.score]}", row))
        note = "Percent. *chosen on the test set, as the official program does; quote the last epoch."
        return f"{result_table(rows, self.args.proLimit)}\n\n{note}"

    def _selection(self) -> list[str]:
        """Metrics by which a best checkpoint is kept: those that are defined."""
        last = self._rows()[-1]
        defined = [m for m in ("pixel_auroc", "pixel_pro") if last[m] is not None]
        return defined or [m for m in ("image_auroc",) if last[m] is not None]

    def _best(self, metric: str) -> dict:
        return max(self._rows(), key=lambda row: -1 if row[metric] is None else row[metric])


def remarks(args, config: PyramidFlowConfig, data: AnomalyClass, device, augment) -> list[str]:
    """What a user should know before it starts."""
    lines = [f"class {data.name}: {warning}" for warning in data.warnings]
    lines += without_cuda(device, args.gpu)
    if not data.test:
        lines.append(
            f"class {data.name}: no test images: no metrics can be had, thresholds come from good images alone"
        )
    elif not any(not image.defective for image in data.test):
        lines.append(f"class {data.name}: no good test images; --holdout 0.2 gives some")
    held_out = f", {len(data.held_out)} good ones held out," if data.held_out else ""
    lines.append(
        f"class {data.name}: {len(data.train)} training and {len(data.test)} test images{held_out} at "
        f"{size_text(config.image_size)}; encoder {config.encoder}, {config.num_level} levels, "
        f"{config.num_stack} stacks, {config.volume_norm}, {args.precision}, "
        + (f"augmented by {augment.description}" if augment else "not augmented")
    )
    settled = {"numLayer": (config.num_level, 4), "volumeNorm": (config.volume_norm, "CVN")}
    lines += [
        f"--{flag} auto is {value} for a class called {data.name}, as in the official program"
        for flag, (value, usual) in settled.items()
        if getattr(args, flag) == "auto" and value != usual
    ]
    lines += [f"--{f} has no effect with --encoder {args.encoder}" for f in flags_without_effect(args)]
    return lines


def epoch_line(epoch: int, loss: float, rows: list[dict], args: Namespace, clock: Clock) -> str:
    """Of the log: the metrics where they were taken."""
    line = f"epoch {epoch}: loss {loss:.4f}"
    if rows and rows[-1]["epoch"] == epoch:
        labels, row = metric_labels(args.proLimit), rows[-1]
        keys = TABLE_METRICS if any(row[key] is not None for key in METRICS) else ()
        line += "".join(f", {labels[key]} {percent(row[key])}" for key in keys)
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
    for add_flags in (
        add_data_flags,
        add_model_flags,
        add_training_flags,
        add_running_flags_of_training,
    ):
        add_flags(parser)
    return parser


# fmt: off
def add_data_flags(parser: Parser) -> None:
    """Which images there are, and how they are read."""
    add = parser.add_argument_group("data").add_argument
    add("--cls", nargs="+", default=["tile"], metavar="CLASS",
        help="folders of --datapath, one run each; or all")
    add("--datapath", default="../mvtec_anomaly_detection",
        help="folder of MVTec AD, AD 2 or LOCO, BTAD, VisA, Real-IAD, or data in MVTec's layout")
    add("--good", metavar="DIR",
        help="folder of good images, instead of --datapath, which may also be one; its name is the class's")
    add("--bad", metavar="DIR", help="with --good: folder of defective test images")
    add("--masks", metavar="DIR", help="with --bad: folder of their masks, NAME_mask.png or NAME.png")
    add("--holdout", type=_holdout, default="auto", metavar="SHARE",
        help="of the good images that thresholds come from, and nothing else; auto: 0.1 of 50 or more if there "
        "are no good test images, else 0")
    add("--dataset", choices=DATASETS, default="auto", help="layout; auto recognizes it")
    add("--imageSize", type=_size, nargs="+", default=["auto"], metavar="N",
        help="input size, one number or H W; auto: 256 with --encoder none, else 1024")
    add("--augment", default="auto", metavar="{auto,none,flips,turns,FILE}",
        help="auto: flips and turns for MVTec's five textures; flips, turns: for any class; or a pipeline "
        "serialized by albumentations")
    add("--cache", choices=CACHES, default="auto",
        help="decoded images: ram, kept; none, read each time; auto: by free memory")


def add_model_flags(parser: Parser) -> None:
    """The architecture, and the weights it starts from."""
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=ENCODERS, default="resnet18", help="none: fixed 1x1 convolution (FNF)")
    add("--encoderBN", choices=ENCODER_BNS, default="batch",
        help="the encoder's BatchNorm while training: the batch's statistics, or frozen")
    add("--encoderWeights", metavar="PATH",
        help="file of encoder weights with torchvision's names, instead of a download")
    add("--numLayer", choices=("auto", *"2345678"), default="auto", metavar="{auto,2..8}",
        help="levels of the pyramid; auto: by class")
    add("--volumeNorm", choices=("auto", *VOLUME_NORMS), default="auto",
        help="volume normalization; auto: by class")
    add("--kernelSize", type=whole_number(1, 99), default=7, help="of the coupling blocks' convolutions, odd")
    add("--numChannel", type=whole_number(1, 1024), default=16, help="channels with --encoder none")
    add("--numStack", type=whole_number(1, 256), default=4,
        help="repetitions of the schedule of coupling blocks")
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
    add("--warmup", type=number(0), default=0.0, metavar="EPOCHS",
        help="in which the learning rate rises linearly")
    add("--saveMemory", type=boolean, default=True, metavar="{true,false}",
        help="backpropagate by inversion: memory does not grow with depth")

    add = parser.add_argument_group("ablations", "of the paper's Table 2").add_argument
    add("--loss", choices=LOSSES, default="fourier",
        help="spatial: without the Fourier transform; likelihood: of a Gaussian, for --volumeNorm none")
    add("--template", choices=TEMPLATES, default="mean",
        help="what latents are contrasted with: each other and their mean; or zero, in training and in the score")
    add("--contrast", choices=CONTRASTS, default="latent",
        help="latent: differences are composed; composed: compose, then difference")


def add_running_flags_of_training(parser: Parser) -> None:
    """The score, where it runs, and what it writes."""
    group = parser.add_argument_group("score")
    add_score_flags(group)
    group.add_argument("--falseAlarm", type=number(LOWEST_RATE, 1), default=FALSE_ALARM, metavar="RATE",
        help="share of good images that the default threshold may call defective")
    group.add_argument("--proLimit", type=number(0, 1, above=True), default=0.3,
        help="false-positive rate up to which the second PRO integrates")

    group = parser.add_argument_group("running")
    add_running_flags(group)
    add = group.add_argument
    add("--evalEvery", type=whole_number(1), default=1,
        help="epochs between evaluations; the last is always evaluated")
    add("--saveDir", default="saveDir", help="folder in which the run's folder is made")
    add("--resume", metavar="RUN",
        help="folder of a run to resume; its settings come with it; with more --epochs also a finished one")
    add("--config", metavar="FILE",
        help="yaml or json file of flags, such as a run's config.json; the command line wins")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (pip install tensorboard)")
# fmt: on


def _size(text: str) -> int | str:
    return "auto" if text == "auto" else whole_number(1, 2**14)(text)


def _holdout(text: str) -> float | str:
    return "auto" if text == "auto" else number(0, MOST_HOLDOUT)(text)


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
    datapath = Path(args.datapath)
    if args.good is None:
        return datapath if is_flat(datapath, args.dataset) else None
    return Path(args.good)


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
        data = open_class(Path(args.datapath), args.cls[0], args.dataset, need_test=False)
    else:
        data = open_folders(args.cls[0], folder, bad, masks)
    return hold_out(data, args.holdout, args.seed)


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
        raise InputError(
            f"--config {path}: not a table of flags such as `epochs: 15`; choose another file"
        )
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
    """The architecture that the flags ask for, `auto` settled by class.

    Raises:
        InputError: the flags do not fit together.
    """
    size, name = args.imageSize, args.cls[0]
    if size == ["auto"]:
        size = [AUTO_IMAGE_SIZE[args.encoder]]
    if len(size) > 2 or "auto" in size:
        raise InputError("--imageSize takes auto, one number, or two (height width)")
    num_layer, volume_norm = args.numLayer, args.volumeNorm
    if num_layer == "auto":
        num_layer = AUTO_NUM_LAYER.get(name, 4)
    if volume_norm == "auto":
        volume_norm = "SVN" if name in AUTO_SVN else "CVN"
    try:
        config = PyramidFlowConfig(
            encoder=args.encoder,
            encoder_bn=args.encoderBN,
            num_level=int(num_layer),
            num_stack=args.numStack,
            num_channel=args.numChannel,
            kernel_size=args.kernelSize,
            volume_norm=volume_norm,
            image_size=(size[0], size[-1]),
            contrast=args.contrast,
            save_memory=args.saveMemory,
        )
        return with_map_size(config, args.mapSize)
    except ValueError as error:
        raise InputError(str(error)) from None


def flags_without_effect(args: Namespace) -> list[str]:
    """Flags that were set although the encoder does not read them."""
    unread = ("encoderBN", "encoderWeights") if args.encoder == "none" else ("numChannel",)
    parser = make_parser()
    return [name for name in unread if getattr(args, name) != parser.get_default(name)]


def check_class(args: Namespace) -> AnomalyClass:
    """The class, if its files and the flags fit together.

    Raises:
        InputError: they do not.
    """
    model_config(args)
    check_score_flags(args)
    if args.resume is None:
        check_writable(Path(args.saveDir))
    data = open_data(args)
    count, batch = len(data.train), args.batchSize
    if count < 2:
        raise InputError(f"class {data.name} has {count} training images; add some, at least 2")
    if batch < 2 and args.loss != "likelihood" and args.template == "mean":
        raise InputError("--batchSize 1: the loss compares pairs of images; use at least 2")
    if batch > count:
        raise InputError(
            f"--batchSize {batch} is more than the {count} training images; use 2 to {count}"
        )
    if batch * world_size() > count:
        raise InputError(
            f"{world_size()} processes with --batchSize {batch} need at least as many images, there are "
            f"{count}; start fewer"
        )
    return data


# ------------------------------------------------------------------------------------- resume


def load_state(folder: Path) -> dict:
    """What `Run.save_state` wrote.

    Raises:
        InputError: the folder holds no run that can be resumed.
    """
    if not folder.is_dir() or str(folder) in ("", "."):
        raise InputError(
            f"--resume {folder}: no such folder; choose a run's folder, such as saveDir/tile-..."
        )
    if not (folder / STATE_FILE).is_file():
        raise InputError(
            f"--resume {folder}: no {STATE_FILE} in it; choose a run's folder, or start again"
        )
    content = load_checkpoint(folder / STATE_FILE)
    if isinstance(content.get("settings"), dict):
        for name in ADDED_FLAGS:
            content["settings"].setdefault(name, make_parser().get_default(name))
    names = {action.dest for action in make_parser()._actions} - {"help"}
    types = {"settings": dict, "training_images": str, "processes": int, "epoch": int, "rows": list,
             "model": dict, "optimizer": dict, "scheduler": dict, "random_state": Tensor}  # fmt: skip
    if (
        any(not isinstance(content.get(k), t) for k, t in types.items())
        or content["settings"].keys() != names
    ):
        raise InputError(f"{folder / STATE_FILE} is not the state of a run of this version; start again")
    return content


def resumed_arguments(stored: dict, argv: list[str] | None) -> Namespace:
    """The settings of a stopped run, with the flags that may change.

    Raises:
        InputError: a given flag contradicts the run's, or nothing is left to do.
    """
    given = given_flags(argv)
    folder = Path(given["resume"])
    for name, value in given.items():
        same = value == stored[name] or (name == "precision" and value == "auto")
        if name in ("imageSize", "mapSize"):  # one number means a square
            same = (value[0], value[-1]) == (stored[name][0], stored[name][-1])
        if name not in FREE_ON_RESUME and not same:
            raise InputError(
                f"--{name} {value} contradicts the run in {folder}, which has {stored[name]}; leave the "
                "flag out, or start a new run"
            )
    parser = make_parser()
    words = flag_words(parser, {**stored, "config": None, "resume": None}, f"--resume {folder}")
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    args = Namespace(**{**vars(parser.parse_args(words)), **free})
    finished = (folder / RESULT_FILE).is_file()
    if finished and args.epochs <= stored["epochs"]:
        raise InputError(
            f"--resume {folder}: this run is finished after {stored['epochs']} epochs; give more --epochs"
        )
    if args.epochs < stored["epochs"]:
        raise InputError(
            f"--epochs {args.epochs}: the run has {stored['epochs']}; give as many, or more"
        )
    return args


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
        weights = load_tensors(Path(source)) if source else download_encoder_weights(encoder)
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
    differing = [
        f"{k} {theirs[k]}" for k in mine if k not in ("save_memory", "map_size") and mine[k] != theirs[k]
    ]
    if differing:
        raise InputError(f"--init {checkpoint}: it has {', '.join(differing)}; set the flags alike")
    model.load_state_dict(other.state_dict())


if __name__ == "__main__":
    run_script(main)
