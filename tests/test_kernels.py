"""Each kernel equals its plain twin, the formula; and the frequency domain is what kernels.py says it is."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
import spectral
from kernels import MEMORY_FORMAT, conv2d
from model import AffineParameters, LaplacianPyramid, PyramidFlowConfig


def random(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return (x.to(memory_format=MEMORY_FORMAT) if x.dim() == 4 else x).requires_grad_()


# -------------------------------------------------------------------------- kernels and formulas


def cases():
    """(name of a kernel, its arguments)."""
    torch.manual_seed(0)
    matrix, x, shift, log_scale = random(3, 3), *(random(2, 3, 10, 7) for _ in range(3))
    scale = log_scale.detach().exp().requires_grad_()
    for size in ((10, 7), (1, 2)):
        yield "blur", (random(2, 3, *size),)
        yield "blur_upsampled", (random(2, 3, *size),)
    yield "affine_coupling", (matrix, scale, x, shift)
    yield "undo_affine_coupling", (matrix, x, shift, scale)
    running_means = (random(1, 1, 10, 7).detach(), random(1, 3, 1, 1).detach(), torch.zeros(1, 1, 1, 1))
    for mean in (kernels.OF_PIXEL, kernels.OF_CHANNEL, *running_means):
        yield "scale_and_shift", (random(2, 6, 10, 7), mean)
    yield "every_second_pixel", (random(2, 3, 6, 4),)
    yield "pairs", (random(2, 3, 6, 5),)
    yield "pairs", (random(4, 3, 6, 5),)
    yield "channel_mean", (x,)
    yield "template_distances", (x, random(4, 3, 10, 7))
    yield "template_distances", (x, kernels.bank_layout(random(5, 3, 10, 7)))
    sizes, sources = [(32, 16), (48, 36), (10, 4), (12, 10)], ["map", "upsampled", "both"]
    endings = [(1, 1.0), (1, 0.01), (2, 1.0)]
    for k, (h, w), source, ending in itertools.product([1, 3, 5, 7, 9], sizes, sources, endings):
        x = None if source == "upsampled" else random(2, 3, h, w)
        upsampled = None if source == "map" else random(2, 2, h // 2, w // 2)
        channels = {"map": 3, "upsampled": 2, "both": 5}[source]
        yield "conv2d", (random(4, channels, k, k), x, upsampled, *ending)
    for k in (1, 3, 7):
        yield "kernel_of_upsampled", (random(4, 3, k, k),)
    for mode in (True, False):
        yield "normalized_conv", (random(2, 3, 6, 5), *conv_and_norm(3, mode), random(2, 4, 6, 5))


def conv_and_norm(channels, training):
    conv, norm = torch.nn.Conv2d(channels, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4)
    for x in (norm.weight, norm.running_var):
        torch.nn.init.uniform_(x, 0.5, 2)
    for x in (norm.bias, norm.running_mean):
        torch.nn.init.normal_(x)
    return conv.double(), norm.double().train(training)


def describe(value):
    arguments = value if isinstance(value, tuple) else (value,)
    return "-".join("x".join(map(str, x.shape)) if isinstance(x, Tensor) else str(x) for x in arguments)


def test_every_kernel_has_a_case():
    twins = {name.removeprefix("plain_") for name in vars(kernels) if name.startswith("plain_")}
    assert twins == {name for name, _ in cases()}


def test_many_maps_compose_as_the_pyramid_does():
    for num_level in (2, 4):
        levels = tuple(random(2, 3, 32 >> i, 16 >> i) for i in range(num_level))
        ways = LaplacianPyramid(num_level).double().compose, kernels.compose_maps
        expected, composed = (
            [y, *torch.autograd.grad(y.square().sum(), levels)] for y in (f(levels) for f in ways)
        )
        torch.testing.assert_close(composed, expected)


@pytest.mark.parametrize("size", [(10, 7), (1, 2), (3, 1)])
@pytest.mark.parametrize("kernel", ["blur", "blur_upsampled"])
def test_the_blur_by_matrices_as_on_cuda(kernel, size):
    x, matrix_of = random(2, 3, *size), {"blur": kernels.blur_matrix, "blur_upsampled": kernels.up_matrix}[kernel]
    found, expected = kernels._along_both_axes(matrix_of, x), getattr(kernels, f"plain_{kernel}")(x)
    assert found.is_contiguous(memory_format=MEMORY_FORMAT)
    grads = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*grads)


def test_what_scoring_in_inference_mode_keeps_can_be_trained_with():
    kernels.up_matrix.cache_clear()
    levels = random(1, 1, 8, 8), random(1, 1, 4, 4)
    with torch.inference_mode():
        kernels.compose_maps(tuple(x.detach() for x in levels))
    kernels.compose_maps(levels).sum().backward()
    assert all(x.grad is not None for x in levels)


def test_the_layout_of_a_bank_puts_a_pixels_templates_side_by_side():
    bank = random(5, 3, 4, 6)
    laid_out = kernels.bank_layout(bank)
    assert torch.equal(laid_out, bank)
    assert laid_out.permute(2, 3, 0, 1).is_contiguous()


@pytest.fixture(params=spectral.WAYS)
def way(request, monkeypatch):
    """Each way of the convolution; beside one, strips of pixels as they are, else so short that there are many."""
    take(request.param, monkeypatch)
    if request.param != "direct":
        monkeypatch.setattr(kernels, "STRIP_ELEMENTS", 48)


def take(way, monkeypatch):
    def choose(weight, x, upsampled, stride):
        return "direct" if way == "strips" and (stride > 1 or upsampled is not None) else way

    monkeypatch.setattr(kernels, "choose_way", choose)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("memory_format", [MEMORY_FORMAT, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("name", "arguments"), list(cases()), ids=describe)
def test_kernel_equals_its_formula_with_all_gradients(name, arguments, memory_format):
    kernel, formula = getattr(kernels, name), getattr(kernels, f"plain_{name}")
    arguments = [
        x.contiguous(memory_format=memory_format) if isinstance(x, Tensor) and x.dim() == 4 else x
        for x in arguments
    ]
    expected = as_tuple(formula(*arguments))
    with torch.no_grad():
        torch.testing.assert_close(as_tuple(kernel(*arguments)), expected)
    results = as_tuple(kernel(*arguments))
    torch.testing.assert_close(results, expected)
    assert [y.requires_grad for y in results] == [y.requires_grad for y in expected]
    learned = [i for i, y in enumerate(expected) if y.requires_grad]
    cotangents = [torch.randn_like(expected[i]) for i in learned]
    sources = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad([results[i] for i in learned], sources, cotangents),
        torch.autograd.grad([expected[i] for i in learned], sources, cotangents),
    )


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def test_scale_is_at_least_float32_and_shift_stays_as_it_is():
    raw = random(2, 6, 8, 8).detach().bfloat16()
    for function in (kernels.scale_and_shift, kernels.plain_scale_and_shift):
        assert [y.dtype for y in function(raw, (0, 1))] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("features", [[], ["AMX"]], ids=str)
@pytest.mark.parametrize("mean", [(0, 1), (0, 2, 3), "a tensor"], ids=str)
def test_scale_of_every_bfloat16_is_looked_up_as_it_is_computed(mean, features, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_features", lambda: features)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.bfloat16)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values)).view(1, 16, 64, 64)
    raw = torch.cat([values, values.flip(1)], 1).contiguous(memory_format=MEMORY_FORMAT)
    mean = torch.randn(1, 1, 64, 64) if mean == "a tensor" else mean
    found, expected = (f(raw, mean) for f in (kernels.scale_and_shift, kernels.plain_scale_and_shift))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not kernels.scale_and_shift(torch.full((1, 2, 1, 1), torch.nan).bfloat16(), (0, 1))[0].isfinite()


# ------------------------------------------------------------------------------ k x k convolutions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("source", ["map", "upsampled", "both"])
@pytest.mark.parametrize(("stride", "slope"), [(1, 0.01), (1, 1.0), (2, 0.01)])
def test_the_fused_convolution_equals_the_formula(dtype, tolerance, source, stride, slope, monkeypatch):
    """As far as the precision goes, with its gradients; and it is taken where it saves a pass."""
    torch.manual_seed(0)  # with a sum that is nearly zero LeakyReLU may take another slope
    take("direct", monkeypatch)
    used = []
    original = kernels._FusedConvolution.apply
    monkeypatch.setattr(kernels._FusedConvolution, "apply", lambda *given: used.append(1) or original(*given))
    own, small = random(2, 16, 32, 16), random(2, 16, 16, 8)
    maps = {"map": (own, None), "upsampled": (None, small), "both": (own, small)}[source]
    exact = [None if x is None else x.detach().to(dtype).double().requires_grad_() for x in maps]
    weight = random(32, 32 if source == "both" else 16, 7, 7).detach().to(dtype).double().requires_grad_()
    expected = kernels.plain_conv2d(weight, *exact, stride, slope)
    cotangent = torch.randn_like(expected).to(dtype)
    sources = [weight, *(x for x in exact if x is not None)]
    wanted = torch.autograd.grad(expected, sources, cotangent.double())
    rounded = [None if x is None else x.detach().to(dtype, memory_format=MEMORY_FORMAT) for x in (weight, *exact)]
    for x in rounded:
        if x is not None:
            x.requires_grad_()
    y = conv2d(*rounded, stride, slope)
    found = torch.autograd.grad(y, [x for x in rounded if x is not None], cotangent)
    assert bool(used) == (slope != 1 or source == "both")
    for x, reference in zip((y, *found), (expected, *wanted), strict=True):
        assert x.dtype == dtype
        assert (x - reference).norm() < tolerance * reference.norm()
        assert not x.is_contiguous() or x.is_contiguous(memory_format=MEMORY_FORMAT)


@pytest.mark.parametrize("way", spectral.WAYS)
def test_a_weights_gradient_is_laid_out_as_the_weight(way, monkeypatch):
    """Or autograd would keep it and a copy, for each block, until a step with memory saving ends."""
    take(way, monkeypatch)
    weight = random(8, 4, 7, 7)
    (grad,) = torch.autograd.grad(conv2d(weight, random(1, 4, 32, 32)).square().sum(), weight)
    assert grad.stride() == weight.stride()
    assert not weight.is_contiguous()


@pytest.mark.parametrize("mkl_is_slow", [True, False])
@pytest.mark.parametrize("way", spectral.WAYS)
def test_float32_is_right_by_either_library(way, mkl_is_slow, monkeypatch):
    """oneDNN or MKL: float64 takes neither."""
    take(way, monkeypatch)
    for module in (kernels, spectral):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: mkl_is_slow)
    x, shift, y = (random(2, 8, 48, 32) for _ in range(3))
    matrix = torch.linalg.qr(random(8, 8).detach())[0].requires_grad_()
    raw, weight, small = random(2, 16, 48, 32), random(12, 16, 7, 7), random(2, 8, 24, 16)
    mean = random(1, 1, 48, 32).detach()
    scale = random(2, 8, 48, 32).detach().exp().requires_grad_()
    assert_float32("conv2d", weight, x, small)
    assert_float32("affine_coupling", matrix, scale, x, shift)
    assert_float32("scale_and_shift", raw, (0, 1))
    with torch.no_grad():
        assert_float32("scale_and_shift", raw, mean)
        assert_float32("undo_affine_coupling", matrix, y, shift, scale)


def assert_float32(name, *arguments):
    """A kernel and its gradients in float32 equal the formula's in float64."""
    expected, sources = as_tuple(getattr(kernels, f"plain_{name}")(*arguments)), tensors(arguments)
    rounded = [rounded_to_float32(x) if isinstance(x, Tensor) else x for x in arguments]
    found = as_tuple(getattr(kernels, name)(*rounded))
    if expected[0].requires_grad:
        expected, found = (
            (*y, *torch.autograd.grad(y[0].square().sum(), x, allow_unused=True))
            for y, x in ((expected, sources), (found, tensors(rounded)))
        )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 3e-6 * b.norm()


def tensors(arguments):
    return [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]


def rounded_to_float32(x):
    x = x.detach().float()
    return (x.contiguous(memory_format=MEMORY_FORMAT) if x.dim() == 4 else x).requires_grad_()


@pytest.mark.parametrize("way", ["tiles", "strips"])
def test_nothing_is_kept_for_a_gradient_that_nobody_wants(way, monkeypatch):
    function = {"tiles": spectral._TileConvolution, "strips": spectral._StripConvolution}[way]
    original, wanted = function.forward, []

    def forward(ctx, *given):
        wanted.extend(ctx.needs_input_grad)
        return original(ctx, *given)

    monkeypatch.setattr(function, "forward", staticmethod(forward))
    take(way, monkeypatch)
    weight, x = random(4, 4, 7, 7), random(1, 4, 16, 16).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            conv2d(weight, x)
    assert not any(wanted)
    conv2d(weight, x)
    assert any(wanted)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("channels", [2, 4, 6, 8, 16, 64])
def test_bfloat16_is_right_at_any_size(channels, size):
    """The library's own convolutions are not, on some processors."""
    config = PyramidFlowConfig("none", num_level=2, num_channel=channels, image_size=(size, size))
    network = AffineParameters(config, 2 * channels, (size, size), 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exact = copy.deepcopy(network).double()
    network.compute_dtype = torch.bfloat16
    maps = [random(2, channels, n, n).detach().bfloat16() for n in (size, size // 2)]
    cotangents = [torch.randn(2, channels, size, size) for _ in range(2)]
    found, wanted = (gradients(net, maps, cotangents, dtype) for net, dtype in
                     ((network, torch.float32), (exact, torch.float64)))  # fmt: skip
    for x, reference in zip(found, wanted, strict=True):
        assert (x - reference).norm() < 0.1 * reference.norm()  # the sign of what is nearly zero counts


def gradients(network, maps, cotangents, dtype):
    """Of both maps and both weights."""
    maps = [x.to(dtype, memory_format=MEMORY_FORMAT).requires_grad_() for x in maps]
    outputs = network(*maps)
    cotangents = [g.to(y.dtype) for g, y in zip(cotangents, outputs, strict=True)]
    return torch.autograd.grad(outputs, (*maps, *network.parameters()), cotangents)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_encoders_fused_convolution_equals_the_formula(stride, added, monkeypatch):
    torch.manual_seed(0)
    conv, norm = (module.float() for module in conv_and_norm(3, training=False))
    conv.stride = stride, stride
    x = torch.randn(2, 3, 16, 12).to(memory_format=MEMORY_FORMAT)
    with torch.no_grad():
        added = torch.randn_like(conv(x)) if added else None
        expected = kernels.plain_normalized_conv(x, conv, norm, added)
        monkeypatch.delattr(kernels, "plain_normalized_conv")
        torch.testing.assert_close(kernels.normalized_conv(x, conv, norm, added), expected)


@pytest.mark.parametrize("learned", ["image", "weight"])
def test_the_encoders_convolution_has_the_gradients_that_are_asked_for(learned):
    torch.manual_seed(0)
    conv, norm = (module.float().requires_grad_(False) for module in conv_and_norm(3, training=False))
    x = torch.randn(2, 3, 8, 8)
    source = {"image": x, "weight": conv.weight}[learned].requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.normalized_conv(x, conv, norm).sum(), source)
    (expected,) = torch.autograd.grad(kernels.plain_normalized_conv(x, conv, norm).sum(), source)
    torch.testing.assert_close(gradient, expected)


def test_the_encoders_convolution_takes_the_batchs_statistics_in_training():
    torch.manual_seed(0)
    conv, norm = (module.float().requires_grad_(False) for module in conv_and_norm(3, training=True))
    kernels.normalized_conv(torch.randn(2, 3, 8, 8), conv, norm)
    assert norm.num_batches_tracked == 1


@pytest.mark.usefixtures("way")
def test_only_gradients_that_are_asked_for():
    x, weight = random(1, 2, 16, 16), random(3, 2, 7, 7)
    for wanted, other in ((x, weight), (weight, x)):
        other.requires_grad_(False)
        conv2d(weight, x).sum().backward()
        assert wanted.grad is not None
        assert other.grad is None
        other.requires_grad_()
        wanted.grad = None


@pytest.mark.usefixtures("way")
def test_inside_torch_checkpoint():
    x, weight = random(1, 2, 16, 16), random(3, 2, 7, 7)
    plain = torch.autograd.grad(conv2d(weight, x).square().sum(), (x, weight))
    recomputed = checkpoint(conv2d, weight, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), (x, weight)), plain)


@pytest.mark.parametrize(("way", "channels"), [("tiles", 64), ("strips", 32)])
def test_float32_is_as_accurate_as_the_direct_convolution(way, channels, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(1, channels, 256, 128), torch.randn(channels, channels, 7, 7)
    monkeypatch.setattr(spectral, "cpu_features", lambda: [])
    assert spectral.choose_way(weight, x, None, 1) == way
    exact = F.conv2d(x.double(), weight.double(), padding=3)
    error = (conv2d(weight, x) - exact).abs().max() / exact.abs().max()
    assert error < 3e-6


@pytest.mark.parametrize(
    ("way", "dtype", "times_worse"),
    [
        ("tiles", torch.float32, 1),
        ("tiles", torch.bfloat16, 3),
        ("strips", torch.float32, 1.2),
        ("strips", torch.bfloat16, 2),
    ],
    ids=str,
)
def test_accuracy_beside_that_of_the_direct_convolution(way, dtype, times_worse, monkeypatch):
    torch.manual_seed(0)
    x, weight, cotangent = (torch.randn(shape) for shape in ((1, 64, 64, 64), (64, 64, 7, 7), (1, 64, 64, 64)))

    def results(way, dtype):
        take(way, monkeypatch)
        sources = [y.to(dtype).requires_grad_() for y in (weight, x)]
        y = conv2d(*sources)
        return [y, *torch.autograd.grad(y, sources, cotangent.to(dtype))]

    exact = results("direct", torch.float64)
    for found, direct, y in zip(results(way, dtype), results("direct", dtype), exact, strict=True):
        assert (found - y).norm() < times_worse * (direct - y).norm()


def test_the_way_by_size_channels_and_precision(monkeypatch):
    def way(size, channels, k=7, stride=1, dtype=torch.float32):
        weight = torch.empty(channels, channels, k, k, dtype=dtype, device="meta")
        x = torch.empty(2, channels, size, size, dtype=dtype, device="meta")
        return spectral.choose_way(_OnCpu(weight), x, None, stride)

    class _OnCpu:
        def __init__(self, tensor):
            self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cpu")

    monkeypatch.setattr(spectral, "cpu_features", lambda: [])
    assert way(256, 128) == way(256, 128, dtype=torch.bfloat16) == "tiles"
    assert way(256, 32) == way(256, 32, dtype=torch.bfloat16) == "strips"
    assert way(128, 32, dtype=torch.bfloat16) == "strips"
    assert way(64, 32, dtype=torch.bfloat16) == way(64, 32) == "direct"
    assert way(8, 128) == "direct"
    assert way(256, 4) == "direct"
    assert way(256, 32, k=3) == "direct"
    assert way(64, 128, stride=2) == "direct"
    assert way(256, 128, dtype=torch.float64) == "direct"
    monkeypatch.setattr(spectral, "cpu_features", lambda: ["AMX"])
    assert way(256, 128) == "tiles"
    assert way(256, 128, dtype=torch.bfloat16) == "strips"
    assert way(64, 128, dtype=torch.bfloat16) == way(256, 32, dtype=torch.bfloat16) == "direct"
    assert way(256, 128, stride=2, dtype=torch.bfloat16) == "direct"
    assert spectral.choose_way(torch.empty(8, 8, 7, 7, device="meta"), None, None, 1) == "direct"


# ------------------------------------------------------------------------------- frequency domain


@pytest.mark.parametrize("kind", ["input", "upsampled", "output", "every second output", "kernel"])
def test_the_two_transforms_of_tiles_are_adjoint(kind):
    torch.manual_seed(0)
    by = spectral.basis(kind, 7, torch.float64)
    size = (2, 7, 7, 3) if kind == "kernel" else (2, 20, 40, 3)
    x = torch.randn(size, dtype=torch.float64)
    assert_adjoint(x, tile_spectra(x, by), from_tile_spectra, by)


def tile_spectra(x, by):
    """(F, tiles, T, 2C)."""
    rows = spectral.Rows.of(x, by)
    return torch.stack([rows.to_spectrum(f) for f in range(rows.parts.shape[1])])


def from_tile_spectra(spectra, by, out):
    rows = spectral.Rows(out, by)
    for f, spectrum in enumerate(spectra):
        rows.from_spectrum(spectrum, f)
    return rows.to_map(out)


def assert_adjoint(x, spectrum, back, by):
    """<F x, y> = <x, F* y>."""
    y = torch.randn_like(spectrum)
    torch.testing.assert_close((spectrum * y).sum(), (x * back(y, by, torch.empty_like(x))).sum())


def test_a_spectrum_is_the_fourier_transform_of_the_tiles():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 32, 2, dtype=torch.float64)
    spectrum = tile_spectra(x, spectral.basis("input", 7, torch.float64))
    assert spectrum.shape == (12, 2, 22, 4)
    second_tile = F.pad(x, (0, 0, 3, 3, 3, 3))[0, :22, 16:38]
    expected = torch.fft.rfft2(second_tile, dim=(1, 0))
    torch.testing.assert_close(spectrum[:, 1, :, :2], expected.real)
    torch.testing.assert_close(spectrum[:, 1, :, 2:], expected.imag)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_the_two_transforms_of_strips_are_adjoint(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 20, 3, dtype=torch.float64)
    assert_adjoint(x, strip_spectra(x, kind), from_strip_spectra, kind)


def strip_spectra(x, kind):
    """(T, strips, W*C), made in two parts."""
    by = spectral.strip_basis(kind, 7, x.dtype)
    strips = len(x) * by.count(x.shape[1])
    parts = [(0, strips - 1), (strips - 1, 1)]
    out = [x.new_empty(len(by.down), count, x[0, 0].numel()) for _, count in parts]
    for part, (first, _) in zip(out, parts, strict=True):
        spectral.rows_to_spectrum(x, by, part, first)
    return torch.cat(out, 1)


def from_strip_spectra(spectra, kind, out):
    by, last = spectral.strip_basis(kind, 7, out.dtype), spectra.shape[1] - 1
    spectral.rows_from_spectrum(spectra[:, :last], by, out)
    return spectral.rows_from_spectrum(spectra[:, last:], by, out, last)


def test_a_spectrum_is_the_fourier_transform_of_the_strips():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 8, 2, dtype=torch.float64)
    spectrum = strip_spectra(x, "input").unflatten(2, (8, 2))
    assert spectrum.shape == (38, 2, 8, 2)
    second_strip = F.pad(x, (0, 0, 0, 0, 3, 3))[0, 32:70]
    expected = torch.fft.rfft(second_strip, dim=0)
    torch.testing.assert_close(spectrum[:2, 1], expected.real[[0, 19]])
    torch.testing.assert_close(spectrum[2::2, 1], expected.real[1:19])
    torch.testing.assert_close(spectrum[3::2, 1], expected.imag[1:19])


def test_the_two_transforms_of_a_kernel_are_adjoint():
    weight, blocks = random(5, 3, 7, 7).detach(), spectral.mixing_blocks(7, torch.float64)
    spectrum = spectral.kernel_spectrum(weight, blocks)
    assert spectrum.shape == (19 * 2 * 5, 2 * 3, 1, 7)
    y = torch.randn_like(spectrum)
    expected = (weight * spectral.kernel_from_spectrum(y, blocks)).sum()
    torch.testing.assert_close((spectrum * y).sum(), expected)


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (40, 24), (20, 36)])
@pytest.mark.parametrize("strips_at_once", [1, 3, 50])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_strips_of_any_number_and_height(k, size, strips_at_once, dtype, tolerance, monkeypatch):
    """A few at a time, the last ones fewer; in float32 and bfloat16 as oneDNN lays out their kernels."""
    take("strips", monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(spectral, "STRIP_BYTES", strips_at_once * (31 + k) * size[1] * 4 * dtype.itemsize)
    exact = random(5, 4, k, k), random(2, 4, *size)
    expected = kernels.plain_conv2d(*exact)
    cotangent = torch.randn_like(expected)
    wanted = expected, *torch.autograd.grad(expected, exact, cotangent)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    y = conv2d(*rounded)
    found = y, *torch.autograd.grad(y, rounded, cotangent.to(dtype))
    for x, reference in zip(found, wanted, strict=True):
        assert (x - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("way", spectral.WAYS)
def test_every_way_works_under_autocast(way, monkeypatch):
    take(way, monkeypatch)
    x, weight = random(1, 4, 40, 32).float(), random(4, 4, 7, 7).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(weight, x)
    reference = F.conv2d(x, weight, padding=3)
    assert (y - reference).norm() < 0.05 * reference.norm()
