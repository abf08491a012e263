"""Thresholds without labels are what they say: scores of good images against the template of the others."""

import numpy as np
import pytest
import torch

from calibration import LEVELS, Calibration, calibrate, choose_thresholds, distribution
from evaluation import at_mask_size
from model import PyramidFlow, PyramidFlowConfig, anomaly_map, latent_template
from util import InputError

CONFIG = PyramidFlowConfig(
    encoder="none", num_level=2, num_stack=1, num_channel=3, kernel_size=3, image_size=(16, 16)
)


def test_each_image_is_scored_against_the_template_of_the_others():
    torch.manual_seed(0)
    model = PyramidFlow(CONFIG).eval()
    with torch.no_grad():
        features = model.encode(torch.randn(5, 3, 16, 16))
    template = latent_template(model, [features])
    calibration = calibrate(model, template, features.split(2))
    expected = []
    for i in range(5):
        others = torch.cat([features[:i], features[i + 1 :]])
        maps = anomaly_map(model, features[i : i + 1], latent_template(model, [others]))
        expected.append(float(at_mask_size(maps).max()))
    assert calibration.image_scores == pytest.approx(sorted(expected), rel=1e-5)


def test_quantiles_of_pixels_and_images():
    maps = torch.arange(4 * 100 * 100.0).view(4, 100, 100)
    calibration = distribution(maps)
    assert len(calibration.pixel_scores) == len(LEVELS)
    for q in (0.0, 0.25, 0.5, 0.99, 0.999, 1.0):
        thresholds = calibration.thresholds(pixel_quantile=q, image_quantile=q)
        assert thresholds.pixel == pytest.approx(q * (maps.numel() - 1), abs=2)
        assert thresholds.image == pytest.approx(np.quantile([9999, 19999, 29999, 39999], q))


def test_the_colour_scale_leaves_room_above_good_pixels():
    low, high = distribution(torch.rand(3, 64, 64)).colour_scale()
    assert low == pytest.approx(0, abs=0.01)
    assert high == pytest.approx(2, abs=0.02)


def test_one_image_has_no_others():
    model = PyramidFlow(CONFIG).eval()
    with torch.no_grad():
        features = model.encode(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least two"):
        calibrate(model, latent_template(model, [features]), [features])


def test_a_calibration_survives_its_dict():
    calibration = distribution(torch.rand(3, 8, 8))
    assert Calibration.from_dict(calibration.to_dict()) == calibration


@pytest.mark.parametrize(
    "change",
    [
        {"image_scores": []},
        {"image_scores": [2.0, 1.0]},
        {"image_scores": [float("nan")]},
        {"image_scores": "x"},
        {"pixel_scores": [1.0]},
        {"more": [1.0]},
    ],
)
def test_what_is_no_calibration_is_refused(change):
    given = distribution(torch.rand(3, 8, 8)).to_dict()
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own message)
        Calibration.from_dict({**given, **change})


def test_the_choices_of_a_threshold():
    calibration = Calibration([1.0, 2.0, 3.0], np.linspace(0, 1, len(LEVELS)).tolist())
    metrics = {"threshold": 0.4, "image_threshold": 0.6}
    quantiles = (1.0, 0.5)
    chosen = choose_thresholds("quantile", metrics, calibration, quantiles)
    assert (chosen.pixel, chosen.image) == (1.0, 2.0)
    chosen = choose_thresholds("f1", metrics, calibration, quantiles)
    assert (chosen.pixel, chosen.image) == (0.4, 0.6)
    chosen = choose_thresholds("f1", {"threshold": None, "image_threshold": 0.6}, None, quantiles)
    assert (chosen.pixel, chosen.image) == (0.6, 0.6)
    chosen = choose_thresholds("0.25", metrics, None, quantiles)
    assert (chosen.pixel, chosen.image) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("quantile", "--resume"),
        ("f1", "use --threshold quantile or a number"),
        ("high", "use f1, quantile or a number"),
        ("nan", "use f1, quantile or a number"),
    ],
)
def test_a_threshold_that_cannot_be_had(choice, message):
    with pytest.raises(InputError, match=message):
        choose_thresholds(choice, {"threshold": None, "image_threshold": None}, None, (0.9, 0.9))
