"""The folder of a run: the log, the metrics, the checkpoints and the pictures that are written to it."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

import pictures
from calibration import Calibration
from checkpoint import load_checkpoint, save_checkpoint
from evaluation import TestSet, percent, result_table
from hardware import Clock
from metrics import METRIC_NAMES, Metrics
from model import PyramidFlow
from settings import Settings
from util import InputError, create_run_folder, start_log, write_csv, write_json

STATE_FILE, LAST_FILE, RESULT_FILE = "state.pt", "last.pt", "result.json"
TABLE_NOTE = "Percent. *chosen on the test set, as the official program does; quote the last epoch."


@dataclass
class State:
    """How far a run is; with weights and optimiser it is all that going on needs.

    Attributes:
        epoch: the one in progress, from 1.
        losses: of its steps so far.
        random_state: torch's, from which the epoch's order is drawn.
        rows: metrics of the evaluated epochs.
    """

    epoch: int
    losses: list[float]
    random_state: Tensor
    rows: list[dict] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def add(self, losses: list[Tensor]) -> str | None:
        """Move the losses of further steps here, which waits for them; what is wrong with one of them."""
        problem = None
        for loss in torch.stack(losses).tolist() if losses else ():
            self.losses.append(loss)
            if not math.isfinite(loss) and problem is None:
                problem = f"the loss became {loss} at step {len(self.losses)} of the epoch"
        losses.clear()
        return problem

    def add_row(self, metrics: Metrics, clock: Clock) -> None:
        """The metrics of this epoch."""
        seconds = round(sum(clock.seconds.values()), 2)
        self.rows.append(
            {"epoch": self.epoch, "loss": self.mean_loss, **asdict(metrics), "seconds": seconds}
        )

    def begin_next_epoch(self) -> None:
        self.epoch, self.losses, self.random_state = self.epoch + 1, [], torch.get_rng_state()


@dataclass
class Run:
    """One run's folder.

    Attributes:
        folder: where everything is written to.
        settings: of the run.
        log: to stdout and log.txt.
        state: how far it is.
    """

    folder: Path
    settings: Settings
    log: logging.Logger
    state: State

    def __post_init__(self):
        self._board = open_tensorboard(self.folder) if self.settings.tensorboard else None

    @classmethod
    def start(cls, settings: Settings, about: dict, environment: list[str], state: State) -> Run:
        folder = create_run_folder(Path(settings.saveDir), settings.cls)
        log = start_log(folder / "log.txt", environment)
        write_json(folder / "config.json", about)
        log.info(f"run folder {folder}")
        return cls(folder, settings, log, state)

    @classmethod
    def resume(cls, settings: Settings, about: dict, environment: list[str], state: State) -> Run:
        folder = Path(settings.resume)
        log = start_log(folder / "log.txt", environment)
        on_disk = load_state(folder)["state"]  # now that no other process writes to it
        if (on_disk["epoch"], len(on_disk["losses"])) != (state.epoch, len(state.losses)):
            raise InputError(f"--resume {folder}: another process went on with it; start again")
        for unfinished in folder.glob(".*.tmp"):  # of a write that was killed
            unfinished.unlink()
        log.info(f"going on with {folder} in epoch {state.epoch}, {len(state.losses)} steps done")
        return cls(folder, settings, log, state)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        for handler in self.log.handlers:
            handler.close()

    @property
    def how_to_resume(self) -> str:
        return f"go on with: python train.py --resume {self.folder}"

    def save_state(self, content: dict) -> None:
        """All that `--resume` needs, in one file that is always whole.

        Args:
            content: weights, optimiser and settings.
        """
        save_checkpoint(self.folder / STATE_FILE, {**content, "state": asdict(self.state)})

    def record(self, content: dict, clock: Clock) -> None:
        """The last row goes to metrics.csv, the weights to last.pt, and to best_*.pt where they are the best.

        Args:
            content: weights, template and configuration.
        """
        state, rows = self.state, self.state.rows
        row = rows[-1]
        content = {**content, "metrics": row}
        save_checkpoint(self.folder / LAST_FILE, content)
        for metric in self._selection():
            if self._best(metric) is row:
                save_checkpoint(self.folder / f"best_{metric}.pt", content)
        write_csv(self.folder / "metrics.csv", rows)
        shown = ", ".join(f"{label} {percent(row[key])}" for key, label in METRIC_NAMES.items())
        self.log.info(f"epoch {state.epoch}: loss {state.mean_loss:.4f}, {shown}, {clock}")
        if self._board:
            for key, value in row.items():
                if key != "epoch" and value is not None:
                    self._board.add_scalar(key, value, state.epoch)
            self._board.flush()

    def calibrate(self, calibrate: Callable[[dict], Calibration]) -> Calibration:
        """Add the scores of good images to every checkpoint; those of last.pt are returned."""
        of_epoch: dict[int, Calibration] = {}
        for name in (LAST_FILE, *(f"best_{metric}.pt" for metric in self._selection())):
            content = load_checkpoint(self.folder / name)
            epoch = content["metrics"]["epoch"]
            if epoch not in of_epoch:
                of_epoch[epoch] = calibrate(content)
            save_checkpoint(self.folder / name, {**content, "calibration": of_epoch[epoch].to_dict()})
        return of_epoch[self.state.rows[-1]["epoch"]]

    def finish(
        self,
        model: PyramidFlow,
        template: tuple[Tensor, ...],
        test_set: TestSet,
        calibration: Calibration,
    ) -> None:
        """The pictures, result.json, and the table."""
        rows = self.state.rows
        folder = self.folder / "pictures"
        maps = test_set.anomaly_maps(model, template)
        pictures.save_evaluation(folder, test_set, maps, calibration, image_template(model, template))
        pictures.save_curves(folder / "curves.png", rows)
        if self._board:
            for path in sorted(folder.rglob("*.png")):
                name = str(path.relative_to(folder).with_suffix(""))
                self._board.add_image(name, pictures.read(path), rows[-1]["epoch"], dataformats="HWC")
            self._board.close()
        best = {
            f"best_{metric}": summary(self._best(metric)) | {"chosen_on": f"test set, by {metric}"}
            for metric in ("pixel_auroc", "pixel_pro", "image_auroc")
            if rows[-1][metric] is not None
        }
        chosen = [best[f"best_{metric}"] for metric in self._selection()]
        result = {"class": self.settings.cls, "last": summary(rows[-1]), "best": (chosen or [None])[0]}
        write_json(self.folder / RESULT_FILE, {**result, **best, "seed": self.settings.seed})
        labels = ["last", *(f"best {METRIC_NAMES[metric]}*" for metric in self._selection())]
        table = result_table(
            [
                (self.settings.cls, f"{row['epoch']} ({label})", row)
                for label, row in zip(labels, [rows[-1], *chosen], strict=True)
            ]
        )
        self.log.info(f"\n{table}\n\n{TABLE_NOTE}")
        self.log.info(f"\nwritten to {self.folder}")
        self.log.info(f"to use it: python predict.py {self.folder / LAST_FILE} IMAGES --out predictions")

    def _selection(self) -> list[str]:
        """Metrics by which a best checkpoint is kept: those that are defined."""
        last = self.state.rows[-1]
        defined = [m for m in ("pixel_auroc", "pixel_pro") if last[m] is not None]
        return defined or [m for m in ("image_auroc",) if last[m] is not None]

    def _best(self, metric: str) -> dict:
        return max(self.state.rows, key=lambda row: row[metric])


def check_tensorboard() -> None:
    """Fail now rather than after the data is read.

    Raises:
        InputError: the package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package: pip install tensorboard")


def open_tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def load_state(folder: Path) -> dict:
    """What `Run.save_state` wrote.

    Raises:
        InputError: the folder holds no run that can go on.
    """
    if not folder.is_dir():
        raise InputError(
            f"--resume {folder}: no such folder; name a run's folder, such as saveDir/tile-..."
        )
    if not (folder / STATE_FILE).is_file():
        raise InputError(
            f"--resume {folder}: no {STATE_FILE} in it; name a run's folder, or start again"
        )
    if (folder / RESULT_FILE).is_file():
        raise InputError(
            f"--resume {folder}: this run is finished; train.py without --resume starts another"
        )
    content = load_checkpoint(folder / STATE_FILE)
    try:
        same = (
            content["settings"].keys() == {item.name for item in fields(Settings)}
            and content["state"].keys() == {item.name for item in fields(State)}
            and {"model", "optimizer"} <= content.keys()
        )
    except (KeyError, AttributeError):
        same = False
    if not same:
        raise InputError(f"{folder / STATE_FILE} is not the state of a run of this version; start again")
    return content


def image_template(model: PyramidFlow, template: tuple[Tensor, ...]) -> Tensor | None:
    """Normalised image (3,h,w) of the latent template (Fig. 7); None where the stem has no inverse."""
    if model.config.encoder != "none":
        return None
    with torch.no_grad():
        return model.eval().inverse(template)[0]


def summary(row: dict) -> dict:
    return {key: row[key] for key in ("epoch", *METRIC_NAMES, "threshold", "image_threshold")}
