"""Score images with a trained model: scores.csv, and for each image a heat map, the raw map and a mask.

    python predict.py saveDir/tile-.../last.pt image.png --out results
    python predict.py saveDir/tile-.../last.pt folder_of_images --out results --threshold f1
    python predict.py tile.onnx folder_of_images --out results        # exported by export.py
    python predict.py saveDir/tile-.../last.pt --template template.png

Written to --out, a new folder: scores.csv (path, score, decision, threshold); overlays/*.png; maps/*.tiff,
float32 at the image's own size, as MVTec's evaluator reads them; masks/*.png.  Images may have any size and
mode; those that cannot be read are listed at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calibration import IMAGE_QUANTILE, PIXEL_QUANTILE, Thresholds, choose_thresholds
from checkpoint import Trained
from dataset import IMAGE_SUFFIXES, list_images
from evaluation import at_mask_size
from export import OnnxModel
from hardware import choose_device, keep_freed_memory
from loading import look_ahead, normalise, read_image
from model import anomaly_map
from pictures import overlay, to_picture
from run import image_template
from settings import add_running_flags
from util import InputError, Parser, atomic_path, fraction, progress, run_script, whole_number


def main() -> None:
    arguments = parse_arguments()
    device = choose_device(arguments.gpu)
    keep_freed_memory()
    scorer = load_scorer(arguments, device)
    if arguments.template:
        save_template(scorer, arguments.template)
    if not arguments.images:
        return
    quantiles = (arguments.pixelQuantile, arguments.imageQuantile)
    thresholds = choose_thresholds(arguments.threshold, scorer.metrics, scorer.calibration, quantiles)
    items = find_images(arguments.images)
    make_new_folder(arguments.out)
    unreadable = predict(scorer, items, arguments, thresholds)
    for line in unreadable:
        print(line, file=sys.stderr)
    if unreadable:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, help="a .pt file of train.py, or an .onnx file of export.py")
    parser.add_argument(
        "images", type=Path, nargs="*", help="images, and folders that are searched for them"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="new folder [predictions]")
    parser.add_argument(
        "--threshold", default="quantile",
        help="quantile: of the scores of good training images; f1: where F1 is best on the test images; "
        "or a number [quantile]",
    )  # fmt: skip
    parser.add_argument(
        "--pixelQuantile", type=fraction, default=PIXEL_QUANTILE,
        help=f"share of good pixels that stay below --threshold quantile [{PIXEL_QUANTILE}]",
    )  # fmt: skip
    parser.add_argument(
        "--imageQuantile", type=fraction, default=IMAGE_QUANTILE,
        help=f"share of good images that stay below --threshold quantile [{IMAGE_QUANTILE}]",
    )  # fmt: skip
    parser.add_argument("--batchSize", type=whole_number(1), default=4, help="images at once [4]")
    parser.add_argument(
        "--template", type=Path, metavar="FILE.png", help="write the image template (encoder none)"
    )
    add_running_flags(parser)
    arguments = parser.parse_intermixed_args()
    if not arguments.images and not arguments.template:
        parser.error("name images or folders, or --template FILE.png")
    return arguments


# -------------------------------------------------------------------------------------- model


class TorchScorer:
    """A checkpoint, with the interface of `export.OnnxModel`."""

    def __init__(self, trained: Trained, device: torch.device):
        self.trained, self._device = trained, device
        self.image_size = trained.model.config.image_size
        self.metrics, self.calibration = trained.metrics, trained.calibration

    def score(self, images: Tensor) -> np.ndarray:
        """Anomaly maps, float32 (B,256,256), of images uint8 (B,h,w,3)."""
        model = self.trained.model
        features = model.encode(normalise(images.to(self._device)))
        return at_mask_size(anomaly_map(model, features, self.trained.template)).cpu().numpy()


def load_scorer(arguments: argparse.Namespace, device: torch.device) -> TorchScorer | OnnxModel:
    if arguments.model.suffix.lower() == ".onnx":
        if arguments.precision != "auto":
            raise InputError(
                "--precision: an .onnx file has the precision it was exported in; leave it out"
            )
        return OnnxModel(arguments.model, device)
    return TorchScorer(Trained.load(arguments.model, device, arguments.precision), device)


def save_template(scorer: TorchScorer | OnnxModel, path: Path) -> None:
    """Raises InputError if the model has no image template, or it cannot be written."""
    if not isinstance(scorer, TorchScorer):
        raise InputError("--template: an .onnx file holds no inverse; name the .pt file it was made of")
    template = image_template(scorer.trained.model, scorer.trained.template)
    if template is None:
        encoder = scorer.trained.model.config.encoder
        raise InputError(
            f"--template: the encoder {encoder} has no inverse, so there is no image template; only models "
            "trained with --encoder none have one"
        )
    save_image(path, to_picture(template), "--template")
    print(f"image template written to {path}")


# --------------------------------------------------------------------------------- the images


@dataclass
class Item:
    """One image to score.

    Attributes:
        path: of the image.
        name: of what is written for it, without suffix, relative to the folders of --out.
    """

    path: Path
    name: Path


@dataclass
class Loaded:
    """An image that was read, or why it was not: its own size, and the model's; uint8 (h,w,3)."""

    item: Item
    original: np.ndarray | None = None
    resized: np.ndarray | None = None
    error: str | None = None


def find_images(given: list[Path]) -> list[Item]:
    """All images among the given files and in the given folders, sorted, under names that differ.

    Raises:
        InputError: a path does not exist, or a folder holds no images.
    """
    items, taken = [], set()
    for path in given:
        if path.is_dir():
            folders = [path, *(p for p in sorted(path.rglob("*")) if p.is_dir())]
            found = [
                image for folder in folders if _is_visible(folder, path) for image in list_images(folder)
            ]
            if not found:
                raise InputError(f"no images in {path}; it may hold {', '.join(sorted(IMAGE_SUFFIXES))}")
        elif path.is_file():
            found = [path]
        else:
            raise InputError(f"{path} does not exist; name an image or a folder")
        for image in found:
            relative = image.relative_to(path) if path.is_dir() else Path(image.name)
            if len(given) > 1 and path.is_dir():
                relative = Path(path.resolve().name) / relative
            name = relative.with_suffix("")
            if name in taken:
                name = relative.with_name(relative.name.replace(".", "_"))
            number = itertools.count(2)
            while name in taken:
                name = relative.with_name(f"{relative.stem}-{next(number)}")
            taken.add(name)
            items.append(Item(image, name))
    return items


def _is_visible(folder: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in folder.relative_to(root).parts)


def load(item: Item, size: tuple[int, int]) -> Loaded:
    try:
        original = read_image(item.path)
    except InputError as error:
        return Loaded(item, error=str(error))
    resized = Image.fromarray(original).resize(size[::-1], Image.Resampling.BILINEAR)
    return Loaded(item, original, np.asarray(resized))


# ------------------------------------------------------------------------------------ writing


def predict(
    scorer: TorchScorer | OnnxModel,
    items: list[Item],
    arguments: argparse.Namespace,
    thresholds: Thresholds,
) -> list[str]:
    """Score and write everything, a few images at a time; the errors of those that cannot be read."""
    unreadable, defective, start = [], 0, time.perf_counter()
    writer = Writer(arguments.out, thresholds, scorer)
    with (arguments.out / "scores.csv").open(
        "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as file:
        table = csv.writer(file)
        table.writerow(["path", "score", "decision", "threshold"])
        for batch in scored(scorer, items, arguments, unreadable):
            rows = [writer.row(*pair) for pair in batch]
            table.writerows(rows)
            file.flush()
            defective += sum(row[2] == "defective" for row in rows)
            writer.start(batch)
        writer.wait()
    count = len(items) - len(unreadable)
    rate = count / (time.perf_counter() - start)
    print(
        f"{count} images, {defective} defective, {rate:.1f} images/s, written to {arguments.out}"
        + (f"; {len(unreadable)} cannot be read:" if unreadable else "")
    )
    return unreadable


def scored(
    scorer: TorchScorer | OnnxModel,
    items: list[Item],
    arguments: argparse.Namespace,
    unreadable: list[str],
) -> Iterator[list[tuple[Loaded, np.ndarray]]]:
    """Batches of images with their maps; images are read ahead, as few as keep the scorer busy.

    Args:
        unreadable: errors of images that cannot be read are added here.
    """
    ahead = look_ahead(
        lambda item: load(item, scorer.image_size), items, 2 * arguments.batchSize, arguments.numWorkers
    )
    bar = iter(progress(ahead, "images", len(items)))
    while loaded := list(itertools.islice(bar, arguments.batchSize)):
        unreadable += [image.error for image in loaded if image.error]
        loaded = [image for image in loaded if not image.error]
        if loaded:
            images = torch.from_numpy(np.stack([image.resized for image in loaded]))
            yield list(zip(loaded, scorer.score(images), strict=True))


class Writer:
    """Writes what belongs to one image into the folders of --out."""

    def __init__(self, out: Path, thresholds: Thresholds, scorer: TorchScorer | OnnxModel):
        self._out, self._thresholds = out, thresholds
        self._pool, self._writing = ThreadPoolExecutor(), []
        calibration = scorer.calibration
        self._scale = (
            calibration.colour_scale() if calibration else (0.0, 2 * abs(thresholds.pixel) + 1e-12)
        )

    def row(self, image: Loaded, anomaly: np.ndarray) -> list:
        """Of scores.csv."""
        score, threshold = float(anomaly.max()), self._thresholds.image
        decision = "defective" if score >= threshold else "good"
        return [image.item.path, f"{score:.6g}", decision, f"{threshold:.6g}"]

    def start(self, batch: list[tuple[Loaded, np.ndarray]]) -> None:
        """Write in the background, after the batch before: the next one can be scored meanwhile."""
        self.wait()
        self._writing = [self._pool.submit(self.write, *pair) for pair in batch]

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        for one in self._writing:
            one.result()

    def write(self, image: Loaded, anomaly: np.ndarray) -> None:
        """The map at the image's size: as numbers, as colours over the image, and cut at the threshold."""
        original, name = image.original, image.item.name
        full = Image.fromarray(anomaly).resize(original.shape[1::-1], Image.Resampling.BILINEAR)
        values = np.asarray(full)
        pictures = {
            ("maps", ".tiff"): full,
            ("overlays", ".png"): Image.fromarray(overlay(original, values, self._scale)),
            ("masks", ".png"): Image.fromarray(np.uint8(255) * (values >= self._thresholds.pixel)),
        }
        for (folder, suffix), picture in pictures.items():
            path = self._out / folder / name.with_name(name.name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, **({"compress_level": 1} if suffix == ".png" else {}))


def make_new_folder(out: Path) -> None:
    """Raises InputError if it cannot be made, or holds something already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"--out {out} is not empty; name a new folder")
    except OSError as error:
        raise InputError(f"cannot write to --out {out} ({error.strerror}); name another") from None


def save_image(path: Path, picture: np.ndarray, flag: str) -> None:
    if path.exists():
        raise InputError(f"{flag} {path} exists; name a new file")
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(picture).save(temporary, format="png")
    except OSError as error:
        raise InputError(f"cannot write {flag} {path} ({error.strerror}); name another") from None


if __name__ == "__main__":
    run_script(main)
