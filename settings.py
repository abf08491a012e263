"""The flags of train.py and what they ask for; `auto` settled by class as in the official program."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields

from dataset import DATASETS, MVTEC_TEXTURES
from hardware import PRECISIONS
from loading import CACHES
from model import CONTRASTS, ENCODER_BNS, ENCODERS, LOSSES, TEMPLATES, VOLUME_NORMS, PyramidFlowConfig
from util import InputError, Parser, whole_number

# The official program's choices by class, where a flag says auto.
AUTO_NUM_LAYER = {"metal_nut": 8, "carpet": 8, "transistor": 8, "screw": 2}
AUTO_SVN = ("carpet", "grid", "bottle", "transistor")
AUTO_IMAGE_SIZE = {"none": 256, "resnet18": 1024, "resnet34": 1024}

NUM_WORKERS = min(os.cpu_count() or 1, 8)

# What may change when a run is resumed: where it computes and where its data are.
FREE_ON_RESUME = ("resume", "datapath", "gpu", "numWorkers", "cache", "tensorboard")


def _flag(default, group: str, help: str, **options):
    return field(default=default, metadata={"group": group, "help": help, **options})


def boolean(text: str) -> bool:
    """An argparse type: true or false, as a word."""
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
    cls: str = _flag(
        "tile", "data", "class to train on: a folder of --datapath; all: one after the other"
    )
    datapath: str = _flag(
        "../mvtec_anomaly_detection", "data", "folder of MVTec AD, BTAD, VisA, or data in MVTec's layout"
    )
    dataset: str = _flag("auto", "data", "layout of the data; auto recognises it", choices=DATASETS)
    imageSize: list = _flag(
        ("auto",), "data", "input size, one number or H W; auto: 256 with --encoder none, else 1024",
        type=_size, nargs="+", metavar="N",
    )  # fmt: skip
    augment: str = _flag(
        "auto", "data", "auto: flips and turns for MVTec's five textures; none", choices=("auto", "none")
    )
    cache: str = _flag(
        "auto", "data", "decoded images: ram, kept; none, read again each time; auto, by free memory",
        choices=CACHES,
    )  # fmt: skip
    numWorkers: int = _flag(
        NUM_WORKERS, "data", "threads that read and decode images", type=whole_number(1)
    )
    # model
    encoder: str = _flag("resnet18", "model", "none: fixed 1x1 convolution (FNF)", choices=ENCODERS)
    encoderBN: str = _flag(
        "batch", "model", "the encoder's BatchNorm: batch, the batch's statistics while training; frozen",
        choices=ENCODER_BNS,
    )  # fmt: skip
    encoderWeights: str | None = _flag(
        None, "model", "file of encoder weights with torchvision's names, instead of a download",
        metavar="PATH",
    )  # fmt: skip
    numLayer: str = _flag(
        "auto", "model", "levels of the pyramid; auto: by class",
        choices=("auto", *"2345678"), metavar="{auto,2..8}",
    )  # fmt: skip
    volumeNorm: str = _flag(
        "auto", "model", "volume normalization; auto: by class", choices=("auto", *VOLUME_NORMS)
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
        True, "training", "backpropagate by inversion: memory does not grow with depth",
        type=boolean, metavar="{true,false}",
    )  # fmt: skip
    precision: str = _flag(
        "auto", "training", "of the flow's k x k convolutions; auto: the fastest that keeps the metrics",
        choices=PRECISIONS,
    )  # fmt: skip
    # the paper's ablations (Table 2)
    loss: str = _flag(
        "fourier", "ablations", "spatial: without the Fourier transform; likelihood: of a Gaussian, for "
        "--volumeNorm none", choices=LOSSES,
    )  # fmt: skip
    template: str = _flag(
        "mean", "ablations", "what latents are contrasted with: each other and their mean; or zero, in training "
        "and in the score", choices=TEMPLATES,
    )  # fmt: skip
    contrast: str = _flag(
        "latent", "ablations", "latent: differences are composed; composed: compose, then difference",
        choices=CONTRASTS,
    )  # fmt: skip
    # running
    gpu: str = _flag("0", "running", "index of the CUDA device, or cpu")
    evalEvery: int = _flag(
        1, "running", "epochs between evaluations; the last is always evaluated", type=whole_number(1)
    )
    saveDir: str = _flag("saveDir", "running", "folder in which the run's folder is made")
    resume: str | None = _flag(
        None, "running", "folder of a stopped run to go on with; its settings come with it",
        metavar="RUN",
    )  # fmt: skip
    tensorboard: bool = _flag(
        False, "running", "also log for TensorBoard (pip install tensorboard)", action="store_true"
    )

    def __post_init__(self):
        self.imageSize = list(self.imageSize)


def parse_settings(
    description: str, arguments: list[str] | None = None
) -> tuple[Settings, dict[str, object]]:
    """(all settings, those that were given on the command line)."""
    parser = Parser(description=description)
    groups = {}
    for item in fields(Settings):
        options = dict(item.metadata)
        group = options.pop("group")
        if item.default is not None:
            shown = "auto" if item.default == ("auto",) else item.default
            options["help"] += f" [{str(shown).lower() if isinstance(shown, bool) else shown}]"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{item.name}", default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(arguments))
    return Settings(**given), given


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts have which run a trained model."""
    parser.add_argument("--gpu", default="0", help="index of the CUDA device, or cpu [0]")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the flow's convolutions [auto]"
    )
    parser.add_argument(
        "--numWorkers", type=whole_number(1), default=NUM_WORKERS,
        help=f"threads that read images [{NUM_WORKERS}]",
    )  # fmt: skip


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
            contrast=settings.contrast,
            save_memory=settings.saveMemory,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def augmentation(settings: Settings, config: PyramidFlowConfig) -> str:
    """`--augment auto`: flips and turns for MVTec's textures, none for objects and unknown classes."""
    if settings.augment == "none" or settings.cls not in MVTEC_TEXTURES:
        return "none"
    square = config.image_size[0] == config.image_size[1]
    return "flips and turns" if square else "flips"


def resumed(stored: dict, given: dict[str, object], folder: str) -> Settings:
    """The settings of a stopped run.

    Args:
        stored: its settings.
        given: flags on the command line that goes on with it.
        folder: of the run.

    Raises:
        InputError: a given flag contradicts the run's; it is named.
    """
    for name, value in given.items():
        same = value == stored[name] or (name == "precision" and value == "auto")
        if name == "imageSize":  # one number means a square
            same = (value[0], value[-1]) == (stored[name][0], stored[name][-1])
        if name not in FREE_ON_RESUME and not same:
            raise InputError(
                f"--{name} {value} contradicts the run in {folder}, which has {stored[name]}; leave the "
                "flag out, or start a new run"
            )
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return Settings(**{**stored, **free})


def flags_without_effect(settings: Settings) -> list[str]:
    """Flags that were set although the encoder does not read them."""
    unread = ("encoderBN", "encoderWeights") if settings.encoder == "none" else ("numChannel",)
    return [name for name in unread if getattr(settings, name) != getattr(Settings, name)]
