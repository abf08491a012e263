"""What a run leaves behind: weights, template, settings, as tensors and plain values; nothing is executed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from model import PyramidFlow, load_encoder_weights
from util import InputError, atomic_path

FORMAT = "PyramidFlow checkpoint"
VERSION = 2


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
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a PyramidFlow checkpoint; name a .pt file that train.py wrote")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} is of checkpoint version {content.get('version')}, this program reads "
            f"{VERSION}; train again or use the program that wrote it"
        )
    return content


def load_tensors(path: Path, device: torch.device | str = "cpu") -> object:
    """`torch.load` of tensors and plain values only.

    Raises:
        InputError: missing, damaged, or with anything else inside.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a file that does") from None
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
