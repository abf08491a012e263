"""Two hundred damaged checkpoints and images: one clear line each, no traceback, no hang, nothing executed."""

import os
import pickle

import numpy as np
import pytest
import torch
from conftest import save_image

import predict

COUNT = 100


def mutated(data, rng):
    """Bytes changed, cut off, doubled, or put elsewhere."""
    data = bytearray(data)
    way = rng.integers(5)
    if way == 0:  # single bytes
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif way == 1:
        data = data[: rng.integers(len(data))]
    elif way == 2:  # a piece overwritten
        start = rng.integers(len(data))
        length = int(rng.integers(1, 200))
        data[start : start + length] = (
            rng.integers(0, 256, len(data[start : start + length])).astype(np.uint8).tobytes()
        )
    elif way == 3:  # a piece left out
        start = rng.integers(len(data))
        del data[start : start + rng.integers(1, 400)]
    else:  # two pieces swapped
        a, b = sorted(rng.integers(0, len(data), 2))
        data = data[b:] + data[a:b] + data[:a]
    return bytes(data)


def assert_plain(code, err, good):
    assert code in (0, *good), err
    assert "Traceback" not in err
    assert code == 0 or err.count("\n") == 1, err


def test_damaged_checkpoints(trained, tmp_path, run_main):
    whole = trained.checkpoint.read_bytes()
    image = trained.data / "widget" / "test" / "hole" / "000.png"
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(COUNT):
        path = tmp_path / "a.pt"
        path.write_bytes(mutated(whole, rng))
        flags = ["--out", tmp_path / f"out{i}", "--gpu", "cpu", "--precision", "fp32"]
        code, _, err = run_main(predict.main, [path, image, *flags])
        assert_plain(code, err, good=(2,))
        refused += code == 2
    assert refused > 0.9 * COUNT


def test_damaged_images(trained, tmp_path, run_main):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "tif"):
        noise = rng.integers(0, 256, (24, 20, 3)).astype(np.uint8)
        save_image(tmp_path / f"whole.{suffix}", noise)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        folder = tmp_path / suffix
        folder.mkdir()
        for i in range(COUNT // 4):
            (folder / f"{i:03}.{suffix}").write_bytes(mutated(whole, rng))
        flags = ["--out", tmp_path / f"out-{suffix}", "--gpu", "cpu", "--precision", "fp32"]
        code, out, err = run_main(predict.main, [trained.checkpoint, folder, *flags])
        assert code in (0, 1)
        assert "Traceback" not in err
        listed = [line for line in err.splitlines() if "cannot read image" in line]
        assert f"{COUNT // 4 - len(listed)} images" in out


class Malice:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_checkpoint_with_code_in_it_is_not_executed(trained, tmp_path, run_main, plain_pickle):
    content = {**torch.load(trained.checkpoint, weights_only=True), "metrics": Malice(str(tmp_path / "executed"))}
    path = tmp_path / "a.pt"
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    code, _, err = run_main(predict.main, [path, trained.data, "--out", tmp_path / "out"])
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be read as tensors and plain values" in err
    assert not (tmp_path / "executed").exists()
