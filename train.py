"""Train PyramidFlow on one class of good images and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import pictures
from checkpoint import fill_encoder, save_checkpoint
from dataset import AnomalyClass, open_class
from evaluation import DivergedError, TestSet, features_in_order, percent, result_table
from hardware import (
    choose_device,
    choose_precision,
    describe_environment,
    keep_freed_memory,
    network_dtype,
)
from loading import FeatureSource, ImageStore, training_plan
from metrics import METRIC_NAMES, Metrics, evaluate_maps
from model import PyramidFlow, PyramidFlowConfig, fourier_loss, latent_template
from settings import Settings, augmentation, flags_without_effect, model_config, parse_settings
from util import (
    InputError,
    check_writable,
    create_run_folder,
    progress,
    run_script,
    seed_everything,
    start_log,
    write_csv,
    write_json,
)

# The official program's optimiser.
ADAM = {"lr": 2e-4, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 1e-5}
MAX_GRADIENT_NORM = 1.0
STEPS_BETWEEN_CHECKS = 50  # of the loss on CUDA, where looking at it makes the host wait


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(__doc__, arguments)
    device = choose_device(settings.gpu)
    precision = choose_precision(settings.precision, device)
    config = model_config(settings)
    data = open_class(Path(settings.datapath), settings.cls)
    check_batch_size(settings, len(data.train))
    check_writable(Path(settings.saveDir))
    keep_freed_memory()
    seed_everything(settings.seed)
    model = PyramidFlow(config)
    fill_encoder(model, settings.encoderWeights)
    model.to(device).compute_networks_in(network_dtype(precision))
    store = ImageStore(
        data.train, config.image_size, settings.cache, device, settings.numWorkers, "training images"
    )
    train_set = FeatureSource(store, model.encode, constant=model.encoder_is_constant)
    test_set = TestSet.load(data, model, settings.cache, settings.numWorkers, device)

    run = Run.start(settings, config, data, device)
    if device.type == "cpu" and settings.gpu != "cpu":
        run.log.info("no CUDA device: running on the CPU")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    run.log.info(f"{describe_run(data, config)}, {precision}")
    for flag in flags_without_effect(settings):
        run.log.info(f"--{flag} has no effect with --encoder {settings.encoder}")
    optimizer = make_optimizer(model)

    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        plan = training_plan(len(store), settings.batchSize, augmentation(settings, config))
        model.train()
        batches = progress(train_set.batches(plan), f"epoch {epoch}", len(plan))
        loss = train_one_epoch(model, optimizer, batches)
        if epoch % settings.evalEvery and epoch < settings.epochs:
            run.log.info(f"epoch {epoch}: loss {loss:.4f}")
            continue
        model.eval()
        template = latent_template(model, features_in_order(train_set, config, "template"))
        maps = test_set.anomaly_maps(model, template)
        metrics = evaluate_maps(maps, test_set.truth)
        run.record(epoch, loss, metrics, time.perf_counter() - start, model, template)
    run.finish(model, template, maps, test_set)


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


def train_one_epoch(
    model: PyramidFlow, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]
) -> float:
    """One pass over batches of features (B,C,H,W); the mean loss.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    losses: list[Tensor] = []
    for features in batches:
        losses.append(train_step(model, optimizer, features))
        if losses[-1].device.type == "cpu" or len(losses) % STEPS_BETWEEN_CHECKS == 0:
            check_finite(losses)
    check_finite(losses)
    return torch.stack(losses).mean().item()


def train_step(model: PyramidFlow, optimizer: torch.optim.Optimizer, features: Tensor) -> Tensor:
    """One step of the optimiser; the loss, still on the device: nothing here waits for it."""
    latents, _ = model.latents(features)
    loss = fourier_loss(model.pyramid, latents)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


def check_finite(losses: list[Tensor]) -> None:
    finite = torch.stack(losses[-STEPS_BETWEEN_CHECKS:]).isfinite()
    if not finite.all():
        step = len(losses) - len(finite) + int(finite.long().argmin())
        raise DivergedError(f"the loss became {losses[step].item()} at step {step + 1} of the epoch")


# ------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """The folder of a run and what is written to it."""

    folder: Path
    settings: Settings
    config: PyramidFlowConfig
    log: logging.Logger
    rows: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, settings: Settings, config: PyramidFlowConfig, data: AnomalyClass, device) -> Run:
        folder = create_run_folder(Path(settings.saveDir), settings.cls)
        log = start_log(folder / "log.txt", describe_environment(device))
        write_json(
            folder / "config.json",
            {
                "settings": asdict(settings),
                "model": config.to_dict(),
                "training_images": len(data.train),
                "test_images": len(data.test),
            },
        )
        log.info(f"run folder {folder}")
        return cls(folder, settings, config, log)

    def record(
        self,
        epoch: int,
        loss: float,
        metrics: Metrics,
        seconds: float,
        model: PyramidFlow,
        template: tuple[Tensor, ...],
    ) -> None:
        """A row in metrics.csv, last.pt, and best_*.pt where this epoch is the best so far."""
        row = {"epoch": epoch, "loss": loss, **asdict(metrics), "seconds": round(seconds, 2)}
        self.rows.append(row)
        content = {
            "config": self.config.to_dict(),
            "settings": asdict(self.settings),
            "model": {name: x.cpu() for name, x in model.state_dict().items()},
            "template": [x.cpu() for x in template],
            "metrics": row,
        }
        save_checkpoint(self.folder / "last.pt", content)
        for metric in self._selection():
            if self._best(metric) is row:
                save_checkpoint(self.folder / f"best_{metric}.pt", content)
        write_csv(self.folder / "metrics.csv", self.rows)
        shown = ", ".join(f"{label} {percent(row[key])}" for key, label in METRIC_NAMES.items())
        self.log.info(f"epoch {epoch}: loss {loss:.4f}, {shown}, {seconds:.1f} s")

    def finish(self, model: PyramidFlow, template, maps: Tensor, test_set: TestSet) -> None:
        """result.json, pictures and the table."""
        last = self.rows[-1]
        chosen = {metric: self._best(metric) for metric in self._selection()}
        best = {
            ("best" if i == 0 else f"best_{metric}"): _summary(row)
            | {"chosen_on": f"test set, by {metric}"}
            for i, (metric, row) in enumerate(chosen.items())
        }
        write_json(
            self.folder / "result.json",
            {
                "class": self.settings.cls,
                "last": _summary(last),
                "best": None,
                **best,
                "seed": self.settings.seed,
            },
        )
        rows = [("last", last)] + [(f"best {METRIC_NAMES[m]}*", row) for m, row in chosen.items()]
        table = result_table(
            [(self.settings.cls, f"{row['epoch']} ({label})", row) for label, row in rows]
        )
        note = "Percent. *chosen on the test set, as the official program does; quote the last epoch."
        self.log.info(f"\n{table}\n\n{note}")
        self._save_pictures(model, template, maps, test_set)
        self.log.info(f"\nwritten to {self.folder}")

    def _selection(self) -> list[str]:
        """Metrics by which a best epoch is chosen: those that are defined."""
        defined = [m for m in ("pixel_auroc", "pixel_pro") if self.rows[-1][m] is not None]
        return defined or [m for m in ("image_auroc",) if self.rows[-1][m] is not None]

    def _best(self, metric: str) -> dict:
        return max(self.rows, key=lambda row: row[metric])

    def _save_pictures(self, model: PyramidFlow, template, maps: Tensor, test_set: TestSet) -> None:
        folder = self.folder / "pictures"
        folder.mkdir()
        pictures.save_curves(folder / "curves.png", self.rows)
        image_template = None
        if self.config.encoder == "none":
            with torch.no_grad():
                image_template = pictures.to_picture(model.inverse(template)[0])
        scale = pictures.colour_scale(maps)
        for i in pictures.choose_examples(test_set.data.test):
            image = test_set.data.test[i]
            kind_folder = folder / image.kind
            kind_folder.mkdir(exist_ok=True)
            pictures.save_panel(
                kind_folder / f"{image.path.name.replace('.', '_')}.png",
                f"{self.settings.cls}, {image.kind}/{image.path.name}",
                test_set.store[i],
                image_template,
                maps[i],
                scale,
                None if test_set.truth.masks is None else test_set.truth.masks[i],
            )


def describe_run(data: AnomalyClass, config: PyramidFlowConfig) -> str:
    height, width = config.image_size
    return (
        f"class {data.name}: {len(data.train)} training and {len(data.test)} test images at {height}x{width}; "
        f"encoder {config.encoder}, {config.num_level} levels, {config.num_stack} stacks, {config.volume_norm}"
    )


def _summary(row: dict) -> dict:
    return {key: row[key] for key in ("epoch", *METRIC_NAMES, "threshold")}


if __name__ == "__main__":
    run_script(main)
