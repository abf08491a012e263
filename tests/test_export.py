"""An exported model gives the same maps without Python's part of the program."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

import export
import predict
from checkpoint import Trained
from evaluation import at_mask_size
from export import OnnxModel, export_onnx
from loading import normalise
from model import PyramidFlow, PyramidFlowConfig, anomaly_map, latent_template

onnxruntime = pytest.importorskip("onnxruntime")


def trained_model(encoder, volume_norm, num_level):
    """With weights and statistics that are not the trivial ones of an untrained model."""
    torch.manual_seed(0)
    side = 2 ** (num_level - 1) * (1 if encoder == "none" else 4)
    config = PyramidFlowConfig(
        encoder=encoder, num_level=num_level, num_stack=1, num_channel=4, kernel_size=3,
        volume_norm=volume_norm, image_size=(max(side, 32), 2 * max(side, 32)),
    )  # fmt: skip
    model = PyramidFlow(config)
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for _ in range(3):
            model(torch.randn(2, 3, *config.image_size))
        model.eval()
        template = latent_template(model, [model.encode(torch.randn(3, 3, *config.image_size))])
    metrics = {"threshold": 0.5, "image_threshold": 0.6}
    return Trained("a.pt", "widget", model, template, metrics, None)


@pytest.mark.parametrize("num_level", [2, 4, 8])
@pytest.mark.parametrize("volume_norm", ["CVN", "SVN"])
@pytest.mark.parametrize("encoder", ["none", "resnet18"])
def test_onnxruntime_gives_the_same_maps_for_any_batch(tmp_path, encoder, volume_norm, num_level):
    trained = trained_model(encoder, volume_norm, num_level)
    export_onnx(trained, tmp_path / "a.onnx")
    exported = OnnxModel(tmp_path / "a.onnx", torch.device("cpu"))
    assert exported.image_size == trained.model.config.image_size
    for batch in (1, 3):
        images = torch.randint(0, 256, (batch, *exported.image_size, 3), dtype=torch.uint8)
        maps = exported.score(images)
        features = trained.model.encode(normalise(images))
        expected = at_mask_size(anomaly_map(trained.model, features, trained.template)).numpy()
        assert maps.shape == (batch, 256, 256)
        assert np.abs(maps - expected).max() < 1e-4 * expected.max()


def test_the_file_alone_is_enough(tmp_path):
    """Inputs, outputs and metadata are as export.py says, for programs that know nothing of this one."""
    trained = trained_model("none", "CVN", 2)
    export_onnx(trained, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [32, 64, 3])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    anomaly, score = session.run(["anomaly_map", "score"], {"image": images})
    assert np.array_equal(score, anomaly.max(axis=(1, 2)))
    about = json.loads(session.get_modelmeta().custom_metadata_map["pyramidflow"])
    assert about["class"] == "widget"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_export_and_predict_from_the_command_line(trained, tmp_path, run_main):
    code, out, err = run_main(export.main, [trained.checkpoint, tmp_path / "a.onnx"])
    assert code == 0, err
    assert "MiB" in out
    tables = []
    given = ([tmp_path / "a.onnx"], [trained.checkpoint, "--precision", "fp32"])
    for i, model in enumerate(given):
        flags = [trained.data / "widget" / "test", "--out", tmp_path / f"out{i}", "--gpu", "cpu"]
        code, _, err = run_main(predict.main, [*model, *flags])
        assert code == 0, err
        tables.append(list(csv.DictReader((tmp_path / f"out{i}" / "scores.csv").open())))
    for a, b in zip(*tables, strict=True):
        assert (a["path"], a["threshold"]) == (b["path"], b["threshold"])
        assert float(a["score"]) == pytest.approx(float(b["score"]), rel=1e-4)


def test_an_existing_file_is_kept(trained, tmp_path, run_main):
    (tmp_path / "a.onnx").write_text("mine")
    code, _, err = run_main(export.main, [trained.checkpoint, tmp_path / "a.onnx"])
    assert code == 2
    assert "exists; name a new file" in err
    assert (tmp_path / "a.onnx").read_text() == "mine"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(trained, tmp_path, run_main, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnxruntime":
        (tmp_path / "a.onnx").write_bytes(b"")
        result = run_main(predict.main, [tmp_path / "a.onnx", trained.data, "--out", tmp_path / "out"])
    else:
        result = run_main(export.main, [trained.checkpoint, tmp_path / "b.onnx"])
    code, _, err = result
    assert (code, err.count("\n")) == (2, 1)
    assert f"needs the package {package}: pip install" in err


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a\x12\x07pytorch"])
def test_another_file_is_refused(tmp_path, run_main, content):
    (tmp_path / "a.onnx").write_bytes(content)
    code, _, err = run_main(predict.main, [tmp_path / "a.onnx", tmp_path, "--out", tmp_path / "out"])
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a model that export.py wrote" in err


def test_an_onnx_file_has_no_image_template(tmp_path, run_main):
    export_onnx(trained_model("none", "SVN", 2), tmp_path / "a.onnx")
    code, _, err = run_main(predict.main, [tmp_path / "a.onnx", "--template", tmp_path / "t.png"])
    assert code == 2
    assert "holds no inverse" in err
