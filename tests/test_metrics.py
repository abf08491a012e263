"""The metrics are exact: equal to scikit-learn's and to plain loops over every threshold."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.metrics import precision_recall_curve, roc_auc_score

from metrics import GroundTruth, evaluate_maps


def random_case(seed, ties):
    """Six 20x24 maps, the first two good, with regions that touch diagonally and at borders."""
    rng = np.random.default_rng(seed)
    masks = scipy.ndimage.gaussian_filter(rng.normal(size=(6, 20, 24)), (0, 1.5, 1.5)) > 0.2
    masks[:2] = False
    maps = rng.normal(size=masks.shape) + masks * rng.uniform(0, 2)
    if ties:
        maps = np.round(maps, 1)
    return torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(masks)


def truth_of(masks):
    return GroundTruth.from_masks(masks.flatten(1).any(1), masks)


def plain_aupro(maps, masks, limit):
    """One threshold after the other, one region after the other."""
    maps, masks = maps.numpy(), masks.numpy()
    regions = []
    for score, mask in zip(maps, masks, strict=True):
        labelled, count = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [score[labelled == i] for i in range(1, count + 1)]
    good = maps[~masks]
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append((good >= threshold).mean())
        y.append(np.mean([(region >= threshold).mean() for region in regions]))
    grid = np.unique([*(v for v in x if v < limit), limit])
    area = 0.0
    for a, b in itertools.pairwise(grid):
        # at a jump (equal x) the curve continues from its upper end and arrives at its lower end
        ya = max(v for u, v in zip(x, y, strict=True) if u == a)
        below = [k for k in range(len(x)) if x[k] <= a]
        k = below[-1] + 1
        slope = (y[k] - ya) / (x[k] - a)
        area += (b - a) * (ya + ya + slope * (b - a)) / 2
    return area / limit


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_scikit_learn_and_to_plain_thresholds(seed, ties):
    maps, masks = random_case(seed, ties)
    metrics = evaluate_maps(maps, truth_of(masks))
    flat_masks, flat_maps = masks.flatten().numpy(), maps.flatten().numpy()
    assert metrics.pixel_auroc == pytest.approx(roc_auc_score(flat_masks, flat_maps), abs=1e-12)
    image_scores = maps.flatten(1).amax(1).numpy()
    assert metrics.image_auroc == pytest.approx(
        roc_auc_score(masks.flatten(1).any(1), image_scores), abs=1e-12
    )
    assert metrics.pixel_pro == pytest.approx(plain_aupro(maps, masks, 1.0), abs=1e-9)
    assert metrics.pixel_pro_30 == pytest.approx(plain_aupro(maps, masks, 0.3), abs=1e-9)

    precision, recall, _ = precision_recall_curve(flat_masks, flat_maps)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert metrics.f1_max == pytest.approx(best, abs=1e-12)
    flagged = flat_maps >= np.float32(metrics.threshold)
    f1 = 2 * (flagged & flat_masks).sum() / (flagged.sum() + flat_masks.sum())
    assert f1 == pytest.approx(metrics.f1_max, abs=1e-12)


def test_perfect_and_inverted_maps():
    _, masks = random_case(0, ties=False)
    truth = truth_of(masks)
    perfect = evaluate_maps(masks.float(), truth)
    values = (perfect.pixel_auroc, perfect.pixel_pro, perfect.pixel_pro_30, perfect.f1_max)
    assert values == pytest.approx((1, 1, 1, 1))
    assert perfect.threshold == 1.0
    inverted = evaluate_maps(-masks.float(), truth)
    assert inverted.pixel_auroc == pytest.approx(0)
    assert inverted.pixel_pro_30 == pytest.approx(0)


def test_all_scores_equal():
    maps, masks = random_case(0, ties=False)
    metrics = evaluate_maps(torch.full_like(maps, 0.7), truth_of(masks))
    assert metrics.pixel_auroc == pytest.approx(0.5)
    assert metrics.image_auroc == pytest.approx(0.5)
    assert metrics.pixel_pro == pytest.approx(0.5)
    assert metrics.pixel_pro_30 == pytest.approx(0.15)  # the diagonal up to 0.3
    assert metrics.threshold == pytest.approx(0.7)


def test_negative_zero_ties_with_zero():
    masks = torch.zeros(2, 1, 2, dtype=torch.bool)
    masks[1] = True
    maps = torch.tensor([[[-0.0, 0.0]], [[0.0, -0.0]]])
    assert evaluate_maps(maps, truth_of(masks)).pixel_auroc == pytest.approx(0.5)


def test_a_defect_of_one_pixel():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, 3, 4] = True
    maps = torch.arange(128.0).view(2, 8, 8)
    metrics = evaluate_maps(maps, truth_of(masks))
    above = int((maps > maps[1, 3, 4]).sum())
    assert metrics.pixel_auroc == pytest.approx(1 - above / 127)
    assert metrics.pixel_pro == pytest.approx(1 - above / 127)
    assert metrics.pixel_pro_30 == pytest.approx(max(0, 0.3 - above / 127) / 0.3)


def test_regions_count_equally_and_touch_diagonally():
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region: 8-connected
    masks[0, 5:9, 5:9] = True
    truth = truth_of(masks)
    assert truth.region_sizes.tolist() == [2, 16]
    maps = torch.zeros(1, 10, 10)
    maps[0, 5:9, 5:9] = 1.0  # finds the large one only: half of the regions, 16/18 of the pixels
    metrics = evaluate_maps(maps, truth)
    assert metrics.pixel_pro == pytest.approx(0.75)
    assert metrics.pixel_auroc == pytest.approx((16 / 18 + 1) / 2)


def test_the_image_label_comes_from_the_folder():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)  # a defect too small to survive resizing
    metrics = evaluate_maps(
        torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]),
        GroundTruth.from_masks(torch.tensor([False, True]), masks),
    )
    assert metrics.image_auroc == 1.0
    assert (metrics.pixel_auroc, metrics.pixel_pro, metrics.f1_max) == (None, None, None)


def test_nothing_defective_nothing_good_no_masks():
    maps, masks = random_case(0, ties=False)
    nothing = evaluate_maps(maps, truth_of(torch.zeros_like(masks)))
    assert set(vars(nothing).values()) == {None}
    all_defective = evaluate_maps(maps[2:], truth_of(masks[2:]))
    assert all_defective.image_auroc is None
    assert all_defective.pixel_auroc is not None
    all_masked = evaluate_maps(maps, truth_of(torch.ones_like(masks)))
    assert (all_masked.pixel_auroc, all_masked.pixel_pro) == (None, None)
    no_masks = evaluate_maps(maps, GroundTruth.from_masks(masks.flatten(1).any(1), None))
    assert no_masks.image_auroc is not None
    assert (no_masks.pixel_auroc, no_masks.pixel_pro, no_masks.pixel_pro_30, no_masks.f1_max) == (
        None,
    ) * 4


def test_counting_does_not_stop_at_2_to_the_24():
    """Float32 sums stop growing at 16.8 million pixels."""
    count = 2**24 + 2**20
    masks = torch.zeros(1, 1, count, dtype=torch.bool)
    masks[0, 0, :1000] = True
    maps = torch.ones(1, 1, count)
    maps[0, 0, :1000] = 0.0
    maps[0, 0, -(2**19) :] = 0.0
    metrics = evaluate_maps(maps, truth_of(masks))
    assert metrics.pixel_auroc == pytest.approx(2**19 / (count - 1000) / 2, abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    maps, masks = random_case(0, ties=False)
    maps[0, 0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        evaluate_maps(maps, truth_of(masks))


def test_shapes_that_disagree_are_refused():
    maps, masks = random_case(0, ties=False)
    with pytest.raises(ValueError, match="5 maps for 6 images"):
        evaluate_maps(maps[:5], truth_of(masks))
    with pytest.raises(ValueError, match="masks"):
        evaluate_maps(maps[:, :10], truth_of(masks))
