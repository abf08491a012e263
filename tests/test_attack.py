"""A few of tests/attack.py's attacks, and that it would see what it looks for."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attack
import pytest
import torch
from spoil import Code

from util import save_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run_attack(*flags):
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, attack.__file__, *flags], env={**os.environ, **one_thread},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_few_attacks_are_survived():
    done = run_attack("--only", "kills", "disks", "files", "silence", "--scale", "0.012")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, count in (("kills", 3), ("disks", 1), ("files", 14), ("silence", 1)):
        assert f"| {name} | {count} | {count} |" in done.stdout or f"{name} 0: skipped" in done.stdout


@pytest.mark.parametrize(
    ("name", "cut"), [("last.pt", 100), ("metrics.csv", 2), ("result.json", 3), ("report.html", 9)]
)
def test_a_torn_file_is_seen(trained, tmp_path, name, cut):
    folder = tmp_path / "run"
    shutil.copytree(trained.run, folder)
    assert attack.torn(folder) is None
    (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    assert attack.torn(folder).startswith(f"torn: {name}")


def test_a_changed_weight_is_seen(trained, tmp_path):
    folders = [tmp_path / name / "runs" / "widget" for name in ("whole", "other")]
    for folder in folders:
        shutil.copytree(trained.run, folder)
    base = SimpleNamespace(whole=lambda name: tmp_path / "whole")
    assert attack.different(base, "train", tmp_path / "other") is None
    content = torch.load(folders[1] / "last.pt", weights_only=True)
    weight = next(x for x in content["model"].values() if x.is_floating_point())
    weight += 1e-6
    save_tensors(folders[1] / "last.pt", content)
    assert attack.different(base, "train", tmp_path / "other") == "last.pt differs"


@pytest.mark.parametrize(
    ("code", "err", "problem"),
    [
        (0, "", None),
        (2, "train.py: error: no class\n", None),
        (1, "", "exit code 1"),
        (-11, "", "exit code -11"),
        (2, "one\ntwo\n", "2 lines"),
        (0, "Traceback (most recent call last):\nValueError\n", "traceback"),
        (0, "--- Logging error ---\n", "traceback"),
    ],
)
def test_what_is_no_good_end(code, err, problem):
    found = attack.Ended(code, "", err).problem((0, 2))
    assert found is None if problem is None else problem in found


def test_code_in_a_pickle_would_be_seen(tmp_path):
    """The canary is made by each of the ways."""
    for way in range(5):
        Code.canary = str(tmp_path / f"canary{way}")
        pickle.loads(pickle.dumps(Code(way)))
        assert Path(Code.canary).is_dir()
