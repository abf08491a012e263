"""What a GPU does differently, on small data.  The same tests run on the CPU too: so the tests are known to work
where there is no GPU, and what needs one is skipped there."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Pictures, read_images
from test_model import FIXTURES, anomaly_map, latent_template, official_model
from torch import Tensor

import dataset
import evaluate
import export
import fit
import kernels
import predict
import runs
import train
import util
from benchmarks import measuring, memory
from benchmarks.measuring import CHAINS
from dataset import Images, normalize
from model import PyramidFlow, PyramidFlowConfig, pair_loss, training_loss
from scorer import ScoreOptions, Scorer, lay_out, load_checkpoint
from tools.convert_official import convert_state_dict
from util import apply_precision

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason=f"needs a CUDA device: {util.why_no_cuda()}")

# Largest errors, of what the passes give and of gradients, relative in the norm of that order: of the largest
# value, or of the mean square.  TF32 has 10 bits, bfloat16 7: a hidden value near 0 may change its sign, and its
# gradient jumps.  About three times what is found on the CPU.
PARITY = {"fp32": (math.inf, 1e-4, 1e-4), "tf32": (2, 2e-3, 0.1), "bf16": (2, 2e-2, 0.25)}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Where a test says nothing else: convolutions in full precision, by what cuDNN deems best."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


# ---------------------------------------------------------------- parity with the official program


@contextmanager
def computing_in(precision: str, device: torch.device, model: PyramidFlow):
    """TF32 is imitated on the CPU: what the convolutions read loses 13 of its 23 bits."""
    with pytest.MonkeyPatch.context() as patch:
        model.compute_networks_in(apply_precision(precision))
        if precision == "tf32" and device.type == "cpu":
            original = kernels.conv2d
            patch.setattr(kernels, "conv2d", lambda *xs, **kw: original(*map(as_tf32, xs), **kw))
        yield


class _Rounded(torch.autograd.Function):
    """As the hardware does: what comes in is rounded on the way there and back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def as_tf32(x: Tensor | None) -> Tensor | None:
    return None if x is None else _Rounded.apply(x)


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("precision", PARITY)
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_parity_with_the_official_program(path, precision, save_memory, device):
    if precision != "fp32" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU from Ampere on")
    official = torch.load(path, weights_only=True)
    model = official_model(official, save_memory).to(device)
    order, *tolerances = PARITY[precision]
    with computing_in(precision, device, model):
        errors = parity_errors(official, model, device, order)
    for name, error in errors.items():
        assert error < tolerances[name.startswith("grad")], (name, error)
    wide = model.config.channels >= 16  # for fewer cuDNN may have no kernel with TF32, and oneDNN errs in bfloat16
    rounds = {"fp32": False, "tf32": device.type == "cpu" or wide, "bf16": device.type != "cpu" or wide}
    if rounds[precision] or device.type == "cpu" or precision == "fp32":
        assert (max(errors.values()) > 1e-4) == rounds[precision]  # that is what it computes in


def parity_errors(official: dict, model: PyramidFlow, device: torch.device, order: float) -> dict[str, float]:
    """By name, the errors of a training step and of scoring."""
    given = {name: official[name].to(device) for name in ("train_input", "eval_input")}
    latents, _ = model.train()(given["train_input"])
    loss = pair_loss(model.pyramid, latents)
    loss.backward()
    ours = {"loss": loss.reshape(1), **by_level("train_output", latents)}
    ours |= {f"grad {name}": p.grad for name, p in model.flow.named_parameters(prefix="flow")}
    ours |= {f"buffer {name}": b for name, b in model.named_buffers()}
    with torch.no_grad():
        latents, logdets = model.eval()(given["eval_input"], logdets=True)
        levels = model.pyramid.decompose(model.stem(given["eval_input"]))
    template = latent_template(model, given["train_input"])
    for name, x in {"pyramid": levels, "output": latents, "logdets": logdets}.items():
        ours |= by_level(f"eval_{name}", x)
    ours |= by_level("template", template)
    ours["anomaly_map"] = anomaly_map(model, given["eval_input"], template)
    return {name: difference(ours[name], x, order) for name, x in expected_of(official, model).items()}


def expected_of(official: dict, model: PyramidFlow) -> dict[str, Tensor]:
    names = ("train_output", "eval_pyramid", "eval_output", "eval_logdets", "template")
    expected = {k: x for name in names for k, x in by_level(name, official[name]).items()}
    for name, part in (("grad", "grads"), ("buffer", "buffers_after_step")):
        converted = convert_state_dict(model, official[part])
        expected |= {f"{name} {key}": x for key, x in converted.items()}
    loss = torch.tensor([float(official["loss"])])
    return {**expected, "loss": loss, "anomaly_map": official["anomaly_map"]}


def by_level(name: str, levels) -> dict[str, Tensor]:
    return {f"{name} {i}": x for i, x in enumerate(levels)}


def difference(ours: Tensor, official: Tensor, order: float) -> float:
    """Relative in a norm; of a large official tensor every 17th element is stored."""
    ours, official = ours.detach().cpu().float().flatten(), official.flatten()
    if len(ours) != len(official):
        ours = ours[::17]
    return float((ours - official).norm(order) / official.norm(order).clamp_min(1e-12))


# ---------------------------------------------------------------------------------- the commands


def at(device: torch.device) -> list:
    """Flags that all commands take."""
    return ["--gpu", "cpu" if device.type == "cpu" else 0, "--precision", "fp32"]


def train_at(device: torch.device, data: Path, save_dir: Path, *extra) -> Path:
    """The folder of a finished run."""
    flags = [*SMALL, *at(device), "--datapath", data, "--saveDir", save_dir, *extra]
    train.main(list(map(str, flags)))
    (run,) = save_dir.iterdir()
    return run


def assert_alike(run: Path, other: Path) -> None:
    """Weights, statistics, templates and metrics of two runs' last epochs."""
    first, second = (load_checkpoint(folder / "last.pt") for folder in (run, other))
    for name, x in first["model"].items():
        torch.testing.assert_close(x, second["model"][name], rtol=1e-3, atol=1e-4, msg=name)
    for (x, *_), (y, *_) in zip(first["templates"], second["templates"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    for name in ("pixel_auroc", "image_auroc", "pixel_pro"):
        assert first["metrics"][name] == pytest.approx(second["metrics"][name], abs=0.01), name


@pytest.mark.parametrize("save_memory", [("true",), ("false", "--cache", "none")], ids=" ".join)
def test_training(trained, tmp_path, device, save_memory):
    """The CPU's numbers, from the same seed."""
    there = train_at(device, trained.data, tmp_path, "--saveMemory", *save_memory)
    assert_alike(there, trained.run)
    environment = (there / "log.txt").read_text().splitlines()[:3]
    assert any(" gpu " in line for line in environment) == (device.type == "cuda")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_training_in_another_precision(trained, tmp_path, device, precision):
    if precision == "tf32" and device.type == "cpu":
        pytest.skip("the CPU has no TF32")
    run = train_at(device, trained.data, tmp_path, "--precision", precision)
    result, expected = (json.loads((r / "result.json").read_text()) for r in (run, trained.run))
    assert result["last"]["loss"] == pytest.approx(expected["last"]["loss"], rel=0.02)


def test_a_run_is_resumed_elsewhere(trained, tmp_path, device, run_main):
    runs = [tmp_path / "there", tmp_path / "here"]
    for run, where in zip(runs, (device, CPU), strict=True):
        shutil.copytree(trained.run, run)
        flags = ["--resume", run, "--epochs", 3, "--gpu", at(where)[1]]
        code, _, err = run_main(train.main, flags)
        assert code == 0, err
        assert load_checkpoint(run / "state.pt")["epoch"] == 4
    assert_alike(*runs)


def test_evaluation(trained, tmp_path, device, run_main):
    flags = [trained.checkpoint, "--datapath", trained.data, "--out", tmp_path, *at(device)]
    code, _, err = run_main(evaluate.main, flags)
    assert code == 0, err
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    expected = load_checkpoint(trained.checkpoint)["metrics"]
    for name in ("pixel_auroc", "image_auroc", "pixel_pro", "pixel_ap"):
        assert result[name] == pytest.approx(expected[name], abs=0.002), name
    for name in ("pixel_threshold", "image_threshold"):
        assert result[name] == pytest.approx(expected[name], rel=1e-3), name


BANK = ["--score", "bank", "--numTemplate", 3]


@pytest.mark.parametrize("score", [[], BANK], ids=["paper", "bank"])
def test_fitting_predicting_and_exporting(trained, tmp_path, device, run_main, score):
    """A scorer that was fitted there gives the same scores there, on the CPU, and as an ONNX file."""
    fitted, good = tmp_path / "new.pt", trained.data / "widget" / "train" / "good"
    code, _, err = run_main(fit.main, [trained.checkpoint, good, "--out", fitted, *score, *at(device)])
    assert code == 0, err
    code, _, err = run_main(export.main, [fitted, tmp_path / "new.onnx"])
    assert code == 0, err
    cases = [(fitted, at(device)), (fitted, at(CPU)), (tmp_path / "new.onnx", at(device)[:2])]
    tables = []
    for number, (file, flags) in enumerate(cases):
        out, images = tmp_path / str(number), trained.data / "widget" / "test"
        code, _, err = run_main(predict.main, [file, images, "--out", out, *flags])
        assert code == 0, err
        with (out / "scores.csv").open() as table:
            tables.append([float(row["score"]) for row in csv.DictReader(table)])
    assert len(tables[0]) == 6
    for scores in tables[1:]:
        assert scores == pytest.approx(tables[0], rel=1e-3)


# ------------------------------------------------------------------------------- parts of the way


@pytest.mark.parametrize("kept_there", [True, False])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_images_on_the_device_or_pinned(trained, device, monkeypatch, cache, kept_there):
    monkeypatch.setattr(dataset, "free_memory", lambda device: 2**40 if kept_there else 0)
    paths = sorted((trained.data / "widget" / "train" / "good").iterdir())
    images = Images(paths, (16, 16), cache, device, 2, "x")
    stays = cache == "ram" and (kept_there or device.type == "cpu")
    assert (images._on_device is not None) == stays
    expected = read_images(paths, (16, 16))
    for batch, indices in zip(images.batches([[4, 1], [0, 5]]), [[4, 1], [0, 5]], strict=True):
        assert batch.device.type == device.type
        assert torch.equal(batch.cpu(), expected[indices])
        assert normalize(batch).device.type == device.type


def random_model(device: torch.device, **changes) -> PyramidFlow:
    """With weights that are not those of an untrained model."""
    torch.manual_seed(0)
    config = {"encoder": "none", "num_level": 3, "num_stack": 2, "num_channel": 4, "image_size": (32, 32)}
    model = PyramidFlow(PyramidFlowConfig(**{**config, **changes}))
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device)


def random_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("contrast", ["latent", "composed"])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_bank_scores_alike_everywhere(device, whiten, contrast):
    """Templates, the calibration, which leaves each image out, maps, and the template as an image."""
    images, options = random_images(7), ScoreOptions("bank", 4, whiten, 1.0)
    scorers = [
        Scorer.fit(random_model(where, contrast=contrast), Pictures(images.to(where)), options)
        for where in (device, CPU)
    ]
    calibrations = [scorer.calibration.image_scores for scorer in scorers]
    assert calibrations[0] == pytest.approx(calibrations[1], rel=0.01)
    for x, y in zip(*(scorer.templates for scorer in scorers), strict=True):
        far = (x.cpu() - y).abs() > 1e-3  # numbers are stored in steps: one between two may go either way
        assert far.double().mean() < 1e-3
    scorers[0].templates = tuple(lay_out(t.to(device)) for t in scorers[1].templates)
    there, here = (scorer.score(images) for scorer in scorers)
    assert there.maps.device.type == device.type
    for x, y in zip(there, here, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4)
    pictures = [scorer.image_template(images[3].numpy()).cpu() for scorer in scorers]
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)


def one_step(model: PyramidFlow, images: Tensor) -> None:
    """As train.train_one_epoch, but that nobody looks at the loss."""
    args = train.parse_arguments([])
    optimizer = train.make_optimizer(model, args)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        training_loss(model, *model.train()(normalize(images))).backward()
        torch.nn.utils.clip_grad_norm_(list(model.flow.parameters()), args.clipNorm)
        optimizer.step()


@pytest.mark.parametrize("save_memory", [True, False])
def test_the_host_never_waits_in_a_step(device, save_memory):
    model, images = random_model(device, save_memory=save_memory), random_images(2).to(device)
    one_step(model, images)  # the first prepares much
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        one_step(model, images)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_memory_saving_saves_memory(device, monkeypatch):
    monkeypatch.setattr(memory, "FIG5_CONFIG", random_model(CPU, num_level=4).config)
    peaks = {chain: memory.measure(chain, 6, device)[0] for chain in CHAINS}
    assert 0 < peaks["SequentialNF"] < peaks["SequentialNet"]


@pytest.mark.parametrize("encoder", ["none", "resnet18"])
def test_activations_take_what_is_estimated(device, encoder):
    """On CUDA cuDNN's workspaces come on top."""
    side = {"none": 128, "resnet18": 64 if device.type == "cpu" else 256}[encoder]
    model = PyramidFlow(PyramidFlowConfig(encoder, image_size=(side, side), save_memory=False))
    images = torch.randn(2, 3, side, side, device=device)
    model = model.to(device).train()

    def step() -> None:
        training_loss(model, *model(images)).backward()

    step()
    measured = measuring.step_memory(step, model.flow, device)
    estimated = runs.activation_bytes(model.config, 2, "fp32", device)
    if device.type == "cpu":
        assert estimated == pytest.approx(measured, rel=0.1)
    else:
        assert 0.8 * estimated < measured < 3 * estimated


# ------------------------------------------------------------------------- processes, no memory

# One process that does what several do: it joins a group, and sums, averages and gathers over it.
ALONE = """
import os, sys
import torch.distributed as dist
import train, util
class Several(int):
    def __eq__(self, other): return False
    def __gt__(self, other): return True
    __hash__ = int.__hash__
util.world_size = lambda: Several(1)
original = util.data_parallel
def data_parallel(module):
    network = original(module)
    print(type(network).__name__, "joined by", dist.get_backend())
    return network
util.data_parallel = data_parallel
train.main(sys.argv[1:])
"""


def test_one_process_of_a_group(trained, tmp_path, device):
    """NCCL on CUDA; in epochs of one step, after which no loss waits on the device."""
    (tmp_path / "alone.py").write_text(ALONE)
    own = ["--datapath", trained.data, "--saveDir", tmp_path / "runs", "--batchSize", 6]
    flags = [*SMALL, *at(device), *own]
    command = list(map(str, [sys.executable, tmp_path / "alone.py", *flags]))
    as_torchrun_sets = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "01", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    environment = {**os.environ, **as_torchrun_sets, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    backend = "nccl" if device.type == "cuda" else "gloo"
    assert f"DistributedDataParallel joined by {backend}" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert_alike(run, train_at(device, trained.data, tmp_path / "plain", "--batchSize", 6))


def test_a_tensor_that_does_not_fit_is_one_line(device, run_main):
    code, _, err = run_main(lambda: torch.empty(1 << 50, device=device), [])
    assert (code, err.count("\n")) == (2, 1)
    assert "out of memory; use smaller images" in err


@needs_cuda
def test_a_training_that_does_not_fit_is_one_line(trained, tmp_path, run_main):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        small = [*SMALL, "--gpu", 0, "--datapath", trained.data, "--saveDir", tmp_path]
        large = ["--imageSize", 512, "--numChannel", 64, "--batchSize", 6]
        code, _, err = run_main(train.main, [*small, *large])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (code, err.count("\n")) == (2, 1), err
    assert "out of memory; use smaller images" in err
