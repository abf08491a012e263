"""fit.py makes a scorer of other good images, from the weights of a checkpoint."""

import shutil

import pytest
import torch
from conftest import make_class

import evaluate
import fit
import predict
from dataset import Images, list_images
from scorer import ScoreOptions, Scorer


@pytest.fixture
def other(tmp_path):
    """Good images of the same part, darker."""
    folder = make_class(tmp_path / "new lamp", num_train=5) / "train" / "good"
    for path in list_images(folder):
        image = predict.Image.open(path).point(lambda x: x * 0.5)
        image.save(path)
    return folder


def run(run_main, trained, folder, out, *extra):
    flags = ["--out", out, "--gpu", "cpu", "--precision", "fp32", *extra]
    return run_main(fit.main, [trained.checkpoint, folder, *flags])


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], ScoreOptions("paper", 1, False, 0.0)),
        (["--score", "bank", "--numTemplate", 3, "--smooth", 1], ScoreOptions("bank", 3, True, 1.0)),
    ],
)
def test_the_new_scorer_is_that_of_the_new_images(trained, tmp_path, other, run_main, flags, options):
    out = tmp_path / "deep" / "new.pt"
    code, text, err = run(run_main, trained, other, out, *flags)
    assert code == 0, err
    old, new = Scorer.load(trained.checkpoint), Scorer.load(out)
    assert (new.options, new.class_name, new.metrics) == (options, "widget", {})
    for name, x in old.model.state_dict().items():
        assert torch.equal(new.model.state_dict()[name], x), name
    images = Images(list_images(other), old.image_size, "ram", torch.device("cpu"), 1, "x")
    expected = Scorer.fit(old.model, images, options)
    assert new.calibration == expected.calibration
    assert all(map(torch.equal, new.templates, expected.templates))
    assert text.count("\n") == 1
    assert text.startswith("5 good images, score " + ("bank of 3" if flags else "paper"))
    for threshold in (new.calibration.thresholds().image, new.calibration.thresholds().pixel):
        assert f"{threshold:.4g}" in text
    assert f"python predict.py {out} IMAGES --out predictions" in text


def test_what_is_odd_about_the_images_is_said(trained, tmp_path, other, run_main):
    first = list_images(other)[0]
    (other / "copy.png").write_bytes(first.read_bytes())
    (other / "camera2").mkdir()
    code, text, err = run(run_main, trained, other, tmp_path / "new.pt")
    assert code == 0, err
    assert "1 images are the same once more" in text
    assert "files and folders are skipped" in text


def test_new_light_is_no_defect_any_more(trained, tmp_path, other, run_main):
    code, _, err = run(run_main, trained, other, tmp_path / "new.pt")
    assert code == 0, err
    defective = []
    for model in (trained.checkpoint, tmp_path / "new.pt"):
        out = tmp_path / model.stem
        code, text, err = run_main(predict.main, [model, other, "--out", out, "--gpu", "cpu"])
        assert code == 0, err
        defective.append(int(text.split(", ")[1].split()[0]))
    assert defective[0] == 5
    assert defective[1] <= 1  # of five good ones, at the quantile of 95 %


def test_what_was_fitted_can_be_fitted_again_and_keeps_its_score(trained, tmp_path, other, run_main):
    assert run(run_main, trained, other, tmp_path / "a.pt", "--score", "bank", "--numTemplate", 2)[0] == 0
    flags = ["--out", tmp_path / "b.pt", "--gpu", "cpu"]
    code, text, err = run_main(fit.main, [tmp_path / "a.pt", other, *flags])
    assert code == 0, err
    assert "score bank of 2" in text
    data = ["--datapath", trained.data, "--out", tmp_path / "out", "--gpu", "cpu"]
    code, text, err = run_main(evaluate.main, [tmp_path / "b.pt", *data])
    assert code == 0, err
    assert "| widget | n/a (bank) |" in text


def test_a_scorer_gets_no_name_of_an_exported_model(trained, tmp_path, other, run_main):
    code, _, err = run(run_main, trained, other, tmp_path / "new.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose a name that ends in .pt" in err
    assert not (tmp_path / "new.onnx").exists()


def test_no_file_is_overwritten(trained, tmp_path, other, run_main):
    (tmp_path / "new.pt").write_text("mine")
    code, _, err = run(run_main, trained, other, tmp_path / "new.pt")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists; choose a new file" in err
    assert (tmp_path / "new.pt").read_text() == "mine"


def test_folders_that_will_not_do(trained, tmp_path, other, run_main):
    out = tmp_path / "new.pt"
    for path in list_images(other)[1:]:
        path.unlink()
    for folder, message in (
        (other, "holds 1 image; thresholds need at least two"),
        (other.parent, "holds no images"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        code, _, err = run(run_main, trained, folder, out)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    shutil.copy(list_images(other)[0], other / "b.png")
    (other / "c.png").write_text("no image")
    code, _, err = run(run_main, trained, other, out)
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot read image" in err
    assert "c.png" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("extra", "message"), [(["--whiten", "false"], "need --score bank"), (["--score", "mean"], "invalid choice")]
)
def test_bad_flags(trained, tmp_path, other, run_main, extra, message):
    code, _, err = run(run_main, trained, other, tmp_path / "new.pt", *extra)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_fewer_images_than_templates_is_explained(trained, tmp_path, other, run_main):
    code, text, err = run(run_main, trained, other, tmp_path / "new.pt", "--score", "bank")
    assert code == 0, err
    assert "score bank of 6 of 64 templates: the mean and all 5 images" in text
