"""A training over two processes is the training of one process that sees both pairs of every step."""

import csv
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_class

import train
import util
from dataset import Augmentation, Images, normalize, training_order
from model import PyramidFlow, training_loss
from scorer import Scorer, TestSet, load_checkpoint
from util import Clock, InputError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_class(root, "tile", num_train=9, num_test=3)
    return root


def flags(data, *extra):
    own = ["--cls", "tile", "--epochs", 2, "--datapath", data, "--score", "bank"]
    return list(map(str, [*SMALL, *own, "--numTemplate", 3, *extra]))


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    """The run of two processes."""
    save_dir = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]  # fmt: skip
    done = subprocess.run(
        [*map(str, command), *flags(data, "--saveDir", save_dir)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1: loss") == 1
    (run,) = save_dir.iterdir()
    return run


@dataclass
class Training:
    """One process's: the model, each epoch's mean loss, and its scorers, --score's last."""

    model: PyramidFlow
    losses: list[float]
    scorers: list[list[Scorer]]


@pytest.fixture(scope="module")
def by_one(data):
    """One process that averages the gradients and the statistics of the two pairs of each step."""
    args = train.parse_arguments(flags(data))
    config, found = train.model_config(args), train.check_class(args)
    torch.manual_seed(args.seed)
    model = PyramidFlow(config)
    optimizer = train.make_optimizer(model, args)
    train_set = Images(found.train, config.image_size, "ram", CPU, 1, "training images")
    test_set = TestSet.load(found, config, "ram", 1, CPU)
    augment = Augmentation.create(args.augment, "tile", config.image_size, args.seed)
    assert augment is not None
    training = Training(model, [], [])
    for epoch in (1, 2):
        order, losses = training_order(9, 2), []
        model.train()
        for pair in (order[0:2], order[2:4]):
            losses += step_on_two(model, optimizer, train_set.batches(pair, augment, epoch), args)
        training.losses.append(sum(losses) / len(losses))
        evaluated = train.evaluate(model, train_set, test_set, args, Clock(CPU))
        training.scorers.append([scorer for scorer, _ in evaluated])
    return training


def step_on_two(model, optimizer, batches, args: Namespace) -> list[float]:
    """The losses of both batches; each moves the running statistics from where they were."""
    statistics = [b.clone() for b in model.buffers()]
    losses, moved = [], []
    optimizer.zero_grad()
    for images in batches:
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
        loss = training_loss(model, *model(normalize(images)))
        (loss / 2).backward()
        losses.append(float(loss.detach()))
        moved.append([b.clone() for b in model.buffers()])
    for buffer, *both in zip(model.buffers(), *moved, strict=True):
        buffer.copy_(sum(both) / 2)
    torch.nn.utils.clip_grad_norm_(model.flow.parameters(), args.clipNorm)
    optimizer.step()
    return losses


def test_the_same_weights_and_statistics(by_two, by_one):
    checkpoint = load_checkpoint(by_two / "last.pt")
    for name, x in by_one.model.state_dict().items():
        torch.testing.assert_close(checkpoint["model"][name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_the_same_templates_whitening_and_thresholds(by_two, by_one):
    theirs, ours = Scorer.load(by_two / "last.pt"), by_one.scorers[-1][-1]
    assert len(ours.templates[0]) == 3
    for a, b in zip((*theirs.templates, *theirs.sigma), (*ours.templates, *ours.sigma), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name in ("image_scores", "pixel_scores"):
        expected = pytest.approx(getattr(ours.calibration, name), rel=1e-3)
        assert getattr(theirs.calibration, name) == expected, name


def test_the_same_metrics_in_one_folder(by_two, by_one):
    rows = list(csv.DictReader((by_two / "metrics.csv").open()))
    scorers = [scorer for epoch in by_one.scorers for scorer in epoch]
    assert [(row["epoch"], row["score"]) for row in rows] == [
        (str(epoch), score) for epoch in (1, 2) for score in ("paper", "bank")
    ]
    for row, scorer in zip(rows, scorers, strict=True):
        assert float(row["loss"]) == pytest.approx(by_one.losses[int(row["epoch"]) - 1], rel=1e-4)
        for name in ("pixel_auroc", "image_auroc", "pixel_pro", "pixel_f1_max"):
            assert float(row[name]) == pytest.approx(scorer.metrics[name], abs=1e-4), name
    assert (by_two / "result.json").is_file()
    assert (by_two / "pictures" / "roc_pro.png").is_file()


def test_more_processes_than_pairs_are_refused(data, monkeypatch):
    monkeypatch.setattr(util, "world_size", lambda: 5)
    with pytest.raises(InputError, match="start fewer"):
        train.check_class(train.parse_arguments(flags(data)))


def test_the_state_is_that_of_all_processes(by_two):
    state = load_checkpoint(by_two / "state.pt")
    assert (state["epoch"], state["processes"]) == (3, 2)


def test_a_run_is_resumed_by_as_many_processes(by_two, data, run_main):
    code, _, err = run_main(train.main, ["--resume", by_two, "--epochs", 3])
    assert (code, err.count("\n")) == (2, 1)
    assert "start 2 processes" in err
