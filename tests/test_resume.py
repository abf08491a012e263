"""A run that was stopped at any moment is resumed and ends where an uninterrupted one ends, to the bit."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_class

import runs
import train
from scorer import load_checkpoint

ROOT = Path(__file__).parent.parent

# For each case a child that trains and kills itself with SIGKILL in one of os.replace's calls (before or after it)
# or of training_loss's.  Children, because starting Python takes longer than the training.
KILLED = """
import json, os, signal, sys
import sklearn.metrics, torch._dynamo  # which a training imports when it needs them
import train
for target, number, moment, *flags in json.loads(sys.argv[1]):
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, (target, number, moment, status)
        continue
    owner = {"replace": os, "training_loss": train}[target]
    original, calls = getattr(owner, target), []
    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, target, killing)
    train.main(flags)
    sys.exit()
"""
CASES = [
    ("training_loss", 2, "before"),  # in the first epoch
    ("training_loss", 5, "after"),  # in the second
    ("replace", 3, "before"),  # at the end of an epoch
    ("replace", 4, "after"),  # while checkpoints are written
    ("replace", 6, "before"),
    ("replace", 8, "after"),
    ("replace", 14, "before"),  # after the last epoch
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_class(root, "tile")  # a texture: order and orientation are random
    return root


def flags(data, save_dir, *extra):
    return [
        str(x) for x in (*SMALL, "--cls", "tile", "--epochs", 3, "--datapath", data, "--saveDir", save_dir, *extra)
    ]


def only_run(save_dir):
    (run,) = save_dir.iterdir()
    return run


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("whole")
    train.main(flags(data, save_dir, "--evalEvery", 2))
    return only_run(save_dir)


def assert_same(run, other):
    for name in ("last.pt", "best_pixel_auroc.pt", "best_pixel_pro.pt", "state.pt"):
        assert_equal_content(load_checkpoint(run / name), load_checkpoint(other / name), name)
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (run, other)]
    assert [row.rsplit(",", 1)[0] for row in rows[0]] == [row.rsplit(",", 1)[0] for row in rows[1]]
    assert (run / "result.json").read_text() == (other / "result.json").read_text()


def assert_equal_content(x, y, where):
    if isinstance(x, torch.Tensor):
        assert torch.equal(x, y), where
    elif isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for key in x.keys() - {"seconds", "saveDir", "resume", "epochs"}:
            assert_equal_content(x[key], y[key], f"{where}, {key}")
    elif isinstance(x, (list, tuple)):
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            assert_equal_content(a, b, f"{where}[{i}]")
    else:
        assert x == y, where


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The folders of the killed runs, in the order of `CASES`."""
    places = [tmp_path_factory.mktemp("killed") for _ in CASES]
    given = [(*case, *flags(data, place, "--evalEvery", 2)) for case, place in zip(CASES, places, strict=True)]
    subprocess.run([sys.executable, "-c", KILLED, json.dumps(given)], cwd=ROOT, check=True)
    return list(map(only_run, places))


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, killed, number):
    run = killed[number]
    assert not (run / "result.json").exists()
    train.main(["--resume", str(run)])
    assert_same(run, uninterrupted)
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_once_and_says_how_to_resume(
    data, uninterrupted, tmp_path, run_main, monkeypatch, number
):
    original, steps = train.training_loss, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(train, "training_loss", interrupted)
    before = signal.getsignal(number)
    code, _, err = run_main(train.main, flags(data, tmp_path / "runs", "--evalEvery", 2))
    assert signal.getsignal(number) == before
    run = only_run(tmp_path / "runs")
    assert code == 130
    assert f"stopped in epoch 2; resume with: python train.py --resume {run}" in err
    assert len(steps) == 5
    assert load_checkpoint(run / "state.pt")["epoch"] == 2
    code, out, _ = run_main(train.main, ["--resume", run])
    assert code == 0
    assert "from epoch 2" in out
    assert len(steps) == 5 + 2 * 3
    assert_same(run, uninterrupted)


def test_a_signal_that_a_callback_swallows_still_stops_the_run(data, tmp_path, run_main, monkeypatch):
    original, steps = train.training_loss, []

    def swallowed(*arguments):
        steps.append(1)
        if len(steps) == 2:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, "training_loss", swallowed)
    assert run_main(train.main, flags(data, tmp_path / "runs"))[0] == 130
    assert len(steps) == 2


def test_a_stop_while_evaluating(data, uninterrupted, tmp_path, run_main, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_maps", stop)
        code, _, err = run_main(train.main, flags(data, tmp_path / "runs", "--evalEvery", 2))
    assert (code, "stopped in epoch 2" in err) == (130, True)
    run = only_run(tmp_path / "runs")
    assert run_main(train.main, ["--resume", run])[0] == 0
    assert_same(run, uninterrupted)


def test_a_finished_run_can_be_given_more_epochs(data, uninterrupted, tmp_path, run_main):
    extra = ["--evalEvery", 2, "--epochs", 2]
    assert run_main(train.main, flags(data, tmp_path / "runs", *extra))[0] == 0
    run = only_run(tmp_path / "runs")
    assert run_main(train.main, ["--resume", run, "--epochs", 3])[0] == 0
    assert_same(run, uninterrupted)


def test_a_run_that_another_process_resumed_is_left_alone(stopped, run_main, monkeypatch):
    stale = runs.load_state(stopped)
    assert run_main(train.main, ["--resume", stopped])[0] == 0
    before = (stopped / "result.json").read_bytes()
    monkeypatch.setattr(train, "load_state", lambda folder, states=[stale]: states.pop() if states else current)
    current = load_checkpoint(stopped / "state.pt")
    code, _, err = run_main(train.main, ["--resume", stopped, "--epochs", 4])
    assert (code, err.count("\n")) == (2, 1)
    assert "another process resumed it" in err
    assert (stopped / "result.json").read_bytes() == before


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    """A run that was stopped in the first step of its second epoch."""
    original, steps = train.training_loss, []

    def stop(*arguments):
        steps.append(1)
        if len(steps) > 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_loss", stop)
        with pytest.raises(train.Interrupted):
            train.main(flags(data, tmp_path / "runs"))
    return only_run(tmp_path / "runs")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--numStack", 2], "--numStack 2 contradicts the run"),
        (["--seed", 1], "which has 0"),
        (["--saveMemory", "true"], "--saveMemory True contradicts"),
        (["--epochs", 2], "the run has 3; give as many, or more"),
        (["--lr", "1e-3"], "--lr 0.001 contradicts"),
        (["--config", "x.yaml"], "a run keeps its own settings; leave --config out"),
        (["--imageSize", 64], "--imageSize"),
        (["--datapath", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_contradicting_flag_is_named(stopped, run_main, extra, message):
    before = (stopped / "state.pt").read_bytes()
    code, _, err = run_main(train.main, ["--resume", stopped, *extra])
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert (stopped / "state.pt").read_bytes() == before


def test_flags_that_agree_or_only_say_where_to_compute_are_taken(stopped, run_main):
    flags = ["--numStack", 1, "--numLayer", 2, "--precision", "auto", "--cache", "none", "--gpu", "cpu"]
    code, _, err = run_main(train.main, ["--resume", stopped, *flags])
    assert code == 0, err


def test_other_training_images_are_refused(stopped, tmp_path, run_main):
    make_class(tmp_path / "other", "tile", num_train=8)
    code, _, err = run_main(train.main, ["--resume", stopped, "--datapath", tmp_path / "other"])
    assert code == 2
    assert "training images are not those of the run" in err


def test_other_images_of_the_same_names_are_refused(stopped, tmp_path, run_main):
    folder = make_class(tmp_path / "other", "tile")
    path = folder / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes() + b"x")
    code, _, err = run_main(train.main, ["--resume", stopped, "--datapath", tmp_path / "other"])
    assert (code, "training images are not those of the run" in err) == (2, True)


def test_the_test_images_have_to_be_the_same(trained, tmp_path, run_main):
    """Or the rows of metrics.csv would be of two data sets."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    data = shutil.copytree(trained.data, tmp_path / "moved")
    flags = ["--resume", run, "--epochs", 3, "--datapath", data, "--gpu", "cpu"]
    (data / "widget" / "test" / "good" / "000.png").unlink()
    code, _, err = run_main(train.main, flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "test images are not those of the run" in err


def test_what_cannot_be_resumed_is_said(uninterrupted, tmp_path, run_main):
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (uninterrupted / "last.pt", f"is a file; give the run's folder, {uninterrupted}"),
        (tmp_path, "no state.pt"),
        (uninterrupted, "this run is finished after 3 epochs; give more --epochs"),
        ("", "no such folder"),
    ):
        code, _, err = run_main(train.main, ["--resume", folder])
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_damaged_state_is_said(stopped, run_main):
    path = stopped / "state.pt"
    path.write_bytes(path.read_bytes()[:-500])
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert code == 2
    assert "state.pt cannot be read" in err


@pytest.mark.parametrize("key", ["settings", "rows", "model"])
def test_a_state_of_another_version_is_said(stopped, run_main, key):
    content = load_checkpoint(stopped / "state.pt")
    content.pop(key)
    torch.save(content, stopped / "state.pt")
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert (code, err.count("\n")) == (2, 1)
    assert "not the state of a run of this version" in err


def wrong_moments(content):
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1000)


def moments_of_no_parameter(content):
    content["optimizer"]["state"][1000] = content["optimizer"]["state"][0]


def wrong_type(content):
    content["epoch"] = "1"


def wrong_flag(content):
    content["settings"]["evalEvery"] = 0


def no_random_state(content):
    content["random_state"] = torch.zeros(3)


def no_learning_rate(content):
    content["optimizer"]["param_groups"][0]["lr"] = "1"


def no_step(content):
    content["scheduler"]["last_epoch"] = None


@pytest.mark.parametrize(
    "change",
    [wrong_moments, moments_of_no_parameter, wrong_type, wrong_flag, no_random_state, no_learning_rate, no_step],
)
def test_a_crafted_state_is_refused(stopped, run_main, change):
    content = load_checkpoint(stopped / "state.pt")
    change(content)
    torch.save(content, stopped / "state.pt")
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert (code, err.count("\n")) == (2, 1), err


def test_settings_of_the_optimizer_come_from_the_flags(stopped, uninterrupted, run_main):
    content = load_checkpoint(stopped / "state.pt")
    content["optimizer"]["param_groups"][0].update(eps="x", betas=None, maximize=True, params=[])
    content["scheduler"].update(step=5, base_lrs="x")
    torch.save(content, stopped / "state.pt")
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert code == 0, err
    state = load_checkpoint(stopped / "state.pt")
    assert (
        state["optimizer"]["param_groups"]
        == load_checkpoint(uninterrupted / "state.pt")["optimizer"]["param_groups"]
    )
