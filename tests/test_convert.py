"""The official program's files are read, and nothing in them is executed."""

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_class

import evaluate
import predict
from model import PyramidFlow, PyramidFlowConfig, coupling_schedule
from scorer import Scorer
from tools import convert_official
from tools.convert_official import PARTS, infer_config, load_official, read_official
from util import InputError


def official_names(model):
    """The model's weights as the official program names them, `down` blocks of CVN at every pixel."""
    state = collections.OrderedDict()
    for name, x in model.state_dict().items():
        if name.endswith("running_mean") and name.startswith("flow."):
            block = model.flow[int(name.split(".")[1])]
            if block.kind == "down" and model.config.volume_norm == "CVN":
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for theirs, ours in PARTS.items():
            name = name.replace(ours, theirs)
        state[name] = x
    return state


def model_of(num_level, volume_norm, **changes):
    torch.manual_seed(0)
    config = PyramidFlowConfig(
        **{
            "encoder": "none", "num_level": num_level, "num_stack": 2, "num_channel": 3, "kernel_size": 3,
            "volume_norm": volume_norm, "image_size": (128, 256), **changes,
        }
    )  # fmt: skip
    model = PyramidFlow(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("volume_norm", ["CVN", "SVN"])
@pytest.mark.parametrize("num_level", range(2, 9))
def test_the_architecture_shows_in_the_weights(num_level, volume_norm):
    model = model_of(num_level, volume_norm)
    state = official_names(model)
    assert infer_config(state, (128, 256)) == model.config
    if volume_norm == "CVN":
        assert infer_config(state, None) == model.config
        with pytest.raises(ValueError, match="for 128x256 images, not 256x256"):
            infer_config(state, (256, 256))
    else:
        assert infer_config(state, None).image_size == (256, 256)


def test_encoders_are_told_apart():
    for encoder in ("resnet18", "resnet34"):
        model = model_of(2, "SVN", encoder=encoder, num_stack=1)
        config = infer_config(official_names(model), None)
        assert (config.encoder, config.channels, config.image_size) == (encoder, 64, (1024, 1024))


def test_what_is_no_architecture_is_refused():
    state = official_names(model_of(3, "CVN"))
    untrained = {n: x.mean().view(1, 1, 1, 1) if "running_mean" in n else x for n, x in state.items()}
    with pytest.raises(ValueError, match="never trained"):
        infer_config(untrained, None)
    shorter = {n: x for n, x in state.items() if not n.startswith("nf.moduleslst.1.")}
    with pytest.raises(KeyError, match="moduleslst"):
        infer_config(shorter, None)
    shorter = {n: x for n, x in state.items() if not n.startswith("nf.moduleslst.5.")}
    with pytest.raises(ValueError, match="follow no schedule"):
        infer_config(shorter, None)


@pytest.mark.parametrize("form", ["tensors", "arrays", "columns first", "parameters"])
def test_a_file_is_read(tmp_path, form):
    model = model_of(3, "CVN")
    state = official_names(model)
    change = {
        "tensors": lambda x: x,
        "arrays": torch.Tensor.numpy,
        "columns first": lambda x: np.asfortranarray(x.numpy()),
        "parameters": torch.nn.Parameter,
    }[form]
    saved = {name: change(x) for name, x in state.items()}
    np.savez(tmp_path / "a.npz", state_dict_pixel=saved, state_dict_pro=saved, epochs=15)
    read = load_official(tmp_path / "a.npz", "pro", None)
    assert read.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], x), name


class Malice:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["instead", "inside", "storage"])
def test_nothing_in_a_file_is_executed(tmp_path, place):
    malice = Malice(os.mkdir, str(tmp_path / "executed"))
    if place == "storage":  # a tensor's bytes are a file of torch's, which can hold code as well
        malice = Malice(torch.storage._load_from_bytes, pickle.dumps(Malice(os.mkdir, "executed")))
    saved = malice if place == "instead" else {"inconv.weight": malice}
    np.savez(tmp_path / "a.npz", state_dict_pixel=np.array(saved, dtype=object))
    with pytest.raises(InputError, match=r"refers to|cannot be read"):
        load_official(tmp_path / "a.npz", "pixel", None)
    assert not (tmp_path / "executed").exists()
    assert not Path("executed").exists()


class Forged:
    """An array of objects whose pickle gives their addresses as bytes; NumPy would follow them."""

    def __init__(self, way):
        self.way = way

    def __reduce__(self):
        address = (0xDEAD).to_bytes(8, "little")
        if self.way == "array":
            return np.ndarray, ((1,), np.dtype("O"), address)
        reconstruct = np.empty(0).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), ForgedDtype(), False, address)


class ForgedDtype:
    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, 8, 8, 0)  # no flag for objects


@pytest.mark.parametrize("way", ["array", "dtype"])
def test_bytes_do_not_become_pointers(tmp_path, way):
    np.savez(tmp_path / "a.npz", state_dict_pixel={"inconv.weight": Forged(way)})
    with pytest.raises(InputError, match="cannot be read"):
        load_official(tmp_path / "a.npz", "pixel", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, state_dict_pixel={"inconv.weight": np.full(3, np.nan)}),
        lambda path: np.savez(path, state_dict_pixel={"inconv.weight": np.array(["x"])}),
        lambda path: np.savez(path, state_dict_pixel={"inconv.weight": np.zeros(3, ">f4")}),
        lambda path: np.savez(path, state_dict_pixel={"inconv.weight": np.zeros(3, "f4,i4")}),
        lambda path: np.savez(path, state_dict_pixel=np.zeros(3)),
        lambda path: np.savez(path, state_dict_pro={}),
        lambda path: np.savez(path, state_dict_pixel={}),
        lambda path: np.savez(path, state_dict_pixel=[1, 2]),
    ],
)
def test_damaged_and_other_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez(path, state_dict_pixel=official_names(model_of(2, "SVN")))
    damage(path)
    with pytest.raises(InputError) as caught:
        load_official(path, "pixel", None)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_official(tmp_path / "none.npz", "state_dict_pixel")


def test_schedules_differ_from_each_other():
    """So that the number of levels shows in which blocks have two sources."""
    kinds = [tuple(kind == "dual" for kind, _ in coupling_schedule(n)) for n in range(2, 9)]
    assert len({k * (840 // len(k)) for k in kinds}) == 7


def test_the_checkpoint_is_one_that_the_other_programs_take(tmp_path, run_main):
    make_class(tmp_path / "data")
    model = model_of(2, "CVN", image_size=(32, 32))
    np.savez(tmp_path / "a.npz", state_dict_pixel=official_names(model))
    data = ["--datapath", tmp_path / "data", "--gpu", "cpu"]
    flags = [tmp_path / "a.npz", tmp_path / "a.pt", "--cls", "widget", *data]
    code, out, err = run_main(convert_official.main, flags)
    assert code == 0, err
    assert "6 good ones" in out
    converted = Scorer.load(tmp_path / "a.pt")
    assert torch.equal(converted.model.stem.weight, model.stem.weight)
    assert len(converted.calibration.image_scores) == 6
    code, out, err = run_main(evaluate.main, [tmp_path / "a.pt", *data, "--out", tmp_path / "out"])
    assert code == 0, err
    assert "| widget | n/a (paper) |" in out
    images = tmp_path / "data" / "widget" / "test"
    out = ["--out", tmp_path / "scores", "--gpu", "cpu"]
    assert run_main(predict.main, [tmp_path / "a.pt", images, *out])[0] == 0
    code, _, err = run_main(convert_official.main, flags)
    assert (code, "exists; choose a new file" in err) == (2, True)
    flags[1] = tmp_path / "b.pt"
    code, _, err = run_main(convert_official.main, [*flags, "--imageSize", 64])
    assert code == 2
    assert "for 32x32 images, not 64x64" in err
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b.npz", "c.pt"], "--cls"),
        (["b.npz", "c.pt", "--cls", "x", "--imageSize", 1, 2, 3], "one number, or two"),
        (["nowhere.npz", "c.pt", "--cls", "x", "--gpu", "cpu"], "nowhere.npz does not exist"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, run_main, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_main(convert_official.main, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
