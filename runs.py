"""A run: its folder, its state, its log and its figures; the weights it starts from and the memory it takes.

train.py holds the flags and the loop; here is what stands around them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import kernels
import report
import spectral
import util
from dataset import AnomalyClass, Images, TestImage
from figures import TEST_IMAGES
from metrics import METRICS, TABLE_METRICS, GroundTruth, Metrics, metric_labels, result_table
from model import PyramidFlow, PyramidFlowConfig, coupling_schedule, load_encoder_weights
from scorer import LAST_FILE, Scorer, TestSet, left_out_factor, load_checkpoint, read_tensor, save_checkpoint
from util import Clock, DivergedError, InputError, Interrupted
from verdict import Scored, named_thresholds, require, roi_remarks

STATE_FILE, RESULT_FILE = "state.pt", "result.json"
STEPS_BETWEEN_LOOKS = 50  # at the loss, for which the host waits on CUDA
FIRST_LOOKS = (1, 10)  # after the step that prepares much, and when the log says how long the run takes


class State:
    """All that changes while a run trains; saved after each epoch, it is all that resuming needs.

    Attributes:
        epoch: the one that is trained now or next, from 1.
        rows: metrics of the evaluated epochs.
    """

    def __init__(self, args, model, optimizer, scheduler, data: AnomalyClass):
        self.epoch, self.rows = 1, []
        masks = [image.mask for image in data.test if image.mask]
        masks = [path for mask in masks for path in (dataset.list_images(mask) if mask.is_dir() else [mask])]
        tested = [*(image.path for image in data.test), *masks]
        images = {"training_images": fingerprint(data.train), "test_images": fingerprint(tested)}
        self._fixed = {"settings": vars(args), **images, "processes": util.world_size()}
        self._parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def add_rows(self, scorers: Sequence[Scorer], loss: float, clock: Clock) -> None:
        """Take the metrics of this epoch from the scorers, which get its number and loss."""
        seconds = round(sum(clock.seconds.values()), 2)
        for scorer in scorers:
            scorer.metrics = {"epoch": self.epoch, "loss": loss, **scorer.metrics, "seconds": seconds}
            self.rows.append(scorer.metrics)

    def content(self) -> dict:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        rest = {"epoch": self.epoch, "rows": self.rows, "random_state": torch.get_rng_state()}
        return {**self._fixed, **parts, **rest}

    def restore(self, stored: dict | None) -> None:
        """Take what `content` gave; None: nothing.

        Raises:
            InputError: it does not fit the flags, or the images are not the same.
        """
        if stored is None:
            return
        remedies = {
            **dict.fromkeys(
                ("training_images", "test_images"),
                "give those it was started with by --datapath, or by --good, --bad and --masks",
            ),
            "processes": f"start {stored['processes']} processes",
        }
        for key, remedy in remedies.items():
            if stored.get(key, self._fixed[key]) != self._fixed[key]:  # old runs know nothing of test images
                name = key.replace("_", " ")
                raise InputError(f"--resume: the {name} are not those of the run; {remedy}")
        names = ("epoch", "loss", "score", *asdict(Metrics()), "seconds")  # rows of old runs lack some
        try:
            check_moments(self._parts["model"], stored["optimizer"])
            stored = {**stored, **own_settings(self._parts["optimizer"], self._parts["scheduler"], stored)}
            for name, part in self._parts.items():
                part.load_state_dict(stored[name])
            self.epoch = stored["epoch"]
            self.rows = [{**dict.fromkeys(names), **row} for row in stored["rows"]]
            torch.set_rng_state(stored["random_state"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
            raise InputError("--resume: the state does not fit its settings; start again") from None


def check_moments(model: PyramidFlow, stored: dict) -> None:
    """Raises ValueError unless Adam's moments have their parameters' shapes, which its kernels trust."""
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    for index, moments in stored["state"].items():
        wanted = {"exp_avg": shapes[index], "exp_avg_sq": shapes[index], "step": ()}
        for name, shape in wanted.items():
            read_tensor(moments[name], shape, torch.float32, name)


def own_settings(optimizer, scheduler, stored: dict) -> dict[str, dict]:
    """The stored states of both, of whose settings only the step and the learning rates are taken from the file.

    The rest is made from flags; PyTorch would take whatever stands there.  Raises ValueError for no number.
    """
    groups, steps = optimizer.state_dict()["param_groups"], ("last_epoch", "_step_count")
    rates = [group["lr"] for group in stored["optimizer"]["param_groups"]]
    require(len(rates) == len(groups) and all(type(x) is float and 0 <= x < 1e9 for x in rates), "learning rates")
    steps = {name: stored["scheduler"][name] for name in steps}
    require(all(type(n) is int and 0 <= n < 10**9 for n in steps.values()), "steps")
    groups = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    return {
        "optimizer": {"state": stored["optimizer"]["state"], "param_groups": groups},
        "scheduler": {**scheduler.state_dict(), **steps, "_last_lr": rates},
    }


def load_state(folder: Path) -> dict:
    """What `Run.save_state` wrote.

    Raises:
        InputError: the folder holds no run that can be resumed.
    """
    if folder.is_file():
        raise InputError(f"--resume {folder} is a file; give the run's folder, {folder.parent}")
    if not folder.is_dir() or str(folder) in ("", "."):
        raise InputError(f"--resume {folder}: no such folder; choose a run's folder, such as saveDir/tile-...")
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(f"--resume {folder}: no {path.name} in it; choose a run's folder, or start again")
    content = load_checkpoint(path)
    types = {"settings": dict, "training_images": str, "processes": int, "epoch": int, "rows": list,
             "model": dict, "optimizer": dict, "scheduler": dict, "random_state": Tensor}  # fmt: skip
    fits = all(isinstance(content.get(key), kind) for key, kind in types.items())
    if not fits:
        raise InputError(f"{path} is not the state of a run of this version; start again")
    return content


def fingerprint(paths: Iterable[Path]) -> str:
    """A digest of image files' names and sizes."""
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

    def end_epoch(self, scorers: Sequence[Scorer], loss: float, clock: Clock) -> None:
        """Write what an epoch gave; where it was evaluated, the scorers, the asked score's as the last.

        The rows go to metrics.csv, the last scorer to last.pt, and to best_*.pt where it is the best.
        """
        self.state.add_rows(scorers, loss, clock)
        if scorers and self.log:
            self._record(scorers[-1])
        self.say([epoch_line(self.state.epoch, loss, self.state.rows, self.args, clock)])
        self.state.epoch += 1
        self.save_state()

    def _record(self, scorer: Scorer) -> None:
        scorer.save(self.folder / LAST_FILE)
        for metric in self._selection():
            if self._best(metric) is scorer.metrics:
                scorer.save(self.folder / f"best_{metric}.pt")
        util.write_csv(self.folder / "metrics.csv", list(map(self._shown, self.state.rows)))
        for key, value in scorer.metrics.items() if self._board else ():
            if isinstance(value, float):
                self._board.add_scalar(key, value, scorer.metrics["epoch"])

    def finish(self, scorer: Scorer, test_set: TestSet, scored: Scored, drawn: Scorer, shown: str) -> None:
        """Write the figures and the report of the last epoch, result.json, and the table.

        Args:
            scorer: of the last epoch.
            test_set, scored, drawn, shown: as `what_to_show` gives them.
        """
        if not self.log:
            return
        given = (self.state.rows, vars(self.args), self.args.proLimit, shown)
        report.save_evaluation(self.folder, test_set, scored, drawn, *given)
        pictures, epoch = self.folder / "pictures", self.state.rows[-1]["epoch"]
        for path in sorted(pictures.rglob("*.png")) if self._board else ():
            name = str(path.relative_to(pictures).with_suffix(""))
            self._board.add_image(name, dataset.read_image(path), epoch, dataformats="HWC")
        if self._board:
            self._board.close()
        thresholds = named_thresholds(scorer.metrics, scorer.calibration, scorer.image_score)
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
        """What result.json says: the last epoch, and the best by each metric that is defined."""
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


def what_to_show(
    test_set: TestSet, train_set: Images, held_out: Images, evaluated: list[tuple[Scorer, Scored]]
) -> tuple[TestSet, Scored, Scorer, str]:
    """Test set, scores, scorer and name for the figures: of good images where there are no test images.

    Of training images the maps are those of the first scorer, the paper's: in a bank an image would be
    compared with itself.
    """
    scorer, scored = evaluated[-1]
    if len(test_set.images):
        return test_set, scored, scorer, TEST_IMAGES
    if held_out:
        images, shown, scored = held_out, "held-out images", scorer.score_all(held_out, "figures")
    else:
        images, shown, scorer = train_set, "training images, each left out of the template", evaluated[0][0]
        factor = left_out_factor(len(images), scorer.settings["template"])
        scored = Scored(*(factor * x for x in scorer.score_all(images, "figures")))
    good = [TestImage(path, "good", None) for path in images.paths]
    data = AnomalyClass(scorer.class_name, [], good)
    truth = GroundTruth.from_masks(data.defective, None, scorer.device)
    return TestSet(data, images, truth), scored, scorer, shown


def open_tensorboard(folder: Path):
    """Raises InputError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


# ------------------------------------------------------------------------------------------------ the log


class LossMeter:
    """The losses of an epoch: checked, shown on the progress bar, averaged.

    On CUDA not each is looked at, because the host waits for it; after a bad one all are bad.

    Args:
        bar: the progress bar of the batches.
        pace: of the run, shown with the loss.
    """

    def __init__(self, bar: tqdm, pace: Pace | None = None):
        self._bar, self._pace, self._losses, self._looked = bar, pace, [], 0
        if pace:
            pace.start()

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step; raises DivergedError if it is not finite."""
        self._losses.append(loss.detach())
        count = len(self._losses)
        if not loss.is_cuda or count % STEPS_BETWEEN_LOOKS == 0 or count in FIRST_LOOKS:
            self._look(self._losses[-1])

    def mean(self) -> float:
        """The mean loss of all steps, over all processes; raises DivergedError if it is not finite."""
        mean = torch.stack(self._losses).double().mean()
        util.average([mean])
        return self._look(mean)

    def _look(self, loss: Tensor) -> float:
        value, count = float(loss), len(self._losses)
        if not math.isfinite(value):
            raise DivergedError(f"the loss became {value} at step {count} of the epoch")
        text = f"loss {value:.4f}"
        if self._pace:
            self._pace.add(count - self._looked)
            text += f", {self._pace}"
        self._bar.set_postfix_str(text, refresh=False)
        self._looked = count
        return value


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
    """How many of the epochs after this one are evaluated."""
    later = range(epoch + 1, args.epochs + 1)
    return sum(e % args.evalEvery == 0 or e == args.epochs for e in later)


def epoch_line(epoch: int, loss: float, rows: list[dict], args: Namespace, clock: Clock) -> str:
    """A line for the log: loss, times, and the metrics where they were taken."""
    line = f"epoch {epoch}: loss {loss:.4f}"
    if rows and rows[-1]["epoch"] == epoch:
        labels, row = metric_labels(args.proLimit), rows[-1]
        keys = TABLE_METRICS if any(row[key] is not None for key in METRICS) else ()
        line += "".join(f", {labels[key]} {util.percent(row[key])}" for key in keys)
    return f"{line}, {clock}"


def remarks(
    asked: Namespace, args: Namespace, config: PyramidFlowConfig, data: AnomalyClass, device, augment
) -> list[str]:
    """What a user should know before it starts; `asked` are the flags, `args` has auto settled."""
    about = f"class {data.name}:"
    odd = [*data.warnings, *roi_remarks(args.roi, data.train)]
    lines = [f"{about} {line}" for line in odd] + util.without_cuda(device, args.gpu)
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
    return lines


# ------------------------------------------------------------------------------------------------- memory


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


def activation_bytes(config: PyramidFlowConfig, batch_size: int, precision: str, device: torch.device) -> int:
    """Bytes at the peak of a training step under plain autograd, without weights and their gradients.

    A block (see `model.CouplingBlock`) keeps the state it makes and exp(s), in float32, and the hidden map
    and [s0, t], in the precision of the convolutions.  On top comes the gradient of one block, or of the loss.
    """
    asked = torch.bfloat16 if precision == "bf16" else None
    c = config.channels
    pixels = [batch_size * h * w for h, w in map(config.level_size, range(config.num_level))]
    peak = 10 * c * pixels[0] * (batch_size - 1)  # of the loss: it grows with the pairs of images
    kept = 4 * c * sum(pixels)
    for kind, i in coupling_schedule(config.num_level) * config.num_stack:
        target = i if kind == "up" else i + 1
        level = i if kind == "down" else target  # of the hidden map
        out = level if config.volume_norm == "SVN" else target  # of [s0, t]
        side = min(config.level_size(level))
        dtype = kernels.convolution_dtype(asked, device, c, side, config.kernel_size) or torch.float32
        size = dtype.itemsize
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
    number_ = torch.empty((), dtype=dtype)
    weight = number_.expand(outputs, channels, k, k)
    cast = (dtype != torch.float32) * weight.nbytes
    x = number_.expand(batch, own, height, width) if own else None
    small = number_.expand(batch, upsampled, height // 2, width // 2) if upsampled else None
    way = spectral.choose_way(weight, x, small, stride) if device.type == "cpu" else "direct"
    if way != "direct":
        kept, for_a_while = spectral.memory_of(way, shape, channels, outputs, k, dtype.itemsize)
        return cast + kept, for_a_while
    folded = outputs * upsampled * (k + 1) ** 2 * dtype.itemsize  # the kernel for the upsampled map
    return cast + folded, weight.nbytes


# ------------------------------------------------------------------------------------------------ weights


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
    from torchvision import models  # see model.py

    weights = models.get_model_weights(encoder).IMAGENET1K_V1
    interactive = sys.stderr is not None and sys.stderr.isatty()
    try:
        return weights.get_state_dict(progress=interactive, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy's page instead of the file, a damaged cache
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"cannot get {weights.url} ({util.first_line(error)}); give the file by --encoderWeights PATH, train "
            f"without an encoder by --encoder none, or remove a damaged copy from {cache}"
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
