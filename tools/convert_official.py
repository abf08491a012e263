"""Convert weights of the official program, a pickled .npz, to a checkpoint; nothing in the file is executed.

    python -m tools.convert_official best.npz tile.pt --cls tile --datapath ../mvtec_anomaly_detection

The file has weights only: template and thresholds are made of the class's training images.  What comes out is
for evaluate.py, predict.py, fit.py and export.py.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import util
from dataset import DATASETS, Images, open_class
from model import RESNET_STRIDE, PyramidFlow, PyramidFlowConfig, coupling_schedule
from scorer import Scorer
from util import InputError, size_text

PARTS = {
    "inconv.": "stem.",
    "nf.moduleslst.": "flow.",
    "affineParams.conv.0.": "affine.conv1.",
    "affineParams.conv.2.": "affine.conv2.",
    "affineParams.norm.": "affine.norm.",
    "conv1x1.w_p": "conv1x1.permutation",
    "conv1x1.w_l": "conv1x1.lower",
    "conv1x1.w_u": "conv1x1.upper",
    "conv1x1.w_s": "conv1x1.log_scale",
    "conv1x1.s_sign": "conv1x1.sign",
}
NUMBERS = ("f2", "f4", "f8", "i4", "i8", "u1", "b1")


def main() -> None:
    args = parse_arguments()
    device = util.choose_device(args.gpu)
    if args.out.exists():
        raise InputError(f"{args.out} exists; choose a new file")
    util.check_writable(args.out.parent, "the folder of OUT.pt,")
    model = load_official(args.file, args.choice, args.imageSize)
    precision = util.choose_precision(args.precision, device, trained_in="fp32")
    model.to(device).compute_networks_in(util.apply_precision(precision))
    data, size = open_class(args.datapath, args.cls, args.dataset, need_test=False), model.config.image_size
    images = Images(data.train, size, "auto", device, args.numWorkers, "training images")
    scorer = Scorer.fit(model, images, class_name=args.cls, settings={"precision": "fp32"})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(args.out)
    print(f"{size_text(size)} images, {len(images)} good ones for the template; written to {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = util.Parser(prog="python -m tools.convert_official", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("file", type=Path, metavar="FILE.npz", help="weights of the official program")
    add("out", type=Path, metavar="OUT.pt", help="file to write, new")
    add("--cls", required=True, help="class that the weights were trained on")
    add("--datapath", type=Path, default=Path("../mvtec_anomaly_detection"), help="folder of its folder")
    add("--dataset", choices=DATASETS, default="auto", help="layout of the data")
    add("--choice", choices=("pixel", "pro"), default="pixel", help="the weights that were best by this metric")
    add("--imageSize", type=util.whole_number(1, 2**14), nargs="+", metavar="N",
        help="input size, one number or H W; without it what the weights show, else 256 or 1024")
    # fmt: on
    util.add_running_flags(parser)
    args = parser.parse_args()
    if args.imageSize and len(args.imageSize) > 2:
        parser.error("--imageSize takes one number, or two (height width)")
    args.imageSize = (args.imageSize[0], args.imageSize[-1]) if args.imageSize else None
    return args


def load_official(path: Path, choice: str, image_size: tuple[int, int] | None) -> PyramidFlow:
    """The model of an official .npz.

    Args:
        choice: "pixel" or "pro", the metric by which the official program chose the weights.
        image_size: (h, w), or None: the size that CVN's statistics show, else the official default.

    Raises:
        InputError: not such a file, with something else inside, or for another image size.
    """
    state_dict = read_official(path, f"state_dict_{choice}")
    try:
        model = PyramidFlow(infer_config(state_dict, image_size))
        model.load_state_dict(convert_state_dict(model, state_dict))
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else util.first_line(error)
        raise InputError(f"{path}: {reason}; choose a file that the official program wrote") from None
    return model


def convert_state_dict(model: PyramidFlow, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official program's entries (weights, gradients or buffers) under our names and shapes.

    A CVN block `down` keeps its running mean at the pixels it reads, every second one.  Running means
    of a model that was never trained have one element there; they are expanded.
    """
    own, converted = model.state_dict(), {}
    for name, x in state_dict.items():
        for theirs, ours in PARTS.items():
            name = name.replace(theirs, ours)
        if name.endswith("running_mean") and name.startswith("flow.") and name in own:
            x = x[:, :, ::2, ::2] if x.shape[-1] == 2 * own[name].shape[-1] else x
            x = x.expand(own[name].shape).clone() if x.numel() == 1 else x
        if name in own:  # the rest are constant masks
            converted[name] = x
    return converted


def infer_config(state_dict: dict[str, Tensor], image_size: tuple[int, int] | None) -> PyramidFlowConfig:
    """The architecture that has these weights.

    Raises:
        ValueError: there is none, or `image_size` is not the one CVN's statistics were made at.
        KeyError: an entry is missing.
    """
    encoder = "resnet34" if any(name.startswith("inconv.4.2.") for name in state_dict) else "resnet18"
    encoder = "none" if "inconv.weight" in state_dict else encoder
    numbers = {name.split(".")[2] for name in state_dict if name.startswith("nf.moduleslst.")}
    blocks = [f"nf.moduleslst.{i}.affineParams" for i in range(max(1, len(numbers)))]
    width, _, kernel_size, _ = state_dict[f"{blocks[0]}.conv.0.weight"].shape
    two_sources = [state_dict[f"{block}.conv.0.weight"].shape[1] == width for block in blocks]
    schedules = {n: [kind == "dual" for kind, _ in coupling_schedule(n)] for n in range(2, 9)}
    repeats = {n: len(blocks) // len(schedule) for n, schedule in schedules.items()}
    levels = [n for n, schedule in schedules.items() if schedule * repeats[n] == two_sources]
    if not levels:
        raise ValueError("the coupling blocks follow no schedule of the method")
    mean = state_dict[f"{blocks[0]}.norm.running_mean"]
    if mean.numel() == 1:
        raise ValueError("these weights were never trained")
    volume_norm, default = "SVN", (256, 256) if encoder == "none" else (1024, 1024)
    if mean.shape[1] == 1:  # the first block has it: `dual` at level 1, `down` at level 0
        scale = (1 if encoder == "none" else RESNET_STRIDE) * (2 if two_sources[0] else 1)
        volume_norm, default = "CVN", (mean.shape[-2] * scale, mean.shape[-1] * scale)
        if image_size and image_size != default:
            wanted = f"are for {size_text(default)} images, not {size_text(image_size)}"
            raise ValueError(f"these weights {wanted}")
    return PyramidFlowConfig(
        encoder=encoder, num_level=levels[0], num_stack=repeats[levels[0]], num_channel=width // 2,
        kernel_size=kernel_size, volume_norm=volume_norm, image_size=image_size or default,
    )  # fmt: skip


def read_official(path: Path, entry: str) -> dict[str, Tensor]:
    """One state dict of an official .npz.

    Raises:
        InputError: missing, damaged, or with anything but arrays inside.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            file = io.BytesIO(archive.read(f"{entry}.npy"))
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        (found,) = _Reader(file).load().data
        return {str(name): _as_tensor(x) for name, x in found.items()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; choose a file that does") from None
    except Exception as error:  # a damaged zip file or pickle raises nearly anything
        reason = error if isinstance(error, _RefusedError) else "it is damaged or another file"
        raise InputError(f"{path} cannot be read as the official program's {entry}: {reason}") from None


def _as_tensor(x: Tensor | _Array) -> Tensor:
    x = x.tensor() if isinstance(x, _Array) else x
    if not isinstance(x, Tensor) or not x.isfinite().all():
        raise ValueError("not a finite array")
    return x.detach().clone()


class _RefusedError(Exception):
    """The pickle names something that weights do not need."""


class _Reader(pickle.Unpickler):
    """Knows what puts arrays and tensors together, and nothing else."""

    def find_class(self, module: str, name: str):
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
            "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch.storage._load_from_bytes": _load_storage,
        }
        if f"{module}.{name}" not in known:
            raise _RefusedError(f"it refers to {module}.{name}, which weights do not need")
        return known[f"{module}.{name}"]


def _load_storage(data: bytes) -> torch.TypedStorage:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _Dtype:
    """Stands for numpy.dtype, which lets a pickle declare bytes to be objects, pointers to anywhere."""

    def __init__(self, name: str, *_):
        self.name = name

    def __setstate__(self, state: tuple):
        self.byte_order = state[1]


class _Array:
    """Stands for numpy.ndarray."""

    def __setstate__(self, state: tuple):
        _, self.shape, self.dtype, self.fortran, self.data = state

    def tensor(self) -> Tensor:
        if self.dtype.name not in NUMBERS or self.dtype.byte_order == ">":
            raise _RefusedError(f"an array of {self.dtype.name} holds no weights")
        array = np.frombuffer(self.data, dtype=self.dtype.name)
        return torch.from_numpy(array.reshape(self.shape, order="F" if self.fortran else "C").copy())


if __name__ == "__main__":
    util.run_script(main)
