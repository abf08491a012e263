"""Exact metrics of anomaly maps: pixel and image AUROC, AUPRO, F1-max.

Definitions as in MVTec's own evaluator (Bergmann et al., IJCV 2021): every distinct score is a
threshold, ties move together, and AUPRO weighs each 8-connected defect region equally.  One sort of
the good pixels serves every metric.
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
        masks: (N,H,W) bool; None if there are none.
        regions: (P,) int64, the region of each defective pixel, in the order of `maps[masks]`.
        region_sizes: (R,) int64, pixels of each region.
    """

    defective: Tensor
    masks: Tensor | None = None
    regions: Tensor | None = None
    region_sizes: Tensor | None = None

    @property
    def region_shares(self) -> Tensor:
        """(P,) float64: what a defective pixel counts, so that each region counts equally; sums to 1."""
        return 1 / self.region_sizes.double()[self.regions] / len(self.region_sizes)

    @classmethod
    def from_masks(cls, defective: Tensor, masks: Tensor | None, device="cpu") -> GroundTruth:
        """Label the 8-connected regions of bool masks (N,H,W)."""
        if masks is None:
            return cls(defective.to(device))
        regions, count = [np.zeros(0, np.int64)], 0
        for i in torch.nonzero(masks.flatten(1).any(1)).flatten().tolist():
            labelled, found = scipy.ndimage.label(masks[i].numpy(), structure=np.ones((3, 3)))
            regions.append(labelled[labelled > 0].astype(np.int64) + count - 1)
            count += found
        regions = torch.from_numpy(np.concatenate(regions))
        tensors = (masks, regions, regions.bincount(minlength=count))
        return cls(defective.to(device), *(x.to(device) for x in tensors))


@dataclass(frozen=True)
class Metrics:
    """Values 0..1; None where undefined (no masks, nothing defective, or nothing good).

    Attributes:
        pixel_auroc, image_auroc: area under the ROC curve; an image's score is its map's maximum.
        pixel_pro: AUPRO up to a false-positive rate of 1, the paper's number.
        pixel_pro_30: AUPRO up to 0.3, divided by 0.3, everybody else's.
        f1_max, threshold: best F1 over pixels, and the score from which on a pixel is defective.
        image_threshold: the score from which on an image is defective, at the best F1 over images.
    """

    pixel_auroc: float | None
    image_auroc: float | None
    pixel_pro: float | None
    pixel_pro_30: float | None
    f1_max: float | None
    threshold: float | None
    image_threshold: float | None


def evaluate_maps(maps: Tensor, truth: GroundTruth) -> Metrics:
    """All metrics of anomaly maps (N,H,W), float32, at the masks' size.

    Raises:
        ValueError: a score is not finite, or the shapes disagree.
    """
    if not torch.isfinite(maps).all():
        raise ValueError("anomaly maps hold values that are not finite")
    if len(maps) != len(truth.defective):
        raise ValueError(f"{len(maps)} maps for {len(truth.defective)} images")
    image_scores = maps.flatten(1).amax(1)
    images = Ranking(image_scores[~truth.defective], image_scores[truth.defective])
    _, image_threshold = images.f1_max()
    if truth.masks is None:
        return Metrics(None, images.auroc(), None, None, None, None, image_threshold)
    if truth.masks.shape != maps.shape:
        raise ValueError(f"maps {tuple(maps.shape)}, masks {tuple(truth.masks.shape)}")
    pixels = Ranking(maps[~truth.masks], maps[truth.masks])
    f1_max, threshold = pixels.f1_max()
    return Metrics(
        pixel_auroc=pixels.auroc(),
        image_auroc=images.auroc(),
        pixel_pro=pixels.area(truth.region_shares, 1.0),
        pixel_pro_30=pixels.area(truth.region_shares, PRO_LIMIT),
        f1_max=f1_max,
        threshold=threshold,
        image_threshold=image_threshold,
    )


class Ranking:
    """Where each defective item stands among the good ones.  Every metric follows from that.

    On the way down through the scores, the curves rise at defective items only.  One that ties with good
    items rises along a straight line from x = `above` to x = `reached`, counted in good items.

    Args:
        good, defective: scores, (G,) and (P,).
    """

    def __init__(self, good: Tensor, defective: Tensor):
        good = sorted_scores(good)
        self.scores, self._order = defective.sort()
        self.num_good = len(good)
        self.above = self.num_good - torch.searchsorted(good, self.scores, right=True)
        self.reached = self.num_good - torch.searchsorted(good, self.scores)

    @property
    def defined(self) -> bool:
        return bool(self.num_good and len(self.scores))

    def auroc(self) -> float | None:
        if not self.defined:
            return None
        lost = int((self.above + self.reached).sum())  # twice; integers, so exact
        return 1 - lost / (2 * self.num_good * len(self.scores))

    def area(self, shares: Tensor, limit: float) -> float | None:
        """Area under (share of good items reached, sum of the shares reached) up to x = limit, / limit.

        Args:
            shares: (P,) float64 that sum to 1, in the order of `defective`.
        """
        if not self.defined:
            return None
        start, end = self.above.double() / self.num_good, self.reached.double() / self.num_good
        height = (limit - start).clamp(min=0) ** 2 / (2 * (end - start))  # a rise cut off by the limit
        height = torch.where(end <= limit, limit - (start + end) / 2, height)
        height = torch.where(start < limit, height, 0.0)
        return float((shares[self._order] * height).sum()) / limit

    def curve(self, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(share of good items reached, share of defective items reached) while the threshold sinks.

        Args:
            shares: what each defective item counts; None: all the same.  As in `area`.
        """
        count = len(self.scores)
        if shares is None:
            shares = torch.full((count,), 1 / count, dtype=torch.float64, device=self.scores.device)
        scores, reached = self.scores.flip(0), shares[self._order].flip(0).cumsum(0)
        last_of_ties = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
        y = reached[last_of_ties]
        x = torch.stack([self.above.flip(0), self.reached.flip(0)], 1)[last_of_ties].double()
        y = torch.stack([torch.cat([y.new_zeros(1), y[:-1]]), y], 1)
        end = y.new_ones(1)
        return torch.cat([x.flatten() / self.num_good, end]), torch.cat([y.flatten(), end])

    def f1_max(self) -> tuple[float | None, float | None]:
        """(best F1, the score from which on to flag); a defective item's score is always among the best."""
        if not self.defined:
            return None, None
        count = len(self.scores)
        found = count - torch.searchsorted(self.scores, self.scores)
        f1 = 2 * found.double() / (found + self.reached + count)
        best = count - 1 - int(f1.flip(0).argmax())
        return float(f1[best]), float(self.scores[best])


def sorted_scores(scores: Tensor) -> Tensor:
    # NumPy's vectorised sort is several times as fast as torch's on the CPU.
    return scores.sort().values if scores.is_cuda else torch.from_numpy(np.sort(scores.numpy()))
