"""evaluate.py gives what training gave, from the checkpoint alone."""

import json
import shutil

import pytest
import torch
from conftest import make_class

import evaluate
import evaluation
from checkpoint import load_checkpoint, save_checkpoint
from evaluation import evaluation_batch
from model import PyramidFlowConfig

METRICS = [
    "pixel_auroc",
    "image_auroc",
    "pixel_pro",
    "pixel_pro_30",
    "f1_max",
    "threshold",
    "image_threshold",
]


def flags(trained, tmp_path, *extra):
    return [trained.checkpoint, "--datapath", trained.data, "--out", tmp_path / "out", "--gpu", "cpu",
            "--precision", "fp32", *extra]  # fmt: skip


def test_the_same_table_as_training(trained, tmp_path, run_main):
    code, out, err = run_main(evaluate.main, flags(trained, tmp_path))
    assert code == 0, err
    (folder,) = (tmp_path / "out").iterdir()
    result = json.loads((folder / "result.json").read_text())
    metrics = load_checkpoint(trained.checkpoint)["metrics"]
    assert [result[m] for m in METRICS] == [metrics[m] for m in METRICS]
    log = (trained.run / "log.txt").read_text()
    (row,) = [line for line in log.splitlines() if "2 (last)" in line]
    assert row.split("|")[3:] == out.splitlines()[2].split("|")[3:]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*.*")}
    assert {"metrics.csv", "log.txt", "pictures/histogram.png", "pictures/roc_pro.png"} <= names
    assert "pictures/hole/000_png.png" in names


def test_a_class_folder_without_training_images_is_enough(trained, tmp_path, run_main):
    shutil.copytree(trained.data, tmp_path / "data", ignore=shutil.ignore_patterns("train"))
    code, _, err = run_main(evaluate.main, flags(trained, tmp_path, "--datapath", tmp_path / "data"))
    assert code == 0, err


def test_another_class_only_where_it_is_meant(trained, tmp_path, run_main):
    make_class(tmp_path / "data", "gadget")
    other = flags(trained, tmp_path, "--datapath", tmp_path / "data", "--cls", "gadget")
    code, _, err = run_main(evaluate.main, other)
    assert code == 2
    assert "is of class widget, not gadget" in err
    assert not (tmp_path / "out").exists()
    assert run_main(evaluate.main, [*other, "--anyClass"])[0] == 0


def test_a_run_that_was_not_finished_has_no_calibration_and_is_evaluated(trained, tmp_path, run_main):
    content = load_checkpoint(trained.checkpoint)
    del content["calibration"]
    save_checkpoint(tmp_path / "last.pt", content)
    arguments = [tmp_path / "last.pt", *flags(trained, tmp_path)[1:]]
    code, _, err = run_main(evaluate.main, arguments)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint, or --official"),
        (["a.pt", "--official", "b.npz"], "name a checkpoint, or --official"),
        (["--official", "b.npz"], "needs --cls"),
        (["nowhere.pt"], "nowhere.pt does not exist"),
        (["a.pt", "--imageSize", 1, 2, 3], "one number, or two"),
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


def change_of(key, value):
    def change(content):
        content[key] = value(content[key])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("version", lambda _: 1), "of checkpoint version 1"),
        (change_of("format", lambda _: "x"), "not a PyramidFlow checkpoint"),
        (change_of("config", lambda c: {**c, "image_size": [64, 64]}), "running_mean has shape"),
        (change_of("config", lambda c: {**c, "num_stack": 10**9}), "configuration value"),
        (change_of("config", lambda c: {**c, "num_stack": 2}), "number of coupling blocks"),
        (change_of("config", lambda c: {**c, "num_channel": 5}), "has shape"),
        (change_of("config", lambda c: {**c, "other": 1}), "not a configuration"),
        (change_of("template", lambda t: t[:1]), "number of template levels"),
        (change_of("template", lambda t: [x * float("nan") for x in t]), "not finite"),
        (change_of("model", lambda m: {**m, "stem.weight": m["stem.weight"] / 0}), "not finite"),
        (change_of("model", lambda m: dict(list(m.items())[1:])), "stem.weight"),
        (change_of("calibration", lambda _: {"x": 1}), "not a calibration"),
        (change_of("metrics", lambda _: 3), "damaged"),
        (lambda content: content.pop("template"), "no 'template'"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_together_is_one_line(
    trained, tmp_path, run_main, change, message
):
    content = load_checkpoint(trained.checkpoint)
    change(content)
    torch.save(content, tmp_path / "a.pt")
    code, _, err = run_main(evaluate.main, [tmp_path / "a.pt", *flags(trained, tmp_path)[1:]])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert "a.pt" in err


def test_on_cuda_free_memory_limits_the_batch_of_an_evaluation(monkeypatch):
    config = PyramidFlowConfig()  # a feature of 256x256x64
    for free, expected in ((2**40, 16), (2**31, 4), (2**20, 1)):
        monkeypatch.setattr(evaluation, "free_memory", lambda device, free=free: free)
        assert evaluation_batch(config, torch.device("cuda")) == expected
