"""Pictures of a run: panels of image, template, anomaly map and ground truth; curves over epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dataset import TestImage
from loading import IMAGENET_MEAN, IMAGENET_STD
from metrics import METRIC_NAMES
from util import atomic_path

PANELS_PER_KIND = 3
COLOUR_MAP = "turbo"
TOP_OF_SCALE = 0.999  # quantile of all pixels; the maximum alone would darken every picture


def to_picture(normalised: Tensor) -> np.ndarray:
    """Normalised image (3,h,w) -> uint8 (h,w,3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = normalised.cpu().float() * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def colour_scale(maps: Tensor) -> tuple[float, float]:
    """One scale (lowest, highest) for all anomaly maps (N,H,W) of a class."""
    flat = maps.flatten().float().cpu().sort().values
    low, high = float(flat[0]), float(flat[int(TOP_OF_SCALE * (len(flat) - 1))])
    return low, high if high > low else low + 1e-12


def choose_examples(test: list[TestImage]) -> list[int]:
    """Indices of a few images of each kind, evenly spread."""
    chosen = []
    for kind in sorted({image.kind for image in test}):
        indices = [i for i, image in enumerate(test) if image.kind == kind]
        count = min(PANELS_PER_KIND, len(indices))
        chosen += [indices[int(k)] for k in np.linspace(0, len(indices) - 1, count)]
    return chosen


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
        scale: from `colour_scale`.
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


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
