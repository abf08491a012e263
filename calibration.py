"""Thresholds and colours: what scores good images have, known without any defective one.

Every training image is scored against the template that the others alone would have made.  The mean m of
N latents and the mean m' of all but z satisfy z - m' = (z - m) N / (N - 1), and a map is linear in |z - m|:
so the map against m' is the map against m times N / (N - 1), exactly.  The weights have seen the image, which
this does not correct.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation import at_mask_size
from metrics import sorted_scores
from model import PyramidFlow, anomaly_map
from util import InputError

PIXEL_QUANTILE = 0.999
IMAGE_QUANTILE = 0.95
COLOUR_QUANTILE = 0.999  # of good pixels; twice that score has the scale's highest colour
# Where the distribution of pixel scores is stored: every percent, and ever finer towards the highest.
LEVELS = np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -6, 41)[1:], [1.0]])


@dataclass(frozen=True)
class Thresholds:
    """From these scores on, a pixel and an image are called defective."""

    pixel: float
    image: float


@dataclass(frozen=True)
class Calibration:
    """Scores of the training images, each against the template of the others.

    Attributes:
        image_scores: ascending.
        pixel_scores: at `LEVELS`.
    """

    image_scores: list[float]
    pixel_scores: list[float]

    def thresholds(
        self, pixel_quantile: float = PIXEL_QUANTILE, image_quantile: float = IMAGE_QUANTILE
    ) -> Thresholds:
        return Thresholds(
            float(np.interp(pixel_quantile, LEVELS, self.pixel_scores)),
            float(np.quantile(self.image_scores, image_quantile)),
        )

    def colour_scale(self) -> tuple[float, float]:
        """(lowest, highest) score of a colour scale on which good images look good."""
        low = self.pixel_scores[0]
        return low, max(2 * float(np.interp(COLOUR_QUANTILE, LEVELS, self.pixel_scores)), low + 1e-12)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: object) -> Calibration:
        """Raises ValueError unless `given` is what `to_dict` gives."""
        if not isinstance(given, dict) or given.keys() != {"image_scores", "pixel_scores"}:
            raise ValueError("not a calibration")
        for scores in given.values():
            if (
                not isinstance(scores, list)
                or not scores
                or not all(isinstance(x, float) for x in scores)
            ):
                raise ValueError("not a list of scores")
            if not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
                raise ValueError("scores that are not ascending")
        if len(given["pixel_scores"]) != len(LEVELS):
            raise ValueError("wrong number of scores")
        return cls(**given)


@torch.no_grad()
def calibrate(
    model: PyramidFlow,
    template: tuple[Tensor, ...],
    features: Iterable[Tensor],
    template_is_mean: bool = True,
) -> Calibration:
    """Score the images that the template was made of.

    Args:
        features: batches (B,C,H,W) of all of them.
        template_is_mean: of these images; else it does not depend on them.

    Raises:
        ValueError: fewer than two images.
    """
    maps = torch.cat([at_mask_size(anomaly_map(model, batch, template)) for batch in features])
    if len(maps) < 2:
        raise ValueError("scores against the template of the others need at least two images")
    return distribution(maps * (len(maps) / (len(maps) - 1)) if template_is_mean else maps)


def distribution(maps: Tensor) -> Calibration:
    """Scores of anomaly maps (N,H,W)."""
    pixels = sorted_scores(maps.flatten()).cpu().numpy()
    places = LEVELS * (len(pixels) - 1)
    below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
    pixel_scores = pixels[below] + (places - below) * (pixels[above] - pixels[below])
    return Calibration(
        image_scores=maps.flatten(1).amax(1).sort().values.tolist(),
        pixel_scores=pixel_scores.tolist(),
    )


def choose_thresholds(
    choice: str, metrics: dict, calibration: Calibration | None, quantiles: tuple[float, float]
) -> Thresholds:
    """`--threshold`: f1, quantile, or a number for pixels and images alike.

    Args:
        metrics: of the checkpoint.
        quantiles: of good pixels and of good images.

    Raises:
        InputError: the checkpoint does not hold what the choice needs.
    """
    if choice == "quantile":
        if calibration is None:
            raise InputError(
                "the checkpoint has no scores of good images, its run was not finished; go on with the run "
                "by train.py --resume, or use --threshold f1 or a number"
            )
        return calibration.thresholds(*quantiles)
    if choice == "f1":
        pixel, image = metrics.get("threshold"), metrics.get("image_threshold")
        if image is None:
            raise InputError(
                "--threshold f1 needs defective and good test images, which the checkpoint's data set lacks; "
                "use --threshold quantile or a number"
            )
        return Thresholds(image if pixel is None else pixel, image)
    try:
        value = float(choice)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"--threshold {choice}: use f1, quantile or a number")
    return Thresholds(value, value)
