"""train.py from end to end on a small class: what it writes, and what it refuses."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import SMALL, make_class
from PIL import Image

import model as model_module
import run
import train
from checkpoint import load_checkpoint
from dataset import open_class
from evaluation import TestSet, features_in_order
from loading import FeatureSource, ImageStore
from metrics import evaluate_maps
from model import PyramidFlow, PyramidFlowConfig, latent_template
from settings import model_config, parse_settings
from util import atomic_path, create_run_folder

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
METRICS = ["pixel_auroc", "image_auroc", "pixel_pro", "pixel_pro_30", "f1_max"]


def flags(tmp_path, *extra):
    return [*SMALL, "--datapath", tmp_path / "data", "--saveDir", tmp_path / "runs", *extra]


def only_run(tmp_path):
    (run,) = (tmp_path / "runs").iterdir()
    return run


def rebuilt(checkpoint):
    model = PyramidFlow(PyramidFlowConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model


@pytest.mark.usefixtures("widget")
def test_a_run_from_the_command_line(tmp_path):
    command = [sys.executable, ROOT / "train.py", *flags(tmp_path)]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| widget | 2 (last) |" in done.stdout
    run = only_run(tmp_path)
    assert run.name.startswith("widget-")
    names = {p.name for p in run.iterdir()}
    assert names == {"config.json", "log.txt", "metrics.csv", "last.pt", "best_pixel_auroc.pt",
                     "best_pixel_pro.pt", "state.pt", "result.json", "pictures"}  # fmt: skip

    log = (run / "log.txt").read_text().splitlines()
    assert "torch" in log[0]
    assert "cpu" in log[1]
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["numChannel"] == 4
    assert config["model"]["num_level"] == 2

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", *METRICS, "threshold", "image_threshold", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    result = json.loads((run / "result.json").read_text())
    assert set(result["last"]) >= {"epoch", *METRICS}
    assert all(0 <= result["last"][m] <= 1 for m in METRICS)
    assert result["last"]["pixel_auroc"] == float(rows[-1]["pixel_auroc"])
    assert result["best"]["pixel_auroc"] == max(float(row["pixel_auroc"]) for row in rows)
    assert "test" in result["best"]["chosen_on"]

    pictures = {str(p.relative_to(run / "pictures")) for p in (run / "pictures").rglob("*.png")}
    assert pictures == {
        "curves.png",
        "histogram.png",
        "roc_pro.png",
        *(f"{k}/{i:03}_png.png" for k in ("good", "hole") for i in range(3)),
    }
    assert Image.open(run / "pictures" / "hole" / "000_png.png").size[0] > 600


@pytest.mark.usefixtures("widget")
def test_the_checkpoint_is_whole(tmp_path, run_main):
    """Weights, statistics and a template computed with exactly these weights; a fresh model scores alike."""
    assert run_main(train.main, flags(tmp_path))[0] == 0
    run = only_run(tmp_path)
    checkpoint = load_checkpoint(run / "last.pt")
    assert torch.load(run / "last.pt", weights_only=True).keys() == checkpoint.keys()
    assert checkpoint["metrics"]["epoch"] == 2
    assert "torch" in checkpoint["versions"]
    fresh = rebuilt(checkpoint)
    data = open_class(tmp_path / "data", "widget")
    config = fresh.config
    store = ImageStore(data.train, config.image_size, "ram", CPU, 1, "x")
    source = FeatureSource(store, fresh.eval().encode, constant=False)
    template = latent_template(fresh, features_in_order(source, config, "x"))
    for ours, stored in zip(template, checkpoint["template"], strict=True):
        assert torch.equal(ours, stored)
    test_set = TestSet.load(data, fresh, "ram", 1, CPU)
    maps = test_set.anomaly_maps(fresh, checkpoint["template"])
    metrics = evaluate_maps(maps, test_set.truth)
    for name in METRICS:
        assert getattr(metrics, name) == checkpoint["metrics"][name], name


RELOAD = """
import sys, torch
from model import PyramidFlow, PyramidFlowConfig, anomaly_map
checkpoint = torch.load(sys.argv[1], weights_only=True)
model = PyramidFlow(PyramidFlowConfig(**checkpoint["config"]))
model.load_state_dict(checkpoint["model"])
images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
torch.save(anomaly_map(model, model.eval().encode(images), checkpoint["template"]), sys.argv[2])
"""


@pytest.mark.usefixtures("widget")
def test_a_fresh_process_rebuilds_the_model(tmp_path, run_main):
    assert run_main(train.main, flags(tmp_path))[0] == 0
    path = only_run(tmp_path) / "last.pt"
    command = [sys.executable, "-c", RELOAD, path, tmp_path / "maps.pt"]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    checkpoint = load_checkpoint(path)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    model = rebuilt(checkpoint).eval()
    maps = model_module.anomaly_map(model, model.encode(images), checkpoint["template"])
    assert torch.equal(torch.load(tmp_path / "maps.pt", weights_only=True), maps)


@pytest.mark.usefixtures("widget")
def test_the_same_seed_gives_the_same_numbers_twice(tmp_path, run_main):
    for _ in range(2):
        assert run_main(train.main, flags(tmp_path, "--seed", 3))[0] == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    a, b = (list(csv.DictReader((run / "metrics.csv").open())) for run in (first, second))
    for row, other in zip(a, b, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    x, y = (load_checkpoint(run / "last.pt")["model"] for run in (first, second))
    assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.usefixtures("widget")
def test_memory_saving_changes_nothing_but_memory(tmp_path, run_main):
    losses = []
    for value in ("true", "no"):
        code, out, _ = run_main(train.main, flags(tmp_path, "--saveMemory", value, "--epochs", 1))
        assert code == 0
        losses.append(out.split("loss ")[1].split(",")[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--loss", "spatial"],
        ["--loss", "likelihood", "--volumeNorm", "none"],
        ["--contrast", "composed"],
        ["--template", "zero"],
    ],
    ids=["baseline", "spatial", "likelihood", "composed", "zero template"],
)
def test_the_method_and_each_ablation_train_stably(tmp_path, run_main, extra):
    make_class(tmp_path / "data", num_train=10)
    code, _, err = run_main(train.main, flags(tmp_path, "--epochs", 6, *extra))
    assert code == 0, err
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    losses = [float(row["loss"]) for row in rows]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    if "zero" in extra:
        template = load_checkpoint(only_run(tmp_path) / "last.pt")["template"]
        assert not any(x.any() for x in template)


@pytest.mark.usefixtures("widget")
def test_tensorboard(tmp_path, run_main, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = run_main(train.main, flags(tmp_path, "--tensorboard"))
    assert code == 0, err
    events = EventAccumulator(str(only_run(tmp_path)))
    events.Reload()
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    for name in ("loss", "pixel_auroc"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(i + 1, pytest.approx(float(row[name]))) for i, row in enumerate(rows)]
    assert {"curves", "roc_pro", "hole/000_png"} <= set(events.Tags()["images"])

    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_main(train.main, flags(tmp_path, "--tensorboard"))
    assert code == 2
    assert "pip install tensorboard" in err


def test_all_classes_one_after_the_other(tmp_path, run_main):
    for name in ("bolt", "nut"):
        make_class(tmp_path / "data", name)
    code, out, err = run_main(train.main, flags(tmp_path, "--cls", "all", "--epochs", 1))
    assert code == 0, err
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name.split("-")[0] for run in runs] == ["bolt", "nut"]
    table = out.split("| class |")[-1].splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["bolt", "nut", "mean of 2"]
    rows = [[float(x) for x in line.split("|")[3:8]] for line in table[2:5]]
    for a, b, mean in zip(*rows, strict=True):
        assert mean == pytest.approx((a + b) / 2, abs=0.006)


def test_only_every_nth_epoch_and_the_last_are_evaluated(tmp_path, run_main):
    make_class(tmp_path / "data")
    assert run_main(train.main, flags(tmp_path, "--epochs", 5, "--evalEvery", 2))[0] == 0
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["2", "4", "5"]
    assert float(rows[-1]["pixel_auroc"]) > 0.9


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], "flips and turns"),
        (["--imageSize", 24, 32], "flips"),
        (["--augment", "none"], "none"),
        (["--cls", "widget"], "none"),
    ],
)
def test_textures_are_augmented_and_any_size_works(tmp_path, run_main, monkeypatch, extra, expected):
    make_class(tmp_path / "data", "tile")
    make_class(tmp_path / "data", "widget")
    asked = []
    original = train.training_plan
    monkeypatch.setattr(train, "training_plan", lambda *given: asked.append(given) or original(*given))
    changes = ["--cls", "tile", "--epochs", 1, "--batchSize", 3, *extra]
    assert run_main(train.main, flags(tmp_path, *changes))[0] == 0
    assert asked == [(6, 3, expected)]


def test_a_class_without_masks(tmp_path, run_main):
    make_class(tmp_path / "data", masks=False)
    code, out, _ = run_main(train.main, flags(tmp_path))
    assert code == 0
    assert "n/a" in out
    run = only_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["last"]["pixel_auroc"] is None
    assert result["best"]["image_auroc"] is not None
    assert (run / "best_image_auroc.pt").is_file()


def test_a_class_with_nothing_defective(tmp_path, run_main):
    folder = make_class(tmp_path / "data")
    for path in (folder / "test" / "hole").iterdir():
        path.unlink()
    assert run_main(train.main, flags(tmp_path))[0] == 0
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["best"] is None
    assert all(result["last"][m] is None for m in METRICS)


@pytest.mark.usefixtures("widget")
def test_a_resnet_stem_from_a_weights_file(tmp_path, run_main):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    changes = ["--encoder", "resnet18", "--imageSize", 64, "--epochs", 1, "--encoderWeights"]
    code, _, err = run_main(train.main, flags(tmp_path, *changes, tmp_path / "resnet18.pth"))
    assert code == 0, err
    stored = load_checkpoint(only_run(tmp_path) / "last.pt")["model"]
    assert torch.equal(stored["stem.0.weight"], net.conv1.weight)
    assert not torch.equal(stored["stem.1.running_mean"], net.bn1.running_mean)  # encoderBN=batch


@pytest.mark.usefixtures("widget")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    tmp_path, run_main, monkeypatch
):
    calls = []
    original = model_module.training_loss

    def breaks_in_the_second_epoch(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(train, "training_loss", breaks_in_the_second_epoch)
    code, _, err = run_main(train.main, flags(tmp_path))
    assert code == 1
    assert "the loss became nan at step 2" in err
    checkpoint = load_checkpoint(only_run(tmp_path) / "last.pt")
    assert checkpoint["metrics"]["epoch"] == 1
    assert all(torch.isfinite(x).all() for x in checkpoint["model"].values())


@pytest.mark.usefixtures("widget")
def test_weights_that_are_not_finite_stop_the_run(tmp_path, run_main, monkeypatch):
    def breaks_the_weights(training, state, *_):
        next(training.model.flow.parameters()).data.fill_(math.nan)
        state.losses.append(1.0)

    monkeypatch.setattr(train.Training, "train_one_epoch", breaks_the_weights)
    code, _, err = run_main(train.main, flags(tmp_path))
    assert code == 1
    assert "anomaly maps are no longer finite" in err
    assert not (only_run(tmp_path) / "last.pt").exists()


# ----------------------------------------------------------------------------------- bad input


def assert_refused(tmp_path, result, message):
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--datapath", "nowhere"], "`make demo`"),
        (["--datapath", "nowhere"], "https://www.mvtec.com"),
        (["--cls", "gadget"], "classes there: widget"),
        (["--cls", "../data/widget"], "classes there: widget"),
        (["--cls", ".."], "classes there: widget"),
        (["--seed", 2**64], "not a whole number"),
        (["--batchSize", 1], "use at least 2"),
        (["--batchSize", 7], "more than the 6 training images; use 2 to 6"),
        (["--imageSize", 30, "--numLayer", 4], "the nearest sizes that work: 24 and 32"),
        (["--imageSize", 32, 32, 32], "--imageSize takes"),
        (["--imageSize", "big"], "'big' is not a whole number"),
        (["--kernelSize", 4], "not odd; try 5"),
        (["--gpu", 7], "--gpu 7: no such CUDA device"),
        (["--gpu", "x"], "--gpu x: no such CUDA device"),
        (["--saveMemory", "maybe"], "'maybe' is not one of true"),
        (["--numLayer", 9], "invalid choice"),
        (["--epochs", 0], "whole number from 1"),
        (["--volumNorm", "CVN"], "unrecognized arguments"),
        (["--encoder", "resnet18", "--encoderWeights", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_bad_flags(tmp_path, run_main, extra, message):
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path, *extra)), message)


def test_no_training_images(tmp_path, run_main):
    folder = make_class(tmp_path / "data", num_train=0)
    (folder / "train" / "good").mkdir(parents=True)
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path)), "no training images")


def test_one_training_image(tmp_path, run_main):
    make_class(tmp_path / "data", num_train=1)
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path)), "add some, at least 2")


def test_no_test_images(tmp_path, run_main):
    make_class(tmp_path / "data", num_test=0)
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path)), "no test images")


def test_truncated_image(tmp_path, run_main, widget):
    path = widget / "test" / "hole" / "001.png"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path)), str(path))


def test_defect_without_mask(tmp_path, run_main, widget):
    (widget / "ground_truth" / "hole" / "002_mask.png").unlink()
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path)), "002_mask.png")


@pytest.mark.usefixtures("widget")
def test_save_dir_that_is_a_file(tmp_path, run_main):
    (tmp_path / "taken").write_text("mine")
    result = run_main(train.main, flags(tmp_path, "--saveDir", tmp_path / "taken"))
    assert_refused(tmp_path, result, "cannot write to --saveDir")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "entry conv1.weight has shape"),
        ({}, "no entry conv1.weight"),
        ([1, 2], "not a state dict"),
        (Path, "cannot be read as tensors and plain values"),  # a pickled class
    ],
)
def test_encoder_weights_that_do_not_fit(tmp_path, run_main, content, message):
    torch.save(content, tmp_path / "weights.pth")
    extra = ["--encoder", "resnet18", "--imageSize", 64, "--encoderWeights", tmp_path / "weights.pth"]
    assert_refused(tmp_path, run_main(train.main, flags(tmp_path, *extra)), message)


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize(
    "error", [OSError("<urlopen error Name or service not known>"), TimeoutError(), EOFError()]
)
def test_no_network_for_the_encoder_weights(tmp_path, run_main, monkeypatch, error):
    def no_network(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    result = run_main(train.main, flags(tmp_path, "--encoder", "resnet18", "--imageSize", 64))
    assert_refused(tmp_path, result, "--encoderWeights PATH")
    assert "--encoder none" in result[2]


# ------------------------------------------------------------------------------------- the rest


def test_out_of_memory_is_one_line(run_main):
    code, _, err = run_main(lambda: torch.empty(1 << 60), [])
    assert code == 2
    assert "out of memory; use smaller images" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("widget")
def test_flags_without_effect_are_said(tmp_path, run_main):
    _, out, _ = run_main(train.main, flags(tmp_path, "--epochs", 1, "--encoderBN", "frozen"))
    assert "--encoderBN has no effect with --encoder none" in out


def test_run_folders_are_never_shared(tmp_path):
    folders = {create_run_folder(tmp_path, "tile") for _ in range(5)}
    assert len(folders) == 5


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_official_names_and_defaults():
    settings, _ = parse_settings("", [])
    assert (settings.cls, settings.datapath, settings.encoder) == (
        "tile",
        "../mvtec_anomaly_detection",
        "resnet18",
    )
    assert (settings.numLayer, settings.volumeNorm, settings.kernelSize) == ("auto", "auto", 7)
    assert (settings.numChannel, settings.numStack, settings.gpu, settings.batchSize) == (16, 4, "0", 2)
    assert settings.saveMemory is True
    assert parse_settings("", ["--saveMemory", "False"])[0].saveMemory is False
    assert (settings.epochs, settings.seed, settings.encoderBN, settings.augment) == (
        15,
        0,
        "batch",
        "auto",
    )


@pytest.mark.parametrize(
    ("cls", "levels", "norm"),
    [
        ("tile", 4, "CVN"),
        ("screw", 2, "CVN"),
        ("carpet", 8, "SVN"),
        ("metal_nut", 8, "CVN"),
        ("grid", 4, "SVN"),
    ],
)
def test_auto_settings_by_class(cls, levels, norm):
    config = model_config(parse_settings("", ["--cls", cls])[0])
    assert (config.num_level, config.volume_norm, config.image_size) == (levels, norm, (1024, 1024))
    config = model_config(parse_settings("", ["--cls", cls, "--encoder", "none"])[0])
    assert config.image_size == (256, 256)


def test_help_groups_the_flags(run_main):
    code, out, _ = run_main(train.main, ["--help"])
    assert code == 0
    for group in ("data:", "model:", "training:", "running:"):
        assert group in out
