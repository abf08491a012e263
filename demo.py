"""Make a small data set in MVTec's layout and train on it: no download, no GPU, about a minute.

    python demo.py              # data, training, table of both scores, pictures
    python demo.py --dataOnly   # the data alone, in demo_data/

The class "gravel" is cut from a photographic texture inside scikit-image: random crops with slight
changes of pose and illumination.  Training images come from the left part of the photograph, test
images from the right part.  Defects: cracks, scratches, stains and pieces of other textures, each
with its exact mask.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import skimage.data
import skimage.draw
import skimage.transform
from PIL import Image

import train
from util import InputError, Parser, atomic_path, run_script, whole_number

CLASS_NAME = "gravel"
MARKER = "made_by_demo.txt"
IMAGE_SIZE = 256
CROP_SIZE = 168  # pixels of the photograph that fill an image
TRAIN_COLUMNS, TEST_COLUMNS = slice(0, 300), slice(300, 512)
TINT = np.array([1.0, 0.94, 0.86])
NUM_TRAIN, NUM_TEST_GOOD, NUM_PER_DEFECT = 48, 16, 10
TRAINING_FLAGS = (
    "--encoder", "none", "--numStack", "1", "--epochs", "4", "--evalEvery", "2", "--score", "bank",
    "--gpu", "cpu",
)  # fmt: skip

Picture = np.ndarray  # float (256,256,3), 0..1
Mask = np.ndarray  # bool (256,256)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_data"), help="folder of the data")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the data")
    parser.add_argument("--dataOnly", action="store_true", help="do not train")
    args = parser.parse_args()
    write_data_set(args.out, args.seed)
    command = ["--cls", CLASS_NAME, "--datapath", str(args.out), *TRAINING_FLAGS]
    print(f"data set in {args.out}; train on it with\n  python train.py {shlex.join(command)}\n", flush=True)
    if not args.dataOnly:
        train.main(command)


def write_data_set(out: Path, seed: int = 0) -> None:
    """Write `<out>/gravel` in MVTec's layout; the same seed gives the same files.

    Raises:
        InputError: `out` cannot be written to, or holds something else.
    """
    folder = out / CLASS_NAME
    marker = folder / MARKER
    if not marker.is_file() and any(folder.glob("[!.]*")):
        raise InputError(f"{folder} exists and is not the demo's data; choose another folder by --out")
    rng = np.random.default_rng(seed)
    photograph = skimage.data.gravel() / 255
    learn, test = photograph[:, TRAIN_COLUMNS], photograph[:, TEST_COLUMNS]
    try:
        _write(marker, b"python demo.py writes this folder, and writes it again.\n")
        for i in range(NUM_TRAIN):
            _save(folder / "train" / "good" / f"{i:03}.png", good_image(learn, rng))
        for i in range(NUM_TEST_GOOD):
            _save(folder / "test" / "good" / f"{i:03}.png", good_image(test, rng))
        for kind, add_defect in DEFECTS.items():
            for i in range(NUM_PER_DEFECT):
                picture, mask = add_defect(good_image(test, rng), rng)
                _save(folder / "test" / kind / f"{i:03}.png", picture)
                _save(folder / "ground_truth" / kind / f"{i:03}_mask.png", mask)
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}); choose another folder by --out") from None


def _save(path: Path, picture: Picture | Mask) -> None:
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, format="png")
    _write(path, file.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Whole at every moment, and left alone where it is there: another demo may be reading it."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


# ------------------------------------------------------------------------------------- images


def good_image(photograph: np.ndarray, rng: np.random.Generator) -> Picture:
    """A crop at a random place, slightly turned, scaled and lit."""
    scale = CROP_SIZE / IMAGE_SIZE * rng.uniform(0.97, 1.03)
    angle = np.deg2rad(rng.uniform(-4, 4))
    reach = CROP_SIZE * 0.58  # half a turned and enlarged crop
    center = [rng.uniform(reach, side - reach) for side in photograph.shape[::-1]]
    middle = (IMAGE_SIZE - 1) / 2
    pose = (
        skimage.transform.AffineTransform(translation=(-middle, -middle))
        + skimage.transform.AffineTransform(scale=(scale, scale), rotation=angle)
        + skimage.transform.AffineTransform(translation=center)
    )
    gray = skimage.transform.warp(photograph, pose, output_shape=(IMAGE_SIZE, IMAGE_SIZE), order=3)
    return _light(gray[..., None] * TINT, rng)


def _light(picture: Picture, rng: np.random.Generator) -> Picture:
    """Brightness and a gradient across the image, a few percent each."""
    y, x = np.mgrid[-1 : 1 : IMAGE_SIZE * 1j, -1 : 1 : IMAGE_SIZE * 1j]
    gain = rng.uniform(0.96, 1.04) + rng.uniform(-0.03, 0.03) * x + rng.uniform(-0.03, 0.03) * y
    return np.clip(picture * gain[..., None], 0, 1)


# ------------------------------------------------------------------------------------ defects


def add_crack(picture: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """A thin dark line that wanders."""
    points = [rng.uniform(50, 206, 2)]
    direction = rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(40, 80)):
        direction += rng.normal(0, 0.35)
        points.append(points[-1] + 2.5 * np.array([np.sin(direction), np.cos(direction)]))
    mask = _thick_line(np.array(points), rng.uniform(1.2, 2.2))
    return _blend(picture, mask, picture * rng.uniform(0.1, 0.3))


def add_scratch(picture: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """One to three straight bright lines, nearly parallel."""
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    direction, start = rng.uniform(0, np.pi), rng.uniform(60, 196, 2)
    for _ in range(rng.integers(1, 4)):
        angle = direction + rng.normal(0, 0.06)
        end = start + rng.uniform(50, 110) * np.array([np.sin(angle), np.cos(angle)])
        mask |= _thick_line(np.linspace(start, end, 100), rng.uniform(0.9, 1.8))
        start = start + rng.uniform(-14, 14, 2)
    return _blend(picture, mask, 0.15 * picture + rng.uniform(0.7, 0.85))


def add_stain(picture: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """A colored blot that lets the texture through."""
    color = rng.uniform(0.25, 0.75, 3)
    return _blend(picture, _blob(rng, radius=(14, 36)), picture * color)


def add_paste(picture: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """A piece of another texture, of about the same brightness."""
    other = [skimage.data.brick, skimage.data.grass][rng.integers(2)]() / 255
    y, x = rng.integers(0, 512 - IMAGE_SIZE, 2)
    piece = other[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE, None] * TINT
    piece = piece * (picture.mean() / piece.mean())
    return _blend(picture, _blob(rng, radius=(16, 40)), np.clip(piece, 0, 1))


DEFECTS: dict[str, Callable[[Picture, np.random.Generator], tuple[Picture, Mask]]] = {
    "crack": add_crack,
    "scratch": add_scratch,
    "stain": add_stain,
    "paste": add_paste,
}


def _blend(picture: Picture, mask: Mask, defect: Picture) -> tuple[Picture, Mask]:
    return np.where(mask[..., None], defect, picture), mask


def _thick_line(points: np.ndarray, radius: float) -> Mask:
    """Pixels within `radius` of the polyline through (y,x) points."""
    line = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    for a, b in zip(points[:-1].round().astype(int), points[1:].round().astype(int), strict=True):
        y, x = skimage.draw.line(*a, *b)
        inside = (y >= 0) & (y < IMAGE_SIZE) & (x >= 0) & (x < IMAGE_SIZE)
        line[y[inside], x[inside]] = False
    return scipy.ndimage.distance_transform_edt(line) <= radius


def _blob(rng: np.random.Generator, radius: tuple[float, float]) -> Mask:
    """A round shape with a random outline: a disk whose radius varies smoothly with the angle."""
    cy, cx = rng.uniform(50, 206, 2)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    angle = np.arctan2(y - cy, x - cx)
    outline = np.ones_like(angle)
    for frequency in (2, 3, 5):
        outline += 0.15 * rng.normal() * np.cos(frequency * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(y - cy, x - cx) < rng.uniform(*radius) * np.clip(outline, 0.5, 1.6)


if __name__ == "__main__":
    run_script(main)
