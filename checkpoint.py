"""What a run leaves behind: weights, template, settings, as tensors and plain values; nothing is executed."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from calibration import Calibration
from convolution import MEMORY_FORMAT
from hardware import apply_precision, choose_precision
from model import PyramidFlow, PyramidFlowConfig, coupling_schedule, load_encoder_weights
from util import InputError, atomic_path

FORMAT = "PyramidFlow checkpoint"
VERSION = 2
LARGEST = 2**14  # of any number in a configuration: a damaged file must not make a huge model


@dataclass
class Trained:
    """A trained model, ready to score images.

    Attributes:
        path: of the checkpoint.
        class_name: that it was trained on.
        model: in eval mode, on the device.
        template: the latent template, there too.
        metrics: of the class's test images, with the thresholds of best F1.
        calibration: scores of good images; None if the run was not finished.
    """

    path: Path
    class_name: str
    model: PyramidFlow
    template: tuple[Tensor, ...]
    metrics: dict
    calibration: Calibration | None

    @classmethod
    def load(cls, path: Path, device: torch.device, precision: str = "auto") -> Trained:
        """Read a checkpoint of train.py.

        Raises:
            InputError: it is missing, damaged, of another version, or holds what does not fit together.
        """
        content = load_checkpoint(path)
        if "optimizer" in content:
            raise InputError(f"{path} is what --resume needs; name last.pt beside it")
        try:
            config = read_config(content["config"])
            model = read_model(config, content["model"])
            template = read_template(config, content["template"])
            metrics, name = dict(content["metrics"]), str(content["class"])
            calibration, settings = content.get("calibration"), dict(content.get("settings") or {})
            if calibration is not None:
                calibration = Calibration.from_dict(calibration)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(
                f"{path} is damaged ({reason}); use another checkpoint, or train again"
            ) from None
        trained_in = settings.get("precision")
        precision = choose_precision(precision, device, trained_in)
        model.to(device).compute_networks_in(apply_precision(precision)).eval()
        template = tuple(x.to(device, memory_format=MEMORY_FORMAT) for x in template)
        return cls(path, name, model, template, metrics, calibration)

    def content(self, metrics: dict) -> dict:
        """Of a checkpoint that `load` reads, of weights that were trained in float32."""
        return {
            "class": self.class_name,
            "config": self.model.config.to_dict(),
            "settings": {"precision": "fp32"},
            "model": {name: x.cpu() for name, x in self.model.state_dict().items()},
            "template": [x.cpu() for x in self.template],
            "metrics": metrics,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }


def read_config(given: dict) -> PyramidFlowConfig:
    """Raises ValueError unless `given` is what `PyramidFlowConfig.to_dict` gives."""
    names = {item.name for item in fields(PyramidFlowConfig)}
    if not isinstance(given, dict) or given.keys() != names:
        raise ValueError("not a configuration")
    for value in (*given.values(), *given["image_size"]):
        if not isinstance(value, (str, bool, int, list)) or (isinstance(value, int) and value > LARGEST):
            raise ValueError(f"configuration value {value!r}")
    if len(given["image_size"]) != 2:
        raise ValueError("image size")
    return PyramidFlowConfig(**given)


def read_model(config: PyramidFlowConfig, state_dict: dict[str, Tensor]) -> PyramidFlow:
    """Raises ValueError or RuntimeError unless the weights are those of the configuration, and finite."""
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("flow.")}
    if len(blocks) != config.num_stack * len(coupling_schedule(config.num_level)):
        raise ValueError("number of coupling blocks")
    with torch.device("meta"):
        model = PyramidFlow(config)
    expected = model.state_dict()
    for name in expected.keys() ^ state_dict.keys():
        raise ValueError(f"entry {name} is missing or too much")
    for name, x in state_dict.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"entry {name} is not a tensor")
        if x.shape != expected[name].shape or x.dtype != expected[name].dtype:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(expected[name].shape)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} is not finite")
    model = PyramidFlow(config)
    model.load_state_dict(state_dict)
    return model


def read_template(config: PyramidFlowConfig, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Raises ValueError unless `given` is a latent template for the configuration, and finite."""
    if not isinstance(given, list) or len(given) != config.num_level:
        raise ValueError("number of template levels")
    for i, x in enumerate(given):
        shape = (1, config.channels, *config.level_size(i))
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype != torch.float32:
            raise ValueError(f"template level {i}")
        if not x.isfinite().all():
            raise ValueError(f"template level {i} is not finite")
    return tuple(given)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain values atomically, with format, version and library versions.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
    }
    with atomic_path(path) as temporary:
        try:
            torch.save({**header, **content}, temporary)
        except RuntimeError as error:  # torch's own writer, on a full disk
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_checkpoint` wrote; nothing in the file is executed.

    Raises:
        InputError: missing, damaged, or not such a file.
    """
    content = load_tensors(path, device)
    check_sums(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a PyramidFlow checkpoint; name a .pt file that train.py wrote")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} is of checkpoint version {content.get('version')}, this program reads "
            f"{VERSION}; train again or use the program that wrote it"
        )
    return content


def check_sums(path: Path) -> None:
    """Raises InputError if a byte of the file's contents has changed, which torch.load does not look for."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError):
        damaged = path.name
    if damaged:
        raise InputError(f"{path} is damaged ({damaged}); use another checkpoint, or train again")


def load_tensors(path: Path, device: torch.device | str = "cpu") -> object:
    """`torch.load` of tensors and plain values only.

    Raises:
        InputError: missing, damaged, or with anything else inside.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a file that does") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name a file in it, of a run last.pt") from None
    except Exception:  # torch.load raises nearly anything on damaged files
        problem = (
            "cannot be read as tensors and plain values; it is damaged or not a .pt file, name another"
        )
        raise InputError(f"{path} {problem}") from None


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
        raise InputError(f"{where}: {error}; name a state dict of torchvision's {encoder}") from None


def download_encoder_weights(encoder: str) -> dict[str, Tensor]:
    """ImageNet weights from torchvision, or from its cache.

    Raises:
        InputError: no network, or a damaged file.
    """
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
