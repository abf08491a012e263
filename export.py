"""Export a trained model to ONNX, templates and thresholds inside: image -> verdict, without Python.

    pip install onnx onnxscript onnxruntime
    python export.py saveDir/tile-.../last.pt tile.onnx
    python export.py saveDir/tile-.../last.pt tile.onnx --anyImageSize --threshold f1
    python predict.py tile.onnx my_images --out results
    python docs/onnx_sample.py tile.onnx image.png      # without this program

Input `image`: uint8 (batch,h,w,3), RGB, resized to the model's size (bilinear, as PIL does it); with
--anyImageSize any h and w, and the graph resizes.  Inputs that may be left out: `image_threshold` and
`pixel_threshold`, float32 (1,), and `roi`, bool (H,W), outside of which nothing is defective.  (H,W) is the size
of maps, 256x256 unless --mapSize of train.py or fit.py said otherwise.
Outputs: `anomaly_map`, float32 (batch,H,W); `score`, (batch,), what --imageScore said; `defective`, bool (batch,);
`mask`, bool (batch,H,W).  A score that is not a number is defective.  Metadata: image_height, image_width,
any_image_size, map_height, map_width, image_threshold, pixel_threshold, class.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import MASK_SIZE
from fit import add_checkpoint
from scorer import DETAIL, IMAGE_SCORES, LARGEST, Scorer, gaussian, latents_of, read_metrics
from util import InputError, Parser, atomic_path, check_writable, first_line, run_script
from verdict import (
    HIGHEST,
    Calibration,
    Inspector,
    Scored,
    Thresholds,
    add_threshold_flags,
    require,
    thresholds_of_flags,
)

OPSET = 18
METADATA_KEY, DIGEST_KEY = "pyramidflow", "sha256"
ANY_SIZE = ("height", "width")  # names of dimensions
LARGEST_FILE = 2**31 - 2**24  # protobuf's limit, less what is not templates and weights
INSTALL = "pip install onnx onnxscript onnxruntime"


def main() -> None:
    parser = Parser(description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("out", type=Path, help="file to write, new")
    parser.add_argument("--anyImageSize", action="store_true", help="resize images in the graph")
    add_threshold_flags(parser)
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists; choose a new file")
    if args.out.suffix.lower() != ".onnx":
        raise InputError(f"{args.out} does not end in .onnx, by which predict.py knows such a file; add it")
    check_writable(args.out.parent, "the folder of OUT.onnx,")
    scorer = Scorer.load(args.checkpoint, "cpu", "fp32")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(scorer, args.out, thresholds_of_flags(args, scorer), args.anyImageSize)
    print(f"written to {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


# ------------------------------------------------------------------------------------ writing


def export_onnx(
    scorer: Scorer, path: Path, thresholds: Thresholds | None = None, any_image_size: bool = False
) -> None:
    """Write an ONNX file that scores a batch of any size.

    Args:
        thresholds: defaults of the graph; None: the scorer's `usual_thresholds`.
        any_image_size: images are resized in the graph.

    Raises:
        InputError: the packages for it are missing, it would be too large, or it cannot be written.
    """
    thresholds = thresholds or scorer.usual_thresholds()
    data = serialize(scorer, thresholds, any_image_size)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data + digest_entry(data))
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def serialize(scorer: Scorer, thresholds: Thresholds, any_image_size: bool) -> bytes:
    """The scorer as an ONNX model, without its digest.

    Raises:
        InputError: the packages for it are missing, or it would be too large.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"the export needs the package {error.name}: {INSTALL}") from None
    if sum(t.nbytes for t in (*scorer.templates, *scorer.model.parameters())) > LARGEST_FILE:
        raise InputError(
            f"{len(scorer.templates[0])} templates are more than the 2 GiB of an .onnx file hold; fit a bank "
            "with a smaller --numTemplate by fit.py"
        )
    image = torch.zeros(2, *scorer.image_size, 3, dtype=torch.uint8)
    options = {
        "image_threshold": torch.tensor([thresholds.image]),
        "pixel_threshold": torch.tensor([thresholds.pixel]),
        "roi": torch.ones(scorer.map_size, dtype=torch.bool) if scorer.roi is None else scorer.roi,
    }
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # what they say is for their own developers
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph(scorer).eval(), (image, *options.values()), dynamo=True, verbose=False,
            opset_version=OPSET, input_names=["image", *options],
            output_names=["anomaly_map", "score", "defective", "mask"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}, **dict.fromkeys(options)},
        )  # fmt: skip
    proto = program.model_proto
    for name, default in options.items():  # an initializer that is an input may be left out
        proto.graph.initializer.append(onnx.numpy_helper.from_array(default.numpy(), name))
    if any_image_size:
        _resize_first(proto.graph, scorer.image_size)
    for key, value in _plain_metadata(scorer, thresholds, any_image_size).items():
        proto.metadata_props.add(key=key, value=str(value))
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(_about(scorer)))
    return proto.SerializeToString()


def _resize_first(graph, size: tuple[int, int]) -> None:
    """Let a graph that takes images uint8 (B,*size,3) take those of any size, resized as PIL does it."""
    from onnx import TensorProto, helper, numpy_helper

    for node in graph.node:
        node.input[:] = ["resized" if name == "image" else name for name in node.input]
    (image,) = [given for given in graph.input if given.name == "image"]
    for dimension, name in zip(image.type.tensor_type.shape.dim[1:3], ANY_SIZE, strict=True):
        dimension.dim_param = name
    channels_and_size = np.array([3, *size], dtype=np.int64)
    graph.initializer.append(numpy_helper.from_array(channels_and_size, "resize_to"))
    make, last, first = helper.make_node, [0, 2, 3, 1], [0, 3, 1, 2]
    nodes = [
        make("Shape", ["image"], ["resize_batch"], start=0, end=1),
        make("Concat", ["resize_batch", "resize_to"], ["resize_shape"], axis=0),
        make("Cast", ["image"], ["resize_float"], to=TensorProto.FLOAT),
        make("Transpose", ["resize_float"], ["resize_in"], perm=first),
        make("Resize", ["resize_in", "", "", "resize_shape"], ["resize_out"],
             mode="linear", antialias=1, exclude_outside=1),
        make("Round", ["resize_out"], ["resize_round"]),
        make("Transpose", ["resize_round"], ["resize_last"], perm=last),
        make("Cast", ["resize_last"], ["resized"], to=TensorProto.UINT8),
    ]  # fmt: skip
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def _plain_metadata(scorer: Scorer, thresholds: Thresholds, any_image_size: bool) -> dict:
    """What programs in other languages need, readable without json."""
    height, width = scorer.image_size
    return {
        "class": scorer.class_name, "image_height": height, "image_width": width,
        "map_height": scorer.map_size[0], "map_width": scorer.map_size[1],
        "any_image_size": str(any_image_size).lower(),
        "image_threshold": thresholds.image, "pixel_threshold": thresholds.pixel,
    }  # fmt: skip


def _about(scorer: Scorer) -> dict:
    """What `OnnxScorer` knows besides the graph, in plain values."""
    return {
        "class": scorer.class_name,
        "image_size": list(scorer.image_size),
        "metrics": scorer.metrics,
        "calibration": None if scorer.calibration is None else asdict(scorer.calibration),
        "roi": None if scorer.roi is None else np.packbits(scorer.roi).tobytes().hex(),
        "image_score": scorer.image_score,
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
    """uint8 images (B,h,w,3) -> anomaly maps (B,H,W), scores (B,), defective (B,), masks (B,H,W).

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
            self.register_buffer(f"resize{axis}", _resizing(size, scorer.map_size[axis]))
            self.register_buffer(f"smooth{axis}", _smoothing(axis, scorer.map_size, scorer.smooth))
            around = DETAIL if scorer.image_score == "detail" else 0.0
            self.register_buffer(f"around{axis}", _smoothing(axis, scorer.map_size, around))

    def forward(
        self, image: Tensor, image_threshold: Tensor, pixel_threshold: Tensor, roi: Tensor
    ) -> tuple[Tensor, ...]:
        templates = tuple(getattr(self, f"template{i}") for i in range(self.model.config.num_level))
        scorer = replace(self._scorer, templates=templates)
        maps, typical = scorer.differences(latents_of(self.model, image))
        sharp = _along_both(maps, self.resize0, self.resize1)
        if scorer.image_score == "detail":
            judged = sharp - _along_both(sharp, self.around0, self.around1)
        else:
            judged = sharp if typical is None else _along_both(typical, self.resize0, self.resize1)
        maps = _along_both(sharp, self.smooth0, self.smooth1)
        scores = scorer.image_scores(judged, maps, roi)
        # What is no number is not below either.
        return maps, scores, ~(scores < image_threshold), ~(maps < pixel_threshold) & roi


def _along_both(maps: Tensor, down: Tensor | None, across: Tensor | None) -> Tensor:
    """Maps (B,H,W), each axis multiplied by its matrix; None leaves it."""
    maps = maps if down is None else down @ maps
    return maps if across is None else maps @ across.T


def _resizing(size: int, map_size: int) -> Tensor | None:
    """(map_size,size): resizing, which is linear and the same along each axis."""
    if size == map_size:
        return None
    eye = torch.eye(size)[None, None]
    return F.interpolate(eye, (map_size, size), mode="bilinear", antialias=True)[0, 0]


def _smoothing(axis: int, size: tuple[int, int], deviation: float) -> Tensor | None:
    """(n,n) for the n pixels along one axis of maps of the size: their Gaussian."""
    if not deviation:
        return None
    width = min(size[1 - axis], int(4 * deviation + 0.5) + 1)  # as wide as the Gaussian may need it
    lines = torch.eye(size[axis])[:, :, None].expand(-1, -1, width)  # maps of a bright row each
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


class OnnxScorer(Inspector):
    """An exported model, run by onnxruntime, with the interface of `scorer.Scorer`.

    Attributes:
        class_name, image_size, map_size, image_score, roi, metrics, calibration, device: as in `scorer.Scorer`.
        thresholds: that it was exported with.

    Raises:
        InputError: onnxruntime is missing, or the file is not what `export_onnx` wrote.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        path = Path(path)
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
            self.device = torch.device(device if len(providers) > 1 else "cpu")
            again = int(len(providers) > 1)  # else a second attempt is the same, and announced on stdout
            self._session = onnxruntime.InferenceSession(data, options, providers=providers, enable_fallback=again)
            metadata = self._session.get_modelmeta().custom_metadata_map
            about = json.loads(metadata[METADATA_KEY])
            self.class_name, self.metrics = str(about["class"]), read_metrics(about["metrics"])
            self.image_size = _read_size(about["image_size"], self._session)
            others = self._session.get_overridable_initializers()
            self.map_size = next((tuple(x.shape) for x in others if x.name == "roi"), MASK_SIZE)
            self.roi = _read_roi(about.get("roi"), self.map_size)
            self.thresholds = _read_thresholds(metadata)
            self.image_score = about.get("image_score", "max")
            require(self.image_score in IMAGE_SCORES, "image score")
            given = about["calibration"]
            self.calibration = None if given is None else Calibration.from_dict(given)
        except Exception:  # onnxruntime has exceptions of its own for damaged files
            problem = "is not a model that export.py wrote, or it is damaged; export it again"
            raise InputError(f"{path} {problem}") from None

    def score(self, images: Tensor, roi: Tensor | None = None) -> Scored:
        """Anomaly maps (B,H,W) and scores (B,) of images uint8 (B,h,w,3).

        Args:
            roi: bool (H,W), where scores are taken; None: everywhere.

        Raises:
            InputError: onnxruntime cannot run the model, or it gives something else.
        """
        try:
            given = {"image": images.numpy()} | ({} if roi is None else {"roi": roi.numpy()})
            maps, scores = self._session.run(["anomaly_map", "score"], given)
        except Exception as error:  # of its own kinds, such as too little memory
            raise InputError(
                f"onnxruntime cannot run {self._path} ({first_line(error)}); use a smaller --batchSize, or the "
                ".pt file"
            ) from None
        shapes = (len(images), *self.map_size), (len(images),)
        if any(x.dtype != np.float32 or x.shape != shape for x, shape in zip((maps, scores), shapes, strict=True)):
            raise InputError(f"{self._path} gives other maps or scores than export.py's models; export it again")
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
    if image.type != "tensor(uint8)" or image.shape[1:] not in ([height, width, 3], [*ANY_SIZE, 3]):
        raise ValueError("input")
    return height, width


def _read_thresholds(metadata: dict[str, str]) -> Thresholds | None:
    """Those in the metadata, if any; raises ValueError unless they are finite."""
    if "pixel_threshold" not in metadata:
        return None
    thresholds = Thresholds(*(float(metadata[f"{of}_threshold"]) for of in ("pixel", "image")))
    require(all(abs(x) < HIGHEST for x in asdict(thresholds).values()), "thresholds")
    return thresholds


def _read_roi(given: str | None, size: tuple[int, int]) -> Tensor | None:
    """Raises ValueError unless `given` holds the bits of a region of that size."""
    if given is None:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(given), np.uint8))
    return torch.from_numpy(bits[: math.prod(size)].astype(bool).reshape(size))


def _providers(onnxruntime, device: torch.device) -> list:
    on_cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    chosen = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0})] if on_cuda else []
    return [*chosen, "CPUExecutionProvider"]


if __name__ == "__main__":
    run_script(main)
