"""A scorer is what the formulas say, its thresholds are honest, and it survives a file."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Pictures, save_image
from PIL import Image

import scorer as scorer_module
from dataset import normalize
from metrics import METRICS
from model import PyramidFlow, PyramidFlowConfig
from scorer import ScoreOptions, Scorer, batch_size, fit_all, gaussian, score_all
from util import DivergedError, InputError
from verdict import (
    LEVELS,
    Calibration,
    Defect,
    Scored,
    Thresholds,
    choose_thresholds,
    distribution,
    find_defects,
    read_roi,
    resize_roi,
    roi_remarks,
)

CONFIG = PyramidFlowConfig(
    encoder="none", num_level=3, num_stack=1, num_channel=4, kernel_size=3, image_size=(16, 32)
)
COUNT = 7
BANK = ScoreOptions("bank", 3)


@pytest.fixture
def model():
    """With weights that are not the trivial ones of an untrained model."""
    torch.manual_seed(0)
    model = PyramidFlow(CONFIG)
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model(torch.randn(2, 3, *CONFIG.image_size))
    return model.eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (COUNT, *CONFIG.image_size, 3), dtype=torch.uint8)


def latents_of(model, images):
    """The levels of each image, by the model alone."""
    with torch.no_grad():
        return model(normalize(images))[0]


def map_against(model, latents, template, sigma=None):
    """The composed difference (H,W) of one image, levels (1,C,H/2^i,W/2^i), to one template."""
    sigma = sigma or [torch.ones(CONFIG.channels)] * CONFIG.num_level
    levels = [
        ((z - t).abs() / s[:, None, None]).mean(1, keepdim=True)
        for z, t, s in zip(latents, template, sigma, strict=True)
    ]
    return model.pyramid.compose(tuple(levels))[0, 0]


def at_mask_size(anomaly):
    return F.interpolate(anomaly[None, None], (256, 256), mode="bilinear", antialias=True)[0, 0]


def detail(anomaly):
    """The mean of the highest in a thousand pixels of a map (256,256) less itself, smoothed by one."""
    pixels = (anomaly - gaussian(anomaly[None], 1.0)[0]).flatten().sort().values
    return float(pixels[-66:].mean())


def usual_sizes(latents):
    """sigma[c]: the root of the mean over pixels of the variance over images."""
    return [z.double().var(0, correction=0).mean((1, 2)).sqrt().float() for z in latents]


def greedy(latents, count):
    """The images of a bank, by brute force: k-center on the coarsest levels, the typical ones first.

    Returns:
        Images, and how many of them are typical.
    """
    sigma = usual_sizes(latents)
    points = torch.cat([(latents[i] / sigma[i][:, None, None]).flatten(1) for i in (-2, -1)], 1)
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < min(count, len(points)):
        distances = torch.stack([(points - points[i]).norm(dim=1) for i in chosen]).amin(0)
        chosen.append(int(distances.argmax()))
    apart = torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1).tolist()
    limit = sorted(apart)[int(0.75 * (len(apart) - 1))] * 1.000001
    typical = [i for i in chosen if apart[i] <= limit]
    return typical + [i for i in chosen if i not in typical], len(typical)


def scored(maps):
    return Scored(maps, maps.flatten(1).amax(1))


def one(latents, i):
    return [z[i : i + 1] for z in latents]


# ------------------------------------------------------------------------------------- scores


def test_the_papers_map_is_the_difference_to_the_mean(model, images):
    scorer = Scorer.fit(model, Pictures(images))
    latents = latents_of(model, images)
    mean = [z.mean(0, keepdim=True) for z in latents]
    for t, m in zip(scorer.templates, mean, strict=True):
        assert torch.allclose(t, m, atol=1e-5)
    for i, (found, score) in enumerate(zip(*scorer.score(images), strict=True)):
        expected = at_mask_size(map_against(model, one(latents, i), mean))
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.max()))
        assert score == found.max()


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("smooth", [0.0, 2.0])
def test_the_banks_map_is_that_of_the_best_template_at_each_pixel(model, images, whiten, smooth):
    scorer = Scorer.fit(model, Pictures(images), ScoreOptions("bank", 5, whiten, smooth))
    sigma = scorer.sigma or [torch.ones(CONFIG.channels)] * CONFIG.num_level
    templates = [t * s[:, None, None] for t, s in zip(scorer.templates, sigma, strict=True)]
    others = torch.randint(0, 256, (2, *CONFIG.image_size, 3), dtype=torch.uint8)
    for i, (found, score) in enumerate(zip(*scorer.score(others), strict=True)):
        new = one(latents_of(model, others), i)
        maps = torch.stack([map_against(model, new, one(templates, k), sigma) for k in range(5)])
        expected = at_mask_size(maps.amin(0))
        expected = gaussian(expected[None], smooth)[0] if smooth else expected
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.max()))
        assert float(score) == pytest.approx(detail(at_mask_size(maps.amin(0))), rel=1e-3)
        typical = at_mask_size(maps[: scorer.num_typical].amin(0))  # neither smoothed nor with the odd ones
        by_max = replace(scorer, image_score="max").score(others[i : i + 1]).scores
        assert float(by_max) == pytest.approx(float(typical.max()), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5, COUNT + 5])
def test_the_bank_is_the_mean_and_images_by_greedy_k_center(model, images, count):
    scorer = Scorer.fit(model, Pictures(images), ScoreOptions("bank", count))
    latents = latents_of(model, images)
    chosen, num_typical = greedy(latents, count - 1)
    assert scorer.num_typical == 1 + num_typical
    for t, z, s in zip(scorer.templates, latents, scorer.sigma, strict=True):
        expected = torch.cat([z.mean(0, keepdim=True), z[chosen]]) / s[:, None, None]
        step = 2 * (expected[1:] - expected[:1]).abs().amax((0, 2, 3)) / 127  # stored in 8 bits
        assert t.shape == expected.shape
        assert ((t - expected).abs() <= 0.51 * step[:, None, None] + 1e-4).all()


def test_a_batch_may_be_compared_with_the_bank_in_parts(model, images, monkeypatch):
    scorer = Scorer.fit(model, Pictures(images), BANK)
    whole = scorer.score(images)
    monkeypatch.setattr(scorer_module, "BANK_ELEMENTS", 1)
    for x, y in zip(scorer.score(images), whole, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_whitening_divides_by_the_root_of_the_mean_variance(model, images):
    scorer = Scorer.fit(model, Pictures(images), ScoreOptions("bank", 1))
    latents = latents_of(model, images)
    for s, expected in zip(scorer.sigma, usual_sizes(latents), strict=True):
        assert torch.allclose(s, expected, rtol=1e-4)
    for t, z, s in zip(scorer.templates, latents, scorer.sigma, strict=True):
        assert torch.allclose(t, z.mean(0, keepdim=True) / s[:, None, None], atol=1e-4)


def test_coarse_levels_are_small_and_of_the_two_coarsest_levels():
    latents = tuple(torch.randn(2, 3, 256 >> i, 128 >> i) for i in range(3))
    coarse = scorer_module.coarse_levels(latents)
    assert coarse.shape == (2, 3 * (64 * 32 + 64 * 32))
    assert torch.equal(coarse[:, 3 * 64 * 32 :], latents[2].flatten(1))
    means = latents[1].unflatten(3, (32, 2)).unflatten(2, (64, 2)).mean((3, 5))
    assert torch.allclose(coarse[:, : 3 * 64 * 32], means.flatten(1), atol=1e-6)


def test_smoothing_keeps_the_mean_of_flat_maps_and_spreads_a_peak():
    flat = torch.full((1, 256, 256), 3.0)
    assert torch.allclose(gaussian(flat, 4), flat)
    peak = torch.zeros(1, 256, 256)
    peak[0, 100, 120] = 1
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    expected = torch.exp(-((y - 100) ** 2 + (x - 120) ** 2) / (2 * 4**2)) / (2 * torch.pi * 4**2)
    assert torch.allclose(gaussian(peak, 4)[0], expected, atol=1e-5)


def test_several_scorers_share_one_pass_and_are_those_fitted_alone(model, images):
    passes = []
    model.stem.register_forward_hook(lambda *_: passes.append(1))
    options = [ScoreOptions(), ScoreOptions("bank", 2)]
    together = fit_all(model, Pictures(images), options)
    count = len(passes)
    scored = score_all(together, Pictures(images))
    assert len(passes) == count + 1
    for scorer, option, found in zip(together, options, scored, strict=True):
        alone = Scorer.fit(model, Pictures(images), option)
        assert alone.calibration == scorer.calibration
        for other in (alone.score(images), scorer.score_all(Pictures(images))):
            assert all(map(torch.equal, other, found))


def test_latents_that_do_not_fit_in_memory_are_computed_again(model, images, monkeypatch):
    kept = Scorer.fit(model, Pictures(images), BANK)
    monkeypatch.setattr(scorer_module, "free_memory", lambda device: 0)
    again = Scorer.fit(model, Pictures(images), BANK)
    assert again.calibration == kept.calibration
    assert all(map(torch.equal, again.templates, kept.templates))


def test_the_zero_template(model, images):
    scorer = Scorer.fit(model, Pictures(images), template="zero")
    assert not any(t.any() for t in scorer.templates)
    scores = scorer.score(images).scores
    assert scorer.calibration.image_scores == pytest.approx(scores.sort().values.tolist())


def test_what_a_scorer_was_fitted_with_shows(model, images):
    for options in (
        ScoreOptions("paper", 1, False, 0.0),
        ScoreOptions("bank", 1, True),
        ScoreOptions("bank", 3, False, 2.0),
    ):
        assert Scorer.fit(model, Pictures(images), options).options == options
    more = Scorer.fit(model, Pictures(images), ScoreOptions("bank", 99))
    assert more.options == ScoreOptions("bank", 1 + COUNT)


def test_no_images_and_infinite_scores(model, images):
    with pytest.raises(ValueError, match="at least one image"):
        Scorer.fit(model, Pictures(images[:0]))
    scorer = Scorer.fit(model, Pictures(images))
    scorer.templates = tuple(t / 0 for t in scorer.templates)
    with pytest.raises(DivergedError, match="no longer finite"):
        scorer.score_all(Pictures(images))


@pytest.mark.parametrize("options", [ScoreOptions(), BANK])
def test_the_image_template(model, images, options):
    """The mean's, or that of the template nearest to an image."""
    scorer = Scorer.fit(model, Pictures(images), options)
    sigma = scorer.sigma or [torch.ones(CONFIG.channels)] * CONFIG.num_level
    templates = [t * s[:, None, None] for t, s in zip(scorer.templates, sigma, strict=True)]
    latents = latents_of(model, images)
    for i in range(COUNT):
        means = [
            map_against(model, one(latents, i), one(templates, k), sigma).mean() for k in range(len(templates[0]))
        ]
        expected = model.inverse(tuple(one(templates, int(torch.stack(means).argmin()))))[0]
        assert torch.allclose(scorer.image_template(images[i].numpy()), expected, atol=1e-3)
    mean = [z.mean(0, keepdim=True) for z in latents]
    assert torch.allclose(scorer.image_template(), model.inverse(tuple(mean))[0], atol=1e-3)


@pytest.mark.parametrize("options", [ScoreOptions(), ScoreOptions("bank", 3, True, 1.5)])
def test_a_scorer_survives_its_file(model, images, options, tmp_path):
    scorer = Scorer.fit(model, Pictures(images), options, class_name="widget", settings={"seed": 3})
    scorer.metrics = {"epoch": 2, "score": options.score, **dict.fromkeys(METRICS, 0.5), "image_ap": None}
    scorer.save(tmp_path / "a.pt")
    loaded = Scorer.load(tmp_path / "a.pt", precision="fp32")
    assert all(map(torch.equal, loaded.score(images), scorer.score(images)))
    loaded.save(tmp_path / "b.pt")
    again = Scorer.load(tmp_path / "b.pt", precision="fp32")
    assert all(map(torch.equal, again.templates, scorer.templates))
    for name in ("metrics", "calibration", "class_name", "settings", "options"):
        assert getattr(loaded, name) == getattr(scorer, name)


def test_on_cuda_free_memory_limits_the_batch_of_an_evaluation(monkeypatch):
    config = PyramidFlowConfig()  # a feature of 256x256x64
    for free, expected in ((2**40, 16), (2**31, 4), (2**20, 1)):
        monkeypatch.setattr(scorer_module, "free_memory", lambda device, free=free: free)
        assert batch_size(config, torch.device("cuda")) == expected


# --------------------------------------------------------------------------------- thresholds


def test_each_image_is_scored_against_the_mean_of_the_others(model, images):
    scorer = Scorer.fit(model, Pictures(images))
    expected = []
    for i in range(COUNT):
        others = Scorer.fit(model, Pictures(torch.cat([images[:i], images[i + 1 :]])))
        expected.append(float(others.score(images[i : i + 1]).scores))
    assert scorer.calibration.image_scores == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize("image_score", ["max", "detail"])
@pytest.mark.parametrize("count", [2, 3, COUNT + 3])
def test_an_image_in_the_bank_is_scored_against_the_others_in_it(model, images, count, image_score):
    options = ScoreOptions("bank", count, smooth=0.0, image_score=image_score)
    scorer = Scorer.fit(model, Pictures(images), options)
    latents = latents_of(model, images)
    chosen, _ = greedy(latents, count - 1)
    expected, maps = [], []
    for i in range(COUNT):
        rest = [torch.cat([z[:i], z[i + 1 :]]).mean(0, keepdim=True) for z in latents]
        mean = [m / s[:, None, None] for m, s in zip(rest, scorer.sigma, strict=True)]
        kept = [1 + place for place, k in enumerate(chosen) if k != i]
        bank = [torch.cat([m, t[kept]]) for m, t in zip(mean, scorer.templates, strict=True)]
        typical = 1 + sum(k != i for k in chosen[: scorer.num_typical - 1])
        others = Scorer(model, tuple(bank), typical, scorer.sigma, image_score=image_score)
        found = others.score(images[i : i + 1])
        expected.append(float(found.scores))
        maps.append(found.maps)
    assert scorer.calibration.image_scores == pytest.approx(sorted(expected), rel=1e-4)
    pixels = distribution(Scored(torch.cat(maps), torch.zeros(COUNT))).pixel_scores
    assert scorer.calibration.pixel_scores == pytest.approx(pixels, rel=1e-3, abs=1e-4)
    assert min(expected) > 0.1 * max(expected)  # none with itself


def test_a_whitened_mean_is_calibrated_as_the_mean_is(model, images):
    by_max, scorer = (
        Scorer.fit(model, Pictures(images), ScoreOptions("bank", 1, image_score=kind)) for kind in ("max", "auto")
    )
    latents = latents_of(model, images)
    expected, details = [], []
    for i in range(COUNT):
        others = [torch.cat([z[:i], z[i + 1 :]]).mean(0, keepdim=True) for z in latents]
        anomaly = at_mask_size(map_against(model, one(latents, i), others, scorer.sigma))
        expected.append(float(anomaly.max()))
        details.append(detail(anomaly))
    assert by_max.calibration.image_scores == pytest.approx(sorted(expected), rel=1e-4)
    assert scorer.calibration.image_scores == pytest.approx(sorted(details), rel=1e-3)


def test_one_image_has_no_others(model, images):
    for options in (ScoreOptions(), BANK):
        scorer = Scorer.fit(model, Pictures(images[:1]), options)
        assert scorer.calibration is None
        assert torch.isfinite(scorer.score(images).maps).all()


def test_quantiles_of_pixels_and_images():
    maps = torch.arange(4 * 100 * 100.0).view(4, 100, 100)
    calibration = distribution(scored(maps))
    assert len(calibration.pixel_scores) == len(LEVELS)
    for q in (0.0, 0.25, 0.5, 0.99, 0.999, 1.0):
        thresholds = calibration.thresholds(pixel_quantile=q, image_quantile=q)
        assert thresholds.pixel == pytest.approx(q * (maps.numel() - 1), abs=2)
        assert thresholds.image == pytest.approx(np.quantile([9999, 19999, 29999, 39999], q))


def test_the_color_scale_leaves_room_above_good_pixels():
    low, high = distribution(scored(torch.rand(3, 64, 64))).color_scale()
    assert low == pytest.approx(0, abs=0.01)
    assert high == pytest.approx(2, abs=0.02)


def test_a_color_scale_is_never_empty():
    for score in (-1e10, 0.0, 1e-30, 1e10):
        low, high = Calibration([1.0], [score] * len(LEVELS)).color_scale()
        assert high > low


def test_a_calibration_survives_its_dict():
    calibration = distribution(scored(torch.rand(3, 8, 8)))
    assert Calibration.from_dict(asdict(calibration)) == calibration


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
    given = asdict(distribution(scored(torch.rand(3, 8, 8))))
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own message)
        Calibration.from_dict({**given, **change})


def test_the_choices_of_a_threshold():
    calibration = Calibration([1.0, 2.0, 3.0], np.linspace(0, 1, len(LEVELS)).tolist())
    metrics = {"pixel_threshold": 0.4, "image_threshold": 0.6}
    quantiles = (1.0, 0.5)
    chosen = choose_thresholds("quantile", metrics, calibration, quantiles)
    assert (chosen.pixel, chosen.image) == (1.0, 2.0)
    chosen = choose_thresholds("f1", metrics, calibration, quantiles)
    assert (chosen.pixel, chosen.image) == (0.4, 0.6)
    chosen = choose_thresholds("f1", {**metrics, "pixel_threshold": None}, None, quantiles)
    assert (chosen.pixel, chosen.image) == (0.6, 0.6)
    chosen = choose_thresholds("0.25", metrics, None, quantiles)
    assert (chosen.pixel, chosen.image) == (0.25, 0.25)
    chosen = choose_thresholds("0.25,3", metrics, None, quantiles)
    assert (chosen.pixel, chosen.image) == (3.0, 0.25)


@pytest.mark.parametrize("choice", ["f1", "recall", "0.6"])
def test_a_threshold_of_images_says_nothing_of_pixels_that_are_scored_otherwise(choice):
    """A bank's images are scored by detail, of which maps have many times as much."""
    calibration = Calibration([1.0, 2.0, 3.0], np.linspace(0, 10, len(LEVELS)).tolist())
    metrics = {"pixel_threshold": None, "image_threshold": 0.6, "image_recall_threshold": 0.6}
    expected = {"max": pytest.approx(0.6, rel=0.02), "detail": calibration.thresholds().pixel}
    for image_score, pixel in expected.items():
        chosen = choose_thresholds(choice, metrics, calibration, image_score=image_score)
        assert chosen.pixel == pixel
        assert chosen.image == pytest.approx(0.6, rel=0.02)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("quantile", "fit it on at least two"),
        ("f1", "use --threshold quantile or a number"),
        ("high", "use quantile, none, f1, recall, a number"),
        ("1e39", "use quantile, none, f1, recall, a number"),
        ("nan", "use quantile, none, f1, recall, a number"),
        ("1,2,3", "use quantile, none, f1, recall, a number"),
        ("1,", "use quantile, none, f1, recall, a number"),
    ],
)
def test_a_threshold_that_cannot_be_had(choice, message):
    with pytest.raises(InputError, match=message):
        choose_thresholds(choice, {"pixel_threshold": None, "image_threshold": None}, None, (0.9, 0.9))


# ---------------------------------------------------------------------------------- inspecting


def test_a_region_of_other_proportions_is_said_to_be_stretched(tmp_path):
    for name, shape in (("roi", (50, 100)), ("half", (100, 201)), ("square", (64, 64))):
        save_image(tmp_path / f"{name}.png", np.full(shape, 255, np.uint8))
    roi, half, square = (tmp_path / f"{name}.png" for name in ("roi", "half", "square"))
    (line,) = roi_remarks(roi, [square])
    assert "is 50x100" in line
    assert "64x64: it is stretched" in line
    missing = tmp_path / "missing.png"
    for given, images in ((roi, [half]), (None, [square]), (roi, []), (roi, [missing]), (missing, [roi])):
        assert roi_remarks(given, images) == []


@pytest.mark.parametrize("as_file", [True, False])
def test_a_region_in_an_alpha_channel_is_refused(tmp_path, as_file):
    region = np.full((8, 8, 4), 255, dtype=np.uint8)
    save_image(tmp_path / "roi.png", region)
    assert read_roi(tmp_path / "roi.png" if as_file else region).all()
    region[:4, :, 3] = 0
    save_image(tmp_path / "roi.png", region)
    with pytest.raises(InputError, match="alpha channel; save it in black and white"):
        read_roi(tmp_path / "roi.png" if as_file else region)
    palette = Image.fromarray(np.repeat([[0], [1]], 4, axis=1).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255] * 2)
    palette.save(tmp_path / "palette.png", transparency=0)
    with pytest.raises(InputError, match="alpha channel"):
        read_roi(tmp_path / "palette.png")


def test_arrays_files_and_lists_of_any_size_are_inspected_alike(trained, tmp_path):
    loaded = Scorer.load(str(trained.checkpoint), precision="fp32")
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (50, 70), dtype=np.uint8)
    images = [gray, np.stack([gray] * 3, 2), np.stack([gray] * 4, 2), tmp_path / "a.png", str(tmp_path / "a.png")]
    save_image(tmp_path / "a.png", gray)
    many = loaded.inspect(images, batch_size=2)
    for result in [*many, loaded.inspect(gray)]:
        assert (result.map.dtype, result.map.shape) == (np.float32, (50, 70))
        assert (result.mask.dtype, result.mask.shape) == (bool, (50, 70))
        assert result.score == pytest.approx(many[0].score, rel=1e-4)
        x, y = result.peak
        assert result.map[y, x] == result.map.max()
    thresholds = loaded.calibration.thresholds()
    assert many[0].defective == (many[0].score >= thresholds.image)
    assert np.array_equal(many[0].mask, many[0].map >= np.float32(thresholds.pixel))
    assert loaded.inspect([]) == []


def test_a_verdict_names_its_defects(trained):
    loaded = Scorer.load(trained.checkpoint, precision="fp32")
    path = sorted((trained.data / "widget" / "test" / "hole").iterdir())[0]  # a square at (10,4)
    result = loaded.inspect(path, choose_thresholds("f1", loaded.metrics, None, (0, 0)))
    assert result.defective
    largest = max(result.defects, key=lambda defect: defect.area)
    x0, y0, x1, y1 = largest.box
    assert x0 < 14 < x1
    assert y0 < 8 < y1
    assert largest.peak == pytest.approx(result.map[y0:y1, x0:x1].max())
    assert largest.mean <= largest.peak
    assert sum(defect.area for defect in result.defects) == result.mask.sum()


def test_regions_are_connected_along_corners_and_small_ones_dropped():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[1, 1] = mask[4, 5] = True
    values = np.arange(48, dtype=np.float32).reshape(6, 8)
    kept, defects = find_defects(mask, values)
    assert np.array_equal(kept, mask)
    assert defects == [Defect((0, 0, 2, 2), 2, 9.0, 4.5), Defect((5, 4, 6, 5), 1, 37.0, 37.0)]
    kept, defects = find_defects(mask, values, 2)
    assert defects == [Defect((0, 0, 2, 2), 2, 9.0, 4.5)]
    assert kept.sum() == 2
    assert find_defects(mask, values, 3)[1] == []
    assert not find_defects(mask, values, 3)[0].any()


def test_only_the_part_is_inspected(trained):
    loaded = Scorer.load(trained.checkpoint, precision="fp32")
    path = sorted((trained.data / "widget" / "test" / "hole").iterdir())[0]
    roi = np.zeros((16, 16), bool)
    roi[:, 12:] = True
    whole, inside = loaded.inspect(path), loaded.inspect(path, roi=roi)
    assert inside.score < whole.score
    assert inside.peak[0] >= 24
    assert not inside.mask[:, :24].any()
    assert (inside.map[:, :24] == whole.map.min()).all()
    everything = loaded.inspect(path, roi=np.ones((3, 3), np.uint8))
    assert (everything.score, everything.peak) == (whole.score, whole.peak)
    assert np.array_equal(everything.map, whole.map)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (256, 256), (1000, 3)])
def test_a_small_part_does_not_vanish(size):
    roi = np.zeros((500, 600), bool)
    roi[301, 77] = True
    assert resize_roi(roi, size).any()
    assert resize_roi(~np.zeros((3, 3), bool), size).all()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), float), ((4, 4, 2), "u1"), ((1, 4, 4, 3), "u1"), ((0, 4), "u1")]
)
def test_what_is_no_image_is_not_inspected(trained, shape, dtype):
    with pytest.raises(InputError, match="an image of"):
        Scorer.load(trained.checkpoint).inspect(np.zeros(shape, dtype))


def test_without_thresholds_there_is_no_verdict(trained):
    loaded = Scorer.load(trained.checkpoint)
    loaded.calibration = None
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="no scores of good images"):
        loaded.inspect(image)
    assert loaded.inspect(image, Thresholds(0.0, 0.0)).defective
    with pytest.raises(InputError, match="all black"):
        loaded.inspect(image, Thresholds(0.0, 0.0), roi=np.zeros((4, 4), bool))


def test_images_that_are_all_alike_are_not_defective():
    thresholds = Calibration([0.0] * 4, [0.0] * len(LEVELS)).thresholds()
    assert 0 < thresholds.pixel == thresholds.image < 1e-30


def test_a_class_name_that_is_no_text(trained, tmp_path):
    nested = []
    for _ in range(40):
        nested = [nested, nested]
    content = scorer_module.load_checkpoint(trained.checkpoint)
    scorer_module.save_checkpoint(tmp_path / "a.pt", {**content, "class": nested})
    with pytest.raises(InputError, match=r"is damaged \(class name"):
        Scorer.load(tmp_path / "a.pt")
