"""Whatever way the k x k convolutions take, they are the convolutions of the method."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import convolution
from convolution import (
    basis,
    conv2d_of_upsampled,
    from_spectrum,
    pays_in_frequency_domain,
    same_conv2d,
    to_spectrum,
)


def random(*shape):
    x = torch.randn(*shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    return x.requires_grad_()


@pytest.fixture(params=["direct", "frequency domain"])
def way(request, monkeypatch):
    chosen = request.param == "frequency domain"
    monkeypatch.setattr(convolution, "pays_in_frequency_domain", lambda *_: chosen)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sources", ["map", "upsampled", "both"])
@pytest.mark.parametrize("size", [(32, 16), (48, 36), (10, 4)])
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_equal_to_the_plain_convolution_with_all_gradients(k, size, sources, stride):
    torch.manual_seed(k)
    height, width = size
    x = random(2, 3, height, width) if sources != "upsampled" else None
    upsampled = random(2, 2, height // 2, width // 2) if sources != "map" else None
    parts = [] if x is None else [x]
    if upsampled is not None:
        parts.append(F.interpolate(upsampled, scale_factor=2, mode="nearest"))
    weight = random(4, sum(part.shape[1] for part in parts), k, k)
    plain = F.conv2d(torch.cat(parts, 1), weight, stride=stride, padding=k // 2)
    fast = same_conv2d(weight, x, upsampled, stride)
    torch.testing.assert_close(fast, plain)
    cotangent = torch.randn_like(plain)
    sources = [y for y in (weight, x, upsampled) if y is not None]
    for ours, theirs in zip(
        torch.autograd.grad(fast, sources, cotangent),
        torch.autograd.grad(plain, sources, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("way")
def test_only_gradients_that_are_asked_for():
    x, weight = random(1, 2, 16, 16), random(3, 2, 7, 7)
    for wanted, other in ((x, weight), (weight, x)):
        other.requires_grad_(False)
        same_conv2d(weight, x).sum().backward()
        assert wanted.grad is not None
        assert other.grad is None
        other.requires_grad_()
        wanted.grad = None


@pytest.mark.usefixtures("way")
def test_inside_torch_checkpoint():
    x, weight = random(1, 2, 16, 16), random(3, 2, 7, 7)
    plain = torch.autograd.grad(same_conv2d(weight, x).square().sum(), (x, weight))
    recomputed = checkpoint(same_conv2d, weight, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), (x, weight)), plain)


def test_float32_is_as_accurate_as_the_direct_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 128, 128), torch.randn(64, 64, 7, 7)
    assert pays_in_frequency_domain(weight, x, None, 1)
    exact = F.conv2d(x.double(), weight.double(), padding=3)
    error = (same_conv2d(weight, x) - exact).abs().max() / exact.abs().max()
    assert error < 3e-6


@pytest.mark.parametrize(("dtype", "times_worse"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_accuracy_beside_that_of_the_direct_convolution(dtype, times_worse, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 7, 7)
    exact = F.conv2d(x.double(), weight.double(), padding=3)
    errors = []
    for chosen in (True, False):
        monkeypatch.setattr(convolution, "pays_in_frequency_domain", lambda *_, chosen=chosen: chosen)
        errors.append((same_conv2d(weight.to(dtype), x.to(dtype)) - exact).norm() / exact.norm())
    assert errors[0] < times_worse * errors[1]


@pytest.mark.parametrize("kind", ["input", "upsampled", "output", "every second output", "kernel"])
def test_the_two_transforms_are_adjoint(kind):
    torch.manual_seed(0)
    by = basis(kind, 7, torch.float64)
    size = (2, 7, 7, 3) if kind == "kernel" else (2, 20, 40, 3)
    x = torch.randn(size, dtype=torch.float64)
    spectrum = to_spectrum(x, by)
    y = torch.randn_like(spectrum)
    torch.testing.assert_close(
        (spectrum * y).sum(), (x * from_spectrum(y, by, torch.empty_like(x))).sum()
    )


def test_a_spectrum_is_the_fourier_transform_of_the_tiles():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 32, 2, dtype=torch.float64)
    spectrum = to_spectrum(x, basis("input", 7, torch.float64))
    assert spectrum.shape == (12, 2, 22, 4)
    second_tile = F.pad(x, (0, 0, 3, 3, 3, 3))[0, :22, 16:38]
    expected = torch.fft.rfft2(second_tile, dim=(1, 0))
    torch.testing.assert_close(spectrum[:, 1, :, :2], expected.real)
    torch.testing.assert_close(spectrum[:, 1, :, 2:], expected.imag)


def test_the_frequency_domain_is_for_large_maps_of_many_channels_on_the_cpu(monkeypatch):
    def pays(size, channels, k=7, stride=1, dtype=torch.float32):
        weight = torch.empty(channels, channels, k, k, dtype=dtype, device="meta")
        x = torch.empty(2, channels, size, size, dtype=dtype, device="meta")
        return pays_in_frequency_domain(_OnCpu(weight), x, None, stride)

    class _OnCpu:
        def __init__(self, tensor):
            self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cpu")

    monkeypatch.setattr(convolution, "cpu_features", lambda: [])
    assert pays(256, 128)
    assert pays(256, 32)
    assert not pays(8, 128)
    assert not pays(256, 4)
    assert not pays(256, 32, k=3)
    assert not pays(64, 128, stride=2)
    assert not pays(256, 128, dtype=torch.float64)
    assert pays(256, 128, dtype=torch.bfloat16)
    assert not pays(256, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(convolution, "cpu_features", lambda: ["AMX"])
    assert not pays(256, 128, dtype=torch.bfloat16)
    assert not pays_in_frequency_domain(torch.empty(8, 8, 7, 7, device="meta"), None, None, 1)


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_convolution_of_an_upsampled_map(k):
    x, weight = random(2, 3, 6, 5), random(4, 3, k, k)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=k // 2)
    torch.testing.assert_close(conv2d_of_upsampled(x, weight), plain)
