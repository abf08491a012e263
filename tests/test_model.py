"""The network computes what the official one does, and is what the paper says: invertible, with known volume."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import spectral
from autoFlow import SequentialNet
from model import (
    CouplingBlock,
    InvertibleConv1x1,
    LaplacianPyramid,
    PyramidFlow,
    PyramidFlowConfig,
    compare,
    coupling_schedule,
    load_encoder_weights,
    pair_loss,
    training_loss,
    zero_loss,
)
from tools.convert_official import convert_state_dict

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.pt"))
SMALL = {"encoder": "none", "num_channel": 3, "kernel_size": 3, "image_size": (16, 16)}


def small_model(**changes):
    """A float64 model whose second convolutions are not zero, so that mistakes show."""
    torch.manual_seed(0)
    model = PyramidFlow(PyramidFlowConfig(**{**SMALL, "num_level": 3, "num_stack": 2, **changes})).double()
    perturb(model)
    return model


def perturb(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def images(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, *model.config.image_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def latent_template(model, x):
    latents, _ = model.eval()(x)
    return tuple(z.mean(0, keepdim=True).to(memory_format=kernels.MEMORY_FORMAT) for z in latents)


@torch.no_grad()
def anomaly_map(model, x, template):
    latents, _ = model.eval()(x)
    return compare(model.pyramid, latents, template, torch.abs, model.config.contrast)


# ------------------------------------------------------------- parity with the official program


def assert_parity(ours, official, name):
    """Relative to the largest value, 1e-4; large official tensors are stored as every 17th element."""
    if ours.shape != official.shape:
        ours = ours.flatten()[::17]
    error = (ours - official).abs().max() / official.abs().max().clamp_min(1e-12)
    assert error < 1e-4, f"{name}: relative error {error:.1e}"


def assert_all_parity(ours, official, name):
    for i, (x, y) in enumerate(zip(ours, official, strict=True)):
        assert_parity(x, y, f"{name}, level {i}")


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def official(request):
    return torch.load(request.param, weights_only=True)


def official_model(official, save_memory):
    given = official["config"]
    config = PyramidFlowConfig(
        encoder=given["encoder"],
        num_level=given["num_level"],
        num_stack=given["num_stack"],
        num_channel=given["channel"],
        kernel_size=given["kernel_size"],
        volume_norm=given["volume_norm"],
        image_size=official["train_input"].shape[-2:],
        save_memory=save_memory,
    )
    model = PyramidFlow(config)
    model.load_state_dict(convert_state_dict(model, official["state_dict"]))
    return model.train()


def test_all_fixtures_are_there():
    assert len(FIXTURES) == 4


@pytest.mark.parametrize("save_memory", [True, False])
def test_parity_of_a_training_step(official, save_memory):
    model = official_model(official, save_memory)
    latents, logdets = model(official["train_input"])
    assert logdets is None
    assert_all_parity(latents, official["train_output"], "latents")
    loss = pair_loss(model.pyramid, latents)
    assert abs(loss.item() / official["loss"] - 1) < 1e-4
    loss.backward()

    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in trained.items()}
    grads = convert_state_dict(model, official["grads"])
    assert grads.keys() == trained.keys()
    for name, grad in grads.items():
        assert_parity(
            trained[name], grad.reshape(shapes[name]) if grad.numel() == trained[name].numel() else grad, name
        )
    buffers = dict(model.named_buffers())
    for name, buffer in convert_state_dict(model, official["buffers_after_step"]).items():
        assert buffers[name].shape == buffer.shape
        assert_parity(buffers[name], buffer, name)


@pytest.mark.parametrize("save_memory", [True, False])
def test_parity_of_scoring(official, save_memory):
    model = official_model(official, save_memory)
    with torch.no_grad():
        model(official["train_input"])  # moves the buffers as one training step does
        model.eval()
        levels = model.pyramid.decompose(model.stem(official["eval_input"]))
        latents, logdets = model(official["eval_input"], logdets=True)
    assert_all_parity(levels, official["eval_pyramid"], "pyramid")
    assert_all_parity(latents, official["eval_output"], "latents")
    assert_all_parity(logdets, official["eval_logdets"], "log-dets")
    template = latent_template(model, official["train_input"])
    assert_all_parity(template, official["template"], "template")
    maps = anomaly_map(model, official["eval_input"], template)
    assert_parity(maps, official["anomaly_map"], "anomaly map")


# -------------------------------------------------------------------------- invertible, volume


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("volume_norm", ["CVN", "SVN", "none"])
@pytest.mark.parametrize(("kind", "level"), [("up", 0), ("down", 1), ("dual", 0)])
def test_every_block_is_undone_and_knows_its_volume(kind, level, volume_norm, training, dtype):
    torch.manual_seed(0)
    config = PyramidFlowConfig(
        **{**SMALL, "num_channel": 2, "num_level": 3, "volume_norm": volume_norm, "image_size": (8, 8)}
    )
    block = CouplingBlock(kind, level, config).to(dtype).train(training)
    perturb(block)
    levels = tuple(torch.randn(1, 2, 8 >> i, 8 >> i, dtype=dtype) for i in range(3))
    with torch.no_grad():
        outputs, logdets = block(levels, tuple(torch.zeros_like(x) for x in levels))
        rebuilt, cancelled = block.inverse(outputs, logdets)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for x, y, z in zip(levels, rebuilt, cancelled, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=tolerance)
        torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=tolerance)
    if dtype == torch.float64:
        jacobian = flow_jacobian(lambda xs: block(xs)[0], levels)
        total = sum(x.sum() for x in logdets)
        torch.testing.assert_close(total, torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


def flow_jacobian(function, levels):
    sizes = [x.numel() for x in levels]

    def flat(x):
        parts = (p.view(y.shape) for p, y in zip(x.split(sizes), levels, strict=True))
        return torch.cat([y.flatten() for y in function(tuple(parts))])

    return torch.autograd.functional.jacobian(flat, torch.cat([x.flatten() for x in levels]))


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("volume_norm", ["CVN", "SVN", "none"])
@pytest.mark.parametrize("num_level", [2, 3, 4])
def test_the_whole_flow_is_undone(num_level, volume_norm, training, save_memory):
    model = small_model(num_level=num_level, volume_norm=volume_norm, save_memory=save_memory).train(training)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model.to(dtype)
        x = images(model).to(dtype)
        with torch.no_grad():
            rebuilt = model.inverse(model(x)[0])
        torch.testing.assert_close(rebuilt, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("volume_norm", ["CVN", "SVN", "none"])
def test_the_models_log_det_equals_the_jacobians(volume_norm):
    model = small_model(num_level=2, image_size=(4, 4), volume_norm=volume_norm, save_memory=False).eval()
    x = images(model, batch=1)
    _, logdets = model(x, logdets=True)
    levels = model.pyramid.decompose(model.stem(x))
    jacobian = flow_jacobian(lambda xs: model.flow(xs)[0], levels)
    torch.testing.assert_close(sum(d.sum() for d in logdets), torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("volume_norm", ["CVN", "SVN"])
def test_volume_normalization_keeps_the_volume_while_training(volume_norm):
    """On the levels whose parameters are all used the log-dets of a batch sum to zero."""
    model = small_model(num_level=2, num_stack=1, volume_norm=volume_norm).train()
    _, logdets = model(images(model), logdets=True)
    assert abs(logdets[0].sum().item()) < 1e-9


@pytest.mark.parametrize("save_memory", [True, False])
def test_every_parameter_gets_a_gradient_except_the_stems(save_memory):
    model = small_model(num_level=4, save_memory=save_memory)
    pair_loss(model.pyramid, model(images(model))[0]).backward()
    for name, p in model.named_parameters():
        if name.startswith("stem"):
            assert p.grad is None
        else:
            assert p.grad.abs().max() > 0, name


def test_memory_saving_gives_the_same_gradients():
    grads = []
    for save_memory in (True, False):
        model = small_model(num_level=4, save_memory=save_memory)
        latents, logdets = model(images(model), logdets=True)
        (pair_loss(model.pyramid, latents) + sum(d.square().sum() for d in logdets)).backward()
        grads.append([p.grad for p in model.flow.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


class OtherLayouts(TorchDispatchMode):
    """Collects what gives a map (B,C,H,W) or (B,2C,H,W) of some level another layout than channels_last."""

    def __init__(self, config):
        super().__init__()
        sizes = [config.level_size(i) for i in range(config.num_level)]
        self.shapes = [(n * config.channels, *size) for size in sizes for n in (1, 2)]
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            is_map = isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1:] in self.shapes
            if is_map and x.stride(1) > 1:  # 0: one channel that stands for all
                self.found.append(f"{function} {tuple(x.shape)}")
        return result


@pytest.mark.parametrize(  # each two of the three together
    ("dtype", "save_memory", "volume_norm"),
    [
        (torch.float32, True, "CVN"),
        (torch.bfloat16, False, "CVN"),
        (torch.float32, False, "SVN"),
        (torch.bfloat16, True, "SVN"),
        (torch.float32, True, "none"),
        (torch.bfloat16, False, "none"),
    ],
)
@pytest.mark.parametrize("way", spectral.WAYS)
def test_one_memory_format_from_the_images_to_the_anomaly_maps(way, dtype, volume_norm, save_memory, monkeypatch):
    """Also of all gradients: a copy into another layout, or work on one, takes longer than the work itself."""
    monkeypatch.setattr(
        kernels, "choose_way",
        lambda _, x, upsampled, stride: way if stride == 1 and (way == "tiles" or upsampled is None) else "direct",
    )  # fmt: skip
    model = small_model(
        num_level=4, num_stack=1, volume_norm=volume_norm, image_size=(64, 64), save_memory=save_memory
    ).float()
    model.compute_networks_in(dtype)
    x = images(model).float()
    template = latent_template(model, x)
    with OtherLayouts(model.config) as other:
        training_loss(model, *model.train()(x)).backward()
        anomaly_map(model, x, template)
    assert not other.found


def test_an_untrained_block_is_its_1x1_convolution():
    model = PyramidFlow(PyramidFlowConfig(**SMALL, num_level=2, num_stack=1)).eval()
    x = torch.randn(1, 3, 16, 16)
    levels = model.pyramid.decompose(model.stem(x))
    latents, _ = model(x)
    down, up = model.flow
    for block, latent, level in ((up, latents[0], levels[0]), (down, latents[1], levels[1])):
        matrix = block.conv1x1.matrix(torch.float32)
        torch.testing.assert_close(latent, torch.einsum("oc,bchw->bohw", matrix, level))


@pytest.mark.parametrize("volume_norm", ["CVN", "SVN", "none"])
def test_a_traced_model_gives_the_same_latents_for_any_batch(volume_norm):
    model = small_model(num_stack=1, volume_norm=volume_norm).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}, "logdets": None}
    with torch.no_grad():
        program = torch.export.export(model, (images(model), False), dynamic_shapes=shapes)
        x = images(model, batch=3)
        torch.testing.assert_close(program.module()(x, False), model(x))


# -------------------------------------------------------------------------------------- parts


def test_schedule():
    assert coupling_schedule(2) == [("down", 0), ("up", 0)]
    assert coupling_schedule(3) == [("dual", 0), ("up", 0), ("down", 1)]
    assert coupling_schedule(4) == [("dual", 0), ("down", 2), ("up", 0), ("dual", 1)]
    assert len(coupling_schedule(8)) == 8


def test_pyramid_composes_back_and_keeps_sizes():
    pyramid = LaplacianPyramid(4).double()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    levels = pyramid.decompose(x)
    assert [tuple(y.shape[-2:]) for y in levels] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    torch.testing.assert_close(pyramid.compose(levels), x)


def test_a_constant_coarse_level_is_darkened_at_the_borders():
    """Zero padding in Up: 1.00 in the center, 0.35 at the edge, 0.12 in the corner at L = 4."""
    levels = tuple(torch.full((1, 1, 256 >> i, 256 >> i), float(i == 3)) for i in range(4))
    composed = LaplacianPyramid(4).compose(levels)[0, 0]
    values = [composed[128, 128].item(), composed[0, 128].item(), composed[0, 0].item()]
    assert values == pytest.approx([1.0, 0.35, 0.12], abs=0.006)


@pytest.mark.parametrize("volume_norm", ["CVN", "SVN", "none"])
def test_down_computes_only_what_is_read(volume_norm):
    """Equal to computing the parameters at x_i's size, normalizing, and interpolating them down."""
    model = small_model(num_level=2, num_stack=1, volume_norm=volume_norm).train()
    block = model.flow[0]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    parameters = block.transform_parameters((x, None))
    scale, t = parameters
    s = block.log_det(*parameters)
    if volume_norm == "none":
        s = s - block.conv1x1.log_det() / 3
    hidden = F.leaky_relu(F.conv2d(x, block.affine.conv1.weight, padding=1), 0.01)
    s0, t0 = F.conv2d(hidden, block.affine.conv2.weight, padding=1).chunk(2, dim=1)
    s0 = 2 * 0.636 * torch.atan(s0 / 2)
    dims = {"CVN": (0, 1), "SVN": (0, 2, 3), "none": None}[volume_norm]
    if dims is not None:
        s0 = s0 - s0.mean(dims, keepdim=True)
    s0, t0 = (F.interpolate(y, scale_factor=0.5, mode="nearest") for y in (s0, t0))
    torch.testing.assert_close(s, s0)
    torch.testing.assert_close(scale, s0.exp())
    torch.testing.assert_close(t, t0)
    cotangents = torch.randn_like(s0), torch.randn_like(t0)
    weights = list(block.affine.parameters())
    torch.testing.assert_close(
        torch.autograd.grad((scale, t), weights, cotangents),
        torch.autograd.grad((s0.exp(), t0), weights, cotangents),
    )


@pytest.mark.parametrize(("kind", "dims"), [("CVN", (0, 1)), ("SVN", (0, 2, 3)), ("none", ())])
@pytest.mark.parametrize("strip_elements", [2**17, 48])
def test_coupling_by_strips_equals_its_formula(kind, dims, strip_elements, monkeypatch):
    """s = b - mean(b), b = clamp * 0.636 * atan(s0 / clamp); y = A (exp(s) x + t); with all gradients."""
    monkeypatch.setattr(kernels, "STRIP_ELEMENTS", strip_elements)
    model = small_model(num_level=2, num_stack=1, volume_norm=kind).train()
    block = model.flow[1]
    small, x = (torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (8, 16))
    (y, _), _ = block((x, small))

    upsampled = F.interpolate(small, scale_factor=2)
    hidden = F.leaky_relu(F.conv2d(upsampled, block.affine.conv1.weight, padding=1), 0.01)
    s, t = F.conv2d(hidden, block.affine.conv2.weight, padding=1).chunk(2, dim=1)
    s = 2 * 0.636 * torch.atan(s / 2)
    if dims:
        mean = s.mean(dims, keepdim=True)
        torch.testing.assert_close(block.affine.norm.running_mean, 0.1 * mean.detach())
        assert block.affine.norm.running_mean.grad_fn is None
        s = s - mean
    expected = F.conv2d(x * s.exp() + t, block.conv1x1.matrix(x.dtype)[:, :, None, None])
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    sources = [x, small, *block.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y, sources, cotangent), torch.autograd.grad(expected, sources, cotangent)
    )


@pytest.mark.parametrize("kind", ["CVN", "SVN"])
def test_eval_subtracts_the_running_mean_and_leaves_it(kind):
    model = small_model(volume_norm=kind).eval()
    norm = model.flow[0].affine.norm
    norm.running_mean.uniform_(-1, 1)
    before = norm.running_mean.clone()
    raw = torch.randn(2, 6, *model.config.level_size(model.flow[0].computed_level), dtype=before.dtype)
    s = 2 * 0.636 * torch.atan(raw[:, :3] / 2) - before
    torch.testing.assert_close(norm(raw), (s.exp(), raw[:, 3:]))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("save_memory", [True, False])
def test_statistics_move_once_per_step_and_never_in_eval_or_inverse(save_memory):
    model = small_model(volume_norm="CVN", save_memory=save_memory).train()
    latents, _ = model(images(model))
    after_forward = {name: b.clone() for name, b in model.named_buffers()}
    pair_loss(model.pyramid, latents).backward()
    model.inverse(latents)
    model.eval()(images(model))
    for name, b in model.named_buffers():
        assert torch.equal(b, after_forward[name]), name
    assert any(b.abs().max() > 0 for name, b in after_forward.items() if "running_mean" in name)


@pytest.mark.parametrize("volume_normalized", [True, False])
def test_conv1x1_matrix(volume_normalized):
    torch.manual_seed(0)
    conv = InvertibleConv1x1(6, volume_normalized).double()
    start = conv.matrix(torch.float64)
    unit = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(start @ start.T, unit, rtol=0, atol=1e-5)  # starts orthogonal
    perturb(conv)
    matrix = conv.matrix(torch.float64)
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], conv.log_det())
    torch.testing.assert_close(conv.inverse_matrix(torch.float64) @ matrix, unit)
    assert (abs(conv.log_det().item()) < 1e-12) == volume_normalized


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("volume_norm", ["CVN", "none"])
def test_matrices_computed_at_once_are_those_of_each_block(volume_norm, save_memory, monkeypatch):
    """In every pass, with all gradients; afterwards none is at hand, so none can be out of date."""

    def results():
        model = small_model(volume_norm=volume_norm, save_memory=save_memory).train()
        latents, _ = model(images(model))
        pair_loss(model.pyramid, latents).backward()
        with torch.no_grad():
            rebuilt = model.inverse(latents)
        assert all(block.conv1x1.at_hand == (None, None) for block in model.flow)
        return latents, rebuilt, [p.grad for p in model.flow.parameters()]

    at_once = results()
    nothing = property(lambda _: (None, None), lambda *_: None)
    monkeypatch.setattr(InvertibleConv1x1, "at_hand", nothing, raising=False)
    torch.testing.assert_close(at_once, results(), rtol=1e-9, atol=1e-9)


def test_fourier_loss_is_the_mean_spectrum_over_all_pairs():
    pyramid = LaplacianPyramid(2).double()
    latents = (torch.randn(3, 2, 8, 8).double(), torch.randn(3, 2, 4, 4).double())
    spectra = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        composed = pyramid.compose(tuple((z[i : i + 1] - z[j : j + 1]).abs() ** 2 for z in latents))
        spectra.append(torch.fft.fft2(composed.mean(1)).abs())
    torch.testing.assert_close(pair_loss(pyramid, latents), torch.stack(spectra).mean())
    with pytest.raises(ValueError, match="at least 2"):
        pair_loss(pyramid, tuple(z[:1] for z in latents))


def test_spatial_loss_is_the_mean_composed_difference():
    """Ablation IV."""
    pyramid = LaplacianPyramid(2).double()
    latents = (torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 4, 4).double())
    composed = pyramid.compose(tuple((z[:1] - z[1:]) ** 2 for z in latents))
    torch.testing.assert_close(pair_loss(pyramid, latents, "spatial"), composed.mean())


@pytest.mark.parametrize("contrast", ["latent", "composed"])
@pytest.mark.parametrize("kind", ["fourier", "spatial"])
def test_zero_template_compares_each_image_with_zero(kind, contrast):
    """Ablation II."""
    model = small_model(contrast=contrast)
    latents, _ = model(images(model, batch=3))
    singles = [
        pair_loss(model.pyramid, tuple(torch.cat([z[i : i + 1], 0 * z[:1]]) for z in latents), kind, contrast)
        for i in range(3)
    ]
    torch.testing.assert_close(zero_loss(model.pyramid, latents, kind, contrast), sum(singles) / 3)
    loss = training_loss(model, latents, kind=kind, template="zero")
    torch.testing.assert_close(loss, sum(singles) / 3)


@pytest.mark.parametrize("kind", ["fourier", "spatial"])
def test_composed_contrast_takes_the_difference_at_full_resolution(kind):
    """Ablation III: compose, then difference."""
    pyramid = LaplacianPyramid(2).double()
    latents = (torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 4, 4).double())
    full = pyramid.compose(latents)
    squares = ((full[0] - full[1]) ** 2).mean(0)
    expected = torch.fft.fft2(squares).abs().mean() if kind == "fourier" else squares.mean()
    torch.testing.assert_close(pair_loss(pyramid, latents, kind, "composed"), expected)


def test_composed_contrast_of_maps():
    model = small_model(contrast="composed").eval()
    x = images(model, batch=3)
    template = latent_template(model, x)
    with torch.no_grad():
        difference = model.pyramid.compose(model(x)[0]) - model.pyramid.compose(template)
    torch.testing.assert_close(anomaly_map(model, x, template), difference.abs().mean(1))


def test_likelihood_loss_is_that_of_a_gaussian_under_the_flow():
    """Ablation I, Eq. 8: -log p(x) = -log N(f(x)) - log|det df/dx|, per dimension, up to log(2 pi) / 2."""
    model = small_model(num_level=2, image_size=(4, 4), volume_norm="none", save_memory=False).eval()
    features = model.encode(images(model, batch=1)).detach()
    levels = model.pyramid.decompose(features)
    jacobian = flow_jacobian(lambda xs: model.flow(xs)[0], levels)
    z = torch.cat([x.flatten() for x in model.latents(features)[0]])
    normal = torch.distributions.Normal(0, 1)
    expected = -(normal.log_prob(z).sum() + torch.linalg.slogdet(jacobian)[1]) / z.numel()
    loss = training_loss(model, *model.latents(features, logdets=True), "likelihood") + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(loss, expected.detach(), check_dtype=False)


def test_maps_compare_each_image_with_the_template():
    model = small_model()
    x = images(model, batch=3)
    template = latent_template(model, x[:1])
    maps = anomaly_map(model, x, template)
    assert maps.shape == (3, 16, 16)
    assert maps[0].abs().max() < 1e-12
    torch.testing.assert_close(maps[1:2], anomaly_map(model, x[1:2], template))


# --------------------------------------------------------------------- configuration and stems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (20, 16)}, "20 is not divisible by 8 .*16 and 24"),
        ({"image_size": (4, 4)}, "nearest sizes that work: 8$"),
        ({"encoder": "resnet18", "image_size": (40, 64)}, "40 is not divisible by 32 .*32 and 64"),
        ({"kernel_size": 4}, "not odd; try 5"),
        ({"encoder_bn": "forzen"}, "'forzen' is not one of batch, frozen"),
        ({"encoder": "vgg"}, "'vgg' is not one of"),
        ({"volume_norm": "BN"}, "'BN' is not one of"),
        ({"num_level": 1}, "at least 2 levels"),
        ({"contrast": "none"}, "'none' is not one of latent, composed"),
    ],
)
def test_impossible_configurations_name_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        PyramidFlowConfig(**{**SMALL, "num_level": 4, **changes})


def test_another_image_size_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="16x16 images, got 32x32"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def resnet(**changes):
    torch.manual_seed(0)
    config = PyramidFlowConfig(
        encoder="resnet18", num_level=2, num_stack=1, kernel_size=3, image_size=(32, 32), **changes
    )
    return PyramidFlow(config)


@pytest.mark.parametrize(("encoder_bn", "moves"), [("batch", True), ("frozen", False)])
def test_the_encoders_statistics(encoder_bn, moves):
    model = resnet(encoder_bn=encoder_bn).train()
    before = model.stem[1].running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(before, model.stem[1].running_mean) != moves


def test_an_encoder_has_no_inverse():
    model = resnet().eval()
    with pytest.raises(ValueError, match="resnet18 has no inverse"):
        model.inverse(model(torch.randn(1, 3, 32, 32))[0])


def test_encoder_weights_are_taken_by_torchvisions_names():
    source, model = resnet(), resnet()
    perturb(source.stem.requires_grad_(True))
    for name, buffer in source.stem.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    names = {"0": "conv1", "1": "bn1", "4": "layer1"}
    state = {names[n.split(".")[0]] + n[1:]: x for n, x in source.stem.state_dict().items()}
    load_encoder_weights(model, {**state, "fc.weight": torch.zeros(1)})
    for x, y in zip(model.stem.state_dict().values(), source.stem.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match=r"entry conv1\.weight has shape"):
        load_encoder_weights(model, {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)})
    with pytest.raises(ValueError, match=r"layer1\.2\.conv1\.weight does not belong to a resnet18"):
        load_encoder_weights(model, {**state, "layer1.2.conv1.weight": torch.zeros(1)})
    for odd in (torch.full((64, 3, 7, 7), torch.nan), torch.zeros(64, 3, 7, 7, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"entry conv1\.weight has values that are not finite"):
            load_encoder_weights(model, {**state, "conv1.weight": odd})
    counter = {"bn1.num_batches_tracked": torch.zeros((), dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"entry bn1\.num_batches_tracked has values that are not finite"):
        load_encoder_weights(model, {**state, **counter})
    with pytest.raises(ValueError, match="has no name"):
        load_encoder_weights(model, {**state, 3: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"entry bn1\.bias is not a tensor"):
        load_encoder_weights(model, {**state, "bn1.bias": 3})
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"no entry layer1\.0\.conv1\.weight"):
        load_encoder_weights(model, state)


def test_save_memory_chooses_the_chain():
    assert not isinstance(small_model(save_memory=True).flow, SequentialNet)
    assert isinstance(small_model(save_memory=False).flow, SequentialNet)


def test_the_state_dict_has_its_final_shapes_from_construction_on():
    model = small_model()
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    pair_loss(model.pyramid, model.train()(images(model))[0]).backward()
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes
    fresh = PyramidFlow(PyramidFlowConfig(**model.config.to_dict())).double()
    fresh.load_state_dict(model.state_dict())
    x = images(model)
    torch.testing.assert_close(fresh.eval()(x)[0], model.eval()(x)[0], rtol=0, atol=0)
