"""Weights saved by the official program: a pickled .npz, read without executing anything in it.

The pickle's instructions may build lists, dicts, strings and numbers, and call the few functions of
`FUNCTIONS`, which are ours and only gather arrays.  Anything else it names is refused.
"""

from __future__ import annotations

import ast
import collections
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import RESNET_STRIDE, PyramidFlow, PyramidFlowConfig, coupling_schedule
from util import InputError, size_text

MOST_LEVELS = 8
NPY_MAGIC = b"\x93NUMPY"
PARTS = {
    "affineParams.conv.0.weight": "affine.conv1.weight",
    "affineParams.conv.2.weight": "affine.conv2.weight",
    "affineParams.norm.running_mean": "affine.norm.running_mean",
    "conv1x1.w_p": "conv1x1.permutation",
    "conv1x1.w_l": "conv1x1.lower",
    "conv1x1.w_u": "conv1x1.upper",
    "conv1x1.w_s": "conv1x1.log_scale",
    "conv1x1.s_sign": "conv1x1.sign",
}


def load_official(path: Path, choice: str, image_size: tuple[int, int] | None) -> PyramidFlow:
    """The model of an official .npz; it has no template yet.

    Args:
        choice: "pixel" or "pro", the metric by which the official program chose the weights.
        image_size: (h, w), or None: the size that CVN's statistics show, else the official default.

    Raises:
        InputError: not such a file, with something else inside, or for another image size.
    """
    state_dict = read_official(path, f"state_dict_{choice}")
    try:
        config = infer_config(state_dict, image_size)
        model = PyramidFlow(config)
        model.load_state_dict(convert_state_dict(model, state_dict))
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{path}: {reason}; name a file that the official program wrote") from None
    return model


def convert_state_dict(model: PyramidFlow, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official program's entries (weights, gradients or buffers) under our names and shapes.

    A CVN block `down` keeps its running mean at the pixels it reads, every second one.  Running means
    of a model that was never trained have one element there; they are expanded.
    """
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    converted = {}
    for official, x in state_dict.items():
        if official.startswith("inconv."):
            converted["stem." + official.removeprefix("inconv.")] = x
        elif official.startswith("nf.moduleslst."):
            block, _, part = official.removeprefix("nf.moduleslst.").partition(".")
            if part in PARTS:  # the rest are constant masks
                name = f"flow.{block}.{PARTS[part]}"
                if part.endswith("running_mean") and name in shapes:
                    x = _fit_running_mean(x, shapes[name])
                converted[name] = x
    return converted


def _fit_running_mean(mean: Tensor, shape: torch.Size) -> Tensor:
    if mean.numel() == 1:
        return mean.expand(shape).clone()
    return mean[:, :, ::2, ::2] if mean.shape[-1] == 2 * shape[-1] else mean


# ------------------------------------------------------------------------------ architecture


def infer_config(state_dict: dict[str, Tensor], image_size: tuple[int, int] | None) -> PyramidFlowConfig:
    """The architecture that has these weights.

    Raises:
        ValueError: there is none, or `image_size` is not the one CVN's statistics were made at.
        KeyError: an entry is missing.
    """
    encoder = _infer_encoder(state_dict)
    numbers = {name.split(".")[2] for name in state_dict if name.startswith("nf.moduleslst.")}
    blocks = [f"nf.moduleslst.{i}.affineParams" for i in range(len(numbers))]
    if not blocks:
        raise KeyError("nf.moduleslst.0")
    first = state_dict[f"{blocks[0]}.conv.0.weight"]
    channels, kernel_size = first.shape[0] // 2, first.shape[-1]
    two_sources = [state_dict[f"{b}.conv.0.weight"].shape[1] == 2 * channels for b in blocks]
    num_level, num_stack = _infer_schedule(two_sources)
    mean = state_dict[f"{blocks[0]}.norm.running_mean"]
    if mean.numel() == 1:
        raise ValueError("these weights were never trained")
    volume_norm, seen = "SVN", None
    if mean.shape[1] == 1:  # the first block has it: `dual` at level 1, `down` at level 0
        scale = (1 if encoder == "none" else RESNET_STRIDE) * (2 if two_sources[0] else 1)
        volume_norm, seen = "CVN", (mean.shape[-2] * scale, mean.shape[-1] * scale)
    if seen and image_size and seen != image_size:
        raise ValueError(f"these weights are for {size_text(seen)} images, not {size_text(image_size)}")
    default = (256, 256) if encoder == "none" else (1024, 1024)
    return PyramidFlowConfig(
        encoder=encoder,
        num_level=num_level,
        num_stack=num_stack,
        num_channel=channels,
        kernel_size=kernel_size,
        volume_norm=volume_norm,
        image_size=image_size or seen or default,
    )


def _infer_encoder(state_dict: dict[str, Tensor]) -> str:
    if "inconv.weight" in state_dict:
        return "none"
    return "resnet34" if any(name.startswith("inconv.4.2.") for name in state_dict) else "resnet18"


def _infer_schedule(two_sources: list[bool]) -> tuple[int, int]:
    """(levels, stacks) of the schedule whose blocks have one source or two like these."""
    for num_level in range(2, MOST_LEVELS + 1):
        stack = [kind == "dual" for kind, _ in coupling_schedule(num_level)]
        num_stack, rest = divmod(len(two_sources), len(stack))
        if not rest and num_stack and stack * num_stack == two_sources:
            return num_level, num_stack
    raise ValueError("the coupling blocks follow no schedule of the method")


# ------------------------------------------------------------------------------------ reading


def read_official(path: Path, entry: str) -> dict[str, Tensor]:
    """One state dict of an official .npz.

    Raises:
        InputError: missing, damaged, or with anything but arrays inside.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(f"{entry}.npy")
        found = _Reader(io.BytesIO(_pickle_of_npy(data))).load()
        found = found.item() if isinstance(found, _Array) else found
        if not isinstance(found, dict):
            raise ValueError("not a state dict")
        return {str(name): _as_tensor(x) for name, x in found.items()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a file that does") from None
    except _RefusedError as error:
        raise InputError(
            f"{path} refers to {error}, which weights do not need; it is not read"
        ) from None
    except Exception:  # a damaged zip file or pickle raises nearly anything
        raise InputError(
            f"{path} cannot be read as the official program's {entry}; it is damaged or another file"
        ) from None


def _pickle_of_npy(data: bytes) -> bytes:
    """The pickle inside an .npy file of Python objects."""
    file = io.BytesIO(data)
    if file.read(6) != NPY_MAGIC:
        raise ValueError("not an .npy file")
    major, _ = file.read(2)
    length = int.from_bytes(file.read(2 if major == 1 else 4), "little")
    header = ast.literal_eval(file.read(length).decode("latin1"))
    if header["descr"] != "|O":
        raise ValueError("not an array of objects")
    return file.read()


class _RefusedError(Exception):
    """The pickle names a function that may not be called."""


class _Array:
    """Stands for a NumPy array while its pickle is read."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    def item(self):
        (item,) = self.data
        return item

    def tensor(self) -> Tensor:
        array = np.frombuffer(bytes(self.data), dtype=self.dtype.name)
        array = array.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(array).copy())


class _Dtype:
    """Stands for a NumPy dtype; only plain numbers become arrays."""

    def __init__(self, name, *_):
        self.name = str(name)
        if self.name not in ("O8", "f4", "f8", "f2", "i8", "i4", "u1", "b1"):
            raise _RefusedError(f"an array of {self.name}")

    def __setstate__(self, state):
        if state[1] not in ("<", "|", "="):
            raise _RefusedError("numbers in another byte order")


def _storage(data: bytes) -> torch.TypedStorage:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    return torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


# All that a pickle of weights may call.
FUNCTIONS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Reader(pickle.Unpickler):
    """Knows the functions that put arrays together, and no others."""

    def find_class(self, module: str, name: str):
        if (module, name) not in FUNCTIONS:
            raise _RefusedError(f"{module}.{name}")
        return FUNCTIONS[module, name]


def _as_tensor(x) -> Tensor:
    x = x.tensor() if isinstance(x, _Array) else x
    if not isinstance(x, Tensor) or not x.isfinite().all():
        raise ValueError("not a finite array")
    return x.detach().clone()
