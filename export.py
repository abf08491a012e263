"""Export a trained model to ONNX, template inside: image -> anomaly map and score, without Python.

    pip install onnx onnxscript onnxruntime
    python export.py saveDir/tile-.../last.pt tile.onnx
    python predict.py tile.onnx my_images --out results

Input `image`: uint8 (batch,h,w,3), RGB, resized to the model's size (bilinear, as PIL does it); the size
is in the file's metadata.  Outputs: `anomaly_map`, float32 (batch,256,256), and `score`, its maximum, (batch,).
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration import Calibration
from checkpoint import Trained
from dataset import MASK_SIZE
from loading import normalise
from model import PyramidFlow, anomaly_map
from util import InputError, Parser, atomic_path, run_script

OPSET = 18
METADATA_KEY = "pyramidflow"
INSTALL = "pip install onnx onnxscript onnxruntime"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .pt file that train.py wrote")
    parser.add_argument("out", type=Path, help="file to write, new")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists; name a new file")
    trained = Trained.load(arguments.checkpoint, torch.device("cpu"), "fp32")
    export_onnx(trained, arguments.out)
    print(f"written to {arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB")


def export_onnx(trained: Trained, path: Path) -> None:
    """Write an ONNX file that scores a batch of any size.

    Raises:
        InputError: the packages for it are missing, or the file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"the export needs the package {error.name}: {INSTALL}") from None
    scorer = _Scorer(trained.model, trained.template).eval()
    image = torch.zeros(2, *trained.model.config.image_size, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            scorer, (image,), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=["image"], output_names=["anomaly_map", "score"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    proto = program.model_proto
    calibration = trained.calibration
    about = {
        "class": trained.class_name,
        "image_size": list(trained.model.config.image_size),
        "metrics": trained.metrics,
        "calibration": None if calibration is None else calibration.to_dict(),
    }
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(about))
    try:
        with atomic_path(path) as temporary:
            onnx.save(proto, temporary)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); name another file") from None


class _Scorer(nn.Module):
    """uint8 images (B,h,w,3) -> anomaly maps (B,256,256) and scores (B,).

    What depends on weights alone is computed here and not in the graph.
    """

    def __init__(self, model: PyramidFlow, template: tuple[Tensor, ...]):
        super().__init__()
        self.model = copy.deepcopy(model)
        for block in self.model.flow:
            block.conv1x1 = _FixedMatrix(block.conv1x1.matrix(torch.float32).detach())
        for i, level in enumerate(template):
            self.register_buffer(f"template{i}", level)
        # Resizing to the masks' size is linear along each axis.
        for axis, size in enumerate(model.config.level_size(0)):
            eye = torch.eye(size)[None, None]
            matrix = F.interpolate(eye, (MASK_SIZE[axis], size), mode="bilinear", antialias=True)[0, 0]
            self.register_buffer(f"resize{axis}", matrix)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        template = tuple(getattr(self, f"template{i}") for i in range(self.model.config.num_level))
        maps = anomaly_map(self.model, self.model.encode(normalise(image)), template)
        if maps.shape[-2:] != MASK_SIZE:
            maps = self.resize0 @ maps @ self.resize1.T
        return maps, maps.amax((1, 2))


class _FixedMatrix(nn.Module):
    """Takes the place of an invertible 1x1 convolution whose matrix changes no more."""

    volume_normalized = True

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("_matrix", matrix)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self._matrix.to(dtype)


class OnnxModel:
    """An exported model, run by onnxruntime.

    Attributes:
        class_name, image_size, metrics, calibration: as in `checkpoint.Trained`.

    Raises:
        InputError: onnxruntime is missing, or the file is not one that `export_onnx` wrote.
    """

    def __init__(self, path: Path, device: torch.device):
        try:
            import onnxruntime
        except ImportError:
            raise InputError(f"{path} needs the package onnxruntime: {INSTALL}") from None
        if not path.is_file():
            raise InputError(f"{path} does not exist; name a file that does")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=_providers(onnxruntime, device)
            )
            about = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            self.class_name, self.metrics = str(about["class"]), dict(about["metrics"])
            self.image_size = tuple(int(n) for n in about["image_size"])
            given = about["calibration"]
            self.calibration = None if given is None else Calibration.from_dict(given)
        except Exception:  # onnxruntime has exceptions of its own for damaged files
            problem = "is not a model that export.py wrote, or it is damaged; export it again"
            raise InputError(f"{path} {problem}") from None

    def score(self, images: Tensor) -> np.ndarray:
        """Anomaly maps, float32 (B,256,256), of images uint8 (B,h,w,3)."""
        return self._session.run(["anomaly_map"], {"image": images.numpy()})[0]


def _providers(onnxruntime, device: torch.device) -> list:
    on_cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    chosen = [("CUDAExecutionProvider", {"device_id": device.index})] if on_cuda else []
    return [*chosen, "CPUExecutionProvider"]


if __name__ == "__main__":
    run_script(main)
