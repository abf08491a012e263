"""From a folder of good images to thresholds: no test images, images held out, folders of any name."""

import csv
import json
import math
import shutil
from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import SMALL, make_class, save_image
from PIL import Image
from test_report import data_of

import dataset
import evaluate
import fit
import predict
import reproduce
import runs
import train
from dataset import AnomalyClass, hold_out, is_flat, load_masks, normalize, open_class, open_folders
from scorer import Scorer, load_checkpoint, save_checkpoint
from util import Clock, InputError
from verdict import LEVELS, RECALL_MARGIN, Calibration, choose_thresholds, named_thresholds

ONCE = [*SMALL[2:], "--epochs", 1]  # without --cls
PIXELS = np.linspace(0, 1, len(LEVELS)).tolist()


def only_run(tmp_path):
    (run,) = (tmp_path / "runs").iterdir()
    return run


def trained_on(run_main, tmp_path, *extra):
    """The run's folder, and what was printed."""
    code, out, err = run_main(train.main, [*ONCE, "--saveDir", tmp_path / "runs", *extra])
    assert code == 0, err
    return only_run(tmp_path), out


# --------------------------------------------------------------------------- good images alone


@pytest.mark.parametrize("score", ["paper", "bank"])
@pytest.mark.parametrize("given", ["class", "flat", "good"])
def test_good_images_alone_give_a_scorer(tmp_path, run_main, given, score):
    good = make_class(tmp_path / "data", num_test=0) / "train" / "good"
    place = {
        "class": ["--cls", "widget", "--datapath", tmp_path / "data"],
        "flat": ["--datapath", good],
        "good": ["--good", good],
    }[given]
    run, out = trained_on(run_main, tmp_path, *place, "--score", score)
    name = "widget" if given == "class" else "good"
    assert run.name.startswith(f"{name}-")
    (line,) = [line for line in out.splitlines() if "no test images" in line]
    assert "no metrics can be had" in line
    names = {p.name for p in run.iterdir()}
    assert names == {
        "config.json",
        "log.txt",
        "metrics.csv",
        "last.pt",
        "state.pt",
        "result.json",
        "report.html",
        "pictures",
    }

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "score", "seconds"]
    result = json.loads((run / "result.json").read_text())
    assert result["last"].keys() == {"epoch", "loss", "score"}
    assert result["thresholds"].keys() == {"quantile", "none"}
    assert not [key for key in result if key.startswith("best")]
    pictures = {str(p.relative_to(run / "pictures")) for p in (run / "pictures").rglob("*.png")}
    assert pictures >= {"curves.png", "histogram.png", "good/000_png.png"}

    images = tmp_path / "data" / "widget" / "train" / "good"
    arguments = [run / "last.pt", images, "--out", tmp_path / "out", "--gpu", "cpu"]
    code, _, err = run_main(predict.main, arguments)
    assert code == 0, err
    code, _, err = run_main(evaluate.main, [run / "last.pt", *place[-2:], "--out", tmp_path / "e"])
    assert (code, err.count("\n")) == (2, 1), err
    assert "no test images" in err or given == "good"


@pytest.mark.parametrize("score", ["paper", "bank"])
def test_the_report_of_good_images_alone_shows_each_with_its_own_score(tmp_path, run_main, score):
    """Training images are scored by the paper's score, as if the template had not seen them; nothing else is."""
    good = make_class(tmp_path / "data", num_test=0) / "train" / "good"
    run, _ = trained_on(run_main, tmp_path, "--good", good, "--score", score)
    html = (run / "report.html").read_text()
    shown = {t["name"]: t["score"] for t in data_of(run / "report.html")["tiles"]}
    paths = sorted(good.iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
    model = Scorer.load(run / "last.pt", precision="fp32").model
    for i, path in enumerate(paths):
        latents = [model(normalize(images[[j]]))[0] for j in range(len(paths))]
        others = [torch.cat([z[n] for j, z in enumerate(latents) if j != i]).mean(0, True) for n in range(2)]
        expected = Scorer(model, tuple(others)).score_latents(latents[i]).scores.item()
        assert shown[path.name] == pytest.approx(expected, rel=1e-3)
    assert "training images, each left out of the template, score paper" in html
    assert not data_of(run / "report.html")["labeled"]
    for absent in ("n/a", "false alarms", "mvtec_anomaly_detection"):
        assert absent not in html[: html.index("<script")]
    assert "test images" not in html[: html.index("<style")]


def test_a_checkpoint_that_knows_nothing_of_held_out_images_is_evaluated_on_test_images_alone(tmp_path, run_main):
    """Its training images may not become good test images."""
    folder = make_class(tmp_path / "data", num_train=60)
    shutil.rmtree(folder / "test" / "good")
    place = ["--cls", "widget", "--datapath", tmp_path / "data"]
    run, _ = trained_on(run_main, tmp_path, *place, "--holdout", 0)
    content = load_checkpoint(run / "last.pt")
    del content["settings"]["holdout"]
    save_checkpoint(run / "last.pt", content)
    code, _, err = run_main(evaluate.main, [run / "last.pt", *place[2:], "--out", tmp_path / "e", "--gpu", "cpu"])
    assert code == 0, err
    (result,) = (tmp_path / "e").glob("*/result.json")
    assert json.loads(result.read_text())["image_auroc"] is None


def test_without_test_images_the_training_is_the_same(tmp_path, run_main):
    """Weights and calibration do not depend on what comes after them."""
    make_class(tmp_path / "data")
    make_class(tmp_path / "bare", num_test=0)
    for name in ("data", "bare"):
        trained_on(run_main, tmp_path / name, "--cls", "widget", "--datapath", tmp_path / name)
    with_test, without = (load_checkpoint(only_run(tmp_path / n) / "last.pt") for n in ("data", "bare"))
    assert all(torch.equal(x, without["model"][name]) for name, x in with_test["model"].items())
    assert with_test["calibration"] == without["calibration"]


def test_a_run_without_test_images_is_resumed(tmp_path, run_main):
    good = make_class(tmp_path / "data", num_test=0) / "train" / "good"
    run, _ = trained_on(run_main, tmp_path, "--good", good)
    moved = good.rename(tmp_path / "elsewhere")
    code, _, err = run_main(train.main, ["--resume", run, "--epochs", 2, "--good", moved])
    assert code == 0, err
    assert [row["epoch"] for row in csv.DictReader((run / "metrics.csv").open())] == ["1", "2"]


@pytest.mark.parametrize("score", ["paper", "bank"])
def test_a_run_of_before_these_flags_is_resumed(tmp_path, run_main, score):
    make_class(tmp_path / "data")
    given = ["--cls", "widget", "--datapath", tmp_path / "data", "--score", score]
    run, _ = trained_on(run_main, tmp_path, *given)
    content = load_checkpoint(run / "state.pt")
    for name in train.ADDED_FLAGS:
        del content["settings"][name]
    for row in content["rows"]:
        del row["image_recall_threshold"]
    save_checkpoint(run / "state.pt", content)
    code, _, err = run_main(train.main, ["--resume", run, "--epochs", 2])
    assert code == 0, err
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {row["epoch"]: bool(row["image_recall_threshold"]) for row in rows} == {"1": False, "2": True}
    assert Scorer.load(run / "last.pt").image_score == "max"  # as it was


def test_keys_of_trainings_stay():
    """Of reproduce.py: flags that came later do not matter while they are at their defaults."""
    flags = ["--cls", "tile", "--encoder", "none"]
    key = reproduce.training_key(flags)
    assert key == "af98193f"
    assert reproduce.training_key([*flags, "--holdout", "auto", "--falseAlarm", "0.05"]) == key
    assert reproduce.training_key([*flags, "--mapSize", "256", "--imageScore", "max"]) == key
    for other in (["--holdout", "0.2"], ["--mapSize", "native"], ["--imageScore", "top"]):
        assert reproduce.training_key([*flags, *other]) != key


# --------------------------------------------------------------------------------- any folders


def test_bad_images_and_masks_in_folders_of_their_own(tmp_path, run_main):
    folder = make_class(tmp_path / "data", num_train=10)
    place = ["--good", folder / "train" / "good", "--bad", folder / "test" / "hole",
             "--masks", folder / "ground_truth" / "hole", "--holdout", 0.3]  # fmt: skip
    run, out = trained_on(run_main, tmp_path, *place, "--cls", "knob")
    assert run.name.startswith("knob-")
    assert "7 training and 6 test images, 3 good ones held out" in out
    result = json.loads((run / "result.json").read_text())
    assert result["last"]["pixel_auroc"] > 0.5
    assert result["last"]["image_auroc"] is not None
    assert result["thresholds"].keys() == {"quantile", "none", "f1", "recall"}
    assert {p.name for p in (run / "pictures").iterdir()} >= {"good", "bad"}
    assert load_checkpoint(run / "last.pt")["thresholds"] == result["thresholds"]
    arguments = [run / "last.pt", "--out", tmp_path / "e", "--gpu", "cpu", "--score", "paper"]
    code, _, err = run_main(evaluate.main, arguments)
    assert code == 0, err
    (again,) = (tmp_path / "e").glob("knob-*/result.json")
    for name in ("pixel_auroc", "image_auroc"):
        assert json.loads(again.read_text())[name] == pytest.approx(result["last"][name], abs=1e-3)
    assert "mvtec_anomaly_detection" not in (again.parent / "report.html").read_text()
    (folder / "test" / "hole").rename(tmp_path / "moved")
    code, _, err = run_main(evaluate.main, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be used" in err
    assert "give other data by --datapath and --cls" in err


def test_a_flat_folder_of_good_images_with_bad_ones_is_evaluated_again(tmp_path, run_main):
    folder = make_class(tmp_path / "data")
    place = ["--datapath", folder / "train" / "good", "--bad", folder / "test" / "hole"]
    run, _ = trained_on(run_main, tmp_path, *place, "--holdout", 0.3)
    code, out, err = run_main(evaluate.main, [run / "last.pt", "--out", tmp_path / "e", "--gpu", "cpu"])
    assert code == 0, err
    assert "| good | 1 (paper) |" in out


def test_a_data_set_on_the_command_line_wins_over_good_images_in_a_config(tmp_path, run_main):
    make_class(tmp_path / "data")
    (tmp_path / "a.yaml").write_text("good: elsewhere\nbad: there\ncls: elsewhere\n")
    args = train.parse_arguments(["--config", str(tmp_path / "a.yaml"), "--datapath", str(tmp_path / "data")])
    assert (args.good, args.bad, args.cls) == (None, None, ["tile"])
    words = ["--config", str(tmp_path / "a.yaml"), "--datapath", str(tmp_path), "--cls", "widget", "--bad", "x"]
    args = train.parse_arguments(words)
    assert (args.good, args.bad, args.cls) == (None, "x", ["widget"])


def test_masks_are_paired_by_name(tmp_path):
    folder = make_class(tmp_path)
    bad = folder / "test" / "hole"
    data = open_folders("x", folder / "train" / "good", bad, folder / "ground_truth" / "hole")
    assert [image.kind for image in data.test] == ["bad"] * 3
    assert load_masks(data, 1).flatten(1).any(1).all()
    assert not open_folders("x", folder / "train" / "good", bad, None).has_masks
    good = bad.rename(tmp_path / "good")  # a name does not make them good
    data = open_folders("x", folder / "train" / "good", good, folder / "ground_truth" / "hole")
    assert all(image.defective and image.mask for image in data.test)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--good", "nowhere"], "--good nowhere is not a folder"),
        (["--good", "empty"], "--good empty holds no images"),
        (["--good", "good", "--bad", "nowhere"], "--bad nowhere is not a folder"),
        (["--good", "good", "--bad", "empty"], "--bad empty holds no images"),
        (["--good", "good", "--bad", "good"], "is the folder of --good, too"),
        (["--good", "good", "--masks", "masks"], "give both"),
        (["--good", "good", "--bad", "bad", "--masks", "nowhere"], "--masks nowhere is not a folder"),
        (["--good", "good", "--bad", "bad", "--masks", "masks"], "000.png has no mask masks/000_mask.png"),
        (["--bad", "bad"], "--bad needs the folder of the good images"),
        (["--good", "good", "--datapath", "data"], "give one of them"),
        (["--good", "good", "--cls", "a", "b"], "good images of one class"),
        (["--good", "good", "--cls", "all"], "good images of one class"),
        (["--good", "good", "--holdout", 0.95], "not a number from 0 to 0.9"),
        (["--good", "good", "--holdout", "some"], "not a number from 0 to 0.9"),
        (["--good", "good", "--holdout", 0.9], "has 0 training images"),
        (["--good", "good", "--falseAlarm", 0], "not a number from 0.0001 to 1"),
        (["--good", "good", "--falseAlarm", "few"], "not a number from 0.0001 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, run_main, monkeypatch, extra, message):
    folder = make_class(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (folder / "train" / "good").rename("good")
    (folder / "test" / "hole").rename("bad")
    (tmp_path / "masks").mkdir()
    (tmp_path / "empty").mkdir()
    code, _, err = run_main(train.main, [*ONCE, "--saveDir", "runs", *extra])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_folder_with_classes_is_not_flat(tmp_path):
    folder = make_class(tmp_path)
    assert not is_flat(tmp_path)
    assert is_flat(folder / "train" / "good")
    save_image(tmp_path / "preview.png", np.zeros((8, 8), np.uint8))
    assert not is_flat(tmp_path)
    assert not is_flat(tmp_path / "nowhere")


def test_what_is_skipped_is_said_in_a_line(tmp_path):
    folder = make_class(tmp_path) / "train" / "good"
    (folder / "a.heic").write_bytes(b"x")
    (folder / "below").mkdir()
    (folder / ".hidden").write_bytes(b"x")
    for data in (open_class(tmp_path, "widget"), open_folders("x", folder, None, None)):
        (line,) = data.warnings
        assert "2 of " in line
        assert f"the first is {folder / 'a.heic'}" in line


def test_a_kind_whose_files_are_all_skipped_is_said(tmp_path):
    folder = make_class(tmp_path) / "test"
    (folder / "notes.txt").write_bytes(b"x")
    for name in ("crack/a.gif", "deep/inside/a.png"):
        save_image(folder / name, np.zeros((8, 8), np.uint8))
    (line,) = open_class(tmp_path, "widget").warnings
    assert "2 of 14 files and folders are skipped" in line
    assert f"the first is {folder / 'crack' / 'a.gif'}" in line


# ----------------------------------------------------------------------------------- layouts


def test_mvtec_ad_2(tmp_path):
    folder = make_class(tmp_path)
    (folder / "test").rename(folder / "test_public")
    (folder / "test_public" / "hole").rename(folder / "test_public" / "bad")
    (folder / "ground_truth" / "hole").rename(folder / "ground_truth" / "bad")
    (folder / "ground_truth").rename(folder / "test_public" / "ground_truth")
    data = open_class(tmp_path, "widget", need_train=False)
    assert [image.kind for image in data.test] == ["bad"] * 3 + ["good"] * 3
    assert load_masks(data, 1)[:3].flatten(1).any(1).all()
    assert "--proLimit 0.05" in data.warnings[0]


def realiad(tmp_path, change=None):
    folder = make_class(tmp_path, "cap")
    parts = {"train": [], "test": []}
    for path in sorted(folder.rglob("*.png")):
        part, kind = path.relative_to(folder).parts[:2]
        if part in parts:
            mask = f"ground_truth/hole/{path.stem}_mask.png" if kind == "hole" else None
            row = {"category": "cap", "anomaly_class": "OK" if kind == "good" else "HS",
                   "image_path": str(path.relative_to(folder)), "mask_path": mask}  # fmt: skip
            parts[part].append(row)
    (tmp_path / "cap.json").write_text(json.dumps({"meta": {}, **(change or (lambda x: x))(parts)}))
    for kind in ("train/good", "test/good"):
        (folder / kind).rename(folder / f"{kind}_")  # names that MVTec's layout does not have
    text = (tmp_path / "cap.json").read_text()
    (tmp_path / "cap.json").write_text(text.replace("/good/", "/good_/"))


def test_real_iad(tmp_path):
    realiad(tmp_path)
    data = open_class(tmp_path, "cap")
    assert (len(data.train), [image.kind for image in data.test]) == (6, ["HS"] * 3 + ["good"] * 3)
    assert load_masks(data, 1)[:3].flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: {"train": []}, "no 'test'"),
        (lambda parts: {**parts, "test": [{}]}, "no 'anomaly_class'"),
        (lambda parts: {**parts, "train": parts["test"]}, "a defective training image"),
        (lambda parts: {**parts, "train": [{**parts["train"][0], "image_path": "../a.png"}]}, "outside"),
        (lambda parts: {**parts, "train": [{**parts["train"][0], "image_path": "a.png"}]}, "is not in"),
        (lambda parts: {**parts, "train": 3}, "cannot read"),
        (lambda parts: {**parts, "test": []}, "no test images of class cap"),
        (
            lambda parts: {**parts, "test": [{**parts["test"][0], "anomaly_class": "/tmp/a"}]},
            "no name of a defect",
        ),
        (lambda parts: {**parts, "test": [{**parts["test"][0], "anomaly_class": ".."}]}, "no name of a defect"),
        (lambda parts: {**parts, "test": [{**parts["test"][0], "anomaly_class": 3}]}, "no name of a defect"),
    ],
)
def test_what_is_wrong_with_real_iads_file_is_named(tmp_path, change, message):
    realiad(tmp_path, change)
    with pytest.raises(InputError, match=message):
        open_class(tmp_path, "cap")


# ---------------------------------------------------------------------------------- held out


def paths(count):
    return [f"{i:03}" for i in range(count)]


def test_the_share_that_is_held_out():
    good, bad = dataset.TestImage("g", "good", None), dataset.TestImage("b", "hole", None)
    for test, count, share, expected in [
        ([], 49, "auto", 0),
        ([], 50, "auto", 5),
        ([bad], 50, "auto", 5),
        ([bad, good], 100, "auto", 0),
        ([bad, good], 100, 0.2, 20),
        ([], 50, 0.0, 0),
        ([], 10, 0.01, 1),
        ([], 49, None, 0),
    ]:
        data = AnomalyClass("x", paths(count), test)
        split = hold_out(data, share, 0)
        assert len(split.held_out) == expected
        assert sorted(split.train + split.held_out) == data.train
        assert len(split.test) == len(test) + (expected if test == [bad] else 0)
        assert split.held_out == hold_out(data, share, 0).held_out
    data = AnomalyClass("x", paths(50), [])
    assert hold_out(data, 0.2, 0).held_out != hold_out(data, 0.2, 1).held_out


@pytest.mark.parametrize("score", ["paper", "bank"])
def test_held_out_images_are_neither_trained_on_nor_templates(tmp_path, run_main, monkeypatch, score):
    good = make_class(tmp_path / "data", num_train=8) / "train" / "good"
    seen = []
    original = train.training_order
    monkeypatch.setattr(train, "training_order", lambda *given: seen.append(given[0]) or original(*given))
    run, out = trained_on(
        run_main, tmp_path, "--good", good, "--holdout", 0.25, "--score", score, "--falseAlarm", 0.4
    )
    assert seen == [6]
    scorer = Scorer.load(run / "last.pt")
    assert (scorer.calibration.held_out, scorer.calibration.false_alarm) == (True, 0.4)
    data = hold_out(open_folders("x", good, None, None), 0.25, 0)
    images = train.Images(data.held_out, (32, 32), "ram", torch.device("cpu"), 1, "x")
    scores = sorted(scorer.score_all(images).scores.tolist())
    assert scorer.calibration.image_scores == pytest.approx(scores, rel=1e-5)
    again = Scorer.fit(
        scorer.model, train.Images(data.train, (32, 32), "ram", torch.device("cpu"), 1, "x"), scorer.options
    )
    for ours, theirs in zip(again.templates, scorer.templates, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert "expect 33.3% of new good images" in out  # the 2nd of 2


def test_evaluating_again_holds_out_the_same_images(tmp_path, run_main):
    make_class(tmp_path / "data", num_train=8)
    place = ["--datapath", tmp_path / "data"]
    run, _ = trained_on(run_main, tmp_path, "--cls", "widget", *place, "--holdout", 0.5)
    extra = ["--score", "paper", "--out", tmp_path / "out", "--gpu", "cpu", "--precision", "fp32"]
    code, _, err = run_main(evaluate.main, [run / "last.pt", *place, *extra])
    assert code == 0, err
    (folder,) = (tmp_path / "out").iterdir()
    old, new = (Scorer.load(p).calibration for p in (run / "last.pt", folder / "scorer.pt"))
    assert new.held_out
    assert new.image_scores == pytest.approx(old.image_scores, rel=1e-5)


# --------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (20, 0.05), (99, 0.1), (7, 0.3), (5, 0.5)])
def test_the_conformal_threshold_keeps_its_promise(count, rate):
    """Over many sets of held-out scores, the share of new ones at or above it: its mean, and its interval."""
    rng = np.random.default_rng(0)
    rank = int(np.ceil((count + 1) * (1 - rate) - 1e-9))
    shares = []
    for _ in range(4000):
        scores = np.sort(rng.uniform(size=count)).tolist()
        threshold = Calibration(scores, PIXELS, True, rate).thresholds().image
        assert threshold == scores[rank - 1]
        shares.append(1 - threshold)  # of uniform numbers
    mean, low, high = Calibration(scores, PIXELS, True, rate).expected_false_alarms(rank)
    assert mean <= rate + 1e-9
    assert np.mean(shares) == pytest.approx(mean, abs=0.005)
    assert np.quantile(shares, [0.025, 0.975]) == pytest.approx([low, high], abs=0.015)


def test_too_few_images_take_the_largest_score_and_say_so():
    calibration = Calibration([1.0, 2.0, 3.0], PIXELS, True)
    assert calibration.thresholds().image == 3.0
    line = calibration.describe()
    assert "expect 25.0% of new good images" in line
    assert "hold out 19" in line
    enough = Calibration(np.arange(19.0).tolist(), PIXELS, True)
    assert enough.thresholds().image == 18.0
    assert "hold out" not in enough.describe()
    assert enough.thresholds(image_quantile=0.5).image == 9.0


def test_too_few_held_out_images_are_not_called_a_quantile():
    assert Calibration([1.0, 2.0, 3.0], PIXELS, True).meaning == "the highest of 3 held-out images"
    assert Calibration(np.arange(19.0).tolist(), PIXELS, True).meaning == "95% of held-out images"
    assert Calibration([1.0, 2.0, 3.0], PIXELS).meaning == "95% of training images"


def test_without_held_out_images_a_quantile_is_taken_as_it_is():
    scores = np.arange(10.0).tolist()
    assert Calibration(scores, PIXELS).thresholds().image == np.quantile(scores, 0.95)
    assert Calibration(scores, PIXELS, False, 0.2).thresholds().image == np.quantile(scores, 0.8)
    assert "the weights have seen" in Calibration(scores, PIXELS).describe()


def test_the_named_thresholds():
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0)).sort().values
    calibration = Calibration(scores.tolist(), PIXELS, True, 0.1)
    metrics = {"pixel_threshold": 0.4, "image_threshold": 0.6, "image_recall_threshold": 0.5}
    named = named_thresholds(metrics, calibration, "max")
    assert list(named) == ["quantile", "none", "f1", "recall"]
    assert named["quantile"]["image"] == scores[18]
    assert not (scores >= named["none"]["image"]).any()
    assert (scores >= np.nextafter(np.float32(named["none"]["image"]), np.float32(0))).any()
    assert (named["recall"]["pixel"], named["recall"]["image"]) == (0.4, 0.5 * (1 - RECALL_MARGIN))
    assert named["quantile"]["meaning"] == "above 90% of held-out images"
    assert list(named_thresholds({}, calibration, "max")) == ["quantile", "none"]
    for choice in ("none", "recall"):
        with pytest.raises(InputError, match="the checkpoint"):
            choose_thresholds(choice, {}, None)


def test_at_full_recall_no_defective_test_image_is_missed(trained):
    metrics = load_checkpoint(trained.checkpoint)["metrics"]
    assert metrics["image_recall_threshold"] <= metrics["image_threshold"]
    data = open_class(trained.data, "widget")
    images = train.Images([i.path for i in data.test if i.defective], (32, 32), "ram", torch.device("cpu"), 1, "x")
    scores = Scorer.load(trained.checkpoint).score_all(images).scores
    assert float(scores.min()) == pytest.approx(metrics["image_recall_threshold"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1}, "held-out"),
        *(({"false_alarm": rate}, "false-alarm rate") for rate in ("x", 0.0, math.nan)),
    ],
)
def test_a_calibration_that_no_flag_gives_is_refused(change, message):
    given = asdict(Calibration([1.0], PIXELS))
    assert Calibration.from_dict(given) == Calibration([1.0], PIXELS)
    old = {name: given[name] for name in ("image_scores", "pixel_scores")}
    assert Calibration.from_dict(old) == Calibration([1.0], PIXELS)
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict({**given, **change})


# -------------------------------------------------------------------------------- time, device


def test_the_log_says_how_long_it_will_take(tmp_path, run_main):
    good = make_class(tmp_path / "data", num_train=24) / "train" / "good"
    _, out = trained_on(run_main, tmp_path, "--good", good, "--epochs", 2)
    for text in ("of training are left", "1 evaluation included"):
        assert len([line for line in out.splitlines() if text in line]) == 1


def test_the_pace_of_a_run(monkeypatch):
    """The first step does not count; evaluations come on top."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    said = []
    pace = runs.Pace(100, 4, said.extend)
    pace.start()
    now[0] += 60
    pace.add(1)
    assert (str(pace), said) == ("?", [])
    for _ in range(9):
        now[0] += 2
        pace.add(1)
    assert str(pace) == "2 images/s, 3 min 00 s left"
    assert said == ["about 3 min 00 s of training are left, without evaluations"]
    clock = Clock(torch.device("cpu"))
    clock.seconds = {"training": 200.0, "template": 10.0, "test": 20.0}
    pace.evaluated(clock, runs.evaluations_left(Namespace(epochs=5, evalEvery=2), 2))
    assert str(pace) == "2 images/s, 4 min 00 s left"
    assert said[1:] == ["about 4 min 00 s are left, 2 evaluations included"]
    now[0] += 1000
    pace.start()
    now[0] += 2 * 90
    pace.add(90)
    assert (pace.seconds_left, len(said)) == (60, 2)


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "7 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")])
def test_durations(seconds, text):
    assert runs.duration(seconds) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is none")
def test_without_a_gpu_each_script_says_why(trained, tmp_path, run_main):
    good = trained.data / "widget" / "train" / "good"
    for main, arguments in (
        (evaluate.main, ["--datapath", trained.data, "--out", tmp_path / "out"]),
        (fit.main, [good, "--out", tmp_path / "new.pt"]),
    ):
        code, out, err = run_main(main, [trained.checkpoint, "--precision", "fp32", *arguments])
        assert code == 0, err
        assert out.startswith("no CUDA device (")
