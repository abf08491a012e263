"""Train PyramidFlow on one class of good images and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import pictures
from dataset import (
    MASK_SIZE,
    MVTEC_TEXTURES,
    AnomalyClass,
    Augmentation,
    evaluation_batches,
    flips_and_turns,
    load_images,
    load_masks,
    open_class,
    training_batches,
)
from hardware import (
    PRECISIONS,
    choose_device,
    choose_precision,
    describe_environment,
    keep_freed_memory,
    network_dtype,
)
from metrics import METRIC_NAMES, GroundTruth, Metrics, evaluate_maps
from model import (
    ENCODERS,
    PyramidFlow,
    PyramidFlowConfig,
    anomaly_map,
    fourier_loss,
    latent_template,
    load_encoder_weights,
)
from util import (
    DivergedError,
    InputError,
    Parser,
    check_writable,
    create_run_folder,
    load_tensors,
    progress,
    run_script,
    save_checkpoint,
    seed_everything,
    start_log,
    whole_number,
    write_csv,
    write_json,
)

# The official program's choices by class, where a flag says auto.
AUTO_NUM_LAYER = {"metal_nut": 8, "carpet": 8, "transistor": 8, "screw": 2}
AUTO_SVN = ("carpet", "grid", "bottle", "transistor")
AUTO_IMAGE_SIZE = {"none": 256, "resnet18": 1024, "resnet34": 1024}

# The official program's optimiser.
ADAM = {"lr": 2e-4, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 1e-5}
MAX_GRADIENT_NORM = 1.0
EVALUATION_BATCH = 4

DIVERGED_REMEDY = (
    "checkpoints of earlier epochs, if any, are untouched; try another --seed or --volumeNorm"
)


def _flag(default, group: str, help: str, **options):
    return field(default=default, metadata={"group": group, "help": help, **options})


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(values)}")
    return values[text.lower()]


def _size(text: str) -> int | str:
    return "auto" if text == "auto" else whole_number(1)(text)


@dataclass
class Settings:
    """All flags of train.py, with the official names and defaults where the official program has them."""

    # data
    cls: str = _flag("tile", "data", "class to train on: a folder of --datapath")
    datapath: str = _flag(
        "../mvtec_anomaly_detection", "data", "folder of MVTec AD, or of any data in its layout"
    )
    imageSize: list = _flag(
        ("auto",), "data", "input size, one number or H W; auto: 256 with --encoder none, else 1024",
        type=_size, nargs="+", metavar="N",
    )  # fmt: skip
    augment: str = _flag(
        "auto", "data", "auto: flips and turns for MVTec's five textures; none", choices=("auto", "none")
    )
    numWorkers: int = _flag(
        min(os.cpu_count() or 1, 8), "data", "threads that read and decode images", type=whole_number(1)
    )
    # model
    encoder: str = _flag("resnet18", "model", "none: fixed 1x1 convolution (FNF)", choices=ENCODERS)
    encoderBN: str = _flag(
        "batch", "model", "the encoder's BatchNorm: batch, the batch's statistics while training; frozen",
        choices=("batch", "frozen"),
    )  # fmt: skip
    encoderWeights: str | None = _flag(
        None,
        "model",
        "file of encoder weights with torchvision's names, instead of a download",
        metavar="PATH",
    )
    numLayer: str = _flag(
        "auto",
        "model",
        "levels of the pyramid; auto: by class",
        choices=("auto", *"2345678"),
        metavar="{auto,2..8}",
    )
    volumeNorm: str = _flag(
        "auto", "model", "volume normalization; auto: by class", choices=("auto", "CVN", "SVN", "none")
    )
    kernelSize: int = _flag(
        7, "model", "kernel of the coupling blocks' convolutions, odd", type=whole_number(1)
    )
    numChannel: int = _flag(16, "model", "channels with --encoder none", type=whole_number(1))
    numStack: int = _flag(
        4, "model", "repetitions of the schedule of coupling blocks", type=whole_number(1)
    )
    # training
    epochs: int = _flag(15, "training", "passes over the training images", type=whole_number(1))
    batchSize: int = _flag(2, "training", "images per step, at least 2", type=whole_number(1))
    seed: int = _flag(0, "training", "of weights, order and augmentation", type=whole_number(0))
    saveMemory: bool = _flag(
        True,
        "training",
        "backpropagate by inversion: memory does not grow with depth",
        type=_boolean,
        metavar="{true,false}",
    )
    precision: str = _flag(
        "auto", "training", "of the flow's k x k convolutions; auto: the fastest that keeps the metrics",
        choices=PRECISIONS,
    )  # fmt: skip
    # running
    gpu: str = _flag("0", "running", "index of the CUDA device, or cpu")
    evalEvery: int = _flag(
        1, "running", "epochs between evaluations; the last is always evaluated", type=whole_number(1)
    )
    saveDir: str = _flag("saveDir", "running", "folder in which the run's folder is made")


def parse_settings(arguments: list[str] | None = None) -> Settings:
    parser = Parser(description=__doc__)
    groups = {}
    for item in fields(Settings):
        options = dict(item.metadata)
        group = options.pop("group")
        if item.default is not None:
            shown = "auto" if item.default == ("auto",) else item.default
            options["help"] += f" [{str(shown).lower() if isinstance(shown, bool) else shown}]"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{item.name}", default=item.default, **options)
    settings = Settings(**vars(parser.parse_args(arguments)))
    settings.imageSize = list(settings.imageSize)
    return settings


def model_config(settings: Settings) -> PyramidFlowConfig:
    """The architecture that the flags ask for, `auto` settled by class.

    Raises:
        InputError: the flags do not fit together.
    """
    size = settings.imageSize
    if size == ["auto"]:
        size = [AUTO_IMAGE_SIZE[settings.encoder]]
    if len(size) > 2 or "auto" in size:
        raise InputError("--imageSize takes auto, one number, or two (height width)")
    num_layer, volume_norm = settings.numLayer, settings.volumeNorm
    if num_layer == "auto":
        num_layer = AUTO_NUM_LAYER.get(settings.cls, 4)
    if volume_norm == "auto":
        volume_norm = "SVN" if settings.cls in AUTO_SVN else "CVN"
    try:
        return PyramidFlowConfig(
            encoder=settings.encoder,
            encoder_bn=settings.encoderBN,
            num_level=int(num_layer),
            num_stack=settings.numStack,
            num_channel=settings.numChannel,
            kernel_size=settings.kernelSize,
            volume_norm=volume_norm,
            image_size=(size[0], size[-1]),
            save_memory=settings.saveMemory,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


# ------------------------------------------------------------------------------------ training


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(arguments)
    device = choose_device(settings.gpu)
    precision = choose_precision(settings.precision, device)
    keep_freed_memory()
    config = model_config(settings)
    data = open_class(Path(settings.datapath), settings.cls)
    check_batch_size(settings, len(data.train))
    check_writable(Path(settings.saveDir))
    seed_everything(settings.seed)
    model = build_model(config, settings, device).compute_networks_in(network_dtype(precision))
    train_images = load_images(data.train, config.image_size, settings.numWorkers, "training images")
    test_set = TestSet.load(data, config, settings.numWorkers, device)

    run = Run.start(settings, config, data, device)
    if device.type == "cpu" and settings.gpu != "cpu":
        run.log.info("no CUDA device: running on the CPU")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    run.log.info(describe_run(data, config))
    for flag in flags_without_effect(settings):
        run.log.info(f"--{flag} has no effect with --encoder {settings.encoder}")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], **ADAM)
    augment = choose_augmentation(settings, config)

    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        model.train()
        batches = training_batches(train_images, settings.batchSize, augment, device)
        steps = len(train_images) // settings.batchSize
        loss = train_one_epoch(model, optimizer, progress(batches, f"epoch {epoch}", steps))
        if epoch % settings.evalEvery and epoch < settings.epochs:
            run.log.info(f"epoch {epoch}: loss {loss:.4f}")
            continue
        template = latent_template(
            model, evaluation_batches(train_images, EVALUATION_BATCH, device, "template")
        )
        maps = test_set.anomaly_maps(model, template)
        metrics = evaluate_maps(maps, test_set.truth)
        run.record(epoch, loss, metrics, time.perf_counter() - start, model, template)
    run.finish(model, template, maps, test_set)


def choose_augmentation(settings: Settings, config: PyramidFlowConfig) -> Augmentation | None:
    """`--augment auto`: flips and turns for MVTec's textures, none for objects and unknown classes."""
    if settings.augment == "none" or settings.cls not in MVTEC_TEXTURES:
        return None
    return flips_and_turns(config.image_size[0] == config.image_size[1], settings.seed)


def check_batch_size(settings: Settings, num_images: int) -> None:
    if settings.batchSize < 2:
        raise InputError("--batchSize 1: the loss compares pairs of images; use at least 2")
    if settings.batchSize > num_images:
        raise InputError(
            f"--batchSize {settings.batchSize} is more than the {num_images} training images; "
            + (f"use 2 to {num_images}" if num_images > 1 else "add good images, at least 2 are needed")
        )


def build_model(config: PyramidFlowConfig, settings: Settings, device: torch.device) -> PyramidFlow:
    """The model with its encoder weights, on the device.

    Raises:
        InputError: the weights cannot be had, or do not fit.
    """
    model = PyramidFlow(config)
    if config.encoder != "none":
        source = settings.encoderWeights
        try:
            weights = load_tensors(Path(source)) if source else download_encoder_weights(config.encoder)
            if not isinstance(weights, dict):
                raise ValueError("not a state dict")
            load_encoder_weights(model, weights)
        except ValueError as error:
            where = f"--encoderWeights {source}" if source else f"{config.encoder} weights"
            raise InputError(
                f"{where}: {error}; name a state dict of torchvision's {config.encoder}"
            ) from None
    return model.to(device)


def download_encoder_weights(encoder: str) -> dict[str, Tensor]:
    """ImageNet weights from torchvision, or from its cache."""
    weights = torchvision.models.get_model_weights(encoder).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy's page instead of the file, a damaged cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"cannot get {weights.url} ({reason}); give the file by --encoderWeights PATH, train without an "
            f"encoder by --encoder none, or remove a damaged copy from {cache}"
        ) from None


def train_one_epoch(
    model: PyramidFlow, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]
) -> float:
    """One pass over the batches; the mean loss.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for images in batches:
        latents, _ = model(images)
        loss = fourier_loss(model.pyramid, latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        losses.append(loss.detach())
        check_finite(losses[-2:-1], len(losses) - 1)  # waits for the previous step, not for this one
    check_finite(losses[-1:], len(losses))
    return torch.stack(losses).mean().item()


def check_finite(losses: list[Tensor], step: int) -> None:
    for loss in losses:
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss.item()} at step {step} of the epoch; {DIVERGED_REMEDY}"
            )


# ---------------------------------------------------------------------------------- evaluation


@dataclass
class TestSet:
    """The test images of a class in memory.

    Attributes:
        data: the class.
        images: uint8 (N,h,w,3).
        masks: bool (N,256,256) or None.
        truth: the masks as the metrics need them, on the device.
        device: where maps are computed.
    """

    data: AnomalyClass
    images: Tensor
    masks: Tensor | None
    truth: GroundTruth
    device: torch.device

    @classmethod
    def load(cls, data: AnomalyClass, config: PyramidFlowConfig, num_workers: int, device) -> TestSet:
        images = load_images(
            [image.path for image in data.test], config.image_size, num_workers, "test images"
        )
        masks = load_masks(data, num_workers)
        return cls(data, images, masks, GroundTruth.from_masks(data.defective, masks, device), device)

    def anomaly_maps(self, model: PyramidFlow, template: tuple[Tensor, ...]) -> Tensor:
        """(N,256,256) on the device.

        Raises:
            DivergedError: a score is not finite.
        """
        model.eval()
        batches = evaluation_batches(self.images, EVALUATION_BATCH, self.device, "test")
        maps = torch.cat([at_mask_size(anomaly_map(model, images, template)) for images in batches])
        if not torch.isfinite(maps).all():
            raise DivergedError(f"anomaly maps are no longer finite; {DIVERGED_REMEDY}")
        return maps


def at_mask_size(maps: Tensor) -> Tensor:
    """(B,H,W) -> (B,256,256), where maps and masks meet."""
    if maps.shape[-2:] == MASK_SIZE:
        return maps
    return F.interpolate(maps[:, None], MASK_SIZE, mode="bilinear", antialias=True)[:, 0]


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
        shown = ", ".join(f"{label} {_percent(row[key])}" for key, label in METRIC_NAMES.items())
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
        self.log.info("\n" + result_table(self.settings.cls, last, chosen))
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
                test_set.images[i].numpy(),
                image_template,
                maps[i],
                scale,
                None if test_set.masks is None else test_set.masks[i],
            )


def describe_run(data: AnomalyClass, config: PyramidFlowConfig) -> str:
    height, width = config.image_size
    return (
        f"class {data.name}: {len(data.train)} training and {len(data.test)} test images at {height}x{width}; "
        f"encoder {config.encoder}, {config.num_level} levels, {config.num_stack} stacks, {config.volume_norm}"
    )


def flags_without_effect(settings: Settings) -> list[str]:
    """Flags that were set although the encoder does not read them."""
    unread = ("encoderBN", "encoderWeights") if settings.encoder == "none" else ("numChannel",)
    return [name for name in unread if getattr(settings, name) != getattr(Settings, name)]


def result_table(name: str, last: dict, chosen: dict[str, dict]) -> str:
    """Markdown, percent."""
    rows = [("last", last)] + [(f"best {METRIC_NAMES[m]}*", row) for m, row in chosen.items()]
    lines = [
        "| class | epoch | " + " | ".join(METRIC_NAMES.values()) + " |",
        "|---|---|" + "---|" * len(METRIC_NAMES),
    ]
    for label, row in rows:
        values = " | ".join(_percent(row[key]) for key in METRIC_NAMES)
        lines.append(f"| {name} | {row['epoch']} ({label}) | {values} |")
    lines.append(
        "\nPercent. *chosen on the test set, as the official program does; quote the last epoch."
    )
    return "\n".join(lines)


def _summary(row: dict) -> dict:
    return {key: row[key] for key in ("epoch", *METRIC_NAMES, "threshold")}


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    run_script(main)
