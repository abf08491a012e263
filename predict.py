"""Score images with a trained model: scores.csv, and for each image a heat map, the raw map and a mask.

    python predict.py saveDir/tile-.../last.pt image.png --out results
    python predict.py saveDir/tile-.../last.pt folder_of_images --out results --threshold f1
    python predict.py tile.onnx folder_of_images --out results        # exported by export.py
    python predict.py saveDir/tile-.../last.pt --template template.png

Written to --out, a new folder: overlays/*.png; maps/*.tiff, float32 at the image's own size, as MVTec's
evaluator reads them; masks/*.png; and when all is done scores.csv (path, score, decision, threshold, map) and
report.html, which shows the images sorted by score, with a threshold to move.
Images may have any size and mode; those that cannot be read are listed at the end, and the exit code is 1.
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

import report
from dataset import IMAGE_SUFFIXES, list_images, look_ahead, read_image
from export import OnnxScorer
from figures import file_name, overlay, to_picture
from scorer import IMAGE_QUANTILE, PIXEL_QUANTILE, Scorer, Thresholds, choose_thresholds
from util import (
    InputError,
    Parser,
    add_running_flags,
    atomic_path,
    choose_device,
    fraction,
    keep_freed_memory,
    progress,
    run_script,
    whole_number,
)

COLUMNS = ("path", "score", "decision", "threshold", "map")


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    scorer = load_scorer(args)
    if args.template:
        save_template(scorer, args.template)
    if not args.images:
        return
    quantiles = (args.pixelQuantile, args.imageQuantile)
    thresholds = choose_thresholds(args.threshold, scorer.metrics, scorer.calibration, quantiles)
    items = find_images(args.images)
    make_new_folder(args.out)
    unreadable = predict(scorer, items, args, thresholds)
    for line in unreadable:
        print(line, file=sys.stderr)
    if unreadable:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("model", type=Path, help="a .pt file of train.py or fit.py, or an .onnx file of export.py")
    add("images", type=Path, nargs="*", help="images, and folders that are searched for them")
    add("--out", type=Path, default=Path("predictions"), help="new folder")
    add("--threshold", default="quantile",
        help="quantile: of the scores of good images; f1: where F1 is best on the test images; or a number")
    add("--pixelQuantile", type=fraction, default=PIXEL_QUANTILE,
        help="share of good pixels that stay below --threshold quantile")
    add("--imageQuantile", type=fraction, default=IMAGE_QUANTILE,
        help="share of good images that stay below --threshold quantile")
    add("--batchSize", type=whole_number(1), default=4, help="images at once")
    add("--template", type=Path, metavar="FILE.png",
        help="write the image template (encoder none), the first one of a bank")
    # fmt: on
    add_running_flags(parser)
    args = parser.parse_intermixed_args()
    if not args.images and not args.template:
        parser.error("give images or folders, or --template FILE.png")
    return args


# -------------------------------------------------------------------------------------- model


def load_scorer(args: argparse.Namespace) -> Scorer | OnnxScorer:
    device = choose_device(args.gpu)
    if args.model.suffix.lower() != ".onnx":
        return Scorer.load(args.model, device, args.precision)
    if args.precision != "auto":
        raise InputError("--precision: an .onnx file has the precision it was exported in; leave it out")
    return OnnxScorer(args.model, device)


def save_template(scorer: Scorer | OnnxScorer, path: Path) -> None:
    """Raises InputError if the model has no image template, or it cannot be written."""
    if isinstance(scorer, OnnxScorer):
        raise InputError(
            "--template: an .onnx file holds no inverse; choose the .pt file it was made of"
        )
    if path.exists():
        raise InputError(f"--template {path} exists; choose a new file")
    template = scorer.image_template()
    if template is None:
        raise InputError(
            f"--template: the encoder {scorer.config.encoder} has no inverse, so there is no image "
            "template; only models trained with --encoder none have one"
        )
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(to_picture(template)).save(temporary, format="png")
    except OSError as error:
        raise InputError(f"cannot write --template {path} ({error.strerror}); choose another") from None
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
            found = _images_below(path)
        elif path.is_file():
            found = [path]
        else:
            raise InputError(f"{path} does not exist; choose an image or a folder")
        for image in found:
            relative = image.relative_to(path) if path.is_dir() else Path(image.name)
            if len(given) > 1 and path.is_dir():
                relative = Path(path.resolve().name) / relative
            items.append(Item(image, _free_name(relative, taken)))
    return items


def _images_below(root: Path) -> list[Path]:
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]
    visible = [f for f in folders if not any(part[0] == "." for part in f.relative_to(root).parts)]
    found = [image for folder in visible for image in list_images(folder)]
    if not found:
        raise InputError(f"no images in {root}; it may hold {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def _free_name(relative: Path, taken: set[Path]) -> Path:
    """A name without suffix that is not taken, and that any file system takes; from now on it is taken."""
    folder = Path(*map(file_name, relative.parent.parts))
    other = (f"{relative.stem}-{n}" for n in itertools.count(2))
    for name in itertools.chain((relative.stem, relative.name.replace(".", "_")), other):
        path = folder / file_name(name)
        if path not in taken:
            taken.add(path)
            return path
    raise AssertionError  # the numbers do not end


def load(item: Item, size: tuple[int, int]) -> Loaded:
    try:
        original = read_image(item.path)
    except InputError as error:
        return Loaded(item, error=str(error))
    resized = Image.fromarray(original).resize(size[::-1], Image.Resampling.BILINEAR)
    return Loaded(item, original, np.asarray(resized))


# ------------------------------------------------------------------------------------ writing


def predict(
    scorer: Scorer | OnnxScorer, items: list[Item], args: argparse.Namespace, thresholds: Thresholds
) -> list[str]:
    """Score and write everything, a few images at a time; the errors of those that cannot be read."""
    unreadable, defective, start = [], 0, time.perf_counter()
    writer = Writer(args.out, thresholds, scorer)
    with (
        atomic_path(args.out / "scores.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for batch in scored(scorer, items, args, unreadable):
            rows = [writer.row(image, score) for image, _, score in batch]
            table.writerows(rows)
            defective += sum(row["decision"] == "defective" for row in rows)
            writer.start(batch)
        writer.wait()
    report.save_predictions(writer.report, args.out / report.FILE, scorer, vars(args))
    count = len(items) - len(unreadable)
    rate = count / (time.perf_counter() - start)
    print(
        f"{count} images, {defective} defective, {rate:.1f} images/s, written to {args.out}"
        + (f"; {len(unreadable)} cannot be read:" if unreadable else "")
    )
    return unreadable


def scored(
    scorer: Scorer | OnnxScorer, items: list[Item], args: argparse.Namespace, unreadable: list[str]
) -> Iterator[list[tuple[Loaded, np.ndarray, float]]]:
    """Batches of images with their maps and scores; images are read ahead, as few as keep the scorer busy.

    Args:
        unreadable: errors of images that cannot be read are added here.

    Raises:
        InputError: a score is not finite.
    """
    ahead = look_ahead(
        lambda item: load(item, scorer.image_size), items, 2 * args.batchSize, args.numWorkers
    )
    bar = iter(progress(ahead, "images", len(items)))
    while loaded := list(itertools.islice(bar, args.batchSize)):
        unreadable += [image.error for image in loaded if image.error]
        loaded = [image for image in loaded if not image.error]
        if loaded:
            images = torch.from_numpy(np.stack([image.resized for image in loaded]))
            maps, scores = (x.cpu().numpy() for x in scorer.score(images))
            for image, anomaly, score in zip(loaded, maps, scores, strict=True):
                if not (np.isfinite(anomaly).all() and np.isfinite(score)):
                    raise InputError(f"{image.item.path}: no finite score; use another model")
            yield list(zip(loaded, maps, scores.tolist(), strict=True))


class Writer:
    """Writes what belongs to one image into the folders of --out."""

    def __init__(self, out: Path, thresholds: Thresholds, scorer: Scorer | OnnxScorer):
        self._out, self._thresholds = out, thresholds
        self._pool, self._writing = ThreadPoolExecutor(), []
        self._scale = (0.0, 2 * abs(thresholds.pixel) + 1e-12)
        if scorer.calibration:
            self._scale = scorer.calibration.color_scale()
        self.report = report.start_predictions(scorer, thresholds, self._scale)

    def row(self, image: Loaded, score: float) -> dict:
        """Of scores.csv."""
        threshold = self._thresholds.image
        decision = "defective" if score >= threshold else "good"
        name = _place("maps", image.item.name, ".tiff").as_posix()
        values = (image.item.path, f"{score:.6g}", decision, f"{threshold:.6g}", name)
        return dict(zip(COLUMNS, values, strict=True))

    def start(self, batch: list[tuple[Loaded, np.ndarray, float]]) -> None:
        """Write in the background, after the batch before: the next one can be scored meanwhile."""
        self.wait()
        self._writing = [self._pool.submit(self.write, image, anomaly) for image, anomaly, _ in batch]
        self._writing += [self._pool.submit(self._add_to_report, *one) for one in batch]

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        for one in self._writing:
            one.result()

    def write(self, image: Loaded, anomaly: np.ndarray) -> None:
        """The map at the image's size: as numbers, as colors over the image, and cut at the threshold."""
        original, name = image.original, image.item.name
        full = Image.fromarray(anomaly).resize(original.shape[1::-1], Image.Resampling.BILINEAR)
        values = np.asarray(full)
        shown = Image.fromarray(overlay(original, values, self._scale))
        mask = Image.fromarray(np.uint8(255) * (values >= self._thresholds.pixel))
        self._save(full, _place("maps", name, ".tiff"), format="tiff")
        self._save(shown, _place("overlays", name, ".png"), format="png", compress_level=1)
        self._save(mask, _place("masks", name, ".png"), format="png", compress_level=1)

    def _add_to_report(self, image: Loaded, anomaly: np.ndarray, score: float) -> None:
        threshold = self._thresholds.pixel
        self.report.add_prediction(image.item.path, image.original, anomaly, score, threshold)

    def _save(self, picture: Image.Image, place: Path, **options) -> None:
        path = self._out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, **options)


def _place(folder: str, name: Path, suffix: str) -> Path:
    """Where a file of an image lies in --out."""
    return folder / name.with_name(name.name + suffix)


def make_new_folder(out: Path) -> None:
    """Raises InputError if it cannot be made, or holds something already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"--out {out} is not empty; choose a new folder")
    except OSError as error:
        raise InputError(f"cannot write to --out {out} ({error.strerror}); choose another") from None


if __name__ == "__main__":
    run_script(main)
