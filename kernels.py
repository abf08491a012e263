"""The work on full-size maps: each kernel `f` equals its twin `plain_f`, the formula in a few operators, faster.

model.py calls the kernels; tests/test_kernels.py holds each to its twin in float64, values and gradients.
Maps are (B,C,H,W) in channels_last, and so are all gradients: a copy into another layout, or work on one,
takes longer than the work itself.  While a model is traced (torch.export, torch.compile) PyTorch's own
operators run alone: the twins, and the direct convolution.

Sections: the coupling strip by strip; small things with tidy gradients; the k x k convolutions; and, last,
their way through the frequency domain.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from util import cpu_features

Tensors = tuple[Tensor, ...]

MEMORY_FORMAT = torch.channels_last  # of every map from the image to the anomaly map
CLAMP = 2.0  # of the log-scale
ATAN_FACTOR = 0.636  # stands for 2 / pi in the official code
STRIP_ELEMENTS = 2**17  # per thread: a few float32 strips of this many fit a core's cache
STRIP_ROWS = 32  # of outputs, transformed at once in the frequency domain

# Time on a CPU, in multiply-adds of a direct convolution that take as long; measured.
TIME_OF_TAPS = 1.4  # of each tap along the rows
TIME_OF_TRANSFORMS = 200  # per output and channel on either side
TIME_OF_KERNEL = 160_000  # per input channel and output channel, however large the map


# ------------------------------------------------------------------- coupling, strip by strip
#
# Memory bandwidth is what elementwise work on full-size maps waits for: written as one operator after the
# other, the coupling would take longer than its convolutions in bfloat16.  So these kernels work through
# strips of pixels that fit the processor's cache.


def scale_and_shift(raw: Tensor, mean: Tensor | tuple[int, ...]) -> Tensors:
    """exp(b - mean) and t of a raw map [s0, t], where b = clamp * 0.636 * atan(s0 / clamp).

    Args:
        raw: (B,2C,H,W).
        mean: what is subtracted, a tensor that broadcasts to b; or the dimensions of b to take its mean
            over, (0, 1) or (0, 2, 3).

    Returns:
        (scale, shift, mean): (B,C,H,W), at least float32; (B,C,H,W); what was subtracted, without a graph.
    """
    way = plain_scale_and_shift if torch.compiler.is_compiling() else _ScaleAndShift.apply
    return way(raw, mean)


def plain_scale_and_shift(raw: Tensor, mean: Tensor | tuple[int, ...]) -> Tensors:
    s0, shift = raw.chunk(2, dim=1)
    b = CLAMP * ATAN_FACTOR * torch.atan(s0.to(_at_least_float32(raw)) / CLAMP)
    mean = b.mean(mean, keepdim=True) if isinstance(mean, tuple) else mean
    return (b - mean).exp(), shift, mean.detach()


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw: Tensor, mean: Tensor | tuple[int, ...]) -> Tensors:
        channels = raw.shape[1] // 2
        scale = _empty_like(raw[:, :channels], _at_least_float32(raw))
        for into, part in _strips(scale, raw):
            into.copy_(part[..., :channels]).div_(CLAMP).atan_().mul_(CLAMP * ATAN_FACTOR)
        ctx.dims = mean if isinstance(mean, tuple) else None
        if ctx.dims:
            mean = _mean_over(ctx.dims, scale)
        for into, mean_part in _strips(scale, mean):
            into.sub_(mean_part).exp_()
        ctx.save_for_backward(raw, scale)
        ctx.mark_non_differentiable(mean)
        return scale, raw[:, channels:], mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scale: Tensor, grad_shift: Tensor, _) -> tuple[Tensor, None]:
        raw, scale = ctx.saved_tensors
        channels = scale.shape[1]
        grad_raw, grad_s = _empty_like(raw), grad_scale * scale
        if ctx.dims:
            grad_s -= _mean_over(ctx.dims, grad_s)
        for into, grad, part, shift in _strips(grad_raw, grad_s, raw, grad_shift):
            into[..., :channels] = grad.mul_(_slope(part[..., :channels]))
            into[..., channels:] = shift
        return grad_raw, None


def _slope(s0: Tensor) -> Tensor:
    """db / ds0 = 0.636 / (1 + (s0 / clamp)^2)."""
    u = s0.to(_at_least_float32(s0)) * (ATAN_FACTOR**-0.5 / CLAMP)
    return u.square_().add_(1 / ATAN_FACTOR).reciprocal_()


def affine_coupling(matrix: Tensor, scale: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """y = A (scale * x + shift) per pixel: A (C,C), the others (B,C,H,W)."""
    way = plain_affine_coupling if torch.compiler.is_compiling() else _AffineCoupling.apply
    return way(matrix, scale, x, shift)


def plain_affine_coupling(matrix: Tensor, scale: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    return _matmul(matrix, scale * x + shift)


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: Tensor, scale: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, scale, x, shift)
        y = _empty_like(x)
        for into, scale_part, x_part, shift_part in _strips(y, scale, x, shift):
            into.copy_((scale_part * x_part + shift_part) @ matrix.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> Tensors:
        matrix, *given = ctx.saved_tensors
        grads = [_empty_like(x) for x in given]
        grad_matrix = torch.zeros_like(matrix)
        for grad, scale, x, shift, into_scale, into_x, into_shift in _strips(grad_y, *given, *grads):
            mixed = (scale * x).add_(shift).reshape(-1, len(matrix))
            grad = grad.reshape(-1, len(matrix))
            grad_matrix.addmm_(grad.T, mixed)
            grad = (grad @ matrix).view(x.shape)
            torch.mul(grad, x, out=into_scale)
            torch.mul(grad, scale, out=into_x)
            into_shift.copy_(grad)
        return grad_matrix, *grads


def undo_affine_coupling(inverse: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x = (A^-1 y - shift) / scale per pixel: A^-1 (C,C), the others (B,C,H,W)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return plain_undo_affine_coupling(inverse, y, shift, scale)
    x = _empty_like(y)
    for into, y_part, shift_part, scale_part in _strips(x, y, shift, scale):
        into.copy_((y_part @ inverse.T - shift_part) / scale_part)
    return x


def plain_undo_affine_coupling(inverse: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (_matmul(inverse, y) - shift) / scale


def _matmul(matrix: Tensor, x: Tensor) -> Tensor:
    """A x per pixel; unlike as a 1x1 convolution, in full precision where TF32 is chosen for convolutions."""
    return (x.movedim(1, -1) @ matrix.T).movedim(-1, 1)


def _strips(*maps: Tensor) -> Iterator[Tensors]:
    """The same pixels of each map, as rows (B,n,C), a strip at a time; of a mean over pixels all, (1,1,C)."""
    rows = [_pixel_rows(x) for x in maps]
    batch, pixels, channels = rows[0].shape
    count = pixels
    if not rows[0].is_cuda:
        count = max(1, STRIP_ELEMENTS * torch.get_num_threads() // (batch * channels))
    for start in range(0, pixels, count):
        yield tuple(x if x.shape[1] == 1 else x[:, start : start + count] for x in rows)


def _pixel_rows(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H*W,C), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _mean_over(dims: tuple[int, ...], x: Tensor) -> Tensor:
    """x.mean(dims, keepdim=True) of (B,C,H,W), in rows, one dimension after the other: faster."""
    total = _pixel_rows(x)
    for dim in {(0, 1): (2, 0), (0, 2, 3): (0, 1)}[dims]:
        total = total.sum(dim, keepdim=True)
    shape = [1 if dim in dims else n for dim, n in enumerate(x.shape)]
    return total.mul_(total.numel() / x.numel()).view(shape)


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=MEMORY_FORMAT)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------- gradients in the same memory format


def every_second_pixel(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,C,H/2,W/2): nearest-neighbor interpolation to half the size."""
    way = plain_every_second_pixel if torch.compiler.is_compiling() else _EverySecondPixel.apply
    return way(x)


def plain_every_second_pixel(x: Tensor) -> Tensor:
    return x[:, :, ::2, ::2]


class _EverySecondPixel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x[:, :, ::2, ::2].contiguous(memory_format=MEMORY_FORMAT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        grad_x = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=MEMORY_FORMAT
        )
        grad_x.zero_()[:, :, ::2, ::2] = grad
        return grad_x


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[i] and x[j] for all pairs i < j of a batch (B,C,H,W), each (B*(B-1)/2,C,H,W)."""
    images = x.split(1)  # once, and joined: unlike that of indexing, its gradient has the same format
    numbers = zip(*itertools.combinations(range(len(x)), 2), strict=True)
    first, second = ([images[i] for i in side] for side in numbers)
    return (first[0], second[0]) if len(first) == 1 else (torch.cat(first), torch.cat(second))


def plain_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    return x[i], x[j]


def channel_mean(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,1,H,W)."""
    return x.sum(1, keepdim=True) / x.shape[1]


def plain_channel_mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


# -------------------------------------------------------------------------- a bank of templates


def template_distances(z: Tensor, templates: Tensor) -> Tensor:
    """Mean over channels of |z_b - t_k|, in one pass over the bank: (B,C,H,W), (K,C,H,W) -> (B,K,H,W).

    Args:
        templates: laid out by `bank_layout`, or they are copied into that layout.
    """
    if torch.compiler.is_compiling():
        return plain_template_distances(z, templates)
    batch, channels, height, width = z.shape
    z, templates = (x.permute(2, 3, 0, 1).flatten(0, 1) for x in (z, templates))  # (H*W,B or K,C)
    sums = torch.cdist(z, templates, p=1)
    return (sums / channels).view(height, width, batch, -1).permute(2, 3, 0, 1).contiguous()


def plain_template_distances(z: Tensor, templates: Tensor) -> Tensor:
    return torch.stack([(z - t).abs().mean(1) for t in templates], 1)


def bank_layout(templates: Tensor) -> Tensor:
    """The same (K,C,H,W), in memory as (H,W,K,C): each pixel's templates side by side."""
    return templates.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def compose_maps(levels: Tensors) -> Tensor:
    """`model.LaplacianPyramid.compose` of many maps, L levels (B,K,H/2^i,W/2^i), as matrix products."""
    x = levels[-1].flatten(0, 1)
    for level in levels[-2::-1]:
        down, across = (up_matrix(n, x.dtype, x.device) for n in x.shape[1:])
        wide = x @ across.T
        x = torch.baddbmm(level.flatten(0, 1), down.expand(x.shape[0], -1, -1), wide)
    return x.unflatten(0, levels[0].shape[:2])


@functools.lru_cache(maxsize=64)
def up_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2n,n): nearest-neighbor interpolation to twice the size, then blur (1,4,6,4,1)/16, along one axis."""
    twice = torch.eye(size, dtype=torch.float64).repeat_interleave(2, dim=0)
    taps = enumerate((1, 4, 6, 4, 1), start=-2)
    blur = sum(n / 16 * torch.ones(2 * size - abs(i), dtype=torch.float64).diag(i) for i, n in taps)
    return (blur @ twice).to(device, dtype)


# ---------------------------------------------------------------------------- k x k convolutions


def conv2d(
    weight: Tensor, x: Tensor | None = None, upsampled: Tensor | None = None, stride: int = 1
) -> Tensor:
    """Convolution, with "same" zero padding, of a map, of a nearest-upsampled map, or of their concatenation.

    Upsampled maps are never made, and where it pays the frequency domain is taken.

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
        sources = (("input", x, own), ("upsampled", upsampled, other))
        kinds, maps, weights = zip(*(y for y in sources if y[1] is not None), strict=True)
        kernels = map(kernel_spectrum, weights, kinds)
        return _SpectralConvolution.apply(kinds, weight.shape[-1], *maps, *kernels)
    y = None
    if x is not None:
        y = F.conv2d(x, own, stride=stride, padding=own.shape[-1] // 2)
    if upsampled is not None:
        part = conv2d_of_upsampled(other, upsampled)
        if stride > 1:  # else no view: gradients of views that are changed in place are copied
            part = part[:, :, ::stride, ::stride]
        y = part if y is None else y.add_(part)
    return y


def plain_conv2d(
    weight: Tensor, x: Tensor | None = None, upsampled: Tensor | None = None, stride: int = 1
) -> Tensor:
    maps = [] if x is None else [x]
    if upsampled is not None:
        maps.append(F.interpolate(upsampled, scale_factor=2, mode="nearest"))
    return F.conv2d(torch.cat(maps, 1), weight, stride=stride, padding=weight.shape[-1] // 2)


def conv2d_of_upsampled(weight: Tensor, x: Tensor) -> Tensor:
    """`plain_conv2d(weight, upsampled=x)` as one transposed convolution.

    An input pixel stands for 2x2 pixels of the upsampled map, so the weights it meets add up; about a third
    of the work at k = 7.
    """
    summed = 4 * F.avg_pool2d(weight, 2, stride=1, padding=1)
    kernel = summed.flip(-2, -1).transpose(0, 1).contiguous(memory_format=MEMORY_FORMAT)
    return F.conv_transpose2d(x, kernel, stride=2, padding=kernel.shape[-1] // 2 - 1)


def pays_in_frequency_domain(
    weight: Tensor, x: Tensor | None, upsampled: Tensor | None, stride: int
) -> bool:
    """Whether the frequency domain is the faster way on this device, in this precision, at this size.

    In bfloat16 it has to save a fifth of the time, for its rounding errors are larger.
    """
    if weight.device.type != "cpu" or stride > 1 or torch.compiler.is_compiling():
        return False
    bfloat16 = math.inf if "AMX" in cpu_features() else 1.25  # AMX speeds up the direct way alone
    worth = {torch.float32: 1, torch.bfloat16: bfloat16}.get(weight.dtype, math.inf)
    outputs = x[:, :1].numel() if x is not None else 4 * upsampled[:, :1].numel()
    o, i, k, _ = weight.shape
    i_upsampled = 0 if upsampled is None else upsampled.shape[1]
    direct = (i - i_upsampled) * k**2 + i_upsampled * (k + 1) ** 2 / 3
    along_rows = (i - i_upsampled) * k + i_upsampled * (2 * ((k // 2 + 1) // 2) + 1)
    taps = (2 * (STRIP_ROWS + k) - 4) / STRIP_ROWS * along_rows * TIME_OF_TAPS
    spectral = outputs * (o * taps + (i + o) * TIME_OF_TRANSFORMS) + i * o * TIME_OF_KERNEL
    return worth * spectral < outputs * o * direct


# -------------------------------------------------------------------------- frequency domain
#
# Down the columns the convolution is done by a Fourier transform, along the rows directly.  A map is cut into
# strips of 32 rows of outputs.  The T = 31 + k rows of inputs that a strip needs are transformed, each
# frequency is multiplied by the kernel's and meanwhile convolved along the rows, and the 32 rows are
# transformed back (overlap-save).  That is a third of the work at k = 7, all of it in large matrix products
# and ordinary convolutions.  Its rounding errors are 1.1 times those of the direct way in float32, and 1.7
# times in bfloat16, as every stage rounds.
#
# Of maps (B,H,W,C) a spectrum is (T, strips, W, C), real: frequencies 0 and T/2, and then the real and the
# imaginary part of each one between.  In a factor, (3T/2-1, strips, W, C), the negative real part follows as
# a third: then a product of complex numbers is a convolution across the parts (see `_taps`).  `to_spectrum`
# and `from_spectrum` with the same basis are adjoint; the convolution and its gradients are made of them, of
# `_multiply` and of `_multiply_gradient`.


@dataclass(frozen=True)
class Basis:
    """Discrete Fourier transform of strips of rows, whose samples stand for some of T positions.

    Strip j holds the samples `start + j * stride` to `start + j * stride + n - 1`; those outside the map
    are zero.

    Attributes:
        matrix: (T,n), samples to a spectrum.
        factor: (3T/2-1,n), samples to a factor.
    """

    matrix: Tensor
    factor: Tensor
    start: int
    stride: int

    def count(self, size: int) -> int:
        """Strips over `size` samples."""
        return -(-size // self.stride)

    def strips(self, batch: int, size: int) -> Iterator[tuple[int, int, slice, slice]]:
        """(number, image, samples inside the map, their places in the strip) of each strip."""
        for number, (image, j) in enumerate(itertools.product(range(batch), range(self.count(size)))):
            first = self.start + j * self.stride
            begin, end = max(first, 0), min(first + self.matrix.shape[1], size)
            yield number, image, slice(begin, end), slice(begin - first, end - first)


@functools.lru_cache(maxsize=64)
def basis(kind: str, k: int, dtype: torch.dtype) -> Basis:
    """The basis of a kind of samples, for kernels of k taps.

    "input": what a strip of outputs needs.  "upsampled": likewise, where a sample stands for two positions.
    "output": a strip of outputs; scaled, so that `from_spectrum` is the inverse transform.
    """
    positions, radius = STRIP_ROWS + k - 1, k // 2
    place = torch.arange(positions)
    start, stride, last = {
        "input": (-radius, STRIP_ROWS, positions),
        "upsampled": (-radius // 2, STRIP_ROWS // 2, positions),
        "output": (0, STRIP_ROWS, STRIP_ROWS),
    }[kind]
    sample = place
    if kind == "upsampled":
        sample = (place - radius).div(2, rounding_mode="floor") - start
    sample = torch.where(place < last, sample, -1)
    spread = (sample[:, None] == torch.arange(int(sample.max()) + 1)).double()  # (T,n)
    matrix = fourier_matrix(positions, positions) @ spread
    if kind == "output":
        matrix[2:] *= 2  # a frequency between stands for its conjugate, too
        matrix /= positions
    real, imaginary = matrix[2::2], matrix[3::2]
    factor = torch.cat([matrix[:2], torch.stack([real, imaginary, -real], 1).flatten(0, 1)])
    return Basis(matrix.to(dtype), factor.to(dtype), start, stride)


def fourier_matrix(positions: int, count: int) -> Tensor:
    """(T,n) float64: the first n of T samples, T even, to their spectrum."""
    between = torch.arange(1, positions // 2).repeat_interleave(2)
    frequencies = torch.cat([torch.tensor([0, positions // 2]), between])
    angle = (frequencies[:, None] * torch.arange(count) % positions).double() * (2 * math.pi / positions)
    matrix = angle.cos()
    matrix[3::2] = -angle[3::2].sin()
    return matrix


def to_spectrum(x: Tensor, by: Basis, matrix: Tensor) -> Tensor:
    """(B,H,W,C) -> (P, strips, W, C), by one of the basis's matrices (P,n)."""
    batch, height, width, channels = x.shape
    spectrum = x.new_empty(len(matrix), batch * by.count(height), width * channels)
    for number, image, samples, places in by.strips(batch, height):
        rows = x[image, samples].view(-1, width * channels)
        torch.mm(matrix[:, places], rows, out=spectrum[:, number])
    return spectrum.view(*spectrum.shape[:2], width, channels)


def from_spectrum(spectrum: Tensor, by: Basis, out: Tensor) -> Tensor:
    """(T, strips, W, C) -> `out` (B,H,W,C), contiguous; the adjoint of `to_spectrum` by `by.matrix`."""
    batch, height, width, channels = out.shape
    apart = by.matrix.shape[1] == by.stride  # strips that overlap add up
    if not apart:
        out.zero_()
    for number, image, samples, places in by.strips(batch, height):
        rows, parts = out[image, samples].view(-1, width * channels), spectrum[:, number].flatten(1)
        torch.addmm(rows, by.matrix[:, places].T, parts, beta=1 - apart, out=rows)
    return out


def kernel_spectrum(weight: Tensor, kind: str) -> Tensor:
    """(O,I,k,k) -> (T,O,I,k): the conjugate spectrum of the columns; the rows are taps of a direct convolution.

    Of an "upsampled" map -> (T,2O,I,k'): two neighboring outputs count as one pixel with twice the channels,
    which then has a direct convolution of the small map.
    """
    k, rows = weight.shape[-1], weight.to(_at_least_float32(weight)).movedim(2, 0)
    matrix = fourier_matrix(STRIP_ROWS + k - 1, k)
    matrix[3::2] *= -1
    spectrum = (matrix.to(rows) @ rows.flatten(1)).view(-1, *rows.shape[1:])
    if kind == "upsampled":
        spectrum = torch.einsum("emq,toiq->teoim", pair_taps(k).to(rows), spectrum).flatten(1, 2)
    return spectrum.to(weight.dtype)


def pair_taps(k: int) -> Tensor:
    """(2,k',k) of 0 and 1: whether output e of a pair meets, at tap q, the pixel of tap m of the small map."""
    reach = (k // 2 + 1) // 2
    e, m, q = torch.meshgrid(
        torch.arange(2), torch.arange(2 * reach + 1), torch.arange(k), indexing="ij"
    )
    return ((e + q - k // 2).div(2, rounding_mode="floor") == m - reach).double()


class _SpectralConvolution(torch.autograd.Function):
    """Sum of the convolutions of maps (B,I,H,W), each with its kernel's spectrum -> (B,O,H,W)."""

    @staticmethod
    def forward(ctx, kinds: tuple[str, ...], k: int, *maps_and_kernels: Tensor) -> Tensor:
        maps, kernels = maps_and_kernels[: len(kinds)], maps_and_kernels[len(kinds) :]
        ctx.save_for_backward(*maps_and_kernels)
        ctx.kinds, ctx.k = kinds, k
        product = None
        for kind, x, kernel in zip(kinds, maps, kernels, strict=True):
            product = _multiply(_factor(x, kind, k, kernel.shape[2]), kernel, product)
        batch, _, height, width = maps[0].shape
        scale = 2 if kinds[0] == "upsampled" else 1
        # No view: autograd would copy the gradient of one that is changed in place, into another layout.
        size = (batch, kernels[0].shape[1] // scale, height * scale, width * scale)
        y = torch.empty(size, dtype=product.dtype, device=product.device, memory_format=MEMORY_FORMAT)
        return _to_map(product, "output", k, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        count, saved = len(ctx.kinds), ctx.saved_tensors  # once: checkpoint gives them no second time
        factor = _factor(grad, "output", ctx.k, grad.shape[1])
        grads = [None] * (2 * count)
        for n, kind in enumerate(ctx.kinds):
            x, kernel = saved[n], saved[count + n]
            grad_factor = factor.view(*factor.shape[:2], -1, kernel.shape[1])
            if ctx.needs_input_grad[2 + n]:
                product = _multiply(grad_factor, _adjoint(kernel))
                grads[n] = _to_map(product, kind, ctx.k, _empty_like(x))
            if ctx.needs_input_grad[2 + count + n]:
                factor_x = _factor(x, kind, ctx.k, kernel.shape[2])
                grads[count + n] = _multiply_gradient(factor_x, grad_factor, kernel)
        return None, None, *grads


def _factor(x: Tensor, kind: str, k: int, channels: int) -> Tensor:
    """(B,C,H,W) -> (3T/2-1, strips, W, C), seen with so many channels."""
    by = basis(kind, k, x.dtype)
    factor = to_spectrum(x.permute(0, 2, 3, 1).contiguous(), by, by.factor)
    return factor.view(*factor.shape[:2], -1, channels)


def _to_map(spectrum: Tensor, kind: str, k: int, out: Tensor) -> Tensor:
    """(T, strips, W, C) -> `out` (B,C,H,W), the spectrum seen with its channels."""
    rows = out.permute(0, 2, 3, 1)
    from_spectrum(spectrum.view(*spectrum.shape[:2], *rows.shape[2:]), basis(kind, k, out.dtype), rows)
    return out


def _frequencies(positions: int) -> Iterator[tuple[slice, slice]]:
    """Where each frequency's parts are in a factor, and in a spectrum of T positions."""
    yield from ((slice(f, f + 1), slice(f, f + 1)) for f in (0, 1))
    for f in range(1, positions // 2):
        yield slice(3 * f - 1, 3 * f + 2), slice(2 * f, 2 * f + 2)


def _taps(kernel: Tensor) -> list[Tensor]:
    """A kernel's spectrum (T,O,I,k) -> taps (O,I,1 or 2,k) of each frequency, which multiply across the parts.

    Of (a, b, -a) the taps (c, -d) make (ac - bd, bc + ad), which is (a + bi)(c + di).
    """
    between = kernel[2:].unflatten(0, (-1, 2)) * kernel.new_tensor([1, -1]).view(2, 1, 1, 1)
    taps = [*kernel[:2, None], *between]
    return [x.permute(1, 0, 3, 2).contiguous().permute(0, 3, 1, 2) for x in taps]


def _parts(x: Tensor) -> Tensor:
    """(P, strips, W, C) -> (1, C, P * strips, W): the parts below each other."""
    return x.flatten(0, 1)[None].permute(0, 3, 1, 2)


def _multiply(factor: Tensor, kernel: Tensor, into: Tensor | None = None) -> Tensor:
    """A factor (P, strips, W, I) times a kernel's spectrum (T,O,I,k) -> (T, strips, W, O), added to `into`."""
    (_, strips, width, _), (positions, channels, _, k) = factor.shape, kernel.shape
    out = factor.new_empty(positions, strips, width, channels)
    for (parts, to), taps in zip(_frequencies(positions), _taps(kernel), strict=True):
        y = F.conv2d(_parts(factor[parts]), taps, padding=(0, k // 2), dilation=(strips, 1))
        out[to] = y[0].permute(1, 2, 0).view(out[to].shape)
    return out if into is None else into.add_(out.view(into.shape))


def _multiply_gradient(factor: Tensor, grad_factor: Tensor, kernel: Tensor) -> Tensor:
    """The gradient of the kernel's spectrum, of factors (P, strips, W, I) and (P, strips, W, O)."""
    strips, k = factor.shape[1], kernel.shape[-1]
    grad = torch.empty_like(kernel)
    for (parts, to), taps in zip(_frequencies(len(kernel)), _taps(kernel), strict=True):
        grad_parts = grad_factor[parts.start : parts.start + taps.shape[2]]
        _, grad_taps, _ = torch.ops.aten.convolution_backward(
            _parts(grad_parts), _parts(factor[parts]), taps, None,
            stride=[1, 1], padding=[0, k // 2], dilation=[strips, 1], transposed=False, output_padding=[0, 0],
            groups=1, output_mask=[False, True, False],
        )  # fmt: skip
        grad[to] = grad_taps.permute(2, 0, 1, 3)
    grad[3::2] *= -1  # the sign in `_taps`
    return grad


def _adjoint(kernel: Tensor) -> Tensor:
    """The spectrum (T,I,O,k) by which a gradient is multiplied, of a kernel's (T,O,I,k)."""
    adjoint = kernel.transpose(1, 2).flip(-1)
    adjoint[3::2] *= -1
    return adjoint
