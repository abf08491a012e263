"""A run that was stopped at any moment goes on and ends where an uninterrupted one ends, to the bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_class

import train
from checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent

# Trains, and kills itself with SIGKILL in one of os.replace's calls (before or after it) or of Training.step's.
KILLED = """
import os, signal, sys
import train
target, number, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
owner = {"replace": os, "step": train.Training}[target]
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
train.main(sys.argv[4:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_class(root, "tile")  # a texture: order and orientation are random
    return root


def flags(data, save_dir, *extra):
    return [
        str(x)
        for x in (
            *SMALL,
            "--cls",
            "tile",
            "--epochs",
            3,
            "--datapath",
            data,
            "--saveDir",
            save_dir,
            *extra,
        )
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
        for key in x.keys() - {"seconds", "saveDir", "resume"}:
            assert_equal_content(x[key], y[key], f"{where}, {key}")
    elif isinstance(x, list):
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            assert_equal_content(a, b, f"{where}[{i}]")
    else:
        assert x == y, where


@pytest.mark.parametrize(
    ("target", "number", "moment"),
    [
        ("step", 2, "before"),  # in the first epoch
        ("step", 5, "after"),  # in the second
        ("replace", 5, "after"),  # between training and evaluation
        ("replace", 7, "before"),  # while a checkpoint is written
        ("replace", 8, "after"),
        ("replace", 17, "before"),  # after the last epoch
    ],
)
def test_killed_and_resumed_equals_uninterrupted(data, uninterrupted, tmp_path, target, number, moment):
    command = [sys.executable, "-c", KILLED, target, str(number), moment]
    killed = subprocess.run(
        [*command, *flags(data, tmp_path / "runs", "--evalEvery", 2)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = only_run(tmp_path / "runs")
    assert not (run / "result.json").exists()
    train.main(["--resume", str(run)])
    assert_same(run, uninterrupted)
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_and_says_how_to_go_on(
    data, uninterrupted, tmp_path, run_main, monkeypatch, number
):
    original, steps = train.Training.step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(train.Training, "step", interrupted)
    before = signal.getsignal(number)
    code, _, err = run_main(train.main, flags(data, tmp_path / "runs", "--evalEvery", 2))
    assert signal.getsignal(number) == before
    run = only_run(tmp_path / "runs")
    assert code == 130
    assert f"stopped in epoch 2; go on with: python train.py --resume {run}" in err
    assert len(steps) == 5
    assert len(load_checkpoint(run / "state.pt")["state"]["losses"]) == 2  # the step was finished
    code, out, _ = run_main(train.main, ["--resume", run])
    assert code == 0
    assert "in epoch 2, 2 steps done" in out
    assert len(steps) == 3 * 3  # none was made twice
    assert_same(run, uninterrupted)


def test_a_stop_while_evaluating_costs_no_step(data, uninterrupted, tmp_path, run_main, monkeypatch):
    original, steps = train.Training.step, []

    def counted(*arguments):
        steps.append(1)
        return original(*arguments)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Training, "step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_maps", stop)
        code, _, err = run_main(train.main, flags(data, tmp_path / "runs", "--evalEvery", 2))
    assert (code, "stopped in epoch 2" in err) == (130, True)
    run = only_run(tmp_path / "runs")
    assert run_main(train.main, ["--resume", run])[0] == 0
    assert len(steps) == 3 * 3
    assert_same(run, uninterrupted)


def test_a_run_that_another_process_went_on_with_is_left_alone(stopped, run_main, monkeypatch):
    stale = train.load_state(stopped)
    assert run_main(train.main, ["--resume", stopped])[0] == 0
    before = (stopped / "result.json").read_bytes()
    monkeypatch.setattr(train, "load_state", lambda folder: stale)
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert (code, err.count("\n")) == (2, 1)
    assert "this run is finished" in err
    assert (stopped / "result.json").read_bytes() == before


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    """A run that was stopped in its first step."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", stop)
        with pytest.raises(train.Interrupted):
            train.main(flags(data, tmp_path / "runs"))
    return only_run(tmp_path / "runs")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--numStack", 2], "--numStack 2 contradicts the run"),
        (["--seed", 1], "which has 0"),
        (["--saveMemory", "false"], "--saveMemory False contradicts"),
        (["--epochs", 9], "--epochs 9 contradicts"),
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
    assert "6 training images, --datapath 8" in err


def test_what_cannot_be_resumed_is_said(uninterrupted, tmp_path, run_main):
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no state.pt"),
        (uninterrupted, "this run is finished"),
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


@pytest.mark.parametrize("key", ["settings", "state", "model"])
def test_a_state_of_another_version_is_said(stopped, run_main, key):
    content = load_checkpoint(stopped / "state.pt")
    content.pop(key)
    torch.save(content, stopped / "state.pt")
    code, _, err = run_main(train.main, ["--resume", stopped])
    assert (code, err.count("\n")) == (2, 1)
    assert "not the state of a run of this version" in err
