"""Figures: panels as in the paper's Fig. 7, histogram, ROC, PRO and precision-recall curves, epochs of a run."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataset import IMAGENET_MEAN, IMAGENET_STD, TestImage
from metrics import PRO_LIMIT, TABLE_METRICS, Ranking, metric_labels
from scorer import Scorer, TestSet
from util import atomic_path
from verdict import Calibration, Scored, distribution

PANELS_PER_KIND = 3
COLOR_MAP = "turbo"
OVERLAY_OPACITY = 0.7  # of the highest scores
CURVE_POINTS = 2000  # more than that cannot be seen
NAME_BYTES = 180  # file systems allow 255, some less
TITLE_CHARACTERS = 90
STRIP_ROWS = 256  # of a TIFF, compressed together


def to_picture(normalized: Tensor) -> np.ndarray:
    """Turn a normalized image (3,h,w) into uint8 (h,w,3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = normalized.cpu().float() * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, scores: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Lay the colors of the scores (h,w) over an image, the denser the higher they are; uint8 (h,w,3)."""
    low, high = scale
    levels = np.subtract(scores, low, dtype=np.float32)
    levels *= 255 / (high - low)
    levels = Image.fromarray(levels.clip(0, 255, out=levels).astype(np.uint8))
    palette = matplotlib.colormaps[COLOR_MAP](np.arange(256))[:, :3] * 255
    opacity = levels.point([round(OVERLAY_OPACITY * level) for level in range(256)])
    colors = levels.copy()
    colors.putpalette(palette.round().astype(np.uint8).tobytes())
    return np.asarray(Image.composite(colors.convert("RGB"), Image.fromarray(image), opacity))


def choose_examples(test: list[TestImage]) -> list[int]:
    """Choose indices of a few images of each kind, evenly spread."""
    chosen = []
    for kind in sorted({image.kind for image in test}):
        indices = [i for i, image in enumerate(test) if image.kind == kind]
        count = min(PANELS_PER_KIND, len(indices))
        chosen += [indices[int(k)] for k in np.linspace(0, len(indices) - 1, count)]
    return chosen


def save_evaluation(
    folder: Path, test_set: TestSet, scored: Scored, scorer: Scorer, pro_limit: float = PRO_LIMIT,
    shown: str = "test images",
) -> None:  # fmt: skip
    """Save panels of a few images of each kind, the histogram of image scores, and the curves.

    Args:
        folder: made if it is not there.
        scored: maps and scores of all test images.
        scorer: its calibration gives the color scale and the threshold without labels; if it has none,
            the maps give the scale.  Its image template stands beside each image, if it has one.
        pro_limit: false-positive rate up to which PRO is taken.
        shown: what the images are.
    """
    truth, scale = test_set.truth, (scorer.calibration or distribution(scored)).color_scale()
    maps, scores = scored
    folder.mkdir(exist_ok=True)
    for i in choose_examples(test_set.data.test):
        test_image, image = test_set.data.test[i], test_set.images[i]
        path = folder / file_name(test_image.kind) / f"{_example_name(test_image.path)}.png"
        path.parent.mkdir(exist_ok=True)
        template = scorer.image_template(image)
        template = None if template is None else to_picture(template)
        mask = None if truth.masks is None else truth.masks[i]
        title = f"{test_set.data.name}, {test_image.kind}/{test_image.path.name}"
        save_panel(path, title, image, template, maps[i], scale, mask)
    save_histogram(folder / "histogram.png", scores, truth.defective, scorer.calibration, shown)
    if truth.masks is not None:
        pixels = Ranking.of_pixels(maps, truth)
        images = Ranking(scores[~truth.defective], scores[truth.defective])
        if pixels.defined:
            save_roc_and_pro(folder / "roc_pro.png", images, pixels, truth.region_shares, pro_limit)


def _example_name(path: Path) -> str:
    return file_name(f"{path.stem}_{path.suffix[1:]}")  # a.png and a.jpg may lie in one folder


def file_name(name: str) -> str:
    """Give a name that any file system takes: itself, or what can be kept of it and a digest."""
    printable = "".join(c for c in name if c.isprintable())  # neither line breaks nor what is not UTF-8
    kept = printable.encode()[:NAME_BYTES].decode(errors="ignore")
    return kept if kept == name else f"{kept}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def save_panel(
    path: Path,
    title: str,
    image: np.ndarray,
    template: np.ndarray | None,
    anomaly_map: Tensor,
    scale: tuple[float, float],
    mask: Tensor | None,
) -> None:
    """Save image / image template / anomaly map / ground truth in a row (Fig. 7); None is left out.

    Args:
        image, template: uint8 (h,w,3).
        anomaly_map: (H,W).
        scale: (lowest, highest) score of the colors.
        mask: bool (H,W).
    """
    parts = [("image", image, {})]
    if template is not None:
        parts.append(("image template", template, {}))
    colors = {"cmap": COLOR_MAP, "vmin": scale[0], "vmax": scale[1]}
    parts.append(("anomaly map", anomaly_map.cpu().numpy(), colors))
    if mask is not None:
        parts.append(("ground truth", mask.cpu().numpy(), {"cmap": "gray", "vmin": 0, "vmax": 1}))
    figure = Figure(figsize=(2.6 * len(parts) + 0.6, 3.1), layout="constrained")
    figure.suptitle(_one_line(title), fontsize=10, parse_math=False)
    all_axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (name, picture, options) in zip(all_axes, parts, strict=True):
        shown = axes.imshow(picture, **options)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
        if name == "anomaly map":
            figure.colorbar(shown, ax=axes, shrink=0.75).ax.tick_params(labelsize=7)
    _save(figure, path)


def _one_line(title: str) -> str:
    title = "".join(c if c.isprintable() else "?" for c in title)  # file names can hold anything
    half = TITLE_CHARACTERS // 2
    return title if len(title) <= TITLE_CHARACTERS else f"{title[:half]} ... {title[-half:]}"


def save_histogram(
    path: Path, scores: Tensor, defective: Tensor, calibration: Calibration | None,
    shown: str = "test images",
) -> None:  # fmt: skip
    """Save image scores of good and defective images, with the thresholds that separate them.

    Args:
        scores, defective: (N,).
    """
    images = Ranking(scores[~defective], scores[defective])
    thresholds = {}
    if calibration is not None:
        kind = "held-out" if calibration.held_out else "good training"
        name = f"{1 - calibration.false_alarm:.3g} of {kind} images"
        thresholds[name] = calibration.thresholds().image
    if images.defined:
        thresholds["F1-max"] = images.f1_max()[1]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(float(scores.min()), float(scores.max()) + 1e-12, 41)
    for name, chosen, color in (("good", ~defective, "green"), ("defective", defective, "red")):
        values, label = scores[chosen].cpu().numpy(), f"{name} ({int(chosen.sum())})"
        if not len(values):
            continue
        axes.hist(values, bins, alpha=0.6, color=f"tab:{color}", label=label)
    for (name, threshold), style in zip(thresholds.items(), ("--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, label=f"{name}: {threshold:.3g}")
    axes.set(title=f"image scores of the {shown}", xlabel="image score", ylabel="images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    _save(figure, path)


def save_roc_and_pro(
    path: Path, images: Ranking, pixels: Ranking, region_shares: Tensor, pro_limit: float = PRO_LIMIT
) -> None:
    """Save ROC, per-region overlap over the share of good pixels, and precision over recall.

    Args:
        images: left out if undefined.
        region_shares: (P,) float64, what each defective pixel counts for PRO.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    roc, pro, precision_recall = figure.subplots(1, 3)
    for name, items in {"pixels": pixels, "images": images}.items():
        if items.defined:
            _plot(roc, *items.curve(), f"{name}: area {items.auroc():.4f}")
            precision, recall = (
                items.precision_recall()
            )  # the area under its steps is the average precision
            label = f"{name}: AP {items.average_precision():.4f}"
            _plot(precision_recall, recall, precision, label, drawstyle="steps-post")
    _plot(pro, *pixels.curve(region_shares), f"PRO: area {pixels.area(region_shares, 1.0):.4f}")
    limited = pixels.area(region_shares, pro_limit)
    pro.axvspan(0, pro_limit, alpha=0.15, label=f"PRO@{pro_limit:g}: {limited:.4f}")
    roc.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    pro.set(title="PRO", xlabel="false-positive rate", ylabel="mean overlap with defect regions")
    precision_recall.set(title="precision-recall", xlabel="recall", ylabel="precision")
    for axes in (roc, pro, precision_recall):
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left" if axes is precision_recall else "lower right")
    _save(figure, path)


def _plot(axes: Axes, x: Tensor | np.ndarray, y: Tensor | np.ndarray, label: str, **options) -> None:
    """Draw a curve of any number of points, thinned out."""
    chosen = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).astype(int))
    x, y = (torch.as_tensor(values).cpu().numpy()[chosen] for values in (x, y))
    axes.plot(x, y, label=label, **options)


def save_curves(path: Path, rows: list[dict], pro_limit: float = PRO_LIMIT) -> None:
    """Save loss and metrics over epochs, from the rows of metrics.csv."""
    epochs, labels = [row["epoch"] for row in rows], metric_labels(pro_limit)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in rows], marker="o")
    left.set(title="training loss", xlabel="epoch")
    for key in TABLE_METRICS:
        values = [row[key] for row in rows]
        if None not in values:
            right.plot(epochs, values, marker="o", label=labels[key])
    right.set(title="test metrics", xlabel="epoch")
    if right.lines:
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        right.set_axis_off()
        right.set_title("no test metrics")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def save_stack(path: Path, paths: list[Path]) -> None:
    """Save pictures of files, one below the other."""
    images = [Image.fromarray(read(picture)) for picture in paths]
    width = max(image.width for image in images)
    stack = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        stack.paste(image, (0, top))
        top += image.height
    with atomic_path(path) as temporary:
        stack.save(temporary, format="png")


def read(path: Path) -> np.ndarray:
    """Read a picture as uint8 (h,w,3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks: boxes
        figure.savefig(temporary, format="png", dpi=110)


# ------------------------------------------------------------------------------- files in a hurry
#
# PIL takes three seconds for picture and map of 12 megapixels, as it tries every filter and compresses as well
# as it can.  These take a fifth, and the files are no larger.


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (h,w,3), each row as its difference to the one above."""
    height, width, _ = image.shape
    flat = image.reshape(height, -1)
    rows = np.empty((height, 1 + flat.shape[1]), np.uint8)
    rows[:, 0] = 2  # PNG's filter "up"
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_RLE)  # noise has no longer repetitions
    packed = packer.compress(rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
            check = zlib.crc32(content, zlib.crc32(kind))
            file.writelines((struct.pack(">I", len(content)), kind, content, struct.pack(">I", check)))


def write_tiff(path: Path, values: np.ndarray) -> None:
    """Write float32 (h,w) without loss: deflate, predictor 2, which readers know that do not know 3."""
    height, width = values.shape
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    steps = bits.copy()
    steps[:, 1:] -= bits[:, :-1]
    strips = [zlib.compress(steps[i : i + STRIP_ROWS], 1) for i in range(0, height, STRIP_ROWS)]
    sizes, count = [len(strip) for strip in strips], len(strips)
    gap = sum(sizes) % 2  # a directory starts at an even place
    tables = 8 + sum(sizes) + gap  # where offsets and sizes lie, then the directory
    offsets = 8 + np.cumsum([0, *sizes[:-1]])
    place = (tables, tables + 4 * count) if count > 1 else (8, sizes[0])
    # (tag, type: 3 for 16 and 4 for 32 bits, number of values, value or its place), by tag
    entries = (
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 32), (259, 3, 1, 8), (262, 3, 1, 1),
        (273, 4, count, place[0]), (277, 3, 1, 1), (278, 4, 1, STRIP_ROWS), (279, 4, count, place[1]),
        (317, 3, 1, 2), (339, 3, 1, 3),
    )  # fmt: skip
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", tables + 8 * count))
        file.writelines((*strips, bytes(gap)))
        file.write(np.array([offsets, sizes], dtype="<u4").tobytes())
        file.write(struct.pack("<H", len(entries)))
        file.writelines(struct.pack("<HHII", *entry) for entry in entries)
        file.write(bytes(4))
