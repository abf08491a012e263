"""A training over two processes is the training of one process that sees both pairs of every step."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_class

import train
from checkpoint import load_checkpoint
from loading import training_plan
from model import training_loss
from parallel import World
from run import State
from settings import Settings, parse_settings

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_class(root, "tile", num_train=9, num_test=3)
    return root


def flags(data, save_dir):
    own = ["--cls", "tile", "--epochs", 2, "--datapath", data, "--saveDir", save_dir]
    return list(map(str, [*SMALL, *own]))


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    """The run of two processes."""
    save_dir = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]  # fmt: skip
    done = subprocess.run(
        [*map(str, command), *flags(data, save_dir)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = save_dir.iterdir()
    return run


@pytest.fixture(scope="module")
def by_one(data, tmp_path_factory):
    """One process that averages the gradients and the statistics of the two pairs of each step."""
    settings: Settings = parse_settings("", flags(data, tmp_path_factory.mktemp("one")))[0]
    training = train.Training.prepare(settings, CPU, World())
    model, results = training.model, []
    for _ in range(2):
        plan = training_plan(9, 2, "flips and turns")
        model.train()
        for pair in (plan[0:2], plan[2:4]):
            statistics = [b.clone() for b in model.buffers()]
            moved = []
            training.optimizer.zero_grad()
            for features in training.train_set.batches(pair):
                for buffer, before in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
                (training_loss(model, features) / 2).backward()
                moved.append([b.clone() for b in model.buffers()])
            for buffer, *both in zip(model.buffers(), *moved, strict=True):
                buffer.copy_(sum(both) / 2)
            torch.nn.utils.clip_grad_norm_(model.flow.parameters(), train.MAX_GRADIENT_NORM)
            training.optimizer.step()
        results.append(training.evaluate(train.Clock(CPU)))
    return training, results


def test_the_same_weights_statistics_and_template(by_two, by_one):
    training, results = by_one
    checkpoint = load_checkpoint(by_two / "last.pt")
    for name, x in training.model.state_dict().items():
        torch.testing.assert_close(checkpoint["model"][name], x, rtol=1e-4, atol=1e-6, msg=name)
    for ours, theirs in zip(checkpoint["template"], results[-1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_same_metrics_in_one_folder(by_two, by_one):
    rows = list(csv.DictReader((by_two / "metrics.csv").open()))
    for row, (_, metrics) in zip(rows, by_one[1], strict=True):
        for name in ("pixel_auroc", "image_auroc", "pixel_pro", "f1_max"):
            assert float(row[name]) == pytest.approx(getattr(metrics, name), abs=1e-4), name
    assert (by_two / "result.json").is_file()
    assert (by_two / "pictures" / "roc_pro.png").is_file()


def test_alone_nothing_is_exchanged():
    world = World.join(CPU)
    assert world == World()
    assert world.share(range(5)) == list(range(5))
    module = torch.nn.Linear(2, 2)
    assert world.wrap(module) is module
    x = torch.rand(3)
    assert world.collect(x, 3) is x
    assert world.total([x], 4) == ([x], 4)
    assert world.any(True)
    assert not world.any(False)
    tensor, fills = world.shared_bytes((2, 3))
    assert fills
    assert tensor.shape == (2, 3)


def test_what_two_processes_share():
    first, second = World(0, 2, 0), World(1, 2, 1)
    assert (first.is_main, second.is_main) == (True, False)
    assert (first.share(range(5)), second.share(range(5))) == ([0, 2, 4], [1, 3])
    assert (first.share(range(5), equal=True), second.share(range(5), equal=True)) == ([0, 2], [1, 3])


def test_more_processes_than_pairs_are_refused():
    settings = Settings(batchSize=2)
    with pytest.raises(train.InputError, match="start fewer"):
        train.check_batch_size(settings, 6, 4)


def test_the_state_is_that_of_all_processes(by_two):
    state = State(**load_checkpoint(by_two / "state.pt")["state"])
    assert (state.epoch, state.losses) == (3, [])
