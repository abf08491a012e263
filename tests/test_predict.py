"""predict.py scores images of any kind, and what it writes agrees with what training measured."""

import csv

import numpy as np
import pytest
import torch
from conftest import make_class, save_image
from PIL import Image

import predict
import scorer
from dataset import open_class
from model import PyramidFlow, PyramidFlowConfig
from scorer import ScoreOptions, Scorer


def run(run_main, trained, tmp_path, *extra, images=None):
    images = [trained.data / "widget" / "test"] if images is None else images
    flags = ["--out", tmp_path / "out", "--gpu", "cpu", "--precision", "fp32", *extra]
    return run_main(predict.main, [trained.checkpoint, *images, *flags])


def table(tmp_path):
    return list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))


def test_scores_maps_masks_and_pictures(trained, tmp_path, run_main):
    code, out, err = run(run_main, trained, tmp_path, "--threshold", "f1")
    assert code == 0, err
    assert "6 images, " in out
    assert "images/s" in out
    device = torch.device("cpu")
    loaded = Scorer.load(trained.checkpoint, device, "fp32")
    test_set = scorer.TestSet.load(open_class(trained.data, "widget"), loaded.config, "ram", 1, device)
    maps = loaded.score_all(test_set.images).maps.numpy()
    rows = table(tmp_path)
    assert list(rows[0]) == ["path", "score", "decision", "threshold", "map"]
    for row, image, anomaly in zip(rows, test_set.data.test, maps, strict=True):
        assert row["path"] == str(image.path)
        assert float(row["score"]) == pytest.approx(anomaly.max(), rel=1e-5)
        assert (row["decision"] == "defective") == (float(row["score"]) >= float(row["threshold"]))
        name = f"{image.kind}/{image.path.stem}"
        assert row["map"] == f"maps/{name}.tiff"
        raw = np.asarray(Image.open(tmp_path / "out" / row["map"]))
        assert raw.dtype == np.float32
        expected = Image.fromarray(anomaly).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(raw, np.asarray(expected), rtol=1e-4)
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        assert np.array_equal(mask == 255, raw >= np.float32(loaded.metrics["pixel_threshold"]))
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.png").size == (32, 32)
    assert len(list((tmp_path / "out").rglob("*.*"))) == 3 * 6 + 1  # nothing half written is left
    # F1-max on the test set: these decisions are the best that one threshold can make.
    assert [row["decision"] for row in rows] == ["good"] * 3 + ["defective"] * 3


def test_any_size_and_mode(trained, tmp_path, run_main):
    folder = tmp_path / "images"
    save_image(folder / "gray.png", np.full((50, 70), 100, np.uint8))
    save_image(folder / "deep.png", np.full((20, 30), 40000, np.uint16))
    save_image(folder / "alpha.png", np.full((33, 31, 4), 200, np.uint8))
    Image.new("L", (40, 20)).convert("P").save(folder / "palette.BMP")
    Image.new("1", (7, 5)).save(folder / "tiny.tif")
    Image.new("CMYK", (64, 16)).save(folder / "print.jpg")
    code, out, err = run(run_main, trained, tmp_path, "--batchSize", 4, images=[folder])
    assert code == 0, err
    assert "6 images" in out
    for name, size in (("gray", (70, 50)), ("tiny", (7, 5)), ("print", (64, 16)), ("deep", (30, 20))):
        for kind in ("maps", "masks", "overlays"):
            (path,) = (tmp_path / "out" / kind).glob(f"{name}.*")
            assert Image.open(path).size == size


def test_unreadable_files_are_listed_and_the_others_done(trained, tmp_path, run_main):
    folder = tmp_path / "images"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    save_image(folder / "a.png", noise)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    (folder / "c.jpg").write_text("no image")
    save_image(folder / "d.png", np.zeros((32, 32, 3), np.uint8))
    code, out, err = run(run_main, trained, tmp_path, "--batchSize", 1, images=[folder])
    assert code == 1
    assert "2 images" in out
    assert "2 cannot be read" in out
    assert [line.split("(")[0].split("/")[-1] for line in err.splitlines()] == ["b.png ", "c.jpg "]
    assert [row["path"].split("/")[-1] for row in table(tmp_path)] == ["a.png", "d.png"]


def test_images_of_the_same_name_do_not_overwrite_each_other(trained, tmp_path, run_main):
    image = np.zeros((32, 32, 3), np.uint8)
    for path in ("x/a.png", "x/a.jpg", "y/a.png", "a.png"):
        save_image(tmp_path / path, image)
    images = [tmp_path / "x", tmp_path / "y", tmp_path / "a.png", tmp_path / "y" / "a.png"]
    code, _, err = run(run_main, trained, tmp_path, images=images)
    assert code == 0, err
    maps = [tmp_path / "out" / row["map"] for row in table(tmp_path)]
    assert len(set(maps)) == len(maps) == 5
    assert set(maps) == set((tmp_path / "out" / "maps").rglob("*.tiff"))


def test_names_that_leave_no_room_for_a_suffix(trained, tmp_path, run_main):
    image = np.zeros((32, 32, 3), np.uint8)
    for name in ("x" * 251, "x" * 250 + "y", "\u00e4" * 125 + "z"):
        save_image(tmp_path / "images" / f"{name}.png", image)
    code, _, err = run(run_main, trained, tmp_path, images=[tmp_path / "images"])
    assert code == 0, err
    assert len({row["map"] for row in table(tmp_path)}) == 3
    assert all((tmp_path / "out" / row["map"]).is_file() for row in table(tmp_path))


def test_a_folder_with_results_is_not_written_to(trained, tmp_path, run_main):
    assert run(run_main, trained, tmp_path)[0] == 0
    before = (tmp_path / "out" / "scores.csv").read_bytes()
    code, _, err = run(run_main, trained, tmp_path)
    assert code == 2
    assert "is not empty; choose a new folder" in err
    assert (tmp_path / "out" / "scores.csv").read_bytes() == before


def test_thresholds_without_labels_follow_the_quantiles(trained, tmp_path, run_main):
    scores = Scorer.load(trained.checkpoint).calibration.image_scores
    for quantile in (0.0, 1.0):
        out = tmp_path / str(quantile)
        out.mkdir()
        code, _, err = run(run_main, trained, out, "--imageQuantile", quantile)
        assert code == 0, err
        assert float(table(out)[0]["threshold"]) == pytest.approx(scores[-int(quantile)], rel=1e-5)


def test_without_scores_of_good_images_another_threshold_is_needed(trained, tmp_path, run_main):
    scorer = Scorer.load(trained.checkpoint)
    scorer.calibration = None
    scorer.save(tmp_path / "last.pt")
    images = [trained.data / "widget" / "test"]
    flags = ["--out", tmp_path / "out", "--gpu", "cpu"]
    code, _, err = run_main(predict.main, [tmp_path / "last.pt", *images, *flags])
    assert code == 2
    assert "use --threshold f1 or a number" in err
    code, _, err = run_main(predict.main, [tmp_path / "last.pt", *images, *flags, "--threshold", "0.5"])
    assert code == 0, err


def test_the_image_template(trained, tmp_path, run_main):
    """Untrained, the flow is undone exactly; trained, the template is close to the mean image."""
    path = tmp_path / "template.png"
    code, out, err = run(run_main, trained, tmp_path, "--template", path, images=[])
    assert code == 0, err
    assert str(path) in out
    template = np.asarray(Image.open(path)).astype(float)
    assert template.shape == (32, 32, 3)
    images = [np.asarray(Image.open(p)).astype(float) for p in open_class(trained.data, "widget").train]
    assert np.abs(template - np.mean(images, axis=0)).mean() < 10
    code, _, err = run(run_main, trained, tmp_path, "--template", path, images=[])
    assert code == 2
    assert "exists; choose a new file" in err


def test_the_image_template_of_a_bank_is_the_mean(trained, tmp_path, run_main):
    old = Scorer.load(trained.checkpoint, precision="fp32")
    data = open_class(trained.data, "widget")
    images = scorer.TestSet.load(data, old.config, "ram", 1, torch.device("cpu")).images
    Scorer.fit(old.model, images).save(tmp_path / "paper.pt")
    Scorer.fit(old.model, images, ScoreOptions("bank", 2)).save(tmp_path / "bank.pt")
    templates = []
    for name in ("paper", "bank"):
        flags = ["--template", tmp_path / f"{name}.png", "--gpu", "cpu", "--precision", "fp32"]
        code, _, err = run_main(predict.main, [tmp_path / f"{name}.pt", *flags])
        assert code == 0, err
        templates.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int))
    assert np.abs(templates[0] - templates[1]).max() <= 2


def test_an_encoder_has_no_image_template(tmp_path, run_main):
    config = PyramidFlowConfig(num_level=2, num_stack=1, image_size=(64, 64))
    template = tuple(torch.zeros(1, 64, 16 >> i, 16 >> i) for i in range(2))
    Scorer(PyramidFlow(config), template).save(tmp_path / "a.pt")
    code, _, err = run_main(predict.main, [tmp_path / "a.pt", "--template", tmp_path / "t.png"])
    assert code == 2
    assert "the encoder resnet18 has no inverse" in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["--threshold", "high"], "use quantile, none, f1, recall or a number"),
        (["--imageQuantile", 2], "not a number from 0 to 1"),
        (["--batchSize", 0], "whole number from 1"),
        (["--gpu", 9], "no such CUDA device"),
    ],
)
def test_bad_flags(trained, tmp_path, run_main, extra, message):
    code, _, err = run(run_main, trained, tmp_path, *extra)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; choose a file in it, of a run last.pt"),
        ("state.pt", "choose last.pt beside it"),
    ],
)
def test_what_lies_beside_the_checkpoint_is_no_model(trained, tmp_path, run_main, name, message):
    model = trained.checkpoint.parent / name
    code, _, err = run_main(
        predict.main, [model, trained.data, "--out", tmp_path / "out", "--gpu", "cpu"]
    )
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_nothing_to_do_and_empty_folders(trained, tmp_path, run_main):
    code, _, err = run(run_main, trained, tmp_path, images=[])
    assert code == 2
    assert "give images or folders" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(run_main, trained, tmp_path, images=[tmp_path / "empty"])
    assert code == 2
    assert "no images in" in err


def test_a_score_that_is_not_finite_is_no_verdict(trained, tmp_path, run_main):
    """Finite weights can overflow; then nothing is called good, and there is no table of scores."""
    scorer = Scorer.load(trained.checkpoint)
    scorer.templates = tuple(torch.full_like(t, 3e38) for t in scorer.templates)
    scorer.model.stem.weight.data *= 1e37
    scorer.save(tmp_path / "a.pt")
    images = trained.data / "widget" / "test"
    code, _, err = run_main(
        predict.main, [tmp_path / "a.pt", images, "--out", tmp_path / "out", "--gpu", "cpu"]
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "no finite score" in err
    assert "good/000.png" in err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_scores_are_there_when_all_is_done(trained, tmp_path, run_main, monkeypatch):
    """So that a table of a run that was stopped is not taken for the whole."""

    def write(self, image, anomaly):
        assert not (tmp_path / "out" / "scores.csv").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(predict.Writer, "write", write)
    code, _, err = run(run_main, trained, tmp_path)
    assert code == 130, err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_no_more_images_are_in_memory_than_the_scorer_needs(trained, tmp_path, run_main, monkeypatch):
    """However many there are: those that are read ahead, and the batch in work."""
    make_class(tmp_path / "data", num_train=60)
    alive, most = set(), []
    original = predict.load

    class Counted(predict.Loaded):
        def __del__(self):
            alive.discard(id(self))

    def counting(*arguments):
        loaded = Counted(**vars(original(*arguments)))
        alive.add(id(loaded))
        most.append(len(alive))
        return loaded

    monkeypatch.setattr(predict, "load", counting)
    folder = tmp_path / "data" / "widget" / "train" / "good"
    code, _, err = run(run_main, trained, tmp_path, "--batchSize", 2, "--numWorkers", 2, images=[folder])
    assert code == 0, err
    assert len(most) == 60
    assert max(most) <= 2 * 2 + 1 + 3 * 2
