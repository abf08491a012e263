"""The metrics are exact: equal to scikit-learn's and to plain loops over every threshold."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.metrics import average_precision_score, jaccard_score, precision_recall_curve, roc_auc_score

from metrics import (
    METRICS,
    TABLE_METRICS,
    GroundTruth,
    Metrics,
    Ranking,
    evaluate_maps,
    mean_row,
    metric_labels,
    result_table,
)

pytestmark = pytest.mark.filterwarnings("error")


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
    x, y = np.array(x), np.array(y)
    grid = np.unique([*x[x < limit], limit])
    area = 0.0
    for a, b in itertools.pairwise(grid):
        # at a jump (equal x) the curve continues from its upper end and arrives at its lower end
        ya = y[x == a].max()
        k = np.flatnonzero(x <= a)[-1] + 1
        slope = (y[k] - ya) / (x[k] - a)
        area += (b - a) * (ya + ya + slope * (b - a)) / 2
    return area / limit


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_scikit_learn_and_to_plain_thresholds(seed, ties):
    maps, masks = random_case(seed, ties)
    metrics = evaluate_maps(maps, truth_of(masks), pro_limit=0.1)
    assert metrics.pixel_pro == pytest.approx(plain_aupro(maps, masks, 1.0), abs=1e-9)
    assert metrics.pixel_pro_limited == pytest.approx(plain_aupro(maps, masks, 0.1), abs=1e-9)
    default = evaluate_maps(maps, truth_of(masks)).pixel_pro_limited
    assert default == pytest.approx(plain_aupro(maps, masks, 0.3), abs=1e-9)

    pixels = (masks.flatten().numpy(), maps.flatten().numpy())
    images = (masks.flatten(1).any(1).numpy(), maps.flatten(1).amax(1).numpy())
    for items, (truth, scores) in {"pixel": pixels, "image": images}.items():
        found = {key.removeprefix(f"{items}_"): value for key, value in vars(metrics).items()}
        assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert found["ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
        precision, recall, _ = precision_recall_curve(truth, scores)
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert found["f1_max"] == pytest.approx(best, abs=1e-12)
        flagged = scores >= np.float32(found["threshold"])
        f1 = 2 * (flagged & truth).sum() / (flagged.sum() + truth.sum())
        assert f1 == pytest.approx(found["f1_max"], abs=1e-12)
        if items == "pixel":
            assert found["iou_max"] == pytest.approx(jaccard_score(truth, flagged), abs=1e-12)


def test_iou_max_is_the_best_of_all_thresholds():
    maps, masks = random_case(0, ties=True)
    overlaps = [jaccard_score(masks.flatten(), (maps >= t).flatten()) for t in maps.unique()]
    assert evaluate_maps(maps, truth_of(masks)).iou_max == pytest.approx(max(overlaps), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_the_precision_recall_curve_is_that_of_all_pixels(ties):
    maps, masks = random_case(1, ties)
    precision, recall = Ranking(maps[~masks], maps[masks]).precision_recall()
    expected, expected_recall, scores = precision_recall_curve(masks.flatten(), maps.flatten())
    at_defective = np.append(np.isin(scores, maps[masks].numpy()), True)
    assert precision == pytest.approx(expected[at_defective], abs=1e-12)
    assert recall == pytest.approx(expected_recall[at_defective], abs=1e-12)


def test_perfect_and_inverted_maps():
    _, masks = random_case(0, ties=False)
    truth = truth_of(masks)
    perfect = evaluate_maps(masks.float(), truth)
    assert [getattr(perfect, key) for key in METRICS] == pytest.approx([1] * len(METRICS))
    assert (perfect.pixel_threshold, perfect.image_threshold) == (1.0, 1.0)
    inverted = evaluate_maps(-masks.float(), truth)
    assert inverted.pixel_auroc == pytest.approx(0)
    assert inverted.pixel_pro_limited == pytest.approx(0)


def test_all_scores_equal():
    maps, masks = random_case(0, ties=False)
    metrics = evaluate_maps(torch.full_like(maps, 0.7), truth_of(masks))
    assert metrics.pixel_auroc == pytest.approx(0.5)
    assert metrics.image_auroc == pytest.approx(0.5)
    assert metrics.pixel_pro == pytest.approx(0.5)
    assert metrics.pixel_pro_limited == pytest.approx(0.15)  # the diagonal up to 0.3
    assert metrics.pixel_ap == pytest.approx(masks.double().mean().item())
    assert metrics.image_ap == pytest.approx(4 / 6)
    assert metrics.pixel_threshold == metrics.image_threshold == pytest.approx(0.7)


def test_negative_zero_ties_with_zero():
    masks = torch.zeros(2, 1, 2, dtype=torch.bool)
    masks[1] = True
    maps = torch.tensor([[[-0.0, 0.0]], [[0.0, -0.0]]])
    metrics = evaluate_maps(maps, truth_of(masks))
    assert (metrics.pixel_auroc, metrics.pixel_ap) == pytest.approx((0.5, 0.5))


def test_a_defect_of_one_pixel():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, 3, 4] = True
    maps = torch.arange(128.0).view(2, 8, 8)
    metrics = evaluate_maps(maps, truth_of(masks))
    above = int((maps > maps[1, 3, 4]).sum())
    assert metrics.pixel_auroc == pytest.approx(1 - above / 127)
    assert metrics.pixel_pro == pytest.approx(1 - above / 127)
    assert metrics.pixel_pro_limited == pytest.approx(max(0, 0.3 - above / 127) / 0.3)


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
    assert (metrics.image_auroc, metrics.image_ap, metrics.image_f1_max) == (1.0, 1.0, 1.0)
    assert_pixels_undefined(metrics)


def assert_pixels_undefined(metrics):
    of_images = {"image_auroc", "image_ap", "image_f1_max", "image_threshold", "image_recall_threshold"}
    assert all((value is not None) == (key in of_images) for key, value in vars(metrics).items())


def test_nothing_defective_nothing_good_no_masks():
    maps, masks = random_case(0, ties=False)
    nothing = evaluate_maps(maps, truth_of(torch.zeros_like(masks)))
    assert set(vars(nothing).values()) == {None}
    all_defective = evaluate_maps(maps[2:], truth_of(masks[2:]))
    for key, value in vars(all_defective).items():
        assert (value is None) == key.startswith("image")
    all_masked = evaluate_maps(maps, truth_of(torch.ones_like(masks)))
    assert set(vars(all_masked).values()) == {None}
    assert_pixels_undefined(evaluate_maps(maps, GroundTruth.from_masks(masks.flatten(1).any(1), None)))
    no_images = evaluate_maps(maps[:0], truth_of(masks[:0]))
    assert set(vars(no_images).values()) == {None}


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


def test_labels_follow_the_limit_and_every_metric_has_one():
    assert [*vars(Metrics())] == [*METRICS, "pixel_threshold", "image_threshold", "image_recall_threshold"]
    assert metric_labels() == METRICS
    assert metric_labels(0.05) == {**METRICS, "pixel_pro_limited": "PRO@0.05"}


def test_the_table_is_in_percent_and_ends_with_the_mean_of_what_is_defined():
    first = dict.fromkeys(METRICS, 0.5)
    second = {**first, "pixel_auroc": 0.98766, "image_auroc": None}
    rows = [("tile", "15 (last)", first), ("zipper", "3", second)]
    header, rule, *lines = result_table([*rows, *mean_row(rows)], pro_limit=0.1).splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells == ["class", "epoch", *(metric_labels(0.1)[key] for key in TABLE_METRICS)]
    assert rule.count("---") == len(cells)
    assert lines[0].startswith("| tile | 15 (last) | 50.00 | 50.00 |")
    assert lines[1].startswith("| zipper | 3 | 98.77 | n/a | 50.00 |")
    assert lines[2].startswith("| mean of 2 |  | 74.38 | 50.00 | 50.00 |")
    nothing = [("a", "1", dict.fromkeys(METRICS))]
    assert set(mean_row(nothing)[0][2].values()) == {None}
    assert mean_row([]) == []
