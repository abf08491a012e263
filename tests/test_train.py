"""train.py from end to end on a small class: what it writes, and what it refuses."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import SMALL, make_class
from PIL import Image

import runs
import train
import util
from benchmarks.measuring import step_memory
from dataset import Images, open_class
from metrics import METRICS, TABLE_METRICS, evaluate_maps
from model import PyramidFlow, PyramidFlowConfig, training_loss
from scorer import Scorer, TestSet, load_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


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
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "| widget | 2 (last) |" in done.stdout
    run = only_run(tmp_path)
    assert run.name.startswith("widget-")
    names = {p.name for p in run.iterdir()}
    assert names == {"config.json", "log.txt", "metrics.csv", "last.pt", "best_pixel_auroc.pt",
                     "best_pixel_pro.pt", "state.pt", "result.json", "report.html", "pictures"}  # fmt: skip

    log = (run / "log.txt").read_text().splitlines()
    assert "torch" in log[0]
    assert "cpu" in log[1]
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["numChannel"] == 4
    assert config["model"]["num_level"] == 2

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    thresholds = ["pixel_threshold", "image_threshold", "image_recall_threshold"]
    assert list(rows[0]) == ["epoch", "loss", "score", *METRICS, *thresholds, "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    result = json.loads((run / "result.json").read_text())
    assert set(result["last"]) >= {"epoch", *METRICS}
    assert all(0 <= result["last"][m] <= 1 for m in METRICS)
    assert result["last"]["pixel_auroc"] == float(rows[-1]["pixel_auroc"])
    best = result["best_pixel_auroc"]
    assert best["pixel_auroc"] == max(float(row["pixel_auroc"]) for row in rows)
    assert "test" in best["chosen_on"]

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
    scorer = Scorer.fit(fresh, Images(data.train, config.image_size, "ram", CPU, 1, "x"))
    for ours, (stored, *_) in zip(scorer.templates, checkpoint["templates"], strict=True):
        assert torch.equal(ours, stored)
    test_set = TestSet.load(data, config, "ram", 1, CPU)
    metrics = evaluate_maps(scorer.score_all(test_set.images).maps, test_set.truth)
    for name in METRICS:
        assert getattr(metrics, name) == checkpoint["metrics"][name], name


RELOAD = """
import sys, torch
from pathlib import Path
from scorer import Scorer
images = (torch.arange(2 * 32 * 32 * 3) % 256).byte().view(2, 32, 32, 3)
torch.save(Scorer.load(Path(sys.argv[1])).score(images).maps, sys.argv[2])
"""


@pytest.mark.usefixtures("widget")
def test_a_fresh_process_rebuilds_the_model(tmp_path, run_main):
    assert run_main(train.main, flags(tmp_path))[0] == 0
    path = only_run(tmp_path) / "last.pt"
    command = [sys.executable, "-c", RELOAD, path, tmp_path / "maps.pt"]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    checkpoint = load_checkpoint(path)
    images = (torch.arange(2 * 32 * 32 * 3) % 256).byte().view(2, 32, 32, 3)
    mean = tuple(first for first, _, _ in checkpoint["templates"])
    maps = Scorer(rebuilt(checkpoint).eval(), mean).score(images).maps
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
    for value in ("true", "no", "auto"):
        code, out, _ = run_main(train.main, flags(tmp_path, "--saveMemory", value, "--epochs", 1))
        assert code == 0
        losses.append(out.split("loss ")[1].split(",")[0])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize("saves", [True, False])
def test_cudnn_tries_out_what_is_fastest_only_where_that_is_sound(tmp_path, run_main, monkeypatch, saves):
    """In steps of one shape that compute nothing again; in scoring, whose batches have many sizes, never."""
    seen, originals = {}, {"training_loss": train.training_loss, "score_all": train.score_all}

    def observe(name):
        def observed(*args, **options):
            seen.setdefault(name, set()).add(torch.backends.cudnn.benchmark)
            return originals[name](*args, **options)

        return observed

    for name in originals:
        monkeypatch.setattr(train, name, observe(name))
    code, _, err = run_main(train.main, flags(tmp_path, "--saveMemory", saves, "--epochs", 2))
    assert code == 0, err
    assert seen == {"training_loss": {not saves}, "score_all": {False}}


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize(("times", "saves"), [(1.9, True), (2.1, False)])
def test_auto_saves_memory_where_activations_would_take_half_of_it(tmp_path, run_main, monkeypatch, times, saves):
    given = list(map(str, flags(tmp_path, "--epochs", 1)))
    args = train.parse_arguments(given)
    need = runs.activation_bytes(train.model_config(args), args.batchSize, "fp32", CPU)
    monkeypatch.setattr(util, "free_memory", lambda device: times * need)
    code, out, err = run_main(train.main, given)
    assert code == 0, err
    assert out.count(f"--saveMemory auto is {str(saves).lower()}: ") == 1
    config = json.loads((only_run(tmp_path) / "config.json").read_text())
    assert (config["settings"]["saveMemory"], config["model"]["save_memory"]) == (saves, saves)
    assert load_checkpoint(only_run(tmp_path) / "last.pt")["config"]["save_memory"] == saves
    monkeypatch.setattr(util, "free_memory", lambda device: 0)  # a resumed run keeps to its way
    code, out, err = run_main(train.main, ["--resume", only_run(tmp_path), "--epochs", 2, "--saveMemory", "auto"])
    assert code == 0, err
    assert "--saveMemory auto" not in out
    assert load_checkpoint(only_run(tmp_path) / "last.pt")["config"]["save_memory"] == saves


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("levels", "changes"),
    [
        (4, {}),
        (8, {}),
        (8, {"volume_norm": "SVN"}),
        (4, {"num_stack": 2, "batch": 4}),
        (4, {"num_channel": 8}),
        (4, {"encoder": "resnet18", "image_size": (64, 64)}),
    ],
    ids=["FNF", "FNF, 8 levels", "SVN", "4 images", "8 channels", "Res18"],
)
def test_activations_take_what_is_estimated(levels, changes, precision):
    given = {"batch": 2, "encoder": "none", "image_size": (128, 128), "num_level": levels, **changes}
    batch = given.pop("batch")
    config = PyramidFlowConfig(**given, save_memory=False)
    torch.manual_seed(0)
    model = PyramidFlow(config).train()
    model.compute_networks_in(torch.bfloat16 if precision == "bf16" else None)
    images = torch.randn(batch, 3, *config.image_size)

    def step():
        training_loss(model, *model(images)).backward()

    measured = step_memory(step, model.flow, CPU)
    assert runs.activation_bytes(config, batch, precision, CPU) == pytest.approx(measured, rel=0.1)


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
        templates = load_checkpoint(only_run(tmp_path) / "last.pt")["templates"]
        assert not any(x.any() for level in templates for x in level[:2])


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

    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_main(train.main, flags(tmp_path, "--tensorboard"))
    assert code == 2
    assert "pip install tensorboard" in err


@pytest.mark.parametrize("names", [["bolt", "nut"], ["all"]])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_that_fails_does_not_stop_the_others(tmp_path, run_main, part, names):
    for name in ("bolt", "nut"):
        make_class(tmp_path / "data", name)
    path = tmp_path / "data" / "bolt" / part / "good" / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    code, out, err = run_main(train.main, flags(tmp_path, "--cls", *names, "--epochs", 1))
    assert (code, err.count("\n")) == (2, 1)
    assert f"bolt: cannot read image {path}" in err
    assert "| nut | 1 (last) |" in out


def test_of_all_classes_one_that_cannot_be_trained_is_left_out(tmp_path, run_main):
    for name in ("bolt", "nut"):
        make_class(tmp_path / "data", name)
    mask = next((tmp_path / "data" / "bolt" / "ground_truth").rglob("*.png"))
    mask.unlink()
    code, out, err = run_main(train.main, flags(tmp_path, "--cls", "all", "--epochs", 1))
    first, last = err.splitlines()
    assert code == 2
    assert first.startswith("left out: bolt: ")
    assert last.endswith(first.removeprefix("left out: "))
    assert "| nut | 1 (last) |" in out
    code, out, err = run_main(train.main, flags(tmp_path, "--cls", "nut", "bolt", "--epochs", 1))
    assert (code, err.count("\n"), "nut" in out) == (2, 1, False)  # a class that was named is a mistake


@pytest.mark.usefixtures("widget")
@pytest.mark.parametrize(
    "huge", [["--numStack", 256, "--numChannel", 1024], ["--imageSize", 16384, "--numChannel", 512]]
)
def test_a_model_beyond_the_memory_is_refused_before_it_is_made(tmp_path, run_main, huge):
    code, _, err = run_main(train.main, flags(tmp_path, *huge))
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(r"takes more than [\d.e+]+ GiB of memory, [\d.]+ are free; use a smaller --numStack", err)


def test_all_classes_one_after_the_other(tmp_path, run_main):
    for name in ("bolt", "nut"):
        make_class(tmp_path / "data", name)
    code, out, err = run_main(train.main, flags(tmp_path, "--cls", "all", "--epochs", 1))
    assert code == 0, err
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name.split("-")[0] for run in runs] == ["bolt", "nut"]
    table = out.split("| class |")[-1].splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["bolt", "nut", "mean of 2"]
    rows = [[float(x) for x in line.split("|")[3 : 3 + len(TABLE_METRICS)]] for line in table[2:5]]
    for a, b, mean in zip(*rows, strict=True):
        assert mean == pytest.approx((a + b) / 2, abs=0.006)


def test_only_every_nth_epoch_and_the_last_are_evaluated(tmp_path, run_main):
    make_class(tmp_path / "data")
    assert run_main(train.main, flags(tmp_path, "--epochs", 5, "--evalEvery", 2))[0] == 0
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["2", "4", "5"]
    assert float(rows[-1]["pixel_auroc"]) > 0.9


@pytest.mark.parametrize(
    ("extra", "augmented"),
    [
        ([], True),
        (["--imageSize", 24, 32], True),
        (["--augment", "none"], False),
        (["--cls", "widget"], False),
        (["--cls", "widget", "--augment", "turns"], True),
    ],
)
def test_textures_are_augmented_and_any_size_works(tmp_path, run_main, extra, augmented):
    make_class(tmp_path / "data", "tile")
    make_class(tmp_path / "data", "widget")
    changes = ["--cls", "tile", "--epochs", 1, "--batchSize", 3, *extra]
    code, out, err = run_main(train.main, flags(tmp_path, *changes))
    assert code == 0, err
    assert ("not augmented" in out) is not augmented


@pytest.mark.usefixtures("widget")
def test_augmentation_reaches_the_network_and_not_the_template(tmp_path, run_main, monkeypatch):
    shown = {True: [], False: []}
    original = train.PyramidFlow.encode

    def watched(model, images):
        shown[model.training] += [image.sum().item() for image in images]
        return original(model, images)

    monkeypatch.setattr(train.PyramidFlow, "encode", watched)
    monkeypatch.setattr(train.Augmentation, "__call__", lambda self, image, epoch, index: 255 - image)
    assert run_main(train.main, flags(tmp_path, "--epochs", 1, "--augment", "flips"))[0] == 0
    assert not set(shown[True]) & set(shown[False])


def test_a_class_without_masks(tmp_path, run_main):
    make_class(tmp_path / "data", masks=False)
    code, out, _ = run_main(train.main, flags(tmp_path))
    assert code == 0
    assert "n/a" in out
    run = only_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["last"]["pixel_auroc"] is None
    assert result["best_image_auroc"]["image_auroc"] is not None
    assert (run / "best_image_auroc.pt").is_file()


def test_a_class_with_nothing_defective(tmp_path, run_main):
    folder = make_class(tmp_path / "data")
    for path in (folder / "test" / "hole").iterdir():
        path.unlink()
    assert run_main(train.main, flags(tmp_path))[0] == 0
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert not any(key.startswith("best") for key in result)
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
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path, run_main, monkeypatch):
    calls = []
    original = train.training_loss

    def breaks_in_the_second_epoch(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(train, "training_loss", breaks_in_the_second_epoch)
    code, _, err = run_main(train.main, flags(tmp_path))
    assert code == 1
    assert "the loss became nan at step 2" in err
    checkpoint = load_checkpoint(only_run(tmp_path) / "last.pt")
    assert checkpoint["metrics"]["epoch"] == 1
    for content in (checkpoint, load_checkpoint(only_run(tmp_path) / "state.pt")):
        assert all(torch.isfinite(x).all() for x in content["model"].values())


@pytest.mark.usefixtures("widget")
def test_weights_that_are_not_finite_stop_the_run(tmp_path, run_main, monkeypatch):
    def breaks_the_weights(network, model, *_):
        next(model.flow.parameters()).data.fill_(math.nan)
        return 1.0

    monkeypatch.setattr(train, "train_one_epoch", breaks_the_weights)
    code, _, err = run_main(train.main, flags(tmp_path))
    assert code == 1
    assert "the weights are no longer finite" in err
    assert not (only_run(tmp_path) / "last.pt").exists()
    state = load_checkpoint(only_run(tmp_path) / "state.pt")
    assert state["epoch"] == 1
    assert all(torch.isfinite(x).all() for x in state["model"].values())


@pytest.mark.usefixtures("widget")
def test_weights_that_break_in_an_epoch_without_evaluation_do_not_replace_the_last_state(
    tmp_path, run_main, monkeypatch
):
    original, epochs = train.train_one_epoch, []

    def breaks_in_the_last_step(network, model, *rest):
        loss = original(network, model, *rest)
        epochs.append(loss)
        if len(epochs) == 2:
            next(model.flow.parameters()).data.fill_(math.inf)
        return loss

    monkeypatch.setattr(train, "train_one_epoch", breaks_in_the_last_step)
    code, _, err = run_main(train.main, flags(tmp_path, "--epochs", 4, "--evalEvery", 4))
    assert (code, err.count("\n")) == (1, 1)
    assert "the weights are no longer finite" in err
    state = load_checkpoint(only_run(tmp_path) / "state.pt")
    assert state["epoch"] == 2
    assert all(torch.isfinite(x).all() for x in state["model"].values())


# ------------------------------------------------------------------------------- hyper-parameters


@pytest.mark.usefixtures("widget")
def test_the_flags_reach_the_optimizer(tmp_path, run_main, monkeypatch):
    made = []
    original = train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *given: made.append(original(*given)) or made[-1])
    changes = ["--lr", "1e-3", "--beta1", 0.8, "--beta2", 0.95, "--eps", "1e-6", "--weightDecay", 0.01]
    assert run_main(train.main, flags(tmp_path, "--epochs", 1, *changes))[0] == 0
    group = made[0].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-3, (0.8, 0.95), 1e-6, 0.01,
    )  # fmt: skip


@pytest.mark.usefixtures("widget")
def test_clipping_bounds_the_gradient(tmp_path, run_main, monkeypatch):
    asked = []
    original = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        asked.append(limit)
        return original(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    assert run_main(train.main, flags(tmp_path, "--epochs", 1, "--clipNorm", 0.5))[0] == 0
    assert asked == [0.5] * 3


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], [1.0] * 6),
        (["--scheduler", "cosine"], [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        (["--scheduler", "step"], [1.0] * 4 + [0.1] * 2),
        (["--warmup", 1], [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_of_the_learning_rate(extra, expected):
    args = train.parse_arguments(["--epochs", "2", *map(str, extra)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = train.make_scheduler(optimizer, args, steps=3)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


@pytest.mark.usefixtures("widget")
def test_a_run_repeats_from_its_own_config(tmp_path, run_main):
    assert run_main(train.main, flags(tmp_path, "--lr", "3e-4"))[0] == 0
    first = only_run(tmp_path)
    assert run_main(train.main, ["--config", first / "config.json", "--epochs", 1])[0] == 0
    second = max((tmp_path / "runs").iterdir())
    a, b = (json.loads((run / "config.json").read_text())["settings"] for run in (first, second))
    assert b.pop("epochs") == 1  # the command line wins
    assert b.pop("config") == str(first / "config.json")
    assert b == {k: v for k, v in a.items() if k not in ("epochs", "config")}


def test_a_config_may_be_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1.0e-3\nimageSize: [128, 256]\nsaveMemory: false\ncls: tile\n")
    args = train.parse_arguments(["--config", str(tmp_path / "a.yaml"), "--lr", "0.5"])
    assert (args.lr, args.imageSize, args.saveMemory, args.cls) == (0.5, [128, 256], False, ["tile"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: fast", "argument --lr"),
        ("learningRate: 1", "'learningRate' is no flag"),
        ("- 1", "not a table of flags"),
        ("a: [", "not yaml or json"),
        ("!!python/object/apply:os.system ['touch hacked']", "not yaml or json"),
        ("lr: {a: 1}", "a value that is no word or number"),
        (None, "No such file"),
    ],
)
def test_bad_configs(tmp_path, run_main, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a.yaml").write_text(content)
    code, _, err = run_main(train.main, ["--config", "a.yaml"])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not Path("hacked").exists()


@pytest.mark.usefixtures("widget")
def test_training_from_other_weights(tmp_path, run_main):
    assert run_main(train.main, flags(tmp_path, "--epochs", 1))[0] == 0
    other = only_run(tmp_path) / "last.pt"
    changes = ["--epochs", 1, "--lr", "1e-30", "--init", other, "--saveDir", tmp_path / "next"]
    code, _, err = run_main(train.main, flags(tmp_path, *changes))
    assert code == 0, err
    (run,) = (tmp_path / "next").iterdir()
    x, y = (load_checkpoint(path)["model"] for path in (other, run / "last.pt"))
    learned = [name for name in x if name.endswith("weight") and "flow" in name]
    assert all(torch.allclose(x[name], y[name], atol=1e-6) for name in learned)
    result = run_main(train.main, flags(tmp_path, "--init", other, "--numStack", 2))
    assert (result[0], "it has num_stack 1" in result[2]) == (2, True)


@pytest.mark.usefixtures("widget")
def test_both_scores_of_the_same_weights(tmp_path, run_main):
    assert run_main(train.main, flags(tmp_path, "--saveDir", tmp_path / "paper"))[0] == 0
    code, out, err = run_main(train.main, flags(tmp_path, "--score", "bank", "--numTemplate", 3))
    assert code == 0, err
    assert "2 (last) (paper)" in out
    assert "2 (last) (bank)" in out
    (paper,) = (tmp_path / "paper").iterdir()
    paper, bank = (json.loads((run / "result.json").read_text()) for run in (paper, only_run(tmp_path)))
    assert {k: v for k, v in bank["last_paper"].items() if k != "seconds"} == {
        k: v for k, v in paper["last"].items() if k != "seconds"
    }
    assert bank["last"]["score"] == "bank"
    content = load_checkpoint(only_run(tmp_path) / "last.pt")
    assert [len(codes) for _, codes, _ in content["templates"]] == [2, 2]
    assert {**content["metrics"], "seconds": 0} == {**bank["last"], "seconds": 0}


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
        (["--volumNorm", "CVN"], "did you mean --volumeNorm?"),
        (["--epoch", 3], "did you mean --epochs?"),
        (["--lr", 0], "not a number above 0"),
        (["--lr", "nan"], "not a number above 0"),
        (["--beta1", 1], "not a number from 0 to"),
        (["--scheduler", "linear"], "invalid choice"),
        (["--proLimit", 2], "above 0 to 1"),
        (["--augment", "spin"], "--augment spin"),
        (["--init", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--numTemplate", 0], "whole number from 1"),
        (["--numTemplate", 8], "need --score bank"),
        (["--numStack", 10**9], "whole number from 1 to 256"),
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


def test_official_names_and_defaults():
    args = train.parse_arguments([])
    official = {
        "cls": ["tile"], "datapath": "../mvtec_anomaly_detection", "encoder": "resnet18", "numLayer": "auto",
        "volumeNorm": "auto", "kernelSize": 7, "numChannel": 16, "numStack": 4, "gpu": "0", "batchSize": 2,
        "saveMemory": "auto", "epochs": 15, "seed": 0, "encoderBN": "batch", "augment": "auto", "lr": 2e-4,
        "beta1": 0.5, "beta2": 0.9, "eps": 1e-4, "weightDecay": 1e-5, "clipNorm": 1.0, "score": "paper",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in official} == official
    assert train.parse_arguments(["--saveMemory", "False"]).saveMemory is False


@pytest.mark.parametrize(
    ("cls", "levels", "norm"),
    [("tile", 4, "CVN"), ("screw", 2, "CVN"), ("carpet", 8, "SVN"), ("metal_nut", 8, "CVN"), ("grid", 4, "SVN")],
)
def test_auto_settings_by_class(cls, levels, norm):
    config = train.model_config(train.parse_arguments(["--cls", cls]))
    assert (config.num_level, config.volume_norm, config.image_size) == (levels, norm, (1024, 1024))
    config = train.model_config(train.parse_arguments(["--cls", cls, "--encoder", "none"]))
    assert config.image_size == (256, 256)


def test_help_groups_the_flags(run_main):
    code, out, _ = run_main(train.main, ["--help"])
    assert code == 0
    for group in ("data:", "model:", "training:", "running:"):
        assert group in out
