"""An exported model gives the same maps without Python's part of the program."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pictures
from PIL import Image

import export
import kernels
import predict
from export import METADATA_KEY, OnnxScorer, digest_entry, export_onnx
from model import PyramidFlow, PyramidFlowConfig
from scorer import ScoreOptions, Scorer
from verdict import LEVELS, Calibration, Thresholds, resize_image

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def make_scorer(encoder="none", volume_norm="CVN", num_level=2, options=None, **changes):
    """With weights and statistics that are not the trivial ones of an untrained model."""
    torch.manual_seed(0)
    side = max(2 ** (num_level - 1) * (1 if encoder == "none" else 4), 32)
    config = PyramidFlowConfig(
        **{
            "encoder": encoder, "num_level": num_level, "num_stack": 1, "num_channel": 4, "kernel_size": 3,
            "volume_norm": volume_norm, "image_size": (side, min(2 * side, 512)), **changes,
        }
    )  # fmt: skip
    model = PyramidFlow(config)
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for _ in range(3):
            model(torch.randn(2, 3, *config.image_size))
    images = Pictures(torch.randint(0, 256, (5, *config.image_size, 3), dtype=torch.uint8))
    scorer = Scorer.fit(model, images, options, class_name="widget")
    scorer.metrics = {"pixel_threshold": 0.5, "image_threshold": 0.6}
    return scorer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The scorer that `make_scorer` makes unless asked for more, and its .onnx file, not to be changed."""
    scorer, path = make_scorer(), tmp_path_factory.mktemp("exported") / "a.onnx"
    export_onnx(scorer, path)
    return scorer, path


@pytest.fixture(scope="module")
def of_any_size(exported, tmp_path_factory):
    """The same scorer in a file that takes images of any size."""
    path = tmp_path_factory.mktemp("of_any_size") / "a.onnx"
    export_onnx(exported[0], path, any_image_size=True)
    return path


@pytest.fixture
def onnx_file(exported, tmp_path):
    """A copy of that file."""
    return Path(shutil.copy(exported[1], tmp_path))


def assert_same_maps(scorer, path):
    exported = OnnxScorer(path)
    assert exported.image_size == scorer.image_size
    for batch in (1, 3):
        images = torch.randint(0, 256, (batch, *exported.image_size, 3), dtype=torch.uint8)
        images[1:2] = 0
        (maps, scores), expected = exported.score(images), scorer.score(images)
        assert maps.shape == (batch, 256, 256)
        assert scores.shape == (batch,)
        assert (maps - expected.maps).abs().max() < 1e-4 * expected.maps.max()
        assert (scores - expected.scores).abs().max() < 1e-4 * expected.scores.max()


BANKS = [ScoreOptions("bank", *given) for given in ((3, True, 4.0), (3, False, 0.0), (1, True, 0.0))]


@pytest.mark.parametrize(  # each two of encoder, norm and 2 or 4 levels together; each bank with each contrast
    ("encoder", "volume_norm", "num_level", "options", "changes"),
    [
        ("none", "CVN", 2, BANKS[0], {"image_size": (256, 256)}),  # that of the masks already
        ("none", "SVN", 4, BANKS[0], {"contrast": "composed"}),
        ("none", "CVN", 8, BANKS[1], {}),
        ("resnet18", "SVN", 2, BANKS[1], {"contrast": "composed"}),
        ("resnet18", "SVN", 6, BANKS[2], {"contrast": "composed"}),
        ("none", "SVN", 2, BANKS[2], {}),
        ("resnet18", "CVN", 4, None, {}),
    ],
)
def test_onnxruntime_gives_the_same_maps_for_any_batch(
    tmp_path, encoder, volume_norm, num_level, options, changes
):
    scorer = make_scorer(encoder, volume_norm, num_level, options, **changes)
    export_onnx(scorer, tmp_path / "a.onnx")
    assert_same_maps(scorer, tmp_path / "a.onnx")


def test_the_papers_score_is_the_same_too(exported):
    assert_same_maps(*exported)


def test_metrics_and_thresholds_travel_along_and_nothing_traced_is_kept(tmp_path):
    scorer = make_scorer(options=BANKS[0])
    scorer.calibration = Calibration([1.0, 2.0], np.linspace(0, 1, len(LEVELS)).tolist())
    for kept in (kernels.up_matrix, kernels.summing_matrix):
        kept.cache_clear()  # as in a new process
    export_onnx(scorer, tmp_path / "a.onnx")
    assert scorer.score(torch.zeros(1, 32, 64, 3, dtype=torch.uint8)).maps.isfinite().all()
    exported = OnnxScorer(tmp_path / "a.onnx")
    assert scorer.image_score == "detail"
    for name in ("metrics", "calibration", "class_name", "image_score"):
        assert getattr(exported, name) == getattr(scorer, name)
    assert exported.thresholds == scorer.usual_thresholds()
    metadata = {"image_threshold": "1", "pixel_threshold": "nan"}
    with pytest.raises(ValueError, match="thresholds"):
        export._read_thresholds(metadata)
    assert export._read_thresholds({}) is None  # of files from before


def test_the_file_alone_is_enough(exported):
    """Inputs, outputs and metadata are as export.py says, for programs that know nothing of this one."""
    session = onnxruntime.InferenceSession(str(exported[1]))
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [32, 64, 3])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    anomaly, score = session.run(["anomaly_map", "score"], {"image": images})
    assert np.array_equal(score, anomaly.max(axis=(1, 2)))
    about = json.loads(session.get_modelmeta().custom_metadata_map["pyramidflow"])
    assert about["class"] == "widget"
    assert [p.name for p in exported[1].parent.iterdir()] == ["a.onnx"]


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
        for name in ("path", "threshold", "map"):
            assert a[name] == b[name]
        assert float(a["score"]) == pytest.approx(float(b["score"]), rel=1e-4)


# ------------------------------------------------------------------------------------- verdicts


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


@pytest.mark.parametrize("options", [None, ScoreOptions("bank", 3, True, 2.0)])
def test_the_graph_decides(tmp_path, options):
    scorer = make_scorer(options=options)
    export_onnx(scorer, tmp_path / "a.onnx", Thresholds(1.0, 1.5))
    session = session_of(tmp_path / "a.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    maps, scores, defective, mask = session.run(None, {"image": images})
    assert [x.name for x in session.get_outputs()] == ["anomaly_map", "score", "defective", "mask"]
    assert (mask.dtype, mask.shape, defective.shape) == (bool, (3, 256, 256), (3,))
    assert np.array_equal(mask, maps >= 1.0)
    assert np.array_equal(defective, scores >= 1.5)
    middle = np.sort(scores)[1]
    given = {"image_threshold": np.float32([middle]), "pixel_threshold": np.float32([2.0])}
    _, scores, defective, mask = session.run(None, {"image": images, **given})
    assert defective.sum() == 2
    assert np.array_equal(mask, maps >= 2.0)
    roi = np.zeros((256, 256), bool)
    roi[100:120, 30:60] = True
    maps_of_roi, scores, _, mask = session.run(None, {"image": images, "roi": roi})
    assert np.array_equal(maps_of_roi, maps)
    assert np.array_equal(mask, (maps >= 1.0) & roi)
    expected = scorer.score(torch.from_numpy(images), torch.from_numpy(roi)).scores
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_thresholds_are_readable_without_json(exported):
    scorer, path = exported
    metadata = session_of(path).get_modelmeta().custom_metadata_map
    thresholds = scorer.calibration.thresholds()
    assert float(metadata["image_threshold"]) == thresholds.image
    assert float(metadata["pixel_threshold"]) == thresholds.pixel
    assert (metadata["image_height"], metadata["image_width"]) == ("32", "64")
    assert (metadata["any_image_size"], metadata["class"]) == ("false", "widget")


@pytest.mark.parametrize("size", [(32, 64), (7, 5), (33, 31), (64, 128), (300, 301), (20, 900), (1000, 750)])
def test_the_graph_resizes_as_pil_does(tmp_path, size):
    """Both are seen by a graph that does nothing else."""
    helper, uint8 = onnx.helper, onnx.TensorProto.UINT8
    given, result = (helper.make_tensor_value_info(n, uint8, ["b", 32, 64, 3]) for n in ("image", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["y"])], "g", [given], [result])
    export._resize_first(graph, (32, 64))
    opset = [helper.make_opsetid("", export.OPSET)]
    (tmp_path / "a.onnx").write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    )
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    (resized,) = session_of(tmp_path / "a.onnx").run(None, {"image": images})
    expected = np.stack([resize_image(image, (32, 64)) for image in images])
    assert np.abs(resized.astype(int) - expected).max() <= (size != (32, 64))


def test_images_of_any_size(exported, of_any_size):
    scorer = exported[0]
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    smooth = resize_image(resize_image(image, (5, 7)), (50, 70))
    score = session_of(of_any_size).run(["score"], {"image": smooth[None]})[0]
    verdict, expected = OnnxScorer(of_any_size).inspect(smooth), scorer.inspect(smooth)
    assert verdict.score == pytest.approx(expected.score, rel=1e-4)
    assert score[0] == pytest.approx(expected.score, rel=0.05)  # a step of 255 in some pixels
    assert (verdict.map.shape, verdict.peak) == ((50, 70), expected.peak)
    np.testing.assert_allclose(verdict.map, expected.map, rtol=1e-3)


def test_flags_of_the_export(trained, tmp_path, run_main):
    path = tmp_path / "new" / "a.onnx"
    flags = ["--anyImageSize", "--threshold", "0.25,3"]
    code, out, err = run_main(export.main, [trained.run, path, *flags])
    assert code == 0, err
    assert str(trained.checkpoint) in out
    metadata = session_of(path).get_modelmeta().custom_metadata_map
    assert (metadata["any_image_size"], metadata["image_threshold"]) == ("true", "0.25")
    flags = ["--out", tmp_path / "out", "--gpu", "cpu", "--roi", tmp_path / "roi.png"]
    Image.new("L", (5, 5), 255).save(tmp_path / "roi.png")
    images = trained.data / "widget" / "test"
    assert run_main(predict.main, [path, images, *flags])[0] == 0
    with (tmp_path / "out" / "scores.csv").open() as table:
        used = {(row["threshold"], row["pixel_threshold"]) for row in csv.DictReader(table)}
    assert used == {("0.25", "3")}  # its own
    quantile = OnnxScorer(path).calibration.thresholds()
    for flag in (["--threshold", "quantile"], ["--imageQuantile", 0.5]):
        out = tmp_path / flag[0]
        assert run_main(predict.main, [path, images, "--out", out, "--gpu", "cpu", *flag])[0] == 0
        with (out / "scores.csv").open() as table:
            assert {row["pixel_threshold"] for row in csv.DictReader(table)} == {f"{quantile.pixel:.6g}"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "high"], "use quantile, none, f1, recall, a number"),
        (["--imageQuantile", 2], "not a number from 0 to 1"),
    ],
)
def test_bad_flags_of_the_export(trained, tmp_path, run_main, flags, message):
    code, _, err = run_main(export.main, [trained.checkpoint, tmp_path / "a.onnx", *flags])
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("gravel", "does not end in .onnx"), ("file/a.onnx", "the folder of OUT.onnx")]
)
def test_bad_places_for_the_export(trained, tmp_path, run_main, out, message):
    (tmp_path / "file").touch()
    code, _, err = run_main(export.main, [trained.checkpoint, tmp_path / out])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_other_outputs_are_refused(onnx_file):
    """By their shape, as somebody else's model might have them."""
    proto = onnx.load(onnx_file)
    del proto.metadata_props[-1]
    for node in proto.graph.node:
        node.output[:] = ["raw" if name == "score" else name for name in node.output]
        node.input[:] = ["raw" if name == "score" else name for name in node.input]
    axes = onnx.numpy_helper.from_array(np.array([1]), "one")
    proto.graph.initializer.append(axes)
    proto.graph.node.append(onnx.helper.make_node("Unsqueeze", ["raw", "one"], ["score"]))
    for output in proto.graph.output:
        if output.name == "score":
            output.type.tensor_type.shape.dim.add().dim_value = 1
    onnx_file.write_bytes(sealed(proto))
    with pytest.raises(export.InputError, match="other maps or scores"):
        OnnxScorer(onnx_file).score(torch.zeros(2, 32, 64, 3, dtype=torch.uint8))


def test_without_scores_of_good_images_the_export_needs_a_threshold(tmp_path):
    scorer = make_scorer()
    scorer.calibration = None
    with pytest.raises(export.InputError, match="no scores of good images"):
        export_onnx(scorer, tmp_path / "a.onnx")


@pytest.mark.parametrize("any_image_size", [False, True])
def test_the_sample_in_docs_needs_nothing_of_this_program(exported, of_any_size, tmp_path, any_image_size):
    scorer, sample = exported[0], Path(export.__file__).parent / "docs" / "onnx_sample.py"
    assert len(sample.read_text(encoding="utf-8").splitlines()) <= 60
    shutil.copy(sample, tmp_path)
    shutil.copy(of_any_size if any_image_size else exported[1], tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    command = [sys.executable, "-I", "onnx_sample.py", "a.onnx", "image.png"]
    for thresholds, word in (([], None), (["0", "0"], "defective"), (["99", "99"], "good")):
        (tmp_path / "image_mask.png").unlink(missing_ok=True)
        result = subprocess.run([*command, *thresholds], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        score = float(result.stdout.split("score ")[1].split(",")[0])
        assert score == pytest.approx(scorer.inspect(image).score, rel=0.05 if any_image_size else 1e-3)
        assert word is None or f": {word}, score" in result.stdout
    mask = np.asarray(Image.open(tmp_path / "image_mask.png"))
    assert mask.shape == (50, 70)
    assert not mask.any()
    wrong = {
        "exists": ["a.onnx", "image.png"],
        "Inspect an image": ["a.onnx"],
        "no.onnx": ["no.onnx", "image.png"],
    }
    for words, arguments in wrong.items():
        result = subprocess.run([*command[:3], *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_sample_in_docs_reads_more_than_8_bits_as_this_program_does(exported, onnx_file, tmp_path, suffix):
    """16 bits, and floating-point numbers."""
    shutil.copy(Path(export.__file__).parent / "docs" / "onnx_sample.py", tmp_path)
    gray, name = np.random.default_rng(0).integers(0, 2**16, (50, 70), dtype=np.uint16), f"image.{suffix}"
    Image.fromarray(gray if suffix == "png" else gray.astype(np.float32) / 65535).save(tmp_path / name)
    command = [sys.executable, "-I", "onnx_sample.py", "a.onnx", name]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    score = float(result.stdout.split("score ")[1].split(",")[0])
    assert score == pytest.approx(exported[0].inspect(tmp_path / name).score, rel=1e-3)


# ----------------------------------------------------------------------------- files to refuse


def assert_refused(run_main, path, message="is not a model that export.py wrote"):
    out = path.parent / "out"
    code, _, err = run_main(predict.main, [path, path.parent, "--out", out, "--gpu", "cpu"])
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not out.exists()


def test_an_existing_file_is_kept(trained, tmp_path, run_main):
    (tmp_path / "a.onnx").write_text("mine")
    code, _, err = run_main(export.main, [trained.checkpoint, tmp_path / "a.onnx"])
    assert code == 2
    assert "exists; choose a new file" in err
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
    assert_refused(run_main, tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(content + digest_entry(content))
    assert_refused(run_main, tmp_path / "a.onnx")


def test_a_flipped_bit_is_refused(onnx_file, run_main):
    """Wherever it is: in a weight it would change scores without a word."""
    path, whole = onnx_file, onnx_file.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 30).tolist()
    for place in (*places, 0, len(whole) - 1, len(whole) - 70, whole.index(b"pixel_threshold") + 18):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert_refused(run_main, path)
    for damaged in (whole[:-1], whole[:-76], whole + b"\0", whole[1:]):
        path.write_bytes(damaged)
        assert_refused(run_main, path)


def test_a_file_that_onnx_wrote_again_is_still_the_model(onnx_file, tmp_path):
    onnx.save(onnx.load(onnx_file), tmp_path / "b.onnx")
    images = torch.zeros(1, 32, 64, 3, dtype=torch.uint8)
    maps = [OnnxScorer(tmp_path / name).score(images).maps for name in ("a.onnx", "b.onnx")]
    assert torch.equal(*maps)
    onnx.checker.check_model(onnx_file)


def sealed(proto):
    """With a right digest, as somebody who knows how would write it."""
    data = proto.SerializeToString()
    return data + digest_entry(data)


def with_metadata(proto, **changes):
    (entry,) = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
    entry.value = json.dumps({**json.loads(entry.value), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": [64, 64]},
        {"image_size": [32]},
        {"image_size": [32, 64, 3]},
        {"image_size": [0, 64]},
        {"image_size": [-32, 64]},
        {"image_size": [32.0, 64]},
        {"image_size": [10**9, 10**9]},
        {"image_size": "32"},
        {"metrics": {"image_threshold": "x"}},
        {"metrics": None},
        {"calibration": {"x": 1}},
        {"roi": "zz"},
        {"roi": "00"},
        {"roi": True},
    ],
)
def test_metadata_that_do_not_fit_the_graph_are_refused(onnx_file, run_main, changes):
    proto = onnx.load(onnx_file)
    del proto.metadata_props[-1]
    with_metadata(proto, **changes)
    onnx_file.write_bytes(sealed(proto))
    assert_refused(run_main, onnx_file)


def foreign(inputs, outputs):
    """A model of somebody else's that passes its input on."""
    helper, uint8 = onnx.helper, onnx.TensorProto.UINT8
    (name, shape), (result, _) = inputs, outputs
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [result])], "g",
        [helper.make_tensor_value_info(name, uint8, shape)],
        [helper.make_tensor_value_info(result, uint8, shape)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_foreign_models_end_in_one_line(tmp_path, run_main, trained):
    path = tmp_path / "a.onnx"
    model = foreign(("image", ["b", 32, 32, 3]), ("y", None))
    path.write_bytes(model.SerializeToString())
    assert_refused(run_main, path)
    path.write_bytes(sealed(model))
    assert_refused(run_main, path)
    about = {"class": "x", "image_size": [32, 32], "metrics": {}, "calibration": None}
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(about))
    path.write_bytes(sealed(model))  # it has no anomaly map
    flags = ["--out", tmp_path / "out", "--gpu", "cpu", "--threshold", 1]
    code, _, err = run_main(predict.main, [path, trained.data, *flags])
    assert (code, err.count("\n")) == (2, 1), err
    assert "onnxruntime cannot run" in err


def test_weights_in_another_file_are_refused(onnx_file, tmp_path, run_main):
    path, proto = onnx_file, onnx.load(onnx_file)
    del proto.metadata_props[-1]
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "weights").exists()
    assert_refused(run_main, path)
    path.write_bytes(sealed(onnx.load(path, load_external_data=False)))
    assert_refused(run_main, path)


def test_a_bank_too_large_for_the_format_is_named(tmp_path):
    scorer = make_scorer()
    scorer.templates = tuple(t.expand(2**17, -1, -1, -1) for t in scorer.templates)
    with pytest.raises(export.InputError, match="smaller --numTemplate"):
        export_onnx(scorer, tmp_path / "a.onnx")


def test_an_onnx_file_has_no_image_template_and_a_fixed_precision(onnx_file, tmp_path, run_main):
    code, _, err = run_main(predict.main, [onnx_file, "--template", tmp_path / "t.png"])
    assert code == 2
    assert "holds no inverse" in err
    assert_refused_flag = run_main(predict.main, [onnx_file, tmp_path, "--precision", "fp32"])
    assert assert_refused_flag[0] == 2
    assert "the precision it was exported in" in assert_refused_flag[2]
