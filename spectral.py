"""Convolutions of large maps through the frequency domain, on the CPU: two ways beside the direct one.

`kernels.conv2d` takes the way that `choose_way` finds fastest; each equals the formula, `kernels.plain_conv2d`.
Maps are cut, transformed together with the margin that their outputs need, multiplied by the kernel's
transform, and transformed back (overlap-save).  All of it is matrix products and ordinary convolutions.

tiles: 16x16 outputs, transformed both ways.  A fifth of the work at k = 7, where channels are many.
strips: 32 rows of outputs, transformed down the columns; along the rows the convolution is direct.  A third of
    the work, where channels are few.

In float32 rounding errors are those of the direct way; in bfloat16 they are 2.3 and 1.6 times as large, as every
stage rounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from util import cpu_features, mkl_is_slow

WAYS = ("direct", "tiles", "strips")
TILE = 16  # outputs along one side of a tile
STRIP_ROWS = 32  # of outputs
STRIP_BYTES = 5 * 2**17  # per thread: of spectra that are made and used at once

# Time, in multiply-adds of a direct convolution that take as long; measured.
TILE_MIXING = 6.6  # per output, input and output channel
TILE_TRANSFORMS, STRIP_TRANSFORMS = 550, 145  # per output and channel on either side
AMX_STRIP_TRANSFORMS = 600  # where AMX makes products fast, moving the maps takes longer than they
TILE_KERNEL, STRIP_KERNEL = 100_000, 280_000  # a kernel's transform, per input and output channel
EACH_STRIP = 20_000_000  # however narrow
BFLOAT16_WORTH = {"direct": 1.0, "tiles": 1.5, "strips": 1.25}  # times faster it has to be, as it rounds more


def choose_way(weight: Tensor, x: Tensor | None, upsampled: Tensor | None, stride: int) -> str:
    """The fastest way of `kernels.conv2d` for this device, precision and size, one of `WAYS`."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return "direct"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return "direct"
    amx = weight.dtype == torch.bfloat16 and "AMX" in cpu_features()
    outputs = x[:, :1].numel() if x is not None else 4 * upsampled[:, :1].numel()
    o, i, k, _ = weight.shape
    own, other = (0 if y is None else y.shape[1] for y in (x, upsampled))
    mixing = 2 * (STRIP_ROWS + k - 1) / STRIP_ROWS * i * o * k
    transforms = (i + o) * (AMX_STRIP_TRANSFORMS if amx else STRIP_TRANSFORMS)
    times = {
        "direct": outputs / stride**2 * o * (own * k**2 + other * (k + 1) ** 2 / 3),
        "tiles": outputs * (i * o * TILE_MIXING + (i + o) * TILE_TRANSFORMS) + i * o * TILE_KERNEL,
        "strips": outputs * (mixing + transforms) + i * o * STRIP_KERNEL,
    }
    if amx:  # products as small as the tiles', by `torch.bmm`, were no faster than the direct way
        del times["tiles"]
    if stride > 1 or other:
        del times["strips"]
    else:
        times["strips"] += outputs / (STRIP_ROWS * x.shape[-1]) * EACH_STRIP
    if weight.dtype == torch.bfloat16:
        times = {way: time * BFLOAT16_WORTH[way] for way, time in times.items()}
    return min(times, key=times.get)


def convolve(
    way: str, kinds: Sequence[str], stride: int, maps: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Sum of the convolutions of maps (B,I,H,W), each with its weight (O,I,k,k) -> (B,O,H/stride,W/stride).

    Args:
        way: "tiles"; or "strips", of one "input" with stride 1.
        kinds: of each map, "input" or "upsampled": of half the size.
    """
    # Without grad mode `needs_input_grad` would still tell that the weights' gradients are wanted.
    weights = [_SameLayout.apply(x) if torch.is_grad_enabled() else x.detach() for x in weights]
    if way == "tiles":
        return _TileConvolution.apply(tuple(kinds), stride, *maps, *weights)
    return _StripConvolution.apply(*maps, *weights)


class _SameLayout(torch.autograd.Function):
    """The same tensor; its gradient is laid out as it is, or autograd would copy it, and keep both for a while."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.strides = x.stride()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype).copy_(grad)


def memory_of(
    way: str, shape: tuple[int, int, int], channels: int, outputs: int, k: int, itemsize: int
) -> tuple[int, int]:
    """What a convolution keeps beside the maps for its gradient, and what that takes for a while; bytes.

    Args:
        way: "tiles" or "strips".
        shape: (B,H,W) of the input.
        channels: of it, upsampled ones too.
    """
    batch, height, width = shape
    if way == "tiles":
        positions, down = TILE + k - 1, batch * -(-height // TILE)
        frequencies = positions // 2 + 1
        spectrum = 2 * positions * down * -(-width // TILE) * itemsize  # of one frequency and channel
        rows = 2 * frequencies * (down * (width + k - 1) * (channels + outputs) + 2 * k * channels * outputs)
        matrices = 3 * 4 * positions * channels * outputs
        for_a_while = (rows + matrices) * itemsize + 4 * spectrum * max(channels, outputs)
        return frequencies * spectrum * channels, for_a_while
    positions = STRIP_ROWS + k - 1
    spectrum = positions * batch * -(-height // STRIP_ROWS) * width * itemsize
    kernel = 2 * positions * k * channels * outputs * itemsize
    return spectrum * channels, spectrum * outputs + 3 * kernel


def can_fuse(x: Tensor) -> bool:
    """Whether oneDNN can be called by itself: to add, and to apply LeakyReLU, while it writes a result."""
    library = torch.backends.mkldnn
    if x.device.type != "cpu" or not (library.is_available() and library.enabled):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32


def sampling(kind: str, k: int, outputs: int) -> tuple[Tensor, int, int]:
    """How the samples of a kind stand for the T = outputs + k - 1 positions of a piece, along one axis.

    "input": what a piece of outputs needs.  "upsampled": likewise, where a sample stands for two positions.
    "output": a piece of outputs.  "every second output": half of them.  "kernel": the taps, in one piece.

    Returns:
        (T,n) of 0 and 1; the first sample of the first piece, and of how many the next begins later.
    """
    positions, radius = outputs + k - 1, k // 2
    place = torch.arange(positions)
    start, stride, last = {
        "input": (-radius, outputs, positions),
        "upsampled": (-radius // 2, outputs // 2, positions),
        "output": (0, outputs, outputs),
        "every second output": (0, outputs // 2, outputs),
        "kernel": (0, k, k),
    }[kind]
    sample = place
    if kind == "upsampled":
        sample = (place - radius).div(2, rounding_mode="floor") - start
    elif kind == "every second output":
        sample = torch.where(place % 2 == 0, place // 2, -1)
    sample = torch.where(place < last, sample, -1)
    return (sample[:, None] == torch.arange(int(sample.max()) + 1)).double(), start, stride


class Piece(NamedTuple):
    """What a piece of a map holds, counted through all images, and its part of the basis.

    Attributes:
        begin, end: its samples inside the map.
        reached: where those begin that no piece before it holds.
        matrix: the columns of `Basis.down` for its samples.
    """

    begin: int
    reached: int
    end: int
    matrix: Tensor


@dataclass(frozen=True)
class Basis:
    """Discrete Fourier transform of the pieces of a map along one axis; a piece's n samples stand for T positions.

    Piece j holds the samples `start + j * stride` to `start + j * stride + n - 1`; those outside the map are zero.

    Attributes:
        down: the matrix along the columns, (P,n).
        across: of tiles, the one along the rows, (2T,2n), complex samples (real parts, then imaginary parts) to
            all frequencies, real and imaginary parts alternating.
    """

    down: Tensor
    start: int
    stride: int
    across: Tensor | None = None

    @property
    def length(self) -> int:
        return self.down.shape[1]

    def count(self, size: int) -> int:
        """Pieces over `size` samples."""
        return -(-size // self.stride)

    def piece(self, number: int, size: int) -> Piece:
        """One of the pieces of images of so many samples each."""
        image, j = divmod(number, self.count(size))
        first = self.start + j * self.stride
        begin, end = max(first, 0), min(first + self.length, size)
        reached = min(first + self.length - self.stride, end) if j else begin
        matrix = self.down if end - begin == self.length else self.down[:, begin - first : end - first]
        return Piece(image * size + begin, image * size + max(reached, begin), image * size + end, matrix)


def times_transposed(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (...,K) times the transpose of b (N,K); in float32 on an AMD CPU by oneDNN, as MKL takes twice as long.

    Either may be transposed in memory; with gaps between rows oneDNN would take a hundred times as long.
    """
    if a.dtype == b.dtype == torch.float32 and mkl_is_slow() and can_fuse(a):
        product = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product if out is None else out.copy_(product)
    return torch.matmul(a, b.T, out=out)


def rows_to_spectrum(x: Tensor, by: Basis, out: Tensor, first: int = 0) -> Tensor:
    """(B,H,W,C), contiguous -> `out` (P,n,W*C), of n pieces, from the `first` one on."""
    rows = x.flatten(2).flatten(0, 1)
    for n, into in enumerate(out.unbind(1)):
        piece = by.piece(first + n, x.shape[1])
        times_transposed(piece.matrix.contiguous(), rows[piece.begin : piece.end].T, out=into)
    return out


def rows_from_spectrum(spectrum: Tensor, by: Basis, out: Tensor, first: int = 0) -> Tensor:
    """(P,n,W*C) -> n pieces of `out` (B,H,W,C), contiguous, which holds those before the `first`; the adjoint.

    Pieces that overlap add up.
    """
    rows = out.view(-1, spectrum.shape[-1])
    for n, transformed in enumerate(spectrum.unbind(1)):
        begin, reached, end, matrix = by.piece(first + n, out.shape[1])
        shared = reached - begin
        if shared:
            rows[begin:reached].addmm_(matrix[:, :shared].T, transformed)
        if reached < end:
            torch.mm(matrix[:, shared:].T, transformed, out=rows[reached:end])
    return out


# ------------------------------------------------------------------------------------- tiles
#
# With T = 15 + k, and F = T // 2 + 1 vertical frequencies, which are half of all: a spectrum is of one of them,
# (tiles, T, 2C): the tiles of all images, all horizontal frequencies, real parts and then imaginary parts of the
# channels.  One after the other they are made, multiplied and transformed back; only what the weight's gradient
# needs is kept.  `Rows.of` and `Rows.to_map`, and `Rows.to_spectrum` and `Rows.from_spectrum`, with the same basis
# are adjoint: the convolution, its gradients, and the transform of its kernel are made of them and of products
# over channels.


@functools.lru_cache(maxsize=64)
def basis(kind: str, k: int, dtype: torch.dtype) -> Basis:
    """The basis of a kind of `sampling`; "output" is scaled so that the way back is the inverse transform."""
    spread, start, stride = sampling(kind, k, TILE)
    positions, place = len(spread), torch.arange(len(spread))
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
    return Basis(half.to(dtype), start, stride, across=full.to(dtype))


class Rows:
    """A map (B,H,W,C), transformed down the columns of its pieces; and the transform along their rows.

    `Rows(x, basis)` are for a map like x, and not filled in: `Rows.of` or `from_spectrum` does that.

    Attributes:
        parts: (2,F,pieces,W',C), real and imaginary parts; W' is W and the margins of the outer tiles.
    """

    def __init__(self, x: Tensor, by: Basis):
        batch, height, width, channels = x.shape
        pieces, across = batch * by.count(height), by.count(width)
        padded = (across - 1) * by.stride + by.length
        self.by, self.inside = by, slice(-by.start, width - by.start)
        self.parts = x.new_empty(2, len(by.down) // 2, pieces, padded, channels)
        # One for each tile: PyTorch would copy a single one that often, and that for every frequency.
        self.matrices = by.across.expand(pieces * across, -1, -1).contiguous()

    @classmethod
    def of(cls, x: Tensor, by: Basis) -> Rows:
        """(B,H,W,C) -> its rows."""
        rows = cls(x, by)
        rows.parts[..., : rows.inside.start, :] = rows.parts[..., rows.inside.stop :, :] = 0
        rows_to_spectrum(x.contiguous(), by, rows._inside_map())
        return rows

    def to_map(self, out: Tensor) -> Tensor:
        """-> `out` (B,H,W,C), contiguous."""
        return rows_from_spectrum(self._inside_map(), self.by, out)

    def to_spectrum(self, frequency: int) -> Tensor:
        """-> (tiles, T, 2C)."""
        rows, by = self.parts[:, frequency], self.by
        windows = rows.unfold(2, by.length, by.stride).permute(1, 2, 0, 4, 3)  # (pieces, across, 2, n, C)
        windows = windows.reshape(len(self.matrices), -1, rows.shape[-1])
        return torch.bmm(self.matrices, windows).view(len(windows), -1, 2 * rows.shape[-1])

    def from_spectrum(self, spectrum: Tensor, frequency: int) -> None:
        """(tiles, T, 2C) -> this frequency."""
        rows, by = self.parts[:, frequency], self.by
        windows = torch.bmm(self.matrices.mT, spectrum.view(len(spectrum), -1, rows.shape[-1]))
        windows = windows.view(rows.shape[1], -1, 2, by.length, rows.shape[-1]).permute(2, 0, 1, 3, 4)
        if by.length == by.stride:
            rows.view_as(windows).copy_(windows)
            return
        rows.zero_()  # tiles that overlap add up
        for j, window in enumerate(windows.unbind(2)):
            rows[:, :, j * by.stride : j * by.stride + by.length] += window

    def _inside_map(self) -> Tensor:
        """(2F, pieces, W*C), a view."""
        parts = self.parts.flatten(0, 1)[:, :, self.inside]
        return parts.view(*parts.shape[:2], -1)


class Mixing:
    """Real matrices that multiply by the spectrum of a kernel (k,k,O,I), or by its conjugate."""

    def __init__(self, kernel: Tensor, conjugate: bool):
        k, _, *self.channels = kernel.shape
        self.rows = Rows.of(kernel.reshape(1, k, k, -1), basis("kernel", k, kernel.dtype))
        self.sign = -1 if conjugate else 1

    def at(self, frequency: int) -> Tensor:
        """(T,2O,2I)."""
        o, i = self.channels
        real, imaginary = self.rows.to_spectrum(frequency)[0].unflatten(-1, (2, o, i)).unbind(1)
        mixing = real.new_empty(len(real), 2 * o, 2 * i)
        mixing[:, :o, :i] = mixing[:, o:, i:] = real
        torch.mul(imaginary, self.sign, out=mixing[:, o:, :i])
        torch.mul(imaginary, -self.sign, out=mixing[:, :o, i:])
        return mixing


class MixingGradient:
    """From gradients of the matrices, by the conjugate spectrum, to that of the kernel (k,k,O,I)."""

    def __init__(self, kernel: Tensor):
        k, _, *self.channels = kernel.shape
        self.taps = kernel.new_empty(1, k, k, math.prod(self.channels))
        self.rows = Rows(self.taps, basis("kernel", k, kernel.dtype))

    def put(self, gradient: Tensor, frequency: int) -> None:
        """(T,2O,2I)."""
        o, i = self.channels
        top, bottom = gradient.split(o, dim=1)
        parts = top[..., :i] + bottom[..., i:], top[..., i:] - bottom[..., :i]
        self.rows.from_spectrum(torch.stack(parts, dim=1).view(1, len(gradient), -1), frequency)

    def kernel(self) -> Tensor:
        """(k,k,O,I), once all frequencies are put."""
        return self.rows.to_map(self.taps).view(*self.taps.shape[1:3], *self.channels)


class _TileConvolution(torch.autograd.Function):
    """Sum of the convolutions of maps (B,I,H,W), each with its weight (O,I,k,k) -> (B,O,H/stride,W/stride)."""

    @staticmethod
    def forward(ctx, kinds: tuple[str, ...], stride: int, *maps_and_weights: Tensor) -> Tensor:
        maps, weights = maps_and_weights[: len(kinds)], maps_and_weights[len(kinds) :]
        k, keep = weights[0].shape[-1], any(ctx.needs_input_grad[2 + len(kinds) :])
        ctx.bases = [basis(kind, k, maps[0].dtype) for kind in kinds]
        ctx.out_basis = basis("output" if stride == 1 else "every second output", k, maps[0].dtype)
        ctx.shapes = [x.shape for x in maps]
        y = _output(kinds, maps, len(weights[0]), stride)
        result = Rows(_channels_last(y), ctx.out_basis)
        sources = [Rows.of(_channels_last(x), by) for x, by in zip(maps, ctx.bases, strict=True)]
        mixings = [Mixing(x.permute(2, 3, 0, 1), conjugate=True) for x in weights]
        spectra = []
        for f in range(result.parts.shape[1]):
            product = None
            for source, mixing in zip(sources, mixings, strict=True):
                spectrum = source.to_spectrum(f)
                product = _mix(spectrum, mixing.at(f), product)
                spectra += [spectrum] if keep else []
            result.from_spectrum(product, f)
        result.to_map(_channels_last(y))
        ctx.save_for_backward(*weights, *spectra)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved, count = ctx.saved_tensors, len(ctx.bases)  # once: torch.utils.checkpoint gives them no second time
        weights, spectra = saved[:count], saved[count:]
        of_maps, of_weights = ctx.needs_input_grad[2 : 2 + count], ctx.needs_input_grad[2 + count :]
        source = Rows.of(_channels_last(grad), ctx.out_basis)
        grads, results, mixings, kernels = [None] * 2 * count, {}, {}, {}
        for n, (shape, by, weight) in enumerate(zip(ctx.shapes, ctx.bases, weights, strict=True)):
            if of_maps[n]:
                grads[n] = _new_map(grad, shape)
                results[n] = Rows(_channels_last(grads[n]), by)
                mixings[n] = Mixing(weight.permute(2, 3, 1, 0), conjugate=False)
            if of_weights[n]:
                kernels[n] = MixingGradient(weight.permute(2, 3, 0, 1))
        for f in range(source.parts.shape[1]):
            spectrum = source.to_spectrum(f)
            for n, rows in results.items():
                rows.from_spectrum(_mix(spectrum, mixings[n].at(f)), f)
            for n, kernel in kernels.items():
                kernel.put(_mixing_gradient(spectrum, spectra[f * count + n]), f)
        for n, rows in results.items():
            rows.to_map(_channels_last(grads[n]))
        for n, kernel in kernels.items():
            grads[count + n] = kernel.kernel().permute(2, 3, 0, 1)
        return None, None, *grads


def _new_map(x: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _output(kinds: Sequence[str], maps: Sequence[Tensor], channels: int, stride: int = 1) -> Tensor:
    """Where the result goes, (B,O,H/stride,W/stride).

    No view: autograd would copy the gradient of one that is changed in place, into another layout.
    """
    scale = 2 if kinds[0] == "upsampled" else 1
    batch, _, *size = maps[0].shape
    return _new_map(maps[0], (batch, channels, *(n * scale // stride for n in size)))


def _channels_last(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H,W,C)."""
    return x.permute(0, 2, 3, 1)


def _mix(spectrum: Tensor, matrices: Tensor, into: Tensor | None = None) -> Tensor:
    """(tiles, T, 2I) times the transposes of (T,2O,2I) -> (tiles, T, 2O), added to `into`.

    By oneDNN as a 1x1 convolution in T groups: on an AMD EPYC twice as fast in float32 as `torch.bmm`, by MKL.
    """

    def pixels(x: Tensor) -> Tensor:
        return x.flatten(1)[None, :, None].permute(0, 3, 1, 2)

    x, weight, groups = pixels(spectrum), matrices.flatten(0, 1)[..., None, None], len(matrices)
    if into is None:
        return _channels_last(F.conv2d(x, weight, groups=groups)).reshape(*spectrum.shape[:2], -1)
    if not can_fuse(x):
        return into.add_(_channels_last(F.conv2d(x, weight, groups=groups)).reshape(into.shape))
    add = weight, None, [0, 0], [1, 1], [1, 1], groups, "add", 1.0, None, [], None
    torch.ops.mkldnn._convolution_pointwise_.binary(pixels(into), x, *add)  # without another pass over it
    return into


def _mixing_gradient(grad: Tensor, spectrum: Tensor) -> Tensor:
    """Sums over tiles of (tiles, T, 2O) times (tiles, T, 2I) -> (T,2O,2I)."""
    grad, spectrum = grad.transpose(0, 1), spectrum.transpose(0, 1)
    if grad.dtype == torch.bfloat16:  # or PyTorch would copy it transposed, which takes longer
        grad = grad.contiguous()
    return torch.bmm(grad.mT, spectrum)


# ------------------------------------------------------------------------------------ strips
#
# Of a map (B,H,W,C) the spectrum of n strips is (n,W,T,C), real, with T = 31 + k: frequencies 0 and T/2, and then
# the real and the imaginary part of each one between.  These are T/2 pairs, of 2C channels each, which mix among
# themselves: the product with a kernel's spectrum is a convolution along the rows in T/2 groups.  A few strips at
# a time are transformed, mixed and transformed back, while the processor's cache holds them.


@functools.lru_cache(maxsize=64)
def strip_basis(kind: str, k: int, dtype: torch.dtype) -> Basis:
    """The basis of "input" or "output", scaled so that `rows_from_spectrum` by the latter is the inverse."""
    spread, start, stride = sampling(kind, k, STRIP_ROWS)
    positions = len(spread)
    matrix = fourier_matrix(positions, positions) @ spread
    if kind == "output":
        matrix[2:] *= 2  # a frequency between stands for its conjugate, too
        matrix /= positions
    return Basis(matrix.to(dtype), start, stride)


def fourier_matrix(positions: int, count: int) -> Tensor:
    """(T,n) float64: the first n of T samples, T even, to their spectrum."""
    between = torch.arange(1, positions // 2).repeat_interleave(2)
    frequencies = torch.cat([torch.tensor([0, positions // 2]), between])
    angle = (frequencies[:, None] * torch.arange(count) % positions).double() * (2 * math.pi / positions)
    matrix = angle.cos()
    matrix[3::2] = -angle[3::2].sin()
    return matrix


@functools.lru_cache(maxsize=64)
def mixing_blocks(k: int, dtype: torch.dtype) -> Tensor:
    """(T/2,2,2,k), at least float32: k taps of a column to the 2x2 matrices by which they mix the pairs.

    (a, b) becomes (ac - bd, ad + bc), which is (a + bi)(c + di), where c + di is the column's conjugate spectrum.
    """
    spectrum = fourier_matrix(STRIP_ROWS + k - 1, k)
    blocks = spectrum.new_zeros(len(spectrum) // 2, 2, 2, k)
    blocks[0, 0, 0], blocks[0, 1, 1] = spectrum[:2]  # the first pair is of two real numbers
    blocks[1:, 0, 0] = blocks[1:, 1, 1] = spectrum[2::2]
    blocks[1:, 0, 1], blocks[1:, 1, 0] = spectrum[3::2], -spectrum[3::2]
    return blocks.to(torch.promote_types(dtype, torch.float32))


class _StripConvolution(torch.autograd.Function):
    """The convolution of a map (B,I,H,W) with a weight (O,I,k,k) -> (B,O,H,W)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        k = weight.shape[-1]
        y = _new_map(x, (len(x), len(weight), *x.shape[2:]))
        spectra = _room_for_spectra(x, k) if ctx.needs_input_grad[1] else None
        _by_strips(x, ("input", "output"), k, spectra, kernel_spectrum(weight, mixing_blocks(k, x.dtype)), y)
        ctx.shape = x.shape
        ctx.save_for_backward(weight, spectra)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, spectra = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        k, blocks = weight.shape[-1], mixing_blocks(weight.shape[-1], weight.dtype)
        grad_x = _new_map(grad, ctx.shape) if ctx.needs_input_grad[0] else None
        grad_spectra = _room_for_spectra(grad, k) if ctx.needs_input_grad[1] else None
        _by_strips(
            grad, ("output", "input"), k, grad_spectra,
            None if grad_x is None else kernel_spectrum(weight.transpose(0, 1).flip(-1), blocks.transpose(1, 2)),
            grad_x,
        )  # fmt: skip
        grad_weight = None
        if grad_spectra is not None:
            grad_weight = kernel_from_spectrum(_mixing_gradient_of_strips(grad_spectra, spectra, weight), blocks)
        return grad_x, grad_weight


def kernel_spectrum(weight: Tensor, blocks: Tensor) -> Tensor:
    """(O,I,k,k) -> (T/2*2O,2I,1,k): at each tap along the rows, the matrix by which each pair mixes."""
    o, i, k, _ = weight.shape
    columns = weight.to(blocks.dtype).permute(2, 0, 3, 1).reshape(k, -1)
    spectrum = times_transposed(blocks.reshape(-1, k), columns.T).view(*blocks.shape[:3], o, k, i)
    out = _new_map(weight, (len(blocks) * 2 * o, 2 * i, 1, k))
    _channels_last(out).view(*blocks.shape[:2], o, k, 2, i).copy_(spectrum.permute(0, 1, 3, 4, 2, 5))
    return out


def kernel_from_spectrum(spectrum: Tensor, blocks: Tensor) -> Tensor:
    """(T/2*2O,2I,1,k) -> (O,I,k,k); the adjoint of `kernel_spectrum`."""
    k = spectrum.shape[-1]
    parts = _channels_last(spectrum).reshape(*blocks.shape[:2], -1, k, 2, spectrum.shape[1] // 2)
    parts = parts.permute(0, 1, 4, 2, 3, 5).to(blocks.dtype, memory_format=torch.contiguous_format)
    columns = times_transposed(blocks.reshape(-1, k).T, parts.flatten(3).flatten(0, 2).T)
    return columns.view(k, -1, k, parts.shape[-1]).permute(1, 3, 0, 2).to(spectrum.dtype)


def _room_for_spectra(x: Tensor, k: int) -> Tensor:
    """For the spectrum of all strips of a map (B,C,H,W)."""
    batch, channels, height, width = x.shape
    return x.new_empty(batch * -(-height // STRIP_ROWS), width, STRIP_ROWS + k - 1, channels)


def _by_strips(
    x: Tensor, kinds: tuple[str, str], k: int, spectra: Tensor | None,
    kernel: Tensor | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    """A map (B,C,H,W): its strips' spectra, into `spectra`; these, mixed and transformed back, into `out`.

    Either may be None.
    """
    by, by_out = (strip_basis(kind, k, x.dtype) for kind in kinds)
    rows, out = _channels_last(x).contiguous(), None if out is None else _channels_last(out)
    batch, height, width, channels = rows.shape
    positions, strips = len(by.down), batch * by.count(height)
    # As many at a time as the cache holds; more if the kernel is large, as each time all of it is read.
    most = max(STRIP_BYTES * torch.get_num_threads(), 0 if kernel is None else kernel.nbytes // 2)
    few = min(strips, max(1, most // (positions * width * channels * x.itemsize)))
    if kernel is not None:
        kernel = _packed(kernel, (few, positions * channels, 1, width))
    for first in range(0, strips, few):
        count = min(few, strips - first)
        spectrum = rows_to_spectrum(rows, by, rows.new_empty(positions, count, width * channels), first)
        spectrum = spectrum.unflatten(2, (width, channels)).permute(1, 2, 0, 3)
        spectrum = spectrum.contiguous() if spectra is None else spectra[first : first + count].copy_(spectrum)
        if out is not None:
            product = _mix_pairs(spectrum, kernel).permute(2, 0, 1, 3).flatten(2)  # (T,n,W*O)
            rows_from_spectrum(product, by_out, out, first)


def _packed(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """The kernel as oneDNN lays it out for a convolution of this size, instead of each time anew."""
    if not can_fuse(kernel):
        return kernel
    arguments = [0, kernel.shape[-1] // 2], [1, 1], [1, 1], size[1] // kernel.shape[1]
    return torch.ops.mkldnn._reorder_convolution_weight(kernel, *arguments, size)


def _mix_pairs(spectrum: Tensor, kernel: Tensor) -> Tensor:
    """(n,W,T,I) times a kernel's spectrum -> (n,W,T,O)."""
    positions, padding = spectrum.shape[2], (0, kernel.shape[-1] // 2)
    if kernel.is_mkldnn:
        arguments = padding, (1, 1), (1, 1), positions // 2, "none", [], ""
        y = torch.ops.mkldnn._convolution_pointwise(_as_images(spectrum), kernel, None, *arguments)
    else:
        y = F.conv2d(_as_images(spectrum), kernel, padding=padding, groups=positions // 2)
        y = y.to(spectrum.dtype)  # where autocast chose another one
    return _channels_last(y)[:, 0].unflatten(2, (positions, -1))


def _mixing_gradient_of_strips(grad: Tensor, spectra: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the kernel's spectrum, of (strips,W,T,O) and (strips,W,T,I)."""
    k, pairs = weight.shape[-1], grad.shape[2] // 2
    kernel = weight.new_empty(pairs * 2 * grad.shape[3], 2 * spectra.shape[3], 1, k)  # its values are not read
    arguments = [1, 1], [0, k // 2], [1, 1], False, [0, 0], pairs, [False, True, False]
    return torch.ops.aten.convolution_backward(_as_images(grad), _as_images(spectra), kernel, None, *arguments)[1]


def _as_images(spectrum: Tensor) -> Tensor:
    """(n,W,T,C) -> (n,T*C,1,W), a view in channels_last."""
    return spectrum.flatten(2)[:, None].permute(0, 3, 1, 2)
