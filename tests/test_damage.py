"""Two hundred damaged checkpoints and images: one clear line each, no traceback, no hang, nothing executed."""

import contextlib
import pickle
import random

import numpy as np
import pytest
import torch
from conftest import save_image
from spoil import Code, spoil_bytes, wrong_values

import predict
from model import PyramidFlowConfig
from scorer import read_config
from util import save_tensors

COUNT = 100


def assert_plain(code, err, good):
    assert code in (0, *good), err
    assert "Traceback" not in err
    assert code == 0 or err.count("\n") == 1, err


def test_damaged_checkpoints(trained, tmp_path, run_main):
    whole = trained.checkpoint.read_bytes()
    image = trained.data / "widget" / "test" / "hole" / "000.png"
    rng, refused = random.Random(0), 0
    for i in range(COUNT):
        path = tmp_path / "a.pt"
        path.write_bytes(spoil_bytes(whole, rng))
        flags = ["--out", tmp_path / f"out{i}", "--gpu", "cpu", "--precision", "fp32"]
        code, _, err = run_main(predict.main, [path, image, *flags])
        assert_plain(code, err, good=(2,))
        refused += code == 2
    assert refused > 0.9 * COUNT


def test_each_value_of_a_configuration_is_checked_before_it_is_used():
    """A huge number of levels, say, would take a power of two of it."""
    whole = PyramidFlowConfig(encoder="none", image_size=(32, 32)).to_dict()
    assert read_config(whole).to_dict() == whole
    values = (*wrong_values(30), 10**9, [10**30, 32], [32, -1], [32.0, 32], (2**20, 2**20), (3,))
    for name in whole:
        for value in values:
            with contextlib.suppress(ValueError):
                assert read_config({**whole, name: value}).to_dict() == {**whole, name: value}


@pytest.mark.parametrize("value", [10**20, [[1]], {"a": 1}, torch.zeros(1)])
def test_settings_that_no_flags_have_are_refused(trained, tmp_path, run_main, value):
    """A few nested lists that share their parts would be endless as text."""
    content = torch.load(trained.checkpoint, weights_only=True)
    content["settings"]["epochs"] = value
    save_tensors(tmp_path / "a.pt", content)
    flags = ["--out", tmp_path / "out", "--gpu", "cpu"]
    code, _, err = run_main(predict.main, [tmp_path / "a.pt", trained.data, *flags])
    assert (code, err.count("\n")) == (2, 1), err
    assert "is damaged (settings)" in err


def test_damaged_images(trained, tmp_path, run_main):
    rng = random.Random(0)
    for suffix in ("png", "jpg", "bmp", "tif"):
        noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)
        save_image(tmp_path / f"whole.{suffix}", noise)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        folder = tmp_path / suffix
        folder.mkdir()
        for i in range(COUNT // 4):
            (folder / f"{i:03}.{suffix}").write_bytes(spoil_bytes(whole, rng))
        flags = ["--out", tmp_path / f"out-{suffix}", "--gpu", "cpu", "--precision", "fp32"]
        code, out, err = run_main(predict.main, [trained.checkpoint, folder, *flags])
        assert code in (0, 1)
        assert "Traceback" not in err
        listed = [line for line in err.splitlines() if "cannot read image" in line]
        left = COUNT // 4 - len(listed)
        assert (f"{left} images, " if left else f"of {COUNT // 4} images none can be read") in out


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_checkpoint_with_code_in_it_is_not_executed(trained, tmp_path, run_main, plain_pickle, monkeypatch):
    monkeypatch.setattr(Code, "canary", str(tmp_path / "executed"))
    content = {**torch.load(trained.checkpoint, weights_only=True), "metrics": Code(0)}
    path = tmp_path / "a.pt"
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    code, _, err = run_main(predict.main, [path, trained.data, "--out", tmp_path / "out"])
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be read as tensors and plain values" in err
    assert not (tmp_path / "executed").exists()
