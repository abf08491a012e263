"""evaluate.py gives what training gave, from the checkpoint alone, and the scores of other templates."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_class, save_image

import evaluate
import predict
from metrics import METRICS
from scorer import Scorer, load_checkpoint

KEYS = [*METRICS, "pixel_threshold", "image_threshold"]


def flags(trained, tmp_path, *extra):
    return [trained.checkpoint, "--datapath", trained.data, "--out", tmp_path / "out", "--gpu", "cpu",
            "--precision", "fp32", *extra]  # fmt: skip


def test_the_same_table_as_training(trained, tmp_path, run_main):
    """On the data of the training, if no others are given."""
    without_data = [x for x in flags(trained, tmp_path) if x not in ("--datapath", trained.data)]
    code, out, err = run_main(evaluate.main, without_data)
    assert code == 0, err
    (folder,) = (tmp_path / "out").iterdir()
    result = json.loads((folder / "result.json").read_text())
    metrics = load_checkpoint(trained.checkpoint)["metrics"]
    assert [result[m] for m in KEYS] == [metrics[m] for m in KEYS]
    assert result["settings"]["proLimit"] == 0.3
    assert (result["class"], result["score"], result["epoch"]) == ("widget", "paper", 2)
    log = (trained.run / "log.txt").read_text()
    (row,) = [line for line in log.splitlines() if "2 (last)" in line]
    assert row.split("|")[3:] == out.splitlines()[2].split("|")[3:]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*.*")}
    assert {"metrics.csv", "log.txt", "pictures/histogram.png", "pictures/roc_pro.png"} <= names
    assert "pictures/hole/000_png.png" in names
    assert "scorer.pt" not in names


def test_what_is_odd_about_the_data_is_said(trained, tmp_path, run_main):
    data = shutil.copytree(trained.data, tmp_path / "data")
    image = data / "widget" / "test" / "good" / "000.png"
    shutil.copy(data / "widget" / "train" / "good" / "000.png", image)
    roi = np.zeros((32, 32), np.uint8)
    roi[:12] = 255  # the second and third defect lie below
    save_image(tmp_path / "roi.png", roi)
    changed = [data if x == trained.data else x for x in flags(trained, tmp_path, "--roi", tmp_path / "roi.png")]
    code, out, err = run_main(evaluate.main, changed)
    assert code == 0, err
    assert "1 images are the same in training and test" in out
    assert "1 defective images have no defect inside of --roi and stay defective" in out
    (log,) = (tmp_path / "out").glob("*/log.txt")
    assert "the same in training and test" in log.read_text()


def test_another_score_without_training(trained, tmp_path, run_main):
    """Both rows; the paper's is that of the stored template; and a file that holds the new scorer."""
    extra = ["--score", "bank", "--numTemplate", 4, "--smooth", 2, "--proLimit", 0.1]
    code, out, err = run_main(evaluate.main, flags(trained, tmp_path, *extra))
    assert code == 0, err
    assert "| widget | 2 (paper) |" in out
    assert "| widget | 2 (bank) |" in out
    assert "PRO@0.1" in out
    (folder,) = (tmp_path / "out").iterdir()
    paper, bank = csv.DictReader((folder / "metrics.csv").open())
    stored = load_checkpoint(trained.checkpoint)["metrics"]
    assert (paper["score"], bank["score"]) == ("paper", "bank")
    assert float(paper["image_threshold"]) == pytest.approx(stored["image_threshold"], rel=1e-5)
    scorer = Scorer.load(folder / "scorer.pt")
    assert (scorer.options.num_template, scorer.options.whiten, scorer.smooth) == (4, True, 2)
    result = json.loads((folder / "result.json").read_text())
    assert {key: result[key] for key in scorer.metrics} == scorer.metrics
    # With its own thresholds it decides as these metrics say.
    images, scores = trained.data / "widget" / "test", tmp_path / "scores"
    arguments = ["--out", scores, "--threshold", "f1", "--gpu", "cpu", "--precision", "fp32"]
    code, _, err = run_main(predict.main, [folder / "scorer.pt", images, *arguments])
    assert code == 0, err
    with (scores / "scores.csv").open() as file:
        found = [row["decision"] == "defective" for row in csv.DictReader(file)]
    truth = [False] * 3 + [True] * 3
    both = sum(a and b for a, b in zip(found, truth, strict=True))
    assert 2 * both / (sum(found) + sum(truth)) == pytest.approx(result["image_f1_max"])
    again = [folder / "scorer.pt", *flags(trained, tmp_path)[1:]]
    code, out, err = run_main(evaluate.main, again)
    assert code == 0, err
    last = sorted((tmp_path / "out").iterdir())[-1]
    again = json.loads((last / "result.json").read_text())
    assert again["score"] == "bank"
    assert again["image_threshold"] == pytest.approx(result["image_threshold"], rel=1e-5)


def test_the_papers_score_of_other_images(trained, tmp_path, run_main):
    """--score paper makes the one template anew; it is that of training."""
    code, _, err = run_main(evaluate.main, flags(trained, tmp_path, "--score", "paper"))
    assert code == 0, err
    (folder,) = (tmp_path / "out").iterdir()
    result = json.loads((folder / "result.json").read_text())
    metrics = load_checkpoint(trained.checkpoint)["metrics"]
    assert [result[m] for m in KEYS] == pytest.approx([metrics[m] for m in KEYS], rel=1e-5)


def test_a_class_folder_without_training_images_is_enough(trained, tmp_path, run_main):
    shutil.copytree(trained.data, tmp_path / "data", ignore=shutil.ignore_patterns("train"))
    without = flags(trained, tmp_path, "--datapath", tmp_path / "data")
    code, _, err = run_main(evaluate.main, without)
    assert code == 0, err
    code, _, err = run_main(evaluate.main, [*without, "--score", "bank"])
    assert code == 2
    assert "no class 'widget'" in err


def test_another_class_only_where_it_is_meant(trained, tmp_path, run_main):
    make_class(tmp_path / "data", "gadget")
    other = flags(trained, tmp_path, "--datapath", tmp_path / "data", "--cls", "gadget")
    code, _, err = run_main(evaluate.main, other)
    assert code == 2
    assert "is of class widget, not gadget" in err
    assert not (tmp_path / "out").exists()
    assert run_main(evaluate.main, [*other, "--anyClass"])[0] == 0


def test_a_scorer_without_calibration_is_evaluated(trained, tmp_path, run_main):
    scorer = Scorer.load(trained.checkpoint)
    scorer.calibration = None
    scorer.save(tmp_path / "last.pt")
    code, _, err = run_main(evaluate.main, [tmp_path / "last.pt", *flags(trained, tmp_path)[1:]])
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint"),
        (["nowhere.pt"], "nowhere.pt does not exist"),
        ([Path(__file__).parent.parent / "docs" / "report.png"], "is no model; choose a run's folder"),
        (["a.pt", "--numTemplate", 4], "need --score bank"),
        (["a.pt", "--score", "paper", "--smooth", 4], "need --score bank"),
        (["a.pt", "--proLimit", 0], "not a number above 0 to 1"),
    ],
)
def test_bad_flags(run_main, arguments, message):
    code, _, err = run_main(evaluate.main, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_class_that_is_not_there_is_named(trained, tmp_path, run_main):
    (tmp_path / "empty").mkdir()
    code, _, err = run_main(evaluate.main, flags(trained, tmp_path, "--datapath", tmp_path / "empty"))
    assert code == 2
    assert "no class 'widget'" in err


def nested(depth):
    """Lists in lists that share their parts: small in a file, endless as text."""
    return [] if not depth else [nested(depth - 1)] * 2


def change_of(key, value):
    def change(content):
        content[key] = value(content[key])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("version", lambda _: 1), "of checkpoint version 1"),
        (change_of("version", lambda _: nested(40)), "of checkpoint version unknown"),
        (change_of("format", lambda _: "x"), "not a PyramidFlow checkpoint"),
        (change_of("config", lambda c: {**c, "image_size": [64, 64]}), "running_mean has shape"),
        (change_of("config", lambda c: {**c, "num_stack": 10**9}), "configuration value"),
        (change_of("config", lambda c: {**c, "num_stack": 2}), "number of coupling blocks"),
        (change_of("config", lambda c: {**c, "num_channel": 5}), "has shape"),
        (change_of("config", lambda c: {**c, "other": 1}), "not a configuration"),
        (change_of("templates", lambda t: t[:1]), "number of template levels"),
        (change_of("templates", lambda t: [(x[:0], *rest) for x, *rest in t]), "template level 0 has shape"),
        (change_of("templates", lambda t: [t[0], (t[1][0], t[0][1], t[1][2])]), "template level 1 has shape"),
        (change_of("templates", lambda t: [(x, c.new_zeros(1024, 1), s) for x, c, s in t]), "number of templates"),
        (change_of("templates", lambda t: [(x * float("nan"), *rest) for x, *rest in t]), "not finite"),
        (change_of("templates", lambda t: [(x, c.float(), s) for x, c, s in t]), "template level 0 has"),
        (change_of("templates", lambda t: [x for x, *_ in t]), "not packed"),
        (change_of("num_typical", lambda _: 2), "number of typical templates"),
        (change_of("sigma", lambda _: [torch.ones(4)]), "number of whitening levels"),
        (change_of("sigma", lambda _: [torch.zeros(4)] * 2), "whitening that is not positive"),
        (change_of("sigma", lambda _: [torch.ones(5)] * 2), "whitening has shape"),
        (change_of("smooth", lambda _: -1.0), "smoothing"),
        (change_of("smooth", lambda _: "much"), "smoothing"),
        (change_of("model", lambda m: {**m, "stem.weight": m["stem.weight"] / 0}), "not finite"),
        (change_of("model", lambda m: dict(list(m.items())[1:])), "stem.weight"),
        (change_of("calibration", lambda _: {"x": 1}), "not a calibration"),
        (change_of("metrics", lambda _: 3), "damaged"),
        (change_of("metrics", lambda m: {**m, "image_threshold": float("nan")}), "metric image_threshold"),
        (change_of("metrics", lambda m: {**m, "pixel_threshold": "x"}), "metric pixel_threshold"),
        (lambda content: content.pop("templates"), "no 'templates'"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_together_is_one_line(trained, tmp_path, run_main, change, message):
    content = load_checkpoint(trained.checkpoint)
    change(content)
    torch.save(content, tmp_path / "a.pt")
    code, _, err = run_main(evaluate.main, [tmp_path / "a.pt", *flags(trained, tmp_path)[1:]])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert "a.pt" in err


def test_what_cannot_be_evaluated_is_told_what_can(trained, tmp_path, run_main):
    (tmp_path / "a.onnx").write_bytes(b"x")
    code, _, err = run_main(evaluate.main, [tmp_path / "a.onnx", *flags(trained, tmp_path)[1:]])
    assert (code, err.count("\n")) == (2, 1)
    assert "is an ONNX file, whose scores are fixed; choose the last.pt" in err
    scorer = Scorer.load(trained.checkpoint)
    scorer.class_name, scorer.settings = "good", {**scorer.settings, "good": "my_parts/good"}
    scorer.save(tmp_path / "last.pt")
    given = [tmp_path / "last.pt", *flags(trained, tmp_path)[1:]]
    code, _, err = run_main(evaluate.main, given)
    assert (code, err.count("\n")) == (2, 1)
    assert "trained by --good my_parts/good" in err
    assert "--datapath and the class by --cls" in err
    code, out, err = run_main(evaluate.main, [*given, "--cls", "widget"])
    assert code == 0, err
    assert "| widget | 2 (paper) |" in out
