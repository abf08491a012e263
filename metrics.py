"""Exact metrics of anomaly maps: pixel and image AUROC, AUPRO, F1-max.

Definitions as in MVTec's own evaluator (Bergmann et al., IJCV 2021): every distinct score is a
threshold, ties move together, and AUPRO weighs each 8-connected defect region equally.  One sort of
all pixels serves every metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

METRIC_NAMES = {
    "pixel_auroc": "pixel AUROC",
    "image_auroc": "image AUROC",
    "pixel_pro": "PRO",
    "pixel_pro_30": "PRO@0.3",
    "f1_max": "F1-max",
}
PRO_LIMIT = 0.3  # the false-positive rate up to which the literature integrates; the paper uses 1


@dataclass(frozen=True)
class GroundTruth:
    """What the test images are, in the form that the metrics need; made once per run.

    Attributes:
        defective: (N,) bool, from the folder an image lies in.
        region_ids: (N,H,W) int64, 0 for good pixels, regions of all images numbered from 1; None
            if there are no masks.
        region_sizes: (R,) int64, pixels of each region.
    """

    defective: Tensor
    region_ids: Tensor | None = None
    region_sizes: Tensor | None = None

    @classmethod
    def from_masks(cls, defective: Tensor, masks: Tensor | None, device="cpu") -> GroundTruth:
        """Label the 8-connected regions of bool masks (N,H,W)."""
        if masks is None:
            return cls(defective.to(device))
        region_ids = np.zeros(masks.shape, dtype=np.int64)
        count = 0
        for i in torch.nonzero(masks.flatten(1).any(1)).flatten().tolist():
            labelled, found = scipy.ndimage.label(masks[i].numpy(), structure=np.ones((3, 3)))
            region_ids[i] = np.where(labelled > 0, labelled + count, 0)
            count += found
        sizes = np.bincount(region_ids.ravel(), minlength=count + 1)[1:]
        tensors = (torch.from_numpy(region_ids), torch.from_numpy(sizes))
        return cls(defective.to(device), *(x.to(device) for x in tensors))


@dataclass(frozen=True)
class Metrics:
    """Values 0..1; None where undefined (no masks, nothing defective, or nothing good).

    Attributes:
        pixel_auroc, image_auroc: area under the ROC curve; an image's score is its map's maximum.
        pixel_pro: AUPRO up to a false-positive rate of 1, the paper's number.
        pixel_pro_30: AUPRO up to 0.3, divided by 0.3, everybody else's.
        f1_max, threshold: best F1 over pixels, and the score from which on a pixel is defective.
    """

    pixel_auroc: float | None
    image_auroc: float | None
    pixel_pro: float | None
    pixel_pro_30: float | None
    f1_max: float | None
    threshold: float | None


def evaluate_maps(maps: Tensor, truth: GroundTruth) -> Metrics:
    """All metrics of anomaly maps (N,H,W), float32, at the masks' size.

    Raises:
        ValueError: a score is not finite, or the shapes disagree.
    """
    if not torch.isfinite(maps).all():
        raise ValueError("anomaly maps hold values that are not finite")
    if len(maps) != len(truth.defective):
        raise ValueError(f"{len(maps)} maps for {len(truth.defective)} images")
    image_curve = _Curve(maps.flatten(1).amax(1), truth.defective.long())
    if truth.region_ids is None:
        return Metrics(None, image_curve.auroc(), None, None, None, None)
    if truth.region_ids.shape != maps.shape:
        raise ValueError(f"maps {tuple(maps.shape)}, masks {tuple(truth.region_ids.shape)}")
    curve = _Curve(maps, truth.region_ids, truth.region_sizes)
    f1_max, threshold = curve.f1_max()
    return Metrics(
        pixel_auroc=curve.auroc(),
        image_auroc=image_curve.auroc(),
        pixel_pro=curve.aupro(1.0),
        pixel_pro_30=curve.aupro(PRO_LIMIT),
        f1_max=f1_max,
        threshold=threshold,
    )


class _Curve:
    """Counts at every distinct score, highest first, each after the last of its ties.

    Args:
        scores: any shape, taken as float32.
        region_ids: same shape, int64, 0 for good.
        region_sizes: (R,), if regions are to be weighed.
    """

    def __init__(self, scores: Tensor, region_ids: Tensor, region_sizes: Tensor | None = None):
        # Score and region travel in one 64-bit key, so that one plain sort orders both.
        keys = _sorted(~_ordered_bits(scores.flatten()) << 32 | region_ids.flatten())
        bits, ids = keys >> 32, keys & 0xFFFFFFFF
        last_of_ties = torch.ones_like(bits, dtype=torch.bool)
        torch.ne(bits[1:], bits[:-1], out=last_of_ties[:-1])
        ends = torch.nonzero(last_of_ties).flatten()
        self._bits = bits[ends]
        self.flagged = ends + 1  # int64 counts are exact; float32 stops at 2^24
        self.false_positives = (ids == 0).cumsum(0)[ends]
        self.true_positives = self.flagged - self.false_positives
        self.region_share = None
        if region_sizes is not None and len(region_sizes):
            weights = torch.cat(
                [region_sizes.new_zeros(1, dtype=torch.float64), 1 / region_sizes.double()]
            )
            self.region_share = weights[ids].cumsum(0)[ends] / len(region_sizes)

    def auroc(self) -> float | None:
        good, defective = int(self.false_positives[-1]), int(self.true_positives[-1])
        if not good or not defective:
            return None
        return _area(self.false_positives.double() / good, self.true_positives.double() / defective, 1.0)

    def aupro(self, limit: float) -> float | None:
        """Area under (share of good pixels flagged, mean share of each region flagged), / limit."""
        good = int(self.false_positives[-1])
        if not good or self.region_share is None:
            return None
        return _area(self.false_positives.double() / good, self.region_share, limit)

    def f1_max(self) -> tuple[float | None, float | None]:
        """(best F1, the score from which on to flag)."""
        good, defective = int(self.false_positives[-1]), int(self.true_positives[-1])
        if not good or not defective:
            return None, None
        f1 = 2 * self.true_positives.double() / (self.flagged + defective)
        best = int(f1.argmax())
        return float(f1[best]), float(_scores_from_bits(~self._bits[best]))


def _area(x: Tensor, y: Tensor, limit: float) -> float:
    """Trapezoids from (0,0) to x = limit, linear in between, divided by the limit; float64."""
    x = torch.cat([x.new_zeros(1, dtype=torch.float64), x.double()])
    y = torch.cat([y.new_zeros(1, dtype=torch.float64), y.double()])
    inside = int(torch.searchsorted(x, limit, right=True))
    area = float(torch.trapezoid(y[:inside], x[:inside]))
    if inside < len(x):
        (x0, x1), (y0, y1) = x[inside - 1 : inside + 1].tolist(), y[inside - 1 : inside + 1].tolist()
        at_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (limit - x0) * (y0 + at_limit) / 2
    return area / limit


def _sorted(keys: Tensor) -> Tensor:
    # NumPy's vectorised integer sort is over twice as fast as torch's on the CPU.
    return keys.sort().values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy()))


def _ordered_bits(scores: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31) of the same order and the same ties (-0 equals 0)."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _scores_from_bits(ordered: Tensor) -> Tensor:
    bits = ordered.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
