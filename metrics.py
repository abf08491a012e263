"""Exact metrics of anomaly maps: AUROC, average precision and F1-max of pixels and images, AUPRO, IoU-max.

Definitions as in MVTec's own evaluator (Bergmann et al., IJCV 2021) and scikit-learn: every distinct
score is a threshold, ties move together, and AUPRO weighs each 8-connected defect region equally.  One sort
of the good pixels serves every metric.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import skimage.measure
import torch
from torch import Tensor

from util import markdown_table, percent

PART_PIXELS = 2**24  # of maps, that are sorted together
PRO_LIMIT = 0.3  # the false-positive rate up to which the literature integrates; the paper uses 1
METRICS = {
    "pixel_auroc": "pixel AUROC",
    "image_auroc": "image AUROC",
    "pixel_pro": "PRO",
    "pixel_pro_limited": f"PRO@{PRO_LIMIT:g}",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "iou_max": "IoU-max",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
}
# What fits on a screen and is quoted most.
TABLE_METRICS = ("pixel_auroc", "image_auroc", "pixel_pro", "pixel_pro_limited", "pixel_ap", "image_ap")


@dataclass(frozen=True)
class GroundTruth:
    """What the test images are, in the form that the metrics need; made once per run.

    Attributes:
        defective: (N,) bool, from the folder an image lies in.
        masks: (N,H,W) bool; None if there are none.
        regions: (P,) int64, the region of each defective pixel, in the order of `maps[masks]`.
        region_sizes: (R,) int64, pixels of each region.
        roi: (H,W) bool, outside of which no pixel counts; None: all do.
    """

    defective: Tensor
    masks: Tensor | None = None
    regions: Tensor | None = None
    region_sizes: Tensor | None = None
    roi: Tensor | None = None

    @property
    def region_shares(self) -> Tensor:
        """(P,) float64: what a defective pixel counts, so that each region counts equally; sums to 1."""
        return 1 / self.region_sizes.double()[self.regions] / len(self.region_sizes)

    @classmethod
    def from_masks(
        cls, defective: Tensor, masks: Tensor | None, device="cpu", roi: Tensor | None = None
    ) -> GroundTruth:
        """Label the 8-connected regions of bool masks (N,H,W) on the CPU; everything goes to the device."""
        kept = None if roi is None else roi.to(device)
        if masks is None:
            return cls(defective.to(device), roi=kept)
        masks = masks if roi is None else masks & roi.cpu()
        regions, count = [np.zeros(0, np.int64)], 0
        for i in torch.nonzero(masks.flatten(1).any(1)).flatten().tolist():
            labels, found = skimage.measure.label(masks[i].numpy(), connectivity=2, return_num=True)
            regions.append(labels[labels > 0].astype(np.int64) + count - 1)
            count += found
        regions = torch.from_numpy(np.concatenate(regions))
        tensors = (masks, regions, regions.bincount(minlength=count))
        return cls(defective.to(device), *(x.to(device) for x in tensors), kept)


@dataclass(frozen=True)
class Metrics:
    """Values 0..1; None where undefined (no masks, nothing defective, or nothing good).

    Attributes:
        pixel_auroc, image_auroc: area under the ROC curve.
        pixel_pro: AUPRO up to a false-positive rate of 1, the paper's number.
        pixel_pro_limited: AUPRO up to a limit, divided by it; up to 0.3 it is everybody else's.
        pixel_ap, image_ap: average precision.
        pixel_f1_max, image_f1_max: best F1 over all thresholds.
        iou_max: best intersection over union of all defective pixels, at the threshold of the best F1.
        pixel_threshold, image_threshold: at the best F1; from this score on a pixel, an image is defective.
        image_recall_threshold: of images, the highest at which no defective test image is missed.
    """

    pixel_auroc: float | None = None
    image_auroc: float | None = None
    pixel_pro: float | None = None
    pixel_pro_limited: float | None = None
    pixel_ap: float | None = None
    pixel_f1_max: float | None = None
    iou_max: float | None = None
    image_ap: float | None = None
    image_f1_max: float | None = None
    pixel_threshold: float | None = None
    image_threshold: float | None = None
    image_recall_threshold: float | None = None


def evaluate_maps(
    maps: Tensor, truth: GroundTruth, pro_limit: float = PRO_LIMIT, scores: Tensor | None = None
) -> Metrics:
    """Compute all metrics of anomaly maps (N,H,W), float32, at the masks' size.

    Args:
        scores: of the images, (N,); None: the maps' maxima.
        pro_limit: of `pixel_pro_limited`, above 0 and up to 1.

    Raises:
        ValueError: a score is not finite, or the shapes disagree.
    """
    scores = maps.flatten(1).amax(1) if scores is None else scores
    if not (all_finite(maps) and all_finite(scores)):
        raise ValueError("anomaly maps hold values that are not finite")
    if len(maps) != len(truth.defective):
        raise ValueError(f"{len(maps)} maps for {len(truth.defective)} images")
    if truth.masks is not None and truth.masks.shape != maps.shape:
        raise ValueError(f"maps {tuple(maps.shape)}, masks {tuple(truth.masks.shape)}")
    return Metrics(**_of_images(scores, truth), **_of_pixels(maps, truth, pro_limit))


def _of_images(scores: Tensor, truth: GroundTruth) -> dict[str, float | None]:
    ranking = Ranking(scores[~truth.defective], scores[truth.defective])
    f1_max, threshold = ranking.f1_max()
    return {
        "image_auroc": ranking.auroc(),
        "image_ap": ranking.average_precision(),
        "image_f1_max": f1_max,
        "image_threshold": threshold,
        "image_recall_threshold": float(ranking.scores[0]) if ranking.defined else None,
    }


def _of_pixels(maps: Tensor, truth: GroundTruth, pro_limit: float) -> dict[str, float | None]:
    if truth.masks is None:
        return {}
    ranking = Ranking.of_pixels(maps, truth)
    f1_max, threshold = ranking.f1_max()
    return {
        "pixel_auroc": ranking.auroc(),
        "pixel_pro": ranking.area(truth.region_shares, 1.0),
        "pixel_pro_limited": ranking.area(truth.region_shares, pro_limit),
        "pixel_ap": ranking.average_precision(),
        "pixel_f1_max": f1_max,
        # |A and B| / |A or B| rises with F1 = 2 |A and B| / (|A| + |B|), so both are best at one threshold.
        "iou_max": None if f1_max is None else f1_max / (2 - f1_max),
        "pixel_threshold": threshold,
    }


class Ranking:
    """Where each defective item stands among the good ones.  Every metric follows from that.

    On the way down through the scores, the curves rise at defective items only.  One that ties with good
    items rises along a straight line from x = `above` to x = `reached`, counted in good items.

    Args:
        good: scores (G,), or parts of them, of which one at a time is in memory.
        defective: scores (P,).
    """

    def __init__(self, good: Tensor | Iterable[Tensor], defective: Tensor):
        self.scores, self._order = defective.sort()
        self.num_good, self.above, self.reached = 0, 0 * self._order, 0 * self._order
        for part in [good] if isinstance(good, Tensor) else good:
            part = sorted_scores(part)
            self.num_good += len(part)
            self.above += len(part) - torch.searchsorted(part, self.scores, right=True)
            self.reached += len(part) - torch.searchsorted(part, self.scores)

    @classmethod
    def of_pixels(cls, maps: Tensor, truth: GroundTruth) -> Ranking:
        """Of the pixels of anomaly maps (N,H,W), by masks.

        A few images at a time, so that beside the maps it needs 0.3 GiB, and 40 bytes for each defective pixel;
        average precision and curves need 100 more of these.
        """
        count = max(1, PART_PIXELS // max(1, maps[:1].numel()))
        parts = list(zip(maps.split(count), truth.masks.split(count), strict=True))
        inside = True if truth.roi is None else truth.roi
        good = (part.masked_select(~masks & inside) for part, masks in parts)
        return cls(good, torch.cat([part.masked_select(masks) for part, masks in parts]))

    @property
    def defined(self) -> bool:
        """Whether there are both good and defective items; without either, every metric is None."""
        return bool(self.num_good and len(self.scores))

    def auroc(self) -> float | None:
        """Return the area under the ROC curve, ties along the diagonal."""
        if not self.defined:
            return None
        lost = int((self.above + self.reached).sum())  # twice; integers, so exact
        return 1 - lost / (2 * self.num_good * len(self.scores))

    def area(self, shares: Tensor, limit: float) -> float | None:
        """Return the area under (share of good items reached, sum of shares reached) up to x = limit, / limit.

        With the shares of regions it is AUPRO (Bergmann et al., IJCV 2021).

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
        """Return x, y: the shares of good and of defective items reached while the threshold sinks.

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
        """Return the best F1 and the highest score from which on to flag for it.

        A defective item's score is always among the best.
        """
        if not self.defined:
            return None, None
        count = len(self.scores)
        found = count - torch.searchsorted(self.scores, self.scores)
        f1 = 2 * found.double() / (found + self.reached + count)
        best = count - 1 - int(f1.flip(0).argmax())
        return float(f1[best]), float(self.scores[best])

    def average_precision(self) -> float | None:
        """Return the sum over thresholds of the precision times the recall gained there."""
        from sklearn.metrics import average_precision_score  # a second that predict.py need not wait for

        return float(average_precision_score(**self._weighted())) if self.defined else None

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Return precision and recall at the scores of defective items, ascending, then 1 and 0."""
        from sklearn.metrics import precision_recall_curve

        return precision_recall_curve(**self._weighted())[:2]

    def _weighted(self) -> dict[str, np.ndarray]:
        """Return a few items that have the same precision and recall wherever the recall changes.

        Good items between two defective ones count at the lower of the two, as a single item with their
        number as its weight.  For scikit-learn that is ten million pixels less to sort.
        """
        passed = torch.diff(self.reached, append=self.reached.new_zeros(1)).neg()
        weights = torch.cat([torch.ones_like(passed), passed]).double()
        labels = np.repeat([True, False], len(passed))
        return {
            "y_true": labels,
            "y_score": self.scores.repeat(2).cpu().numpy(),
            "sample_weight": weights.cpu().numpy(),
        }


def all_finite(x: Tensor) -> bool:
    """Whether no element is infinite or no number; without a copy, as `torch.isfinite` makes one."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


def sorted_scores(scores: Tensor) -> Tensor:
    """Return the scores (N,) in ascending order."""
    if scores.is_cuda and scores.numel() < 2**31:  # CUDA sorts no more
        return scores.sort().values
    # NumPy's vectorized sort is several times as fast as torch's on the CPU.
    return torch.from_numpy(np.sort(scores.cpu().numpy())).to(scores.device)


# -------------------------------------------------------------------------------------- table


def metric_labels(pro_limit: float = PRO_LIMIT) -> dict[str, str]:
    """Return the metrics' names for people, by key, where `pixel_pro_limited` was taken up to `pro_limit`."""
    return {**METRICS, "pixel_pro_limited": f"PRO@{pro_limit:g}"}


def result_table(rows: list[tuple[str, str, dict]], pro_limit: float = PRO_LIMIT) -> str:
    """Return a Markdown table of `TABLE_METRICS` in percent.

    Args:
        rows: (class, label of the epoch, metrics by key).
        pro_limit: the one that the metrics were taken with.
    """
    labels = metric_labels(pro_limit)
    header = ["class", "epoch", *(labels[key] for key in TABLE_METRICS)]
    shown = [[name, epoch, *(percent(row[key]) for key in TABLE_METRICS)] for name, epoch, row in rows]
    return markdown_table(header, shown)


def mean_row(rows: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
    """Return the mean over classes as a list of one row, or of none; what a class lacks is left out of it."""
    means = {}
    for key in METRICS:
        values = [row[key] for _, _, row in rows if row[key] is not None]
        means[key] = sum(values) / len(values) if values else None
    return [(f"mean of {len(rows)}", "", means)] if rows else []
