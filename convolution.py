"""The k x k convolutions of the coupling networks, with "same" zero padding and as little work as possible.

`same_conv2d` convolves a map, a nearest-upsampled map, or both next to each other, and adds up.  Upsampled
maps are never made.  Where it pays, the convolution is computed in the frequency domain:

A map is cut into tiles of 16x16 outputs.  The (15 + k)^2 inputs that a tile needs are Fourier transformed,
frequencies are mixed across channels, and the 16x16 outputs are transformed back (overlap-save).  That is
a fifth of the work at k = 7 and many channels.  In float32 it is as accurate as the direct way; in bfloat16
its rounding errors are twice as large, as every stage rounds.  Tiles are small enough for every transform to
be a matrix product.

With maps (B,H,W,C), T = 15 + k and F = T // 2 + 1, a spectrum is (F, tiles, T, 2C): half of the vertical
frequencies, the tiles of all images, all horizontal frequencies, real parts and then imaginary parts of
the channels.  `to_spectrum` and `from_spectrum` with the same basis are adjoint; the convolution, its
gradients, and the transform of its kernel are made of these two and of products over channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hardware import cpu_features

MEMORY_FORMAT = torch.channels_last  # of every map from the image to the anomaly map
TILE = 16  # outputs along one side of a tile

# Time on a CPU, in multiply-adds of a direct convolution that take as long; measured.
TIME_OF_MIXING = 6.6  # per output, input channel and output channel
TIME_OF_TRANSFORMS = 550  # per output and channel on either side
TIME_OF_KERNEL = 150_000  # per input channel and output channel, however large the map


def same_conv2d(
    weight: Tensor, x: Tensor | None = None, upsampled: Tensor | None = None, stride: int = 1
) -> Tensor:
    """F.conv2d(cat([x, F.interpolate(upsampled, scale_factor=2)], 1), weight, stride, padding=k // 2).

    Args:
        weight: (O,I,k,k), k odd, I = I1 + I2.
        x: (B,I1,H,W), or None.
        upsampled: (B,I2,H/2,W/2), or None.
        stride: 1 or 2.

    Returns:
        (B,O,H/stride,W/stride).
    """
    own = other = weight
    if x is not None and upsampled is not None:
        own, other = weight.split([x.shape[1], upsampled.shape[1]], dim=1)
    if pays_in_frequency_domain(weight, x, upsampled, stride):
        maps = [
            (y.permute(0, 2, 3, 1), kernel.permute(2, 3, 1, 0))
            for y, kernel in ((x, own), (upsampled, other))
            if y is not None
        ]
        kinds = ("input",) * (x is not None) + ("upsampled",) * (upsampled is not None)
        flat = [y for pair in maps for y in pair]
        return _SpectralConvolution.apply(kinds, stride, *flat)
    y = None
    if x is not None:
        y = F.conv2d(x, own, stride=stride, padding=own.shape[-1] // 2)
    if upsampled is not None:
        part = conv2d_of_upsampled(upsampled, other)
        if stride > 1:  # else no view: gradients of views that are changed in place are copied
            part = part[:, :, ::stride, ::stride]
        y = part if y is None else y.add_(part)
    return y


def pays_in_frequency_domain(
    weight: Tensor, x: Tensor | None, upsampled: Tensor | None, stride: int
) -> bool:
    """Whether the frequency domain is the faster way on this device, in this precision, at this size.

    In bfloat16 it has to save a third of the time, for its rounding errors are twice as large.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    bfloat16 = math.inf if "AMX" in cpu_features() else 1.5  # AMX speeds up the direct way alone
    worth = {torch.float32: 1, torch.bfloat16: bfloat16}.get(weight.dtype, math.inf)
    outputs = x[:, :1].numel() if x is not None else 4 * upsampled[:, :1].numel()
    o, i, k, _ = weight.shape
    i_upsampled = 0 if upsampled is None else upsampled.shape[1]
    taps = (i - i_upsampled) * k**2 + i_upsampled * (k + 1) ** 2 / 3
    direct = outputs / stride**2 * o * taps
    transforms = outputs * (i + o) * TIME_OF_TRANSFORMS + i * o * TIME_OF_KERNEL
    return worth * (transforms + outputs * i * o * TIME_OF_MIXING) < direct


def conv2d_of_upsampled(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(F.interpolate(x, scale_factor=2), weight, padding=k // 2) as one transposed convolution.

    An input pixel stands for 2x2 pixels of the upsampled map, so the weights it meets add up; about a third
    of the work at k = 7.
    """
    summed = 4 * F.avg_pool2d(weight, 2, stride=1, padding=1)
    kernel = summed.flip(-2, -1).transpose(0, 1).contiguous(memory_format=MEMORY_FORMAT)
    return F.conv_transpose2d(x, kernel, stride=2, padding=kernel.shape[-1] // 2 - 1)


# -------------------------------------------------------------------------- frequency domain


@dataclass(frozen=True)
class Basis:
    """Discrete Fourier transform of tiles along one axis, whose samples stand for some of T positions.

    Tile j holds the samples `start + j * stride` to `start + j * stride + n - 1`; those outside the map
    are zero.

    Attributes:
        half: (2F,n), real samples to real parts and then imaginary parts of frequencies 0..F-1.
        full: (2T,2n), complex samples (real parts, then imaginary parts) to all frequencies, real and
            imaginary part alternating.
    """

    half: Tensor
    full: Tensor
    start: int
    stride: int

    @property
    def length(self) -> int:
        return self.half.shape[1]

    def count(self, size: int) -> int:
        """Tiles over `size` samples."""
        return -(-size // self.stride)

    def tiles(self, size: int) -> Iterator[tuple[int, slice, slice]]:
        """(number, samples inside the map, their places in the tile) of each tile."""
        for j in range(self.count(size)):
            first = self.start + j * self.stride
            begin, end = max(first, 0), min(first + self.length, size)
            yield j, slice(begin, end), slice(begin - first, end - first)


@functools.lru_cache(maxsize=64)
def basis(kind: str, k: int, dtype: torch.dtype) -> Basis:
    """The basis of a kind of samples, for kernels of k taps.

    "input": what a tile of outputs needs.  "upsampled": likewise, where a sample stands for two positions.
    "output": a tile of outputs; scaled, so that `from_spectrum` is the inverse transform.
    "every second output": half of them.  "kernel": the taps, in a single tile.
    """
    positions, radius = TILE + k - 1, k // 2
    place = torch.arange(positions)
    start, stride, last = {
        "input": (-radius, TILE, positions),
        "upsampled": (-radius // 2, TILE // 2, positions),
        "output": (0, TILE, TILE),
        "every second output": (0, TILE // 2, TILE),
        "kernel": (0, k, k),
    }[kind]
    sample = place
    if kind == "upsampled":
        sample = (place - radius).div(2, rounding_mode="floor") - start
    elif kind == "every second output":
        sample = torch.where(place % 2 == 0, place // 2, -1)
    sample = torch.where(place < last, sample, -1)
    spread = (sample[:, None] == torch.arange(int(sample.max()) + 1)).double()  # (T,n)

    angle = (place[:, None] * place % positions).double() * (-2 * math.pi / positions)
    cos, sin = angle.cos() @ spread, angle.sin() @ spread
    count = positions // 2 + 1
    scale_half, scale_full = torch.ones(count, 1, dtype=torch.float64), 1.0
    if "output" in kind:  # the other half of the frequencies is the conjugate of this one
        twice = (place[:count] > 0) & (2 * place[:count] < positions)
        scale_half, scale_full = (1 + twice.double()[:, None]) / positions, 1 / positions
    half = torch.cat([cos[:count] * scale_half, sin[:count] * scale_half])
    real, imaginary = torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)
    full = scale_full * torch.cat([real, imaginary], dim=2).flatten(0, 1)
    return Basis(half.to(dtype), full.to(dtype), start, stride)


def to_spectrum(x: Tensor, by: Basis) -> Tensor:
    """(B,H,W,C) -> (F, tiles, T, 2C)."""
    batch, height, width, channels = x.shape
    down, across = by.count(height), by.count(width)
    padded = (across - 1) * by.stride + by.length
    rows = x.new_zeros(len(by.half), batch, down, padded * channels)
    inside = slice(-by.start * channels, (width - by.start) * channels)
    for b in range(batch):
        for j, samples, places in by.tiles(height):
            strip = x[b, samples].view(-1, width * channels)
            torch.mm(by.half[:, places], strip, out=rows[:, b, j, inside])
    frequencies = len(by.half) // 2
    count = frequencies * batch * down
    overlapping = rows.as_strided(
        (count, across, 2, by.length, channels),
        (padded * channels, by.stride * channels, count * padded * channels, channels, 1),
    )
    windows = overlapping.reshape(-1, 2 * by.length, channels)
    spectrum = torch.bmm(by.full.expand(len(windows), -1, -1), windows)
    return spectrum.view(frequencies, batch * down * across, -1, 2 * channels)


def from_spectrum(spectrum: Tensor, by: Basis, out: Tensor) -> Tensor:
    """(F, tiles, T, 2C) -> `out` (B,H,W,C), contiguous; the adjoint of `to_spectrum`."""
    batch, height, width, channels = out.shape
    down, across = by.count(height), by.count(width)
    padded = (across - 1) * by.stride + by.length
    count = len(spectrum) * batch * down
    windows = spectrum.reshape(-1, len(by.full), channels)
    windows = torch.bmm(by.full.T.expand(len(windows), -1, -1), windows)
    windows = windows.view(count, across, 2, by.length, channels).permute(2, 0, 1, 3, 4)
    apart = by.length == by.stride  # tiles that overlap add up
    rows = windows if apart else spectrum.new_zeros(2, count, padded, channels)
    for j in range(0 if apart else across):
        rows[:, :, j * by.stride : j * by.stride + by.length] += windows[:, :, j]
    rows = rows.reshape(len(by.half), batch, down, padded * channels)
    inside = slice(-by.start * channels, (width - by.start) * channels)
    if not apart:
        out.zero_()
    for b in range(batch):
        for j, samples, places in by.tiles(height):
            strip = out[b, samples].view(-1, width * channels)
            torch.addmm(strip, by.half[:, places].T, rows[:, b, j, inside], beta=1 - apart, out=strip)
    return out


def mixing_of(kernel: Tensor) -> Tensor:
    """(k,k,I,O) -> (F,T,2I,2O): real matrices that multiply by the conjugate of the kernel's spectrum."""
    k, _, i, o = kernel.shape
    spectrum = to_spectrum(kernel.reshape(1, k, k, i * o), basis("kernel", k, kernel.dtype))
    real, imaginary = spectrum[:, 0].unflatten(-1, (2, i, o)).unbind(2)
    mixing = kernel.new_empty(*real.shape[:2], 2 * i, 2 * o)
    mixing[..., :i, :o] = mixing[..., i:, o:] = real
    mixing[..., i:, :o] = imaginary
    torch.neg(imaginary, out=mixing[..., :i, o:])
    return mixing


def kernel_gradient(mixing_gradient: Tensor, kernel_shape: tuple[int, int, int, int]) -> Tensor:
    """Adjoint of `mixing_of`."""
    k, _, i, o = kernel_shape
    top, bottom = mixing_gradient.split(i, dim=-2)
    real = top[..., :o] + bottom[..., o:]
    imaginary = bottom[..., :o] - top[..., o:]
    spectrum = torch.stack([real, imaginary], dim=2)[:, None]
    taps = spectrum.new_empty(1, k, k, i * o)
    return from_spectrum(spectrum, basis("kernel", k, spectrum.dtype), taps).view(kernel_shape)


class _SpectralConvolution(torch.autograd.Function):
    """Sum of the convolutions of maps (B,H,W,I), each with its kernel (k,k,I,O) -> (B,O,H,W)."""

    @staticmethod
    def forward(ctx, kinds: tuple[str, ...], stride: int, *maps_and_kernels: Tensor) -> Tensor:
        maps, kernels = maps_and_kernels[::2], maps_and_kernels[1::2]
        k, dtype = kernels[0].shape[0], maps[0].dtype
        spectra, mixings, mixed = [], [], None
        for kind, x, kernel in zip(kinds, maps, kernels, strict=True):
            spectra.append(to_spectrum(x.contiguous(), basis(kind, k, dtype)))
            mixings.append(mixing_of(kernel))
            mixed = _by_channels(spectra[-1], mixings[-1], mixed)
        ctx.save_for_backward(*spectra, *mixings)
        ctx.kinds, ctx.shapes = kinds, [x.shape for x in maps_and_kernels]
        ctx.kernel_strides = [torch.empty_like(kernel, device="meta").stride() for kernel in kernels]
        ctx.out_kind = "output" if stride == 1 else "every second output"
        batch, height, width, _ = maps[0].shape
        scale = 2 if kinds[0] == "upsampled" else 1
        height, width = height * scale // stride, width * scale // stride
        # No view: autograd would copy the gradient of one that is changed in place, into another layout.
        size = (batch, kernels[0].shape[-1], height, width)
        y = torch.empty(size, dtype=dtype, device=mixed.device, memory_format=MEMORY_FORMAT)
        from_spectrum(mixed, basis(ctx.out_kind, k, dtype), y.permute(0, 2, 3, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        spectra, mixings = saved[: len(ctx.kinds)], saved[len(ctx.kinds) :]
        k = ctx.shapes[1][0]
        grad = grad.permute(0, 2, 3, 1).contiguous()
        grad = to_spectrum(grad, basis(ctx.out_kind, k, grad.dtype))
        grads = []
        for n, (kind, spectrum, mixing) in enumerate(zip(ctx.kinds, spectra, mixings, strict=True)):
            map_grad = kernel_grad = None
            if ctx.needs_input_grad[2 + 2 * n]:
                by_channels = _by_channels(grad, mixing.mT)
                map_grad = grad.new_empty(ctx.shapes[2 * n])
                from_spectrum(by_channels, basis(kind, k, grad.dtype), map_grad)
            if ctx.needs_input_grad[3 + 2 * n]:
                by_tiles = torch.empty_like(mixing)
                for x, y, out in zip(spectrum, grad, by_tiles, strict=True):
                    torch.bmm(x.permute(1, 2, 0), y.transpose(0, 1), out=out)
                # Laid out as the kernel, or autograd would copy it, and keep both for a while.
                shape = ctx.shapes[2 * n + 1]
                kernel_grad = torch.empty_strided(shape, ctx.kernel_strides[n], dtype=grad.dtype)
                kernel_grad.copy_(kernel_gradient(by_tiles, shape))
            grads += [map_grad, kernel_grad]
        return None, None, *grads


def _by_channels(spectrum: Tensor, mixing: Tensor, into: Tensor | None = None) -> Tensor:
    """(F, tiles, T, 2I) times (F,T,2I,2O) -> (F, tiles, T, 2O), added to `into`."""
    out = spectrum.new_empty(*spectrum.shape[:3], mixing.shape[-1]) if into is None else into
    for x, matrix, y in zip(spectrum, mixing, out.transpose(1, 2), strict=True):
        if into is None:
            torch.bmm(x.transpose(0, 1), matrix, out=y)
        else:
            torch.baddbmm(y, x.transpose(0, 1), matrix, out=y)
    return out
