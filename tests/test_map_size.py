"""Maps as fine as the image, scores of several pixels, and of the part alone: in files, metrics and the graph."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, Pictures, make_class, read_images, save_image
from PIL import Image

import evaluate
import export
import fit
import predict
import train
from fit import with_map_size
from metrics import GroundTruth, Ranking, evaluate_maps
from model import PyramidFlow, PyramidFlowConfig
from scorer import ScoreOptions, Scorer, image_scores, load_checkpoint, see_level
from util import InputError
from verdict import Scored, distribution, resize_roi


def small_config(**changes):
    return PyramidFlowConfig(
        **{"encoder": "none", "num_level": 2, "num_stack": 1, "num_channel": 4, "kernel_size": 3, **changes}
    )


def fitted(config, count=3, **options):
    torch.manual_seed(0)
    model = PyramidFlow(config).eval()
    images = torch.randint(100, 110, (count, *config.image_size, 3), dtype=torch.uint8)
    return Scorer.fit(model, Pictures(images), ScoreOptions(**options)), images


# ------------------------------------------------------------------------------------ the size


def test_a_defect_of_four_pixels_keeps_its_peak_in_a_native_map():
    size = (1024, 1024)
    peaks = {}
    for given in ([256], ["native"]):
        config = with_map_size(small_config(image_size=size), given)
        scorer, images = fitted(config, count=2)
        defective = images[:1].clone()
        defective[0, 600:602, 300:302] = 255
        maps, scores = scorer.score(defective)
        assert maps.shape == (1, *config.map_size)
        y, x = np.unravel_index(int(maps[0].argmax()), config.map_size)
        assert abs(y * 1024 / config.map_size[0] - 600) <= 4
        assert abs(x * 1024 / config.map_size[1] - 300) <= 4
        whole = scorer.differences(scorer.model((defective.float() / 255).permute(0, 3, 1, 2))[0])[0]
        assert whole.shape == (1, *size)
        peaks[given[0]] = float(scores)
        if given == ["native"]:
            assert config.map_size == size
            assert 600 <= y <= 601
            assert 300 <= x <= 301
    assert peaks[256] < 0.5 * peaks["native"]


def test_sizes_need_not_be_square():
    for given, encoder, expected in (
        (["native"], "none", (64, 1024)),
        (["native"], "resnet18", (16, 256)),
        ([32, 500], "none", (32, 500)),
        ([100], "none", (100, 100)),
    ):
        config = with_map_size(small_config(encoder=encoder, image_size=(64, 1024)), given)
        assert config.map_size == expected
        if encoder == "none":
            scorer, images = fitted(config)
            assert scorer.score(images).maps.shape == (3, *expected)
            result = scorer.inspect(np.zeros((416 // 4, 4096 // 4, 3), np.uint8))
            assert result.map.shape == (104, 1024)


def test_a_native_run_from_training_to_the_graph(tmp_path, run_main):
    """Non-square images; maps, masks, thresholds and the exported model have one size."""
    make_class(tmp_path / "data")
    size, flags = (32, 64), ["--imageSize", 32, 64, "--mapSize", "native", "--imageScore", "top"]
    place = ["--datapath", tmp_path / "data", "--saveDir", tmp_path / "runs"]
    code, _, err = run_main(train.main, [*SMALL, *flags, *place, "--epochs", 1])
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    stored = load_checkpoint(run / "last.pt")
    assert (stored["config"]["map_size"], stored["image_score"]) == ([32, 64], "top")
    code, _, err = run_main(train.main, ["--resume", run, "--epochs", 2, "--mapSize", "native"])
    assert code == 0, err
    code, _, err = run_main(train.main, ["--resume", run, "--epochs", 3, "--mapSize", 64])
    assert code == 2
    assert "--mapSize [64] contradicts the run" in err

    common = ["--gpu", "cpu", "--precision", "fp32"]
    code, _, err = run_main(evaluate.main, [run, *place[:2], "--out", tmp_path / "evaluations", *common])
    assert code == 0, err
    (folder,) = (tmp_path / "evaluations").iterdir()
    result, metrics = (
        json.loads((folder / "result.json").read_text()),
        load_checkpoint(run / "last.pt")["metrics"],
    )
    for name in ("pixel_auroc", "pixel_pro", "image_auroc", "pixel_threshold", "image_threshold"):
        assert result[name] == metrics[name]
    assert (folder / "report.html").is_file()

    code, _, err = run_main(export.main, [run / "last.pt", tmp_path / "a.onnx"])
    assert code == 0, err
    exported = export.OnnxScorer(tmp_path / "a.onnx")
    assert (exported.image_size, exported.map_size, exported.roi) == (size, size, None)
    scores = []
    for i, model in enumerate([run / "last.pt", tmp_path / "a.onnx"]):
        given = common if i == 0 else common[:2]
        images, out = tmp_path / "data" / "widget" / "test", tmp_path / f"out{i}"
        code, _, err = run_main(predict.main, [model, images, "--out", out, *given])
        assert code == 0, err
        rows = list(csv.DictReader((out / "scores.csv").open()))
        scores.append([float(row["score"]) for row in rows])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_fit_and_evaluate_change_the_size_and_the_score(trained, tmp_path, run_main):
    good, common = trained.data / "widget" / "train" / "good", ["--gpu", "cpu", "--precision", "fp32"]
    flags = ["--mapSize", 40, 50, "--imageScore", "top"]
    code, _, err = run_main(fit.main, [trained.checkpoint, good, "--out", tmp_path / "new.pt", *flags, *common])
    assert code == 0, err
    new = Scorer.load(tmp_path / "new.pt")
    assert (new.map_size, new.options.image_score, new.options.score) == ((40, 50), "top", "paper")
    place = ["--datapath", trained.data, "--out", tmp_path / "out", *common]
    rows = []
    for model, extra in ((tmp_path / "new.pt", []), (trained.checkpoint, flags)):
        code, _, err = run_main(evaluate.main, [model, *place, *extra])
        assert code == 0, err
        folder = sorted((tmp_path / "out").iterdir())[-1]
        rows.append(json.loads((folder / "result.json").read_text()))
        assert (folder / "scorer.pt").exists() == bool(extra)
    for name in ("pixel_auroc", "image_auroc", "image_threshold", "pixel_threshold"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


def test_a_file_without_these_entries_has_the_papers(trained, tmp_path):
    content = load_checkpoint(trained.checkpoint)
    assert content["config"]["map_size"] == [256, 256]
    del content["config"]["map_size"], content["image_score"], content["roi"]
    torch.save(content, tmp_path / "old.pt")
    old = Scorer.load(tmp_path / "old.pt", precision="fp32")
    new = Scorer.load(trained.checkpoint, precision="fp32")
    assert (old.map_size, old.image_score, old.roi) == ((256, 256), "max", None)
    image = np.full((32, 32, 3), 100, np.uint8)
    assert old.inspect(image).score == new.inspect(image).score


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("map_size", [0, 5], "configuration value"),
        ("map_size", [5], "configuration value"),
        ("map_size", [2**15, 5], "configuration value"),
        ("map_size", ["5", 5], "configuration value"),
        ("image_score", "mean", "image score"),
        ("roi", torch.ones(2, 2, dtype=torch.bool), "region of the part has shape"),
        ("roi", torch.zeros(256, 256, dtype=torch.bool), "region of the part is empty"),
        ("roi", "all", "region of the part is not a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(trained, tmp_path, key, value, message):
    content = load_checkpoint(trained.checkpoint)
    (content["config"] if key == "map_size" else content)[key] = value
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        Scorer.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mapSize", 0], "not a whole number from 1"),
        (["--mapSize", "fine"], "not a whole number from 1"),
        (["--mapSize", 1, 2, 3], "--mapSize takes native, one number, or two"),
        (["--mapSize", "native", 3], "--mapSize takes native, one number, or two"),
        (["--imageScore", "mean"], "invalid choice"),
        (["--roi", "nowhere.png"], "no image nowhere.png; choose a file that is there"),
    ],
)
@pytest.mark.parametrize("main", [train.main, evaluate.main, fit.main], ids=["train", "evaluate", "fit"])
def test_bad_flags(trained, tmp_path, run_main, main, flags, message):
    good = trained.data / "widget" / "train" / "good"
    given = {
        train.main: [*SMALL, "--datapath", trained.data, "--saveDir", tmp_path / "runs"],
        evaluate.main: [trained.checkpoint, "--datapath", trained.data, "--out", tmp_path / "out"],
        fit.main: [trained.checkpoint, good, "--out", tmp_path / "new.pt"],
    }[main]
    code, _, err = run_main(main, [*given, "--gpu", "cpu", *flags])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "new.pt").exists()
    assert not (tmp_path / "out").exists()


def test_weights_do_not_depend_on_the_size_of_maps(trained, tmp_path, run_main):
    """So a run may start from a checkpoint that has another one."""
    flags = ["--datapath", trained.data, "--saveDir", tmp_path / "runs", "--epochs", 1, "--mapSize", 64]
    code, _, err = run_main(train.main, [*SMALL, *flags, "--init", trained.checkpoint])
    assert code == 0, err


@pytest.mark.parametrize(
    ("map_size", "smooth", "image_score"),
    [((32, 64), 1.0, "top"), ((16, 90), 9.0, "detail"), ((3, 200), 9.0, "top"), ((3, 200), 1.0, "detail")],
)
def test_the_graph_has_the_size_and_the_score(map_size, smooth, image_score):
    """Also where the Gaussian is wider than one side."""
    config, bank = (small_config(image_size=(32, 64), map_size=map_size), {"score": "bank", "num_template": 3})
    scorer, images = fitted(config, **bank, smooth=smooth, image_score=image_score)
    graph = export.Graph(scorer).eval()
    for roi in (torch.ones(map_size, dtype=torch.bool), torch.rand(map_size) < 0.3):
        with torch.no_grad():
            maps, scores, _, mask = graph(images, torch.zeros(1), torch.zeros(1), roi)
        expected = scorer.score(images, roi)
        assert maps.shape == (3, *map_size)
        assert not mask[:, ~roi].any()
        assert_close(Scored(maps, scores), expected)


def test_an_onnx_file_has_the_size_and_the_region_of_the_part(tmp_path):
    config = small_config(image_size=(32, 64), map_size=(3, 200))
    scorer, images = fitted(config, score="bank", num_template=3, smooth=9.0, image_score="top")
    scorer.roi = torch.rand(config.map_size) < 0.7
    export.export_onnx(scorer, tmp_path / "a.onnx")
    exported = export.OnnxScorer(tmp_path / "a.onnx")
    assert torch.equal(exported.roi, scorer.roi)
    for roi in (None, torch.rand(config.map_size) < 0.3):
        assert_close(exported.score(images, roi), scorer.score(images, roi))
    mask = exported._session.run(["mask"], {"image": images.numpy()})[0]
    assert not mask[:, ~scorer.roi.numpy()].any()


def assert_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() < 1e-4 * y.max()


def test_in_the_graph_what_is_no_number_is_defective():
    """There is nobody to raise an error."""
    scorer, images = fitted(small_config(image_size=(32, 64)))
    scorer.templates = tuple(t * torch.nan for t in scorer.templates)
    everywhere = torch.ones(256, 256, dtype=torch.bool)
    given = torch.tensor([1.0]), torch.tensor([1.0]), everywhere
    _, scores, defective, mask = export.Graph(scorer)(images, *given)
    assert scores.isnan().all()
    assert defective.all()
    assert mask.all()


# ------------------------------------------------------------------------------- scores of images


def test_top_is_the_mean_of_the_highest_in_a_thousand_pixels():
    maps = torch.rand(3, 50, 81)  # 4050 pixels: 5
    expected = maps.flatten(1).sort().values[:, -5:].mean(1)
    assert torch.allclose(image_scores(maps, "top"), expected)
    assert torch.equal(image_scores(maps, "max"), maps.amax((1, 2)))
    for share in (0.9, 0.3, 0.001):
        roi = torch.rand(50, 81) < share
        roi[3, 4] = True
        inside = maps[:, roi].sort().values
        count = math.ceil(inside.shape[1] / 1000)
        assert torch.allclose(image_scores(maps, "top", roi), inside[:, -count:].mean(1))
        assert torch.equal(image_scores(maps, "max", roi), inside[:, -1])
    maps[1, 7, 7] = torch.nan
    for kind in ("max", "top", "detail"):
        assert image_scores(maps, kind).isnan().tolist() == [False, True, False]


def test_one_bright_pixel_does_not_decide_by_top():
    """A defect of many pixels does."""
    maps = torch.zeros(2, 256, 256)
    maps[0, 5, 5] = 1.0
    maps[1, 5:14, 5:14] = 0.5
    assert image_scores(maps, "max").argmax() == 0
    assert image_scores(maps, "top").argmax() == 1


def test_detail_does_not_see_how_bright_the_whole_map_is(monkeypatch):
    """But what stands out of its surroundings."""
    maps = torch.rand(3, 256, 256)
    maps[1] += 5
    maps[2, 100:116, 100:116:2] += 1
    scorer, _ = fitted(small_config(image_size=(32, 64)), score="bank", num_template=3)
    monkeypatch.setattr(Scorer, "differences", lambda *_: (maps, maps))
    scorer.calibration = None
    scores = scorer.score_latents(()).scores
    assert scores[0] == pytest.approx(float(scores[1]), rel=0.2)
    assert scores[2] > 1.3 * scores[:2].max()


def test_an_image_unlike_the_good_ones_all_over_is_scored_by_its_level():
    maps, details, roi = torch.rand(4, 8, 8), torch.tensor([0.5, 9.0, 0.5, torch.nan]), torch.zeros(8, 8) > 0
    maps[0, :5], maps[1, :5], maps[2, :4] = 3.0, 3.0, 3.0
    assert torch.equal(see_level(details, maps, 3.0)[:3], torch.tensor([3.0, 9.0, 0.5]))
    assert see_level(details, maps, 3.0)[3].isnan()
    roi[:, :2], roi[:4] = True, True  # most of what is inside of it is above the level in all three
    assert torch.equal(see_level(details, maps, 3.0, roi)[:3], torch.tensor([3.0, 9.0, 3.0]))


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_are_defective_by_a_bank(value):
    scorer, images = fitted(small_config(image_size=(32, 64)), count=4, score="bank", num_template=3)
    blank, good = scorer.inspect([np.full((32, 64, 3), value, np.uint8), images[0].numpy()])
    assert blank.defective
    assert blank.score == pytest.approx(float(blank.map.max()), rel=1e-3)
    assert good.score < blank.score


def test_the_usual_score_of_an_image():
    """Of the paper's score the maximum; of a bank the detail, while the paper's beside it keeps its own."""
    assert ScoreOptions().image_score == "max"
    assert [o.image_score for o in ScoreOptions("bank").with_papers] == ["max", "detail"]
    for given in ("max", "top"):
        both = ScoreOptions("bank", image_score=given).with_papers
        assert [o.image_score for o in both] == [given, given]


def test_the_calibration_follows_the_score(tmp_path):
    config = small_config(image_size=(32, 64))
    (by_max, _), (by_top, images) = fitted(config), fitted(config, image_score="top")
    assert by_top.calibration.image_scores[-1] < by_max.calibration.image_scores[-1]
    assert by_top.calibration.pixel_scores == by_max.calibration.pixel_scores
    by_top.save(tmp_path / "a.pt")
    loaded = Scorer.load(tmp_path / "a.pt", precision="fp32")
    assert loaded.options == by_top.options
    assert torch.equal(loaded.score(images).scores, by_top.score(images).scores)


# ------------------------------------------------------------------------------------ the part


def test_outside_of_the_part_nothing_counts_for_metrics():
    """They are those of maps and masks that were cut."""
    torch.manual_seed(0)
    maps, masks = torch.rand(6, 20, 30), torch.rand(6, 20, 30) < 0.1
    masks[:3] = False
    defective, roi = masks.flatten(1).any(1), torch.zeros(20, 30, dtype=torch.bool)
    roi[4:18, 6:] = True
    scores = image_scores(maps, "max", roi)
    whole = evaluate_maps(maps, GroundTruth.from_masks(defective, masks, roi=roi), 0.3, scores)
    cut = GroundTruth.from_masks(defective, masks[:, 4:18, 6:].contiguous())
    assert whole == evaluate_maps(maps[:, 4:18, 6:].contiguous(), cut)
    pixels = distribution(Scored(maps, scores), roi).pixel_scores
    assert pixels == distribution(Scored(maps[:, 4:18, 6:], scores)).pixel_scores


def test_good_pixels_in_parts_rank_as_all_together(monkeypatch):
    torch.manual_seed(0)
    maps, masks = (torch.rand(7, 9, 9) * 20).round(), torch.rand(7, 9, 9) < 0.2
    truth = GroundTruth.from_masks(masks.flatten(1).any(1), masks)
    expected = evaluate_maps(maps, truth)
    monkeypatch.setattr("metrics.PART_PIXELS", 100)
    assert evaluate_maps(maps, truth) == expected
    parts = Ranking.of_pixels(maps, truth)
    whole = Ranking(maps[~masks], maps[masks])
    assert torch.equal(parts.above, whole.above)
    assert torch.equal(parts.reached, whole.reached)
    assert parts.num_good == whole.num_good


def test_the_part_from_training_to_the_verdict(tmp_path, run_main):
    """The defects lie outside of it, at 10 to 18 of 32 pixels."""
    make_class(tmp_path / "data")
    roi = np.zeros((64, 64), np.uint8)
    roi[:, 40:] = 255
    save_image(tmp_path / "roi.png", roi)
    place = ["--datapath", tmp_path / "data", "--saveDir", tmp_path / "runs", "--epochs", 1]
    code, _, err = run_main(train.main, [*SMALL, *place, "--roi", tmp_path / "roi.png"])
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    loaded = Scorer.load(run, precision="fp32")
    expected = torch.from_numpy(resize_roi(roi > 0, (256, 256)))
    assert torch.equal(loaded.roi, expected)
    assert loaded.metrics["pixel_auroc"] is None  # no defective pixel is left
    images = sorted((tmp_path / "data" / "widget" / "test" / "hole").iterdir())
    for result in loaded.inspect(images):
        assert result.peak[0] >= 20
        assert not result.mask[:, :20].any()
    maps, scores = loaded.score(read_images(images, (32, 32)))
    assert torch.equal(scores, maps[:, expected].amax(1))
    good = sorted((tmp_path / "data" / "widget" / "train" / "good").iterdir())
    everything = np.full((4, 4), 255, np.uint8)
    whole = [loaded.inspect(path, roi=everything).score for path in good]
    assert [loaded.inspect(path).score for path in good] != whole

    flags = ["--datapath", tmp_path / "data", "--out", tmp_path / "out", "--gpu", "cpu", "--precision", "fp32"]
    code, _, err = run_main(evaluate.main, [run, *flags])
    assert code == 0, err
    (folder,) = (tmp_path / "out").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["image_threshold"] == loaded.metrics["image_threshold"]
    out = ["--out", tmp_path / "predictions", "--gpu", "cpu", "--precision", "fp32"]
    code, _, err = run_main(predict.main, [run, images[0].parent, *out])
    assert code == 0, err
    for row in csv.DictReader((tmp_path / "predictions" / "scores.csv").open()):
        assert int(row["peak_x"]) >= 20
        mask = Image.open(tmp_path / "predictions" / row["map"].replace("maps", "masks").replace("tiff", "png"))
        assert not np.asarray(mask)[:, :20].any()
