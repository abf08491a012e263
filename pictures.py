"""Pictures of an evaluation: panels as in the paper's Fig. 7, histogram, ROC and PRO curves; epochs of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from calibration import IMAGE_QUANTILE, Calibration, distribution
from dataset import TestImage
from evaluation import TestSet
from loading import IMAGENET_MEAN, IMAGENET_STD
from metrics import METRIC_NAMES, PRO_LIMIT, Ranking
from util import atomic_path

PANELS_PER_KIND = 3
COLOUR_MAP = "turbo"
OVERLAY_OPACITY = 0.7  # of the highest scores


def to_picture(normalised: Tensor) -> np.ndarray:
    """Normalised image (3,h,w) -> uint8 (h,w,3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = normalised.cpu().float() * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, scores: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """uint8 (h,w,3) with the colours of the scores (h,w) laid over it, the denser the higher they are."""
    low, high = scale
    levels = ((scores - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    palette = matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255
    opacity = (np.arange(256) / 255 * OVERLAY_OPACITY)[:, None]
    kept, added = (1 - opacity).astype(np.float32), (palette * opacity).astype(np.float32)
    return (image * kept[levels] + added[levels]).round().astype(np.uint8)


def choose_examples(test: list[TestImage]) -> list[int]:
    """Indices of a few images of each kind, evenly spread."""
    chosen = []
    for kind in sorted({image.kind for image in test}):
        indices = [i for i, image in enumerate(test) if image.kind == kind]
        count = min(PANELS_PER_KIND, len(indices))
        chosen += [indices[int(k)] for k in np.linspace(0, len(indices) - 1, count)]
    return chosen


def save_evaluation(
    folder: Path,
    test_set: TestSet,
    maps: Tensor,
    calibration: Calibration | None,
    template: Tensor | None,
) -> None:
    """Panels of a few images of each kind, the histogram of image scores, ROC and PRO curves.

    Args:
        maps: anomaly maps of all test images (N,256,256).
        calibration: gives the colour scale and the threshold without labels; None: the maps' own scale.
        template: the image template, normalised (3,h,w), or None.
    """
    truth, scale = test_set.truth, (calibration or distribution(maps)).colour_scale()
    folder.mkdir(exist_ok=True)
    shown_template = None if template is None else to_picture(template)
    for i in choose_examples(test_set.data.test):
        image = test_set.data.test[i]
        path = folder / image.kind / f"{image.path.name.replace('.', '_')}.png"
        path.parent.mkdir(exist_ok=True)
        title = f"{test_set.data.name}, {image.kind}/{image.path.name}"
        mask = None if truth.masks is None else truth.masks[i]
        save_panel(path, title, test_set.store[i], shown_template, maps[i], scale, mask)
    scores = maps.flatten(1).amax(1)
    save_histogram(folder / "histogram.png", scores, truth.defective, calibration)
    if truth.masks is not None:
        pixels = Ranking(maps[~truth.masks], maps[truth.masks])
        if pixels.defined:
            images = Ranking(scores[~truth.defective], scores[truth.defective])
            save_roc_and_pro(folder / "roc_pro.png", images, pixels, truth.region_shares)


def save_panel(
    path: Path,
    title: str,
    image: np.ndarray,
    template: np.ndarray | None,
    anomaly_map: Tensor,
    scale: tuple[float, float],
    mask: Tensor | None,
) -> None:
    """Image / image template / anomaly map / ground truth in a row (Fig. 7); None is left out.

    Args:
        image, template: uint8 (h,w,3).
        anomaly_map: (H,W).
        scale: (lowest, highest) score of the colours.
        mask: bool (H,W).
    """
    parts = [("image", image, {})]
    if template is not None:
        parts.append(("image template", template, {}))
    colours = {"cmap": COLOUR_MAP, "vmin": scale[0], "vmax": scale[1]}
    parts.append(("anomaly map", anomaly_map.cpu().numpy(), colours))
    if mask is not None:
        parts.append(("ground truth", mask.cpu().numpy(), {"cmap": "gray", "vmin": 0, "vmax": 1}))
    figure = Figure(figsize=(2.6 * len(parts) + 0.6, 3.1), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    for axes, (name, picture, options) in zip(
        figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True
    ):
        shown = axes.imshow(picture, **options)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
        if name == "anomaly map":
            figure.colorbar(shown, ax=axes, shrink=0.75).ax.tick_params(labelsize=7)
    _save(figure, path)


def save_histogram(
    path: Path, scores: Tensor, defective: Tensor, calibration: Calibration | None
) -> None:
    """Image scores of good and defective test images, with the thresholds that separate them.

    Args:
        scores, defective: (N,).
    """
    images = Ranking(scores[~defective], scores[defective])
    lines = {}
    if calibration is not None:
        lines[f"{IMAGE_QUANTILE:.0%} of good training images"] = calibration.thresholds().image
    if images.defined:
        lines["F1-max"] = images.f1_max()[1]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(float(scores.min()), float(scores.max()) + 1e-12, 41)
    for label, chosen, colour in (
        ("good", ~defective, "tab:green"),
        ("defective", defective, "tab:red"),
    ):
        count = int(chosen.sum())
        axes.hist(
            scores[chosen].cpu().numpy(), bins, alpha=0.6, color=colour, label=f"{label} ({count})"
        )
    for (label, threshold), style in zip(lines.items(), ("--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, label=f"{label}: {threshold:.3g}")
    axes.set(title="image scores of the test images", xlabel="image score", ylabel="images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    _save(figure, path)


def save_roc_and_pro(path: Path, images: Ranking, pixels: Ranking, region_shares: Tensor) -> None:
    """ROC over pixels and over images, and the per-region overlap over the share of good pixels."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = [(left, "pixels", pixels.auroc(), pixels.curve())]
    if images.defined:
        curves.append((left, "images", images.auroc(), images.curve()))
    overlap = pixels.curve(region_shares)
    curves.append((right, "PRO", pixels.area(region_shares, 1.0), overlap))
    for axes, label, area, (x, y) in curves:
        step = max(1, len(x) // 2000)  # more points than that cannot be seen
        chosen = np.unique(np.r_[0 : len(x) : step, len(x) - 1])
        axes.plot(x.cpu().numpy()[chosen], y.cpu().numpy()[chosen], label=f"{label}: area {area:.4f}")
    right.axvspan(
        0, PRO_LIMIT, alpha=0.15, label=f"PRO@{PRO_LIMIT}: {pixels.area(region_shares, PRO_LIMIT):.4f}"
    )
    left.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    right.set(title="PRO", xlabel="false-positive rate", ylabel="mean overlap with defect regions")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def save_stack(path: Path, panels: list[Path]) -> None:
    """Pictures of files, one below the other."""
    images = [Image.fromarray(read(panel)) for panel in panels]
    width = max(image.width for image in images)
    stack = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        stack.paste(image, (0, top))
        top += image.height
    with atomic_path(path) as temporary:
        stack.save(temporary, format="png")


def save_curves(path: Path, rows: list[dict]) -> None:
    """Loss and metrics over epochs, from the rows of metrics.csv."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in rows], marker="o")
    left.set(title="training loss", xlabel="epoch")
    for key, label in METRIC_NAMES.items():
        values = [row[key] for row in rows]
        if None not in values:
            right.plot(epochs, values, marker="o", label=label)
    right.set(title="test metrics", xlabel="epoch")
    if right.lines:
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def read(path: Path) -> np.ndarray:
    """uint8 (h,w,3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
