"""predict.py scores images of any kind, and what it writes agrees with what training measured."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import make_class, save_image
from PIL import Image

import evaluate
import fit
import predict
import scorer
from dataset import open_class
from model import PyramidFlow, PyramidFlowConfig
from scorer import ScoreOptions, Scorer
from util import lock
from verdict import Scored


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
    columns = "path,score,decision,threshold,pixel_threshold,margin,peak_x,peak_y,map,name"
    assert ",".join(rows[0]) == columns
    for row, image, anomaly in zip(rows, test_set.data.test, maps, strict=True):
        assert row["path"] == str(image.path)
        assert float(row["score"]) == pytest.approx(anomaly.max(), rel=1e-5)
        assert (row["decision"] == "defective") == (float(row["score"]) >= float(row["threshold"]))
        difference = float(row["score"]) - float(row["threshold"])
        assert float(row["margin"]) == pytest.approx(difference, abs=1e-5)
        assert float(row["pixel_threshold"]) == pytest.approx(loaded.metrics["pixel_threshold"], rel=1e-5)
        name = f"{image.kind}/{image.path.stem}"
        assert (row["map"], row["name"]) == (f"maps/{name}.tiff", str(name))
        raw = np.asarray(Image.open(tmp_path / "out" / row["map"]))
        assert raw.dtype == np.float32
        expected = Image.fromarray(anomaly).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(raw, np.asarray(expected), rtol=1e-4)
        assert raw[int(row["peak_y"]), int(row["peak_x"])] == raw.max()
        assert Image.open(tmp_path / "out" / row["map"]).info["compression"] == "tiff_adobe_deflate"
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        assert np.array_equal(mask == 255, raw >= np.float32(loaded.metrics["pixel_threshold"]))
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.png").size == (32, 32)
    assert len(list((tmp_path / "out").rglob("*.*"))) == 3 * 6 + 4  # nothing half written is left
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
    report = (tmp_path / "out" / "report.html").read_bytes()
    assert run(run_main, trained, tmp_path, "--batchSize", 1, "--resume", images=[folder])[0] == 1
    assert (tmp_path / "out" / "report.html").read_bytes() == report  # with its pictures
    save_image(folder / "b.png", noise)  # is repaired: one is tried again, the other in vain
    code, out, err = run(run_main, trained, tmp_path, "--batchSize", 1, "--resume", images=[folder])
    assert (code, err.count("\n")) == (1, 1)
    assert "3 images" in out
    assert [row["path"].split("/")[-1] for row in table(tmp_path)] == ["a.png", "b.png", "d.png"]
    save_image(folder / "c.jpg", noise)
    for told in ("4 images", "is finished: 4 images"):
        code, out, err = run(run_main, trained, tmp_path, "--batchSize", 1, "--resume", images=[folder])
        assert code == 0, err
        assert told in out
    assert len(table(tmp_path)) == 4


def test_if_no_image_can_be_read_nothing_is_shown(trained, tmp_path, run_main):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    code, out, err = run(run_main, trained, tmp_path, images=[folder])
    assert (code, err.count("\n")) == (1, 1)
    assert "of 1 image none can be read" in out
    assert not (tmp_path / "out" / "report.html").exists()
    save_image(folder / "a.png", np.zeros((32, 32, 3), np.uint8))
    code, out, err = run(run_main, trained, tmp_path, "--resume", images=[folder])
    assert code == 0, err
    assert len(table(tmp_path)) == 1


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
        (["--threshold", "high"], "use quantile, none, f1, recall, a number"),
        (["--imageQuantile", 2], "not a number from 0 to 1"),
        (["--batchSize", 0], "whole number from 1"),
        (["--gpu", 9], "no such CUDA device"),
        (["--minArea", 0], "whole number from 1"),
        (["--write", "maps,pictures"], "'pictures' is not one of overlays, masks, maps, none"),
        (["--write", ""], "is not one of overlays"),
        (["--roi", "nowhere.png"], "no image nowhere.png; choose a file that is there"),
        (["--shard", "3/2"], "'3/2' is not a part such as 1/4"),
        (["--shard", "0/2"], "is not a part"),
        (["--shard", "2"], "is not a part"),
        (["--resume"], "holds nothing to continue; leave --resume out"),
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
        ("pictures", "holds no run's last.pt; choose a run's folder, or a checkpoint"),
        ("state.pt", "choose last.pt beside it"),
    ],
)
def test_what_lies_beside_the_checkpoint_is_no_model(trained, tmp_path, run_main, name, message):
    model = trained.checkpoint.parent / name
    code, _, err = run_main(predict.main, [model, trained.data, "--out", tmp_path / "out", "--gpu", "cpu"])
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


def test_a_score_beyond_all_measure_is_no_verdict(trained, monkeypatch):
    """Means and areas of such maps would overflow."""
    scorer = Scorer.load(trained.checkpoint)
    maps, image = torch.full((1, 256, 256), 1e38), np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(Scorer, "score", lambda *_: Scored(maps, maps[:, 0, 0]))
    with pytest.raises(predict.InputError, match="no finite score"):
        scorer.inspect(image)


def test_a_score_that_is_not_finite_is_no_verdict(trained, tmp_path, run_main):
    """Finite weights can overflow; then nothing is called good, and there is no table of scores."""
    scorer = Scorer.load(trained.checkpoint)
    scorer.templates = tuple(torch.full_like(t, 3e38) for t in scorer.templates)
    scorer.model.stem.weight.data *= 1e37
    scorer.save(tmp_path / "a.pt")
    images = trained.data / "widget" / "test"
    code, _, err = run_main(predict.main, [tmp_path / "a.pt", images, "--out", tmp_path / "out", "--gpu", "cpu"])
    assert (code, err.count("\n")) == (2, 1)
    assert "no finite score" in err
    assert "good/000.png" in err
    assert not list((tmp_path / "out").rglob("*.*g"))
    assert not list((tmp_path / "out").rglob("*.csv"))


def test_scores_are_there_when_all_is_done(trained, tmp_path, run_main, monkeypatch):
    """So that a table of a run that was stopped is not taken for the whole."""

    def write(self, image, anomaly, score):
        assert not (tmp_path / "out" / "scores.csv").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(predict.Writer, "write", write)
    code, _, err = run(run_main, trained, tmp_path)
    assert code == 130, err
    assert {path.name for path in (tmp_path / "out").rglob("*.*")} == {predict.MARKER, predict.ROWS}


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


# ------------------------------------------------------------------------- defects and pictures


def defects(tmp_path):
    return list(csv.DictReader((tmp_path / "out" / "defects.csv").open()))


def read(path):
    return np.asarray(Image.open(path))


def test_every_region_of_the_masks_is_a_row(trained, tmp_path, run_main):
    code, _, err = run(run_main, trained, tmp_path, "--threshold", "f1")
    assert code == 0, err
    rows, checked = defects(tmp_path), 0
    for image in table(tmp_path):
        mask = read(tmp_path / "out" / image["map"].replace("maps", "masks").replace("tiff", "png")) > 0
        anomaly = read(tmp_path / "out" / image["map"])
        regions = [row for row in rows if row["image"] == image["path"]]
        assert [int(row["number"]) for row in regions] == list(range(1, len(regions) + 1))
        assert sum(int(row["area"]) for row in regions) == mask.sum()
        for row in regions:
            x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
            box = mask[y0:y1, x0:x1]
            assert all(side.any() for side in (box[0], box[-1], box[:, 0], box[:, -1]))
            assert float(row["peak_score"]) <= anomaly[y0:y1, x0:x1].max() * (1 + 1e-5)
            if len(regions) == 1:
                inside = anomaly[mask]
                assert float(row["mean_score"]) == pytest.approx(inside.mean(), rel=1e-5)
                assert float(row["peak_score"]) == pytest.approx(inside.max(), rel=1e-5)
            checked += 1
    assert checked == len(rows) > 0


def test_small_regions_are_dropped_from_masks_and_list(trained, tmp_path, run_main):
    assert run(run_main, trained, tmp_path, "--threshold", "f1")[0] == 0
    areas = sorted(int(row["area"]) for row in defects(tmp_path))
    out = tmp_path / "large"
    out.mkdir()
    flags = ["--threshold", "f1", "--minArea", areas[-1]]
    assert run(run_main, trained, out, *flags)[0] == 0
    kept = [int(row["area"]) for row in defects(out)]
    assert kept == [area for area in areas if area == areas[-1]]
    masks = sum((read(path) > 0).sum() for path in (out / "out" / "masks").rglob("*.png"))
    assert masks == sum(kept)
    assert [row["score"] for row in table(out)] == [row["score"] for row in table(tmp_path)]


@pytest.mark.parametrize("kinds", ["none", "masks", "maps,overlays"])
def test_only_what_is_asked_for_is_written(trained, tmp_path, run_main, kinds):
    code, _, err = run(run_main, trained, tmp_path, "--write", kinds)
    assert code == 0, err
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == set(kinds.split(",")) - {"none"}
    assert bool(table(tmp_path)[0]["map"]) == ("maps" in kinds)


def test_outside_of_the_part_nothing_counts(trained, tmp_path, run_main):
    """The mask of the part has another size than the images, and leaves out the defects."""
    roi = np.zeros((64, 64), np.uint8)
    roi[:, 40:] = 255
    save_image(tmp_path / "roi.png", roi)
    assert run(run_main, trained, tmp_path, "--threshold", "f1")[0] == 0
    whole = table(tmp_path)
    out = tmp_path / "inside"
    out.mkdir()
    code, _, err = run(run_main, trained, out, "--threshold", "f1", "--roi", tmp_path / "roi.png")
    assert code == 0, err
    for row, before in zip(table(out), whole, strict=True):
        anomaly, old = read(out / "out" / row["map"]), read(tmp_path / "out" / before["map"])
        assert np.array_equal(anomaly[:, 20:], old[:, 20:])
        assert (anomaly[:, :20] == old.min()).all()
        assert int(row["peak_x"]) >= 20
        assert float(row["score"]) <= float(before["score"])
    assert table(out)[-1]["decision"] == "good" != whole[-1]["decision"]
    assert all(int(row["x0"]) >= 20 for row in defects(out))


def test_a_part_that_is_nowhere(trained, tmp_path, run_main):
    save_image(tmp_path / "roi.png", np.zeros((8, 8), np.uint8))
    code, _, err = run(run_main, trained, tmp_path, "--roi", tmp_path / "roi.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "roi.png is all black; paint white what is to be inspected" in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ folders, resume


def test_a_run_its_folder_and_a_pattern_stand_for_the_newest_checkpoint(trained, tmp_path, run_main):
    runs = trained.run.parent
    images = trained.data / "widget" / "test"
    for i, model in enumerate([trained.run, runs, runs / "widget-*"]):
        flags = ["--out", tmp_path / str(i), "--gpu", "cpu", "--write", "none"]
        code, out, err = run_main(predict.main, [model, images, *flags])
        assert code == 0, err
        assert out.startswith(f"checkpoint {trained.checkpoint}\n")
    commands = {
        evaluate.main: ["--datapath", trained.data, "--out", tmp_path / "evaluations"],
        fit.main: [trained.data / "widget" / "train" / "good", "--out", tmp_path / "new.pt"],
    }
    for main, flags in commands.items():
        code, out, err = run_main(main, [trained.run, *flags, "--gpu", "cpu"])
        assert code == 0, err
        assert out.startswith(f"checkpoint {trained.checkpoint}\n")
        code, _, err = run_main(main, [trained.data, *flags, "--gpu", "cpu"])
        assert (code, err.count("\n")) == (2, 1)


def test_of_several_runs_the_newest_is_taken(tmp_path):
    for i, name in enumerate(["a-1", "a-2", "b-1"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        os.utime(tmp_path / name / "last.pt", (0, 10 - i))
    assert scorer.find_checkpoint(tmp_path) == tmp_path / "a-1" / "last.pt"
    assert scorer.find_checkpoint(tmp_path / "*-1") == tmp_path / "a-1" / "last.pt"
    assert scorer.find_checkpoint(tmp_path / "b*") == tmp_path / "b-1" / "last.pt"
    assert scorer.find_checkpoint(tmp_path / "none.pt") == tmp_path / "none.pt"
    with pytest.raises(predict.InputError, match="holds no run's last"):
        scorer.find_checkpoint(tmp_path / "c*")


def test_own_results_and_linked_folders_are_not_scored(trained, tmp_path, run_main):
    folder = tmp_path / "images"
    save_image(folder / "part" / "a.png", np.zeros((32, 32, 3), np.uint8))
    (folder / "another").symlink_to(folder / "part", target_is_directory=True)
    (folder / "part" / "loop").symlink_to(folder, target_is_directory=True)
    shutil.copytree(trained.run, folder / "run")
    (folder / "part" / "report.html").write_text("of another program")
    for out in (folder / "predictions", tmp_path / "out"):
        flags = ["--out", out, "--gpu", "cpu"]
        code, text, err = run_main(predict.main, [trained.checkpoint, folder, *flags])
        assert code == 0, err
        assert text.startswith("1 image, ")
    code, _, err = run_main(
        predict.main, [trained.checkpoint, tmp_path / "out", "--out", tmp_path / "b", "--gpu", "cpu"]
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "holds results of this program; choose a folder of images" in err


def test_names_that_differ_in_case_only_do_not_meet():
    taken = set()
    names = [predict._free_name(predict.Path(name), taken) for name in ("a.png", "A.png", "A.PNG", "a_png.x")]
    assert len({str(name).casefold() for name in names}) == 4


def content(folder):
    """All files by name, but for the report, which shows the images of one call."""
    files = (p for p in folder.rglob("*.*") if p.is_file() and p.name != "report.html")
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_a_stopped_prediction_is_continued(trained, tmp_path, run_main, monkeypatch):
    assert run(run_main, trained, tmp_path, "--batchSize", 1)[0] == 0
    whole, stopped, original, count = tmp_path / "out", tmp_path / "stopped", predict.Writer.write, []
    stopped.mkdir()

    def write(self, *arguments):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(predict.Writer, "write", write)
    code, _, err = run(run_main, trained, stopped, "--batchSize", 1)
    assert (code, err.count("\n")) == (130, 1), err
    assert "of 6 images are done; to continue: python script.py" in err
    assert err.rstrip().endswith("--resume")
    assert not (stopped / "out" / "scores.csv").exists()
    done = (stopped / "out" / predict.ROWS).read_text()
    assert 1 <= len(done.splitlines()) < 6
    (stopped / "out" / predict.ROWS).write_text(done + '{"name": "hole/0')  # as a power cut leaves it

    code, _, err = run(run_main, trained, stopped)
    assert code == 2
    assert "is not empty; choose a new folder, or add --resume" in err
    code, _, err = run(run_main, trained, stopped, "--minArea", 5, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "is of another command (minArea changed)" in err

    code, out, err = run(run_main, trained, stopped, "--batchSize", 1, "--resume")
    assert code == 0, err
    assert out.startswith("6 images, ")
    assert len(count) <= 3 + 6 - len(done.splitlines())
    assert content(stopped / "out") == content(whole)
    code, out, _ = run(run_main, trained, stopped, "--resume")
    assert (code, out) == (0, f"{stopped / 'out'} is finished: 6 images\n")
    assert content(stopped / "out") == content(whole)


def test_other_weights_or_images_are_not_mixed_in(trained, tmp_path, run_main):
    assert run(run_main, trained, tmp_path)[0] == 0
    marker = tmp_path / "out" / predict.MARKER
    for key in ("model", "images", "roi"):
        changed = json.loads(marker.read_text())
        changed["command"][key] = "another"
        marker.write_text(json.dumps(changed))
        code, _, err = run(run_main, trained, tmp_path, "--resume")
        assert code == 2
        assert f"{key} changed" in err or f", {key}" in err
    assert not (tmp_path / "out" / predict.ROWS).exists()  # of a finished one
    for text in ("[]", "[" * 10**5):
        marker.write_text(text)
        assert "holds nothing to continue" in run(run_main, trained, tmp_path, "--resume")[2]


@pytest.mark.parametrize(
    "row",
    [
        {"name": "x", "score": {}, "defects": []},
        {"name": "x", "score": 1},
        [],
        {"name": "x", "defects": []},
        {"name": "x", "score": dict.fromkeys(predict.SCORE_COLUMNS, 1), "defects": []},
    ],
)
def test_rows_that_are_none_are_refused(trained, tmp_path, run_main, row):
    out = tmp_path / "out"
    assert run(run_main, trained, tmp_path)[0] == 0
    marker = json.loads((out / predict.MARKER).read_text())
    (out / predict.MARKER).write_text(json.dumps({**marker, "finished": False}))
    (out / predict.ROWS).write_text(json.dumps(row) + "\n")
    code, _, err = run(run_main, trained, tmp_path, "--resume")
    assert (code, err.count("\n")) == (2, 1), err
    assert "holds nothing to continue" in err


def test_rows_that_another_process_writes_are_left_alone(trained, tmp_path, run_main):
    out = tmp_path / "out"
    assert run(run_main, trained, tmp_path)[0] == 0
    marker = json.loads((out / predict.MARKER).read_text())
    (out / predict.MARKER).write_text(json.dumps({**marker, "finished": False}))
    with (out / predict.ROWS).open("a+") as file:
        assert lock(file)
        file.write('{"name": "hal')
        file.flush()
        code, _, err = run(run_main, trained, tmp_path, "--resume")
        assert (code, err.count("\n")) == (2, 1), err
        assert "another process is writing to" in err
        file.seek(0)
        assert file.read() == '{"name": "hal'


def test_a_folder_called_as_a_file_beside_it(trained, tmp_path, run_main):
    images = tmp_path / "images"
    for name in ("x.jpg", "x.png/y.png", "x_png/y.png"):
        save_image(images / name, np.full((16, 16, 3), 99, np.uint8))
    code, _, err = run(run_main, trained, tmp_path, images=[images])
    assert code == 0, err
    maps = [row["map"] for row in table(tmp_path)]
    assert sorted(maps) == ["maps/x.tiff", "maps/x_png/y.tiff", "maps/x_png/y_png.tiff"]


def test_a_folder_that_cannot_be_read_is_named(trained, tmp_path, run_main, monkeypatch):
    save_image(tmp_path / "images" / "closed" / "a.png", np.zeros((8, 8, 3), np.uint8))
    original = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, err = run(run_main, trained, tmp_path, images=[tmp_path / "images"])
    assert (code, err.count("\n")) == (2, 1), err
    assert "closed (Permission denied)" in err


def test_shards_are_parts_of_the_whole(trained, tmp_path, run_main):
    assert run(run_main, trained, tmp_path, "--batchSize", 1)[0] == 0
    rows = []
    for i in (1, 2, 3, 4):
        (tmp_path / str(i)).mkdir()
        code, _, err = run(run_main, trained, tmp_path / str(i), "--shard", f"{i}/4", "--batchSize", 1)
        assert code == 0, err
        rows += table(tmp_path / str(i))
    assert len(rows) == 6
    assert sorted(map(str, rows)) == sorted(map(str, table(tmp_path)))
    assert len({row["map"] for row in rows}) == 6
    code, out, err = run(run_main, trained, tmp_path / "4", "--shard", "7/7", "--out", tmp_path / "none")
    assert code == 0, err
    assert out.startswith("no images, 0 defective")  # a share of nothing is done, too


# ------------------------------------------------------------------------------ what goes wrong


def test_a_continued_prediction_says_what_its_report_does_not_show(trained, tmp_path, run_main, monkeypatch):
    original, count = predict.Writer.write, []

    def write(self, *arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(predict.Writer, "write", write)
    assert run(run_main, trained, tmp_path, "--batchSize", 1)[0] == 130
    done = len((tmp_path / "out" / predict.ROWS).read_text().splitlines())
    assert done
    code, _, err = run(run_main, trained, tmp_path, "--batchSize", 1, "--resume")
    assert code == 0, err
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"Not shown: {done} scored before" in html
    data = html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    tiles = json.loads(data)["tiles"]
    assert sorted(tile["name"] for tile in tiles) == sorted(row["path"] for row in table(tmp_path))
    assert sum(tile["pictures"] is None for tile in tiles) == done


def test_the_report_leaves_out_what_is_not_the_part(trained, tmp_path, run_main, monkeypatch):
    roi = np.zeros((64, 64), np.uint8)
    roi[:, 40:] = 255
    save_image(tmp_path / "roi.png", roi)
    seen = []
    monkeypatch.setattr(
        "report.Report.add_prediction", lambda _, path, image, anomaly, *others: seen.append(anomaly)
    )
    assert run(run_main, trained, tmp_path, "--roi", tmp_path / "roi.png")[0] == 0
    assert len(seen) == 6
    for anomaly in seen:
        assert (anomaly[:, :158] == anomaly.min()).all()


def test_nothing_is_written_where_something_is_wrong(trained, tmp_path, run_main):
    """Neither the template nor the results."""
    template = tmp_path / "template.png"
    (tmp_path / "out").write_text("mine")
    code, _, err = run(run_main, trained, tmp_path, "--template", template)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a file; choose a new folder" in err
    assert not template.exists()
    (tmp_path / "out").unlink()
    template.write_text("mine")
    code, _, err = run(run_main, trained, tmp_path, "--template", template)
    assert code == 2
    assert not (tmp_path / "out").exists()
    code, out, err = run(run_main, trained, tmp_path, "--template", tmp_path / "new.png")
    assert code == 0, err
    assert (tmp_path / "new.png").is_file()
    assert "6 images, " in out


def test_a_folder_is_no_image(trained, tmp_path, run_main):
    code, _, err = run(run_main, trained, tmp_path, "--roi", trained.data)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a folder; give an image in it" in err
    with pytest.raises(predict.InputError, match="is a folder; give an image in it"):
        Scorer.load(trained.checkpoint).inspect(trained.data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is none")
def test_without_a_gpu_it_says_why_first(trained, tmp_path, run_main):
    given = [trained.run, trained.data / "widget" / "test", "--out", tmp_path / "out"]
    code, out, err = run_main(predict.main, given)
    assert code == 0, err
    assert out.startswith("no CUDA device (")


@pytest.mark.parametrize("name", ["maps", "scores"])
def test_what_is_no_number_is_no_verdict_anywhere(trained, tmp_path, run_main, monkeypatch, name):
    """Whether a map or a score is the one."""
    original = Scorer.score_latents

    def broken(self, *arguments, **options):
        found = original(self, *arguments, **options)
        return found._replace(**{name: getattr(found, name) * torch.nan})

    monkeypatch.setattr(Scorer, "score_latents", broken)
    good = trained.data / "widget" / "train" / "good"
    commands = {
        predict.main: [trained.data / "widget" / "test", "--out", tmp_path / "out"],
        evaluate.main: ["--datapath", trained.data, "--out", tmp_path / "evaluations"],
        fit.main: [good, "--out", tmp_path / "new.pt"],
    }
    for main, arguments in commands.items():
        code, _, err = run_main(main, [trained.checkpoint, *arguments, "--gpu", "cpu"])
        assert (code, err.count("\n")) == (2, 1), err
        assert "finite" in err
        assert "--lr" not in err
    assert not list(tmp_path.rglob("*.csv"))
    assert not (tmp_path / "new.pt").exists()
    assert not (tmp_path / "evaluations").exists()
    with pytest.raises(predict.InputError, match="no finite score"):
        Scorer.load(trained.checkpoint).inspect(np.zeros((8, 8, 3), np.uint8))
