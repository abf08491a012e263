"""Score images with a trained model: tables of scores and defects, heat maps, raw maps and masks.

    python predict.py saveDir/tile-.../last.pt image.png --out results
    python predict.py saveDir/tile-... folder_of_images --out results --threshold f1 --minArea 20
    python predict.py tile.onnx folder_of_images --out results        # exported by export.py
    python predict.py saveDir/tile-... folder_of_images --out results --resume   # after it was stopped
    python predict.py saveDir/tile-.../last.pt --template template.png

Written to --out, a new folder: overlays/*.png; masks/*.png; maps/*.tiff, float32 at the image's own size, as
MVTec's evaluator reads them; predict.json, what was asked for; and when all is done scores.csv, a row for each
image with the name of its files there, defects.csv, a row for each region of a mask, its box without x1 and y1
themselves, and report.html, which shows the images sorted by score, with a threshold to move.
Images may have any size and mode; those that cannot be read are listed at the end, and the exit code is 1: once
they are repaired, --resume adds them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import report
from dataset import IMAGE_SUFFIXES, WORKING_COPIES, decoded_bytes, list_images, look_ahead, read_image
from export import OnnxScorer
from figures import file_name, overlay, to_picture, write_png, write_tiff
from scorer import Scorer, find_checkpoint
from util import (
    InputError,
    Interrupted,
    Parser,
    StopSignals,
    add_running_flags,
    atomic_path,
    check_writable,
    choose_precision,
    count_images,
    lock,
    progress,
    run_script,
    start_on,
    whole_number,
    write_csv,
    write_json,
)
from verdict import (
    Inspection,
    Thresholds,
    add_threshold_flags,
    judge,
    resize_image,
    resize_roi,
    roi_remarks,
    thresholds_of_flags,
)

SCORE_COLUMNS = (
    "path", "score", "decision", "threshold", "pixel_threshold", "margin", "peak_x", "peak_y", "map", "name",
)  # fmt: skip
DEFECT_COLUMNS = ("image", "number", "x0", "y0", "x1", "y1", "area", "peak_score", "mean_score")
KINDS = {"overlays": ".png", "masks": ".png", "maps": ".tiff"}
WRITERS = 2  # threads: each holds an image of its own size several times
MARKER = "predict.json"  # in a folder of results: what they are results of, and whether all are there
ROWS = "rows.jsonl"  # beside it, the rows of the images that are done, until all are


def main() -> None:
    args = parse_arguments()
    device = start_on(args.gpu)
    args.model = find_checkpoint(args.model)
    scorer = load_scorer(args, device)
    template = read_template(scorer, args.template) if args.template else None
    if args.images:
        thresholds, roi = thresholds_of_flags(args, scorer), scorer.region(args.roi)
        number, count = args.shard
        items = find_images(args.images)[number - 1 :: count]
        for line in roi_remarks(args.roi, [item.path for item in items[:1]]):
            print(line)
        results = Results(args.out, describe(args, items, scorer, device), args.resume)
    if template is not None:
        write_template(template, args.template)
    if not args.images:
        return
    if results.finished:  # all could be read
        print(f"{args.out} is finished: {count_images(len(items))}")
        return
    unreadable = predict(scorer, items, args, thresholds, roi, results)
    for line in unreadable:
        print(line, file=sys.stderr)
    if unreadable:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("model", type=Path,
        help="a .pt file of train.py or fit.py, a run's folder, or an .onnx file of export.py")
    add("images", type=Path, nargs="*", help="images, and folders that are searched for them")
    add("--out", type=Path, default=Path("predictions"), help="new folder")
    add("--resume", action="store_true",
        help="continue the same command's --out where it was stopped, and try again what could not be read")
    add("--write", type=kinds, default=tuple(KINDS), metavar="KINDS",
        help=f"some of {','.join(KINDS)}, with commas, or none")
    add_threshold_flags(parser)
    add("--minArea", type=whole_number(1), default=1, metavar="PIXELS",
        help="smaller regions are left out of masks and defects.csv")
    add("--roi", type=Path, metavar="MASK.png",
        help="white where the part is, of any size; what lies outside does not count; instead of the model's own, "
        "by which train.py or fit.py --roi chose thresholds, too")
    add("--batchSize", type=whole_number(1), default=4, help="images at once")
    add("--shard", type=shard, default="1/1", metavar="I/N",
        help="the I-th of N parts of the images, for several processes")
    add("--template", type=Path, metavar="FILE.png",
        help="write the image template (encoder none), the first one of a bank")
    # fmt: on
    add_running_flags(parser)
    args = parser.parse_intermixed_args()
    if not args.images and not args.template:
        parser.error("give images or folders, or --template FILE.png")
    return args


def kinds(text: str) -> tuple[str, ...]:
    """An argparse type: names of `KINDS` with commas between them, or none."""
    names = () if text == "none" else tuple(text.split(","))
    if unknown := set(names) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is not one of {', '.join(KINDS)}, none")
    return names


def shard(text: str) -> tuple[int, int]:
    """An argparse type: "2/4" -> (2, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4, 2/4, 3/4 or 4/4")
    return int(number), int(count)


# -------------------------------------------------------------------------------------- model


def load_scorer(args: argparse.Namespace, device: torch.device) -> Scorer | OnnxScorer:
    if args.model.suffix.lower() != ".onnx":
        return Scorer.load(args.model, device, args.precision)
    if args.precision != "auto":
        raise InputError("--precision: an .onnx file has the precision it was exported in; leave it out")
    return OnnxScorer(args.model, device)


def read_template(scorer: Scorer | OnnxScorer, path: Path) -> np.ndarray:
    """The image template, uint8 (h,w,3); raises InputError if there is none, or a file of that name."""
    if isinstance(scorer, OnnxScorer):
        raise InputError("--template: an .onnx file holds no inverse; choose the .pt file it was made of")
    if path.exists():
        raise InputError(f"--template {path} exists; choose a new file")
    check_writable(path.parent, "--template")
    template = scorer.image_template()
    if template is None:
        raise InputError(
            f"--template: the encoder {scorer.config.encoder} has no inverse, so there is no image "
            "template; only models trained with --encoder none have one"
        )
    return to_picture(template)


def write_template(template: np.ndarray, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            Image.fromarray(template).save(temporary, format="png")
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
    found = [image for folder in _folders_below(root) for image in list_images(folder)]
    if found:
        return found
    if _holds_results(root):
        raise InputError(f"{root} holds results of this program; choose a folder of images")
    raise InputError(f"no images in {root}; it may hold {', '.join(sorted(IMAGE_SUFFIXES))}")


def _folders_below(root: Path) -> Iterator[Path]:
    """The folder and all below that are visible: each once, also where links lead to it; no results of ours."""
    seen = set()
    for name, inside, _ in os.walk(root, onerror=_cannot_read, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen or _holds_results(folder):
            inside.clear()
            continue
        seen.add(real)
        visible = (n for n in inside if not n.startswith("."))
        inside[:] = sorted(visible, key=lambda n, folder=folder: ((folder / n).is_symlink(), n))
        yield folder


def _holds_results(folder: Path) -> bool:
    """Whether a prediction, a run or an evaluation wrote it, whose pictures are not to be scored."""
    of_training = all((folder / name).is_file() for name in (report.FILE, "metrics.csv"))
    return of_training or (folder / MARKER).is_file()


def _cannot_read(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename} ({error.strerror}); change that, or give other folders")


def _free_name(relative: Path, taken: set[str]) -> Path:
    """A name without suffix that is not taken, and that any file system takes; from now on it is taken."""
    parts = map(file_name, relative.parent.parts)
    ours = KINDS.values()  # a folder x.png would be in the way of what is written for an image x beside it
    folder = Path(*(p.replace(".", "_") if Path(p).suffix.lower() in ours else p for p in parts))
    other = (f"{relative.stem}-{n}" for n in itertools.count(2))
    for name in itertools.chain((relative.stem, relative.name.replace(".", "_")), other):
        path = folder / file_name(name)
        if (key := str(path).casefold()) not in taken:  # Windows and macOS do not tell a.png from A.png
            taken.add(key)
            return path
    raise AssertionError  # the numbers do not end


def load(item: Item, size: tuple[int, int]) -> Loaded:
    try:
        original = read_image(item.path)
    except InputError as error:
        return Loaded(item, error=str(error))
    return Loaded(item, original, resize_image(original, size))


# ----------------------------------------------------------------------------- what is there


def describe(
    args: argparse.Namespace, items: list[Item], scorer: Scorer | OnnxScorer, device: torch.device
) -> dict:
    """All that the results depend on, in plain values, by the names of the flags."""
    names = "".join(f"{item.path.absolute()}\n{item.name}\n" for item in items)
    roi = None if args.roi is None else hashlib.sha256(args.roi.read_bytes()).hexdigest()
    precision = args.precision
    if isinstance(scorer, Scorer):
        precision = choose_precision(precision, device, scorer.settings.get("precision"))
    flags = ("threshold", "pixelQuantile", "imageQuantile", "minArea")
    return {
        "model": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "images": f"{len(items)}, {hashlib.sha256(os.fsencode(names)).hexdigest()}",
        "roi": roi,
        "write": list(args.write),
        "shard": list(args.shard),
        "device": device.type,
        "precision": precision,
        **{name: getattr(args, name) for name in flags},
    }


class Results:
    """The folder --out: new, or with the rows of images that a command had done when it was stopped.

    Args:
        command: of `describe`; what is continued must be of the same.

    Attributes:
        finished: nothing is left to do.
        done: the rows of scores.csv of the images that are, by name.

    Raises:
        InputError: it cannot be made, holds something already, or nothing that can be continued.
    """

    def __init__(self, out: Path, command: dict, resume: bool):
        self.out, self.finished, self.done, self._command = out, False, {}, command
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; choose a new folder")
        try:
            if not resume:
                self._begin()
            elif not (out / MARKER).is_file():
                raise InputError(f"--resume: --out {out} holds nothing to continue; leave --resume out")
            self._file = open(out / ROWS, "a+", encoding="utf-8")  # noqa: SIM115
            if not lock(self._file):
                raise InputError(f"another process is writing to {out}; wait for it, or stop it")
            if resume:
                self._continue()
        except OSError as error:
            raise InputError(f"cannot write to --out {out} ({error.strerror}); choose another") from None

    def _begin(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for unfinished in self.out.glob(f".{MARKER}.*.tmp"):  # of a command that was killed at once
            unfinished.unlink()
        if any(self.out.iterdir()):
            hint = ", or add --resume" if (self.out / MARKER).is_file() else ""
            raise InputError(f"--out {self.out} is not empty; choose a new folder{hint}")
        self._mark(finished=False)

    def _continue(self) -> None:
        try:
            there = json.loads((self.out / MARKER).read_text(encoding="utf-8"))
            command, self.finished = there["command"], there["finished"]
            different = [key for key in self._command if command[key] != self._command[key]]
            if not different and not self.finished:
                self.done = _read_done(self.out / ROWS)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(f"--resume: --out {self.out} holds nothing to continue; leave --resume out") from None
        if self.finished:
            self._close()
        if different:
            raise InputError(
                f"--resume: --out {self.out} is of another command ({', '.join(different)} changed); "
                "repeat the command, or choose a new folder"
            )

    def _mark(self, finished: bool) -> None:
        write_json(self.out / MARKER, {"finished": finished, "command": self._command})

    def add(self, name: str, score: dict, defects: list[dict]) -> None:
        """Of an image whose files are written."""
        self._file.write(json.dumps({"name": name, "score": score, "defects": defects}) + "\n")
        self._file.flush()
        self.done[name] = score

    def _close(self) -> None:
        self._file.close()
        (self.out / ROWS).unlink(missing_ok=True)

    def write(self, items: list[Item], more: bool) -> int:
        """Write the tables, in the order of the items; the number of defective images.

        Args:
            more: images are left, which --resume tries again.
        """
        self._file.seek(0)
        rows = {row["name"]: row for row in map(json.loads, self._file)}
        rows = [rows[name] for item in items if (name := item.name.as_posix()) in rows]
        write_csv(self.out / "scores.csv", [row["score"] for row in rows], SCORE_COLUMNS)
        defects = [defect for row in rows for defect in row["defects"]]
        write_csv(self.out / "defects.csv", defects, DEFECT_COLUMNS)
        if not more:
            self._mark(finished=True)
            self._close()
        return sum(row["score"]["decision"] == "defective" for row in rows)


def _read_done(path: Path) -> dict[str, dict]:
    """`Results.done` of a file of rows, from which a line that was not written to its end is cut."""
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole + end))
    done = {}
    for row in map(json.loads, whole.splitlines()):
        tables = [(SCORE_COLUMNS, [row["score"]]), (DEFECT_COLUMNS, row["defects"])]
        if any(cells.keys() != set(columns) for columns, rows in tables for cells in rows):
            raise ValueError("columns")
        Path(row["score"]["path"]), float(row["score"]["score"])  # which the report reads
        done[row["name"]] = row["score"]
    return done


# ------------------------------------------------------------------------------------ writing


def predict(
    scorer: Scorer | OnnxScorer, items: list[Item], args: argparse.Namespace, thresholds: Thresholds,
    roi: np.ndarray | None, results: Results,
) -> list[str]:  # fmt: skip
    """Score and write everything, a few images at a time; the errors of those that cannot be read.

    Raises:
        Interrupted: the user stopped it.
    """
    left = [item for item in items if item.name.as_posix() not in results.done]
    unreadable, start = [], time.perf_counter()
    writer = Writer(args, thresholds, scorer, roi, results)
    try:
        with StopSignals() as signals:
            for batch in scored(scorer, left, args, roi, unreadable):
                signals.check()
                writer.start(batch)
            writer.wait()
            signals.check()
    except KeyboardInterrupt:
        flag = "" if args.resume else " --resume"
        raise Interrupted(
            f"stopped, {len(results.done)} of {count_images(len(items))} are done; to continue: python "
            f"{shlex.join(sys.argv)}{flag}"
        ) from None
    if unreadable and not results.done:
        print(f"no image written to {args.out}; of {count_images(len(items))} none can be read:")
        return unreadable
    rate = (len(left) - len(unreadable)) / (time.perf_counter() - start)
    page = args.out / report.FILE
    if len(unreadable) < len(left) or not page.exists():  # else it would lose its pictures for nothing
        report.save_predictions(writer.report, page, scorer, vars(args))
    defective, count = results.write(items, bool(unreadable)), count_images(len(items) - len(unreadable))
    line = f"{count}, {defective} defective, {rate:.1f} images/s, written to {args.out}"
    print(f"{line}; {len(unreadable)} cannot be read:" if unreadable else line)
    return unreadable


def scored(
    scorer: Scorer | OnnxScorer, items: list[Item], args: argparse.Namespace, roi: np.ndarray | None,
    unreadable: list[str],
) -> Iterator[list[tuple[Loaded, np.ndarray, float]]]:  # fmt: skip
    """Batches of images with their maps and scores; images are read ahead, as few as keep the scorer busy.

    Args:
        unreadable: errors of images that cannot be read are added here.

    Raises:
        InputError: a score is not finite.
    """
    ahead = look_ahead(
        lambda item: load(item, scorer.image_size), items, 2 * args.batchSize, args.numWorkers,
        lambda item: WORKING_COPIES * decoded_bytes(item.path),
    )  # fmt: skip
    bar = iter(progress(ahead, "images", len(items), unit=" images"))
    while loaded := list(itertools.islice(bar, args.batchSize)):
        unreadable += [image.error for image in loaded if image.error]
        loaded = [image for image in loaded if not image.error]
        if loaded:
            names = [image.item.path for image in loaded]
            pairs = scorer.score_arrays([image.resized for image in loaded], names, roi)
            yield [(image, *pair) for image, pair in zip(loaded, pairs, strict=True)]


class Writer:
    """Judges images, and writes what belongs to each into the folders of --out.

    Args:
        results: take an image's rows when its files are written; the report counts what they have already.
    """

    def __init__(
        self, args: argparse.Namespace, thresholds: Thresholds, scorer: Scorer | OnnxScorer,
        roi: np.ndarray | None, results: Results,
    ):  # fmt: skip
        self._out, self._write, self._thresholds = args.out, args.write, thresholds
        self._min_area, self._roi, self._results = args.minArea, roi, results
        self._small_roi = None if roi is None else resize_roi(roi, scorer.map_size)
        self._pool, self._writing = ThreadPoolExecutor(WRITERS), []
        self._scale = (0.0, 2 * abs(thresholds.pixel) + 1e-12)
        if scorer.calibration:
            self._scale = scorer.calibration.color_scale()
        self.report = report.start_predictions(scorer, thresholds, self._scale)
        for row in results.done.values():
            self.report.add_earlier(Path(row["path"]), float(row["score"]))

    def start(self, batch: list[tuple[Loaded, np.ndarray, float]]) -> None:
        """Write in the background, after the batch before: the next one can be scored meanwhile."""
        self.wait()
        self._writing = [self._pool.submit(self.write, *one) for one in batch]

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        while self._writing:
            self._results.add(*self._writing[0].result())
            del self._writing[0]

    def write(self, image: Loaded, anomaly: np.ndarray, score: float) -> tuple[str, dict, list[dict]]:
        """What was asked for, at the image's size; its name and rows of the tables."""
        size, name = image.original.shape[:2], image.item.name
        verdict = judge(anomaly, score, size, self._thresholds, self._min_area, self._roi)
        if self._small_roi is not None:
            anomaly = np.where(self._small_roi, anomaly, anomaly.min())
        self.report.add_prediction(image.item.path, image.original, anomaly, score, verdict.mask)
        if "overlays" in self._write:
            shown = overlay(image.original, verdict.map, self._scale)
            self._save("overlays", name, lambda path: write_png(path, shown))
        if "masks" in self._write:
            mask = Image.fromarray(np.uint8(255) * verdict.mask)
            self._save("masks", name, lambda path: mask.save(path, format="png", compress_level=1))
        if "maps" in self._write:
            self._save("maps", name, lambda path: write_tiff(path, verdict.map))
        return name.as_posix(), self._score_row(image, verdict), _defect_rows(image, verdict)

    def _save(self, kind: str, name: Path, save: Callable[[Path], None]) -> None:
        path = self._out / _place(kind, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save(temporary)

    def _score_row(self, image: Loaded, verdict: Inspection) -> dict:
        thresholds, margin = self._thresholds, verdict.score - self._thresholds.image
        values = (
            str(image.item.path), f"{verdict.score:.6g}", "defective" if verdict.defective else "good",
            f"{thresholds.image:.6g}", f"{thresholds.pixel:.6g}", f"{margin:.6g}", *verdict.peak,
            _place("maps", image.item.name).as_posix() if "maps" in self._write else "",
            image.item.name.as_posix(),
        )  # fmt: skip
        return dict(zip(SCORE_COLUMNS, values, strict=True))


def _defect_rows(image: Loaded, verdict: Inspection) -> list[dict]:
    rows = (
        (str(image.item.path), i, *defect.box, defect.area, f"{defect.peak:.6g}", f"{defect.mean:.6g}")
        for i, defect in enumerate(verdict.defects, 1)
    )
    return [dict(zip(DEFECT_COLUMNS, row, strict=True)) for row in rows]


def _place(kind: str, name: Path) -> Path:
    """Where a file of an image lies in --out."""
    return kind / name.with_name(name.name + KINDS[kind])


if __name__ == "__main__":
    run_script(main)
