"""Figures: panels as in the paper's Fig. 7, histogram, ROC, PRO and precision-recall curves, epochs of a run."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataset import IMAGENET_MEAN, IMAGENET_STD, TestImage, image_shape, read_image
from metrics import PRO_LIMIT, TABLE_METRICS, Ranking, metric_labels
from scorer import Scorer, TestSet
from util import atomic_path
from verdict import Calibration, Scored, distribution

PANELS_PER_KIND = 3
TEST_IMAGES = "test images"
COLOR_MAP = "turbo"
OVERLAY_OPACITY = 0.7  # of the highest scores
CURVE_POINTS = 2000  # more than that cannot be seen
NAME_BYTES = 180  # file systems allow 255, some less
TITLE_CHARACTERS = 90


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
    shown: str = TEST_IMAGES,
) -> list[Path]:  # fmt: skip
    """Save panels of a few images of each kind, the histogram of image scores, and curves that are defined.

    Args:
        folder: made if it is not there.
        scorer: its calibration gives the color scale and the threshold without labels; if it has none,
            the maps give the scale.  Its image template stands beside each image, if it has one.
        pro_limit: false-positive rate up to which PRO is taken.
        shown: what the images are.

    Returns:
        The files of curves.
    """
    truth, scale = test_set.truth, (scorer.calibration or distribution(scored)).color_scale()
    maps, scores = scored
    folder.mkdir(exist_ok=True)
    for i in choose_examples(test_set.data.test):
        test_image, image = test_set.data.test[i], test_set.images[i]
        path = folder / file_name(test_image.kind) / f"{_example_name(test_image.path)}.png"
        path.parent.mkdir(exist_ok=True)
        if (template := scorer.image_template(image)) is not None:
            template = to_picture(template)
        mask = None if truth.masks is None else truth.masks[i]
        title = f"{test_set.data.name}, {test_image.kind}/{test_image.path.name}"
        save_panel(
            path, title, image, template, maps[i], scale, mask, image_shape(test_image.path, image.shape[:2])
        )
    save_histogram(folder / "histogram.png", scores, truth.defective, scorer.calibration, shown)
    rankings = {"images": Ranking(scores[~truth.defective], scores[truth.defective])}
    if truth.masks is not None:
        rankings["pixels"] = Ranking.of_pixels(maps, truth)
    rankings = {name: ranking for name, ranking in rankings.items() if ranking.defined}
    if not rankings:
        return []
    shares = truth.region_shares if "pixels" in rankings else None
    save_roc_and_pro(folder / "roc_pro.png", rankings, shares, pro_limit)
    return [folder / "roc_pro.png"]


def _example_name(path: Path) -> str:
    return file_name(f"{path.stem}_{path.suffix[1:]}")  # a.png and a.jpg may lie in one folder


def file_name(name: str) -> str:
    """Give a name that any file system takes: itself, or what can be kept of it and a digest."""
    usual = "".join(c for c in name if c.isprintable() and c not in "/\\")  # no line breaks, and UTF-8
    kept = usual.encode()[:NAME_BYTES].decode(errors="ignore")
    if kept == name and name not in ("", ".", ".."):
        return name
    return f"{kept}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def save_panel(
    path: Path, title: str, image: np.ndarray, template: np.ndarray | None, anomaly_map: Tensor,
    scale: tuple[float, float], mask: Tensor | None, shape: tuple[int, int],
) -> None:  # fmt: skip
    """Save image and template (h,w,3), anomaly map and true mask (H,W) in a row (Fig. 7); None is left out.

    Args:
        scale: (lowest, highest) score of the colors.
        shape: (h, w) of the image's file, in whose proportions all are shown.
    """
    colors = {"cmap": COLOR_MAP, "vmin": scale[0], "vmax": scale[1]}
    parts = [("image", image, {}), ("anomaly map", anomaly_map.cpu().numpy(), colors)]
    if template is not None:
        parts.insert(1, ("image template", template, {}))
    if mask is not None:
        parts.append(("ground truth", mask.cpu().numpy(), {"cmap": "gray", "vmin": 0, "vmax": 1}))
    figure = Figure(figsize=(2.6 * len(parts) + 0.6, 3.1), layout="constrained")
    figure.suptitle(_one_line(title), fontsize=10, parse_math=False)
    all_axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (name, picture, options) in zip(all_axes, parts, strict=True):
        shown = axes.imshow(picture, **options)
        axes.set_aspect(shape[0] / shape[1] * picture.shape[1] / picture.shape[0])
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
    shown: str = TEST_IMAGES,
) -> None:  # fmt: skip
    """Save a histogram of scores (N,) of good and defective images, with the thresholds that separate them."""
    images, thresholds = Ranking(scores[~defective], scores[defective]), {}
    if calibration is not None:
        thresholds[calibration.meaning] = calibration.thresholds().image
    if images.defined:
        thresholds["F1-max"] = images.f1_max()[1]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = float(scores.min()), float(scores.max())
    bins = np.linspace(low, max(high, low + 1e-3 * abs(low) + 1e-12), 41)
    for name, chosen, color in (("good", ~defective, "green"), ("defective", defective, "red")):
        if count := int(chosen.sum()):
            values = scores[chosen].cpu().numpy()
            axes.hist(values, bins, alpha=0.6, color=f"tab:{color}", label=f"{name} ({count})")
    for (name, threshold), style in zip(thresholds.items(), ("--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, label=f"{name}: {threshold:.3g}")
    axes.set(title=f"image scores of the {shown}", xlabel="image score", ylabel="images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    _save(figure, path)


def save_roc_and_pro(
    path: Path, rankings: dict[str, Ranking], region_shares: Tensor | None, pro_limit: float = PRO_LIMIT
) -> None:
    """Save ROC, precision over recall and, of pixels, per-region overlap over the share of good ones.

    Args:
        rankings: of "images", of "pixels", or of both.
        region_shares: (P,) float64, what each defective pixel counts for PRO; None without pixels.
    """
    count = 3 if "pixels" in rankings else 2
    figure = Figure(figsize=(13 * count / 3, 3.8), layout="constrained")
    roc, precision_recall, *pro = figure.subplots(1, count)
    for name, items in rankings.items():
        color = {"images": "tab:orange", "pixels": "tab:blue"}[name]
        _plot(roc, *items.curve(), f"{name}: area {items.auroc():.4f}", color=color)
        precision, recall = items.precision_recall()
        label = f"{name}: AP {items.average_precision():.4f}"  # the area under the steps
        _plot(precision_recall, recall, precision, label, color=color, drawstyle="steps-post")
    roc.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    precision_recall.set(title="precision-recall", xlabel="recall", ylabel="precision")
    for axes in pro:
        pixels = rankings["pixels"]
        _plot(axes, *pixels.curve(region_shares), f"PRO: area {pixels.area(region_shares, 1.0):.4f}")
        limited = pixels.area(region_shares, pro_limit)
        axes.axvspan(0, pro_limit, alpha=0.15, label=f"PRO@{pro_limit:g}: {limited:.4f}")
        axes.set(title="PRO", xlabel="false-positive rate", ylabel="mean overlap with defect regions")
    for axes in (roc, precision_recall, *pro):
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left" if axes is precision_recall else "lower right")
    _save(figure, path)


def _plot(axes: Axes, x: Tensor | np.ndarray, y: Tensor | np.ndarray, label: str, **options) -> None:
    """Draw a curve of any number of points, thinned out evenly."""
    chosen = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).astype(int))
    axes.plot(*(torch.as_tensor(values).cpu().numpy()[chosen] for values in (x, y)), label=label, **options)


def save_curves(path: Path, rows: list[dict], pro_limit: float = PRO_LIMIT) -> None:
    """Save loss and metrics over epochs, from the rows of metrics.csv."""
    epochs, labels = [row["epoch"] for row in rows], metric_labels(pro_limit)
    defined = {key: values for key in TABLE_METRICS if None not in (values := [row[key] for row in rows])}
    count = 2 if defined else 1
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, *right = all_axes = figure.subplots(1, count, squeeze=False)[0]
    left.plot(epochs, [row["loss"] for row in rows], marker="o")
    left.set(title="training loss", xlabel="epoch")
    for axes in right:
        for key, values in defined.items():
            axes.plot(epochs, values, marker="o", label=labels[key])
        axes.set(title="test metrics", xlabel="epoch")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _save(figure, path)


def save_stack(path: Path, paths: list[Path]) -> None:
    """Save pictures of files, one below the other."""
    pictures = [read_image(picture) for picture in paths]
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in pictures]
    with atomic_path(path) as temporary:
        write_png(temporary, np.concatenate(padded))


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks: boxes
        figure.savefig(temporary, format="png", dpi=110)


# ------------------------------------------------------------------------------- files in a hurry
#
# PIL takes a second for a picture of 12 megapixels, OpenCV a quarter.  For a map, PIL and OpenCV take two to
# three times as long as this, and the files are no smaller.


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (h,w,3)."""
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1])


def write_tiff(path: Path, values: np.ndarray) -> None:
    """Write float32 (h,w) without loss: deflate, predictor 2, which readers know that do not know 3."""
    height, width = values.shape
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    steps = bits.copy()
    steps[:, 1:] -= bits[:, :-1]
    packed = zlib.compress(steps, 1)
    packed += bytes(len(packed) % 2)  # the directory starts at an even place
    # (tag, type: 3 for 16 and 4 for 32 bits, value), by tag
    entries = (
        (256, 4, width), (257, 4, height), (258, 3, 32), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1),
        (278, 4, height), (279, 4, len(packed)), (317, 3, 2), (339, 3, 3),
    )  # fmt: skip
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", 8 + len(packed)))
        file.write(packed)
        file.write(struct.pack("<H", len(entries)))
        file.writelines(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        file.write(bytes(4))
