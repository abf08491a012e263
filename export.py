"""Export a trained model to ONNX, templates inside: image -> anomaly map and score, without Python.

    pip install onnx onnxscript onnxruntime
    python export.py saveDir/tile-.../last.pt tile.onnx
    python predict.py tile.onnx my_images --out results

Input `image`: uint8 (batch,h,w,3), RGB, resized to the model's size (bilinear, as PIL does it); the size
is in the file's metadata.  Outputs: `anomaly_map`, float32 (batch,256,256), and `score`, its maximum, (batch,).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import MASK_SIZE
from scorer import LARGEST, Calibration, Scored, Scorer, gaussian, latents_of, read_metrics
from util import InputError, Parser, atomic_path, run_script

OPSET = 18
METADATA_KEY, DIGEST_KEY = "pyramidflow", "sha256"
LARGEST_FILE = 2**31 - 2**24  # protobuf's limit, less what is not templates and weights
INSTALL = "pip install onnx onnxscript onnxruntime"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .pt file that train.py or fit.py wrote")
    parser.add_argument("out", type=Path, help="file to write, new")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists; choose a new file")
    export_onnx(Scorer.load(args.checkpoint, "cpu", "fp32"), args.out)
    print(f"written to {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


# ------------------------------------------------------------------------------------ writing


def export_onnx(scorer: Scorer, path: Path) -> None:
    """Write an ONNX file that scores a batch of any size.

    Raises:
        InputError: the packages for it are missing, it would be too large, or it cannot be written.
    """
    data = serialize(scorer)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data + digest_entry(data))
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def serialize(scorer: Scorer) -> bytes:
    """The scorer as an ONNX model, without its digest.

    Raises:
        InputError: the packages for it are missing, or it would be too large.
    """
    try:
        import onnx  # noqa: F401 (torch.onnx needs both)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the export needs the package {error.name}: {INSTALL}") from None
    if sum(t.nbytes for t in (*scorer.templates, *scorer.model.parameters())) > LARGEST_FILE:
        raise InputError(
            f"{len(scorer.templates[0])} templates are more than the 2 GiB of an .onnx file hold; fit a bank "
            "with a smaller --numTemplate by fit.py"
        )
    image = torch.zeros(2, *scorer.image_size, 3, dtype=torch.uint8)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # what they say is for their own developers
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph(scorer).eval(), (image,), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=["image"], output_names=["anomaly_map", "score"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    proto = program.model_proto
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(_about(scorer)))
    return proto.SerializeToString()


def _about(scorer: Scorer) -> dict:
    """What `OnnxScorer` knows besides the graph, in plain values."""
    return {
        "class": scorer.class_name,
        "image_size": list(scorer.image_size),
        "metrics": scorer.metrics,
        "calibration": None if scorer.calibration is None else asdict(scorer.calibration),
    }


def digest_entry(model: bytes | memoryview) -> bytes:
    """What, put behind a serialized model, adds its SHA-256 digest to the model's metadata.

    A protobuf message and another behind it are read as one, merged.  This one is a ModelProto with one
    entry of `metadata_props` (field 14): field 1 the key, field 2 the value, each behind its length.
    """
    digest = hashlib.sha256(model).hexdigest()
    texts = ((b"\x0a", DIGEST_KEY), (b"\x12", digest))
    entry = b"".join(tag + bytes([len(text)]) + text.encode() for tag, text in texts)
    return b"\x72" + bytes([len(entry)]) + entry


class Graph(nn.Module):
    """uint8 images (B,h,w,3) -> anomaly maps (B,256,256) and scores (B,).

    What depends on weights alone is computed here and not in the graph.
    """

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.model = copy.deepcopy(scorer.model)
        for block in self.model.flow:
            block.conv1x1 = _FixedMatrix(block.conv1x1.matrix(torch.float32).detach())
        self._scorer = replace(scorer, model=self.model)
        for i, level in enumerate(scorer.templates):
            self.register_buffer(f"template{i}", level)
        for axis, size in enumerate(scorer.config.level_size(0)):
            self.register_buffer(f"resize{axis}", _resizing(size, MASK_SIZE[axis]))
            self.register_buffer(f"smooth{axis}", _smoothing(MASK_SIZE[axis], scorer.smooth))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        templates = tuple(getattr(self, f"template{i}") for i in range(self.model.config.num_level))
        scorer = replace(self._scorer, templates=templates)
        maps, typical = scorer.differences(latents_of(self.model, image))
        sharp = _along_both(maps, self.resize0, self.resize1)
        scores = sharp if typical is None else _along_both(typical, self.resize0, self.resize1)
        return _along_both(sharp, self.smooth0, self.smooth1), scores.amax((1, 2))


def _along_both(maps: Tensor, down: Tensor | None, across: Tensor | None) -> Tensor:
    """Maps (B,H,W), each axis multiplied by its matrix; None leaves it."""
    maps = maps if down is None else down @ maps
    return maps if across is None else maps @ across.T


def _resizing(size: int, mask_size: int) -> Tensor | None:
    """(mask_size,size): resizing, which is linear and the same along each axis."""
    if size == mask_size:
        return None
    eye = torch.eye(size)[None, None]
    return F.interpolate(eye, (mask_size, size), mode="bilinear", antialias=True)[0, 0]


def _smoothing(size: int, deviation: float) -> Tensor | None:
    """(size,size): the Gaussian along one axis."""
    if not deviation:
        return None
    lines = torch.eye(size)[:, :, None].expand(-1, -1, size)  # maps of a bright row each
    return gaussian(lines, deviation)[:, :, 0].T


class _FixedMatrix(nn.Module):
    """Takes the place of an invertible 1x1 convolution whose matrix changes no more."""

    volume_normalized = True

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("_matrix", matrix)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self._matrix.to(dtype)


# ------------------------------------------------------------------------------------ reading


class OnnxScorer:
    """An exported model, run by onnxruntime, with the interface of `scorer.Scorer`.

    Attributes:
        class_name, image_size, metrics, calibration: as in `scorer.Scorer`.

    Raises:
        InputError: onnxruntime is missing, or the file is not what `export_onnx` wrote.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        try:
            import onnxruntime
        except ImportError:
            raise InputError(f"{path} needs the package onnxruntime: {INSTALL}") from None
        if not path.is_file():
            raise InputError(f"{path} does not exist; choose a file that does")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        providers = _providers(onnxruntime, torch.device(device))
        self._path = path
        try:
            data = _check_digest(path.read_bytes())
            self._session = onnxruntime.InferenceSession(data, options, providers=providers)
            about = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            self.class_name, self.metrics = str(about["class"]), read_metrics(about["metrics"])
            self.image_size = _read_size(about["image_size"], self._session)
            given = about["calibration"]
            self.calibration = None if given is None else Calibration.from_dict(given)
        except Exception:  # onnxruntime has exceptions of its own for damaged files
            problem = "is not a model that export.py wrote, or it is damaged; export it again"
            raise InputError(f"{path} {problem}") from None

    def score(self, images: Tensor) -> Scored:
        """Anomaly maps (B,256,256) and scores (B,) of images uint8 (B,h,w,3).

        Raises:
            InputError: onnxruntime cannot run the model.
        """
        try:
            maps, scores = self._session.run(["anomaly_map", "score"], {"image": images.numpy()})
        except Exception as error:  # of its own kinds, such as too little memory
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"onnxruntime cannot run {self._path} ({reason}); use a smaller --batchSize, or the .pt file"
            ) from None
        return Scored(torch.from_numpy(maps), torch.from_numpy(scores))


def _check_digest(data: bytes) -> bytes:
    """Raises ValueError unless the data are what `export_onnx` wrote, to the bit."""
    length = len(digest_entry(b""))
    if digest_entry(memoryview(data)[:-length]) != data[-length:]:
        raise ValueError("digest")
    return data


def _read_size(given: list[int], session) -> tuple[int, int]:
    """Raises ValueError unless `given` is (h, w) of the images that the session takes."""
    height, width = given
    if any(type(n) is not int or not 1 <= n <= LARGEST for n in given):
        raise ValueError("image size")
    (image,) = session.get_inputs()
    if image.type != "tensor(uint8)" or image.shape[1:] != [height, width, 3]:
        raise ValueError("input")
    return height, width


def _providers(onnxruntime, device: torch.device) -> list:
    on_cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    chosen = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if on_cuda else []
    return [*chosen, "CPUExecutionProvider"]


if __name__ == "__main__":
    run_script(main)
