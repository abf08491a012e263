"""The work on full-size maps: each kernel `f` equals its twin `plain_f`, the formula in a few operators, faster.

model.py calls the kernels; tests/test_kernels.py holds each to its twin in float64, values and gradients.
Maps are (B,C,H,W) in channels_last, and so are all gradients: a copy into another layout, or work on one,
takes longer than the work itself.  While a model is traced (torch.export, torch.compile) PyTorch's own
operators run alone: the twins, and the direct convolution.

Sections: the pyramid's blur; the coupling strip by strip; small things with tidy gradients; a bank of templates;
the k x k convolutions, whose ways through the frequency domain are in spectral.py; those of the encoder.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spectral import can_fuse, choose_way, convolve, times_transposed
from util import cpu_features, mkl_is_slow

Tensors = tuple[Tensor, ...]

MEMORY_FORMAT = torch.channels_last  # of every map from the image to the anomaly map
CLAMP = 2.0  # of the log-scale
BLUR = (1, 4, 6, 4, 1)  # taps of the pyramid's, to be divided by their sum
ATAN_FACTOR = 0.636  # stands for 2 / pi in the official code
OF_PIXEL, OF_CHANNEL = (0, 1), (0, 2, 3)  # dimensions of the means that CVN and SVN take away
STRIP_ELEMENTS = 2**17  # per thread: a few float32 strips of this many fit a core's cache


# -------------------------------------------------------------------------- the pyramid's blur


def blur(x: Tensor) -> Tensor:
    """Each channel of (B,C,H,W) blurred by (1,4,6,4,1)/16 down the columns and along the rows; zero padding."""
    if torch.compiler.is_compiling():
        return plain_blur(x)
    if x.device.type != "cpu":
        return _along_both_axes(blur_matrix, x)
    return F.conv2d(x, _depthwise(_taps(x), x), padding=2, groups=x.shape[1])


def plain_blur(x: Tensor) -> Tensor:
    for shape, padding in (((1, 1, 5, 1), (2, 0)), ((1, 1, 1, 5), (0, 2))):
        kernel = _taps(x).view(shape).expand(x.shape[1], -1, -1, -1)
        x = F.conv2d(x, kernel, padding=padding, groups=x.shape[1])
    return x


def blur_upsampled(x: Tensor) -> Tensor:
    """`blur` of a map (B,C,H,W) upsampled to (B,C,2H,2W) by nearest neighbors, which is never made."""
    if torch.compiler.is_compiling():
        return plain_blur_upsampled(x)
    if x.device.type != "cpu":
        return _along_both_axes(up_matrix, x)
    summed = F.pad(_taps(x), (0, 1)) + F.pad(_taps(x), (1, 0))  # a pixel stands for two
    return F.conv_transpose2d(x, _depthwise(summed, x), stride=2, padding=2, groups=x.shape[1])


def plain_blur_upsampled(x: Tensor) -> Tensor:
    return plain_blur(F.interpolate(x, scale_factor=2, mode="nearest"))


def _taps(x: Tensor) -> Tensor:
    return torch.tensor(BLUR, dtype=x.dtype, device=x.device) / sum(BLUR)


def _depthwise(taps: Tensor, x: Tensor) -> Tensor:
    """(n,) -> (C,1,n,n), the product of the taps along both axes."""
    return torch.outer(taps, taps).expand(x.shape[1], 1, -1, -1)


def _along_both_axes(matrix_of: Callable[..., Tensor], x: Tensor) -> Tensor:
    """(B,C,H,W) multiplied by matrices (m,n) along columns and rows.

    For CUDA, where depthwise convolutions of channels_last maps are slow, and may be in TF32.
    """
    down, across = (matrix_of(n, x.dtype, x.device) for n in x.shape[2:])
    rows = x.permute(0, 2, 3, 1)
    rows = torch.bmm(down.expand(len(x), -1, -1), rows.flatten(2)).unflatten(2, rows.shape[2:])
    batch = rows.shape[:2]
    rows = torch.bmm(across.expand(batch.numel(), -1, -1), rows.flatten(0, 1)).unflatten(0, batch)
    return rows.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed by a training later
def blur_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,n): the blur along one axis."""
    return _blur_matrix(size).to(device, dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def up_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2n,n): nearest-neighbor interpolation to twice the size, then blur, along one axis."""
    twice = torch.eye(size, dtype=torch.float64).repeat_interleave(2, dim=0)
    return (_blur_matrix(2 * size) @ twice).to(device, dtype)


def _blur_matrix(size: int) -> Tensor:
    apart = (torch.arange(size) - torch.arange(size)[:, None]).clamp(-3, 3)
    return torch.tensor((0, *BLUR, 0), dtype=torch.float64)[apart + 3] / sum(BLUR)


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
            over, OF_PIXEL or OF_CHANNEL.

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
        ctx.dims = mean if isinstance(mean, tuple) else None
        in_table = raw.dtype == torch.bfloat16 and not raw.is_cuda and "AMX" not in cpu_features()

        def log_scale(part: Tensor) -> Tensor:
            s0 = part[..., :channels]
            return _look_up(_log_scales(), s0) if in_table else _log_scale_(s0.to(scale.dtype, copy=True))

        if ctx.dims == OF_PIXEL:
            mean = scale.new_empty(1, 1, *scale.shape[2:])
            for into, part, mean_part in _strips(scale, raw, mean):
                b = log_scale(part)
                _exp_(torch.sub(b, mean_part.copy_(_mean_of_rows(b, ctx.dims)), out=into))
        elif ctx.dims:  # of the whole map, so that exp(b - mean) takes a second pass
            for into, part in _strips(scale, raw):
                into.copy_(log_scale(part))
            mean = _mean_of_rows(_pixel_rows(scale), ctx.dims).view(1, channels, 1, 1)
            for into, mean_part in _strips(scale, mean):
                _exp_(into.sub_(mean_part))
        elif in_table:
            for into, part, factor in _strips(scale, raw, (-mean).exp()):
                torch.mul(_look_up(_scales(), part[..., :channels]), factor, out=into)
        else:
            for into, part, negative in _strips(scale, raw, -mean):
                _angle_(into.copy_(part[..., :channels]))
                _exp_(torch.add(negative, into, alpha=CLAMP * ATAN_FACTOR, out=into))
        ctx.save_for_backward(raw, scale)
        ctx.mark_non_differentiable(mean)
        return scale, raw[:, channels:], mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scale: Tensor, grad_shift: Tensor, _) -> tuple[Tensor, None]:
        raw, scale = ctx.saved_tensors
        channels, grad_raw = scale.shape[1], _empty_like(raw)
        if ctx.dims == OF_CHANNEL:
            mean = _mean_of_rows(_pixel_rows(grad_scale * scale), ctx.dims)
        maps = grad_raw, raw, grad_shift, grad_scale, scale
        for into, part, shift, grad, scale_part in _strips(*maps, join=ctx.dims != OF_PIXEL):
            grad = grad * scale_part
            if ctx.dims:
                grad -= mean if ctx.dims == OF_CHANNEL else _mean_of_rows(grad, ctx.dims)
            into[..., :channels] = _times_slope_(grad, part[..., :channels])
            into[..., channels:] = shift
        return grad_raw, None


def _exp_(x: Tensor) -> Tensor:
    """exp(x), in place; by a power of 2 on an AMD CPU, where MKL's exp takes several times as long."""
    return x.mul_(1 / math.log(2)).exp2_() if mkl_is_slow() and not x.is_cuda else x.exp_()


def _log_scale_(s0: Tensor) -> Tensor:
    """b = clamp * 0.636 * atan(s0 / clamp), in place."""
    return _angle_(s0).mul_(CLAMP * ATAN_FACTOR)


def _angle_(s0: Tensor) -> Tensor:
    """atan(s0 / clamp), in place."""
    return s0.mul_(1 / CLAMP).atan_()


@functools.lru_cache(maxsize=1)
def _log_scales() -> Tensor:
    """(65536,) b of every bfloat16, by its bits.

    Looking it up was faster than computing it on an AMD EPYC without AMX, and slower on an Intel Xeon with AMX.
    """
    return _log_scale_(torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float())


@functools.lru_cache(maxsize=1)
def _scales() -> Tensor:
    """(65536,) exp(b) of every bfloat16, by its bits."""
    return _log_scales().exp()


def _look_up(table: Tensor, x: Tensor) -> Tensor:
    """The entries (65536,) of bfloat16 numbers."""
    places = x.view(torch.uint16).to(torch.int32)
    return table.index_select(0, places.view(-1)).view(x.shape)


def _times_slope_(grad: Tensor, s0: Tensor) -> Tensor:
    """grad * db / ds0, in place, where db / ds0 = 0.636 / (1 + (s0 / clamp)^2)."""
    s0 = s0.to(grad.dtype)
    return grad.div_(torch.addcmul(s0.new_full((), 1 / ATAN_FACTOR), s0, s0, value=1 / (ATAN_FACTOR * CLAMP**2)))


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
            times_transposed(_scaled_and_shifted(scale_part, x_part, shift_part)[0], matrix, out=into[0])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> Tensors:
        matrix, *given = ctx.saved_tensors
        grads = [_empty_like(x) for x in given]
        grad_matrix = torch.zeros_like(matrix)
        for grad, scale, x, shift, into_scale, into_x, into_shift in _strips(grad_y, *given, *grads):
            mixed = _scaled_and_shifted(scale, x, shift).reshape(-1, len(matrix))
            grad = grad.reshape(-1, len(matrix))
            grad_matrix.addmm_(grad.T, mixed)
            grad = times_transposed(grad, matrix.T).view(x.shape)
            torch.mul(grad, x, out=into_scale)
            torch.mul(grad, scale, out=into_x)
            into_shift.copy_(grad)
        return grad_matrix, *grads


def _scaled_and_shifted(scale: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift; a bfloat16 shift is converted beforehand, which is faster."""
    return torch.addcmul(shift.to(x.dtype), scale, x)


def undo_affine_coupling(inverse: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x = (A^-1 y - shift) / scale per pixel: A^-1 (C,C), the others (B,C,H,W)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return plain_undo_affine_coupling(inverse, y, shift, scale)
    x = _empty_like(y)
    for into, y_part, shift_part, scale_part in _strips(x, y, shift, scale):
        torch.div(times_transposed(y_part, inverse).sub_(shift_part.to(y.dtype)), scale_part, out=into)
    return x


def plain_undo_affine_coupling(inverse: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (_matmul(inverse, y) - shift) / scale


def _matmul(matrix: Tensor, x: Tensor) -> Tensor:
    """A x per pixel; unlike as a 1x1 convolution, in full precision where TF32 is chosen for convolutions."""
    return (x.movedim(1, -1) @ matrix.T).movedim(-1, 1)


def _strips(*maps: Tensor, join: bool = True) -> Iterator[Tensors]:
    """The same pixels of each map, as rows (B,n,C), a strip at a time; of a mean over pixels all, (1,1,C).

    Of maps of one size it is as if there were one image, (1,n,C), if they may be joined.
    """
    rows = [_pixel_rows(x) for x in maps]
    if join and len({x.shape[:2] for x in rows}) == 1:
        rows = [x.flatten(0, 1)[None] for x in rows]
    batch, pixels, channels = rows[0].shape
    count = pixels
    if not rows[0].is_cuda:
        count = max(1, STRIP_ELEMENTS * torch.get_num_threads() // (batch * channels))
    for start in range(0, pixels, count):
        yield tuple(x if x.shape[1] == 1 else x[:, start : start + count] for x in rows)


def _pixel_rows(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H*W,C), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _mean_of_rows(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of rows (B,n,C) the mean over `dims` of their map: (1,n,1) or (1,1,C)."""
    total = rows
    for dim in {OF_PIXEL: (2, 0), OF_CHANNEL: (0, 1)}[dims]:
        total = total.sum(dim, keepdim=True)  # one after the other: faster
    return total.mul_(total.numel() / rows.numel())


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
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=MEMORY_FORMAT)
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
    """Mean over channels of |z_b - t_k|, on the CPU in one pass over the bank: (B,C,H,W), (K,C,H,W) -> (B,K,H,W).

    Args:
        templates: laid out by `bank_layout`, or they are copied into that layout.
    """
    if z.device.type != "cpu" or torch.compiler.is_compiling():  # cdist on CUDA: a block of threads per number
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
    """`model.LaplacianPyramid.compose`, its twin, of L levels (B,K,H/2^i,W/2^i), as matrix products."""
    x = levels[-1].flatten(0, 1)
    for level in levels[-2::-1]:
        down, across = (up_matrix(n, x.dtype, x.device) for n in x.shape[1:])
        wide = x @ across.T
        x = torch.baddbmm(level.flatten(0, 1), down.expand(x.shape[0], -1, -1), wide)
    return x.unflatten(0, levels[0].shape[:2])


# ---------------------------------------------------------------------------- k x k convolutions


def conv2d(
    weight: Tensor, x: Tensor | None = None, upsampled: Tensor | None = None, stride: int = 1, slope: float = 1.0
) -> Tensor:
    """The LeakyReLU of a convolution, zero padding "same", of a map, a nearest-upsampled map, or both together.

    Upsampled maps are never made, and where it pays a way through the frequency domain is taken.

    Args:
        weight: (O,I,k,k), k odd, I = I1 + I2.
        x: (B,I1,H,W), or None.
        upsampled: (B,I2,H/2,W/2), or None.
        stride: 1 or 2.
        slope: of the LeakyReLU; 1: there is none.

    Returns:
        (B,O,H/stride,W/stride).
    """
    own = other = weight
    if x is not None and upsampled is not None:
        own, other = weight.split([x.shape[1], upsampled.shape[1]], dim=1)
    way = choose_way(weight, x, upsampled, stride)
    if way != "direct":
        sources = (("input", x, own), ("upsampled", upsampled, other))
        kinds, maps, weights = zip(*(y for y in sources if y[1] is not None), strict=True)
        return _leaky_relu(convolve(way, kinds, stride, maps, weights), slope)
    part = None
    if upsampled is not None:
        kernel = kernel_of_upsampled(other)
        padding, last = kernel.shape[-1] // 2 - 1, x is None
        part = _convolution(upsampled, kernel, None, 2, padding, True, slope if last else 1.0)
        if stride > 1:  # else no view: gradients of views that are changed in place are copied
            part = part[:, :, ::stride, ::stride]
    return part if x is None else _convolution(x, own, part, stride, own.shape[-1] // 2, False, slope)


def plain_conv2d(
    weight: Tensor, x: Tensor | None = None, upsampled: Tensor | None = None, stride: int = 1, slope: float = 1.0
) -> Tensor:
    maps = [] if x is None else [x]
    if upsampled is not None:
        maps.append(F.interpolate(upsampled, scale_factor=2, mode="nearest"))
    y = F.conv2d(torch.cat(maps, 1), weight, stride=stride, padding=weight.shape[-1] // 2)
    return F.leaky_relu(y, slope)


def kernel_of_upsampled(weight: Tensor) -> Tensor:
    """(O,I,k,k) -> (I,O,k+1,k+1): the transposed convolution with stride 2 that equals one of an upsampled map.

    An input pixel stands for 2x2 pixels of the upsampled map, so the weights it meets add up; about a third
    of the work at k = 7.
    """
    if torch.compiler.is_compiling():
        return plain_kernel_of_upsampled(weight)
    o, i, k, _ = weight.shape
    taps = weight.permute(0, 2, 3, 1).reshape(o, k * k, i)
    summed = torch.matmul(summing_matrix(k, weight.dtype, weight.device), taps)
    return summed.view(o, k + 1, k + 1, i).permute(3, 0, 1, 2).contiguous(memory_format=MEMORY_FORMAT)


def plain_kernel_of_upsampled(weight: Tensor) -> Tensor:
    summed = 4 * F.avg_pool2d(weight, 2, stride=1, padding=1)
    return summed.flip(-2, -1).transpose(0, 1).contiguous(memory_format=MEMORY_FORMAT)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def summing_matrix(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """((k+1)*(k+1),k*k) of 0 and 1: sums of 2x2 neighbors, turned by 180 degrees; faster than `avg_pool2d`."""
    along = torch.eye(k + 1, dtype=torch.float64)
    along = (along[:, :-1] + along[:, 1:]).flip(0)
    return torch.kron(along, along).to(device, dtype)


def convolution_dtype(asked: torch.dtype | None, device: torch.device, channels: int, side: int, k: int):
    """The dtype that k x k convolutions are to be computed in: as asked; None: that of their weights.

    On the CPU bfloat16 is for 16 channels and more, and for maps as large as the kernel.  oneDNN 3.12 errs below,
    at k = 7: with AMX, gradients of upsampled maps of 4 or 6 channels are unlike the true ones; without it,
    gradients of the weight at maps of 2x2 pixels are zero.

    Args:
        channels: C of the features; the convolutions have C or 2C.
        side: the smaller one of the map.
    """
    errs = asked == torch.bfloat16 and device.type == "cpu" and (channels < 16 or side < k)
    return None if errs else asked


def _leaky_relu(x: Tensor, slope: float) -> Tensor:
    return x if slope == 1 else F.leaky_relu(x, slope, inplace=True)


def _convolution(
    x: Tensor, weight: Tensor, added: Tensor | None, stride: int, padding: int, transposed: bool, slope: float
) -> Tensor:
    """LeakyReLU(convolution + added), of a convolution that is transposed or not."""
    if (slope != 1 or added is not None) and can_fuse(x):
        return _FusedConvolution.apply(x, weight, added, stride, padding, transposed, slope)
    y = (F.conv_transpose2d if transposed else F.conv2d)(x, weight, stride=stride, padding=padding)
    return _leaky_relu(y if added is None else y.add_(added), slope)


class _FusedConvolution(torch.autograd.Function):
    """`_convolution` without passes over the result for the sum and for LeakyReLU."""

    @staticmethod
    def forward(ctx, x, weight, added, stride, padding, transposed, slope) -> Tensor:
        sides = [padding] * 2, [stride] * 2, [1, 1]
        leaky = ("none", [], "") if slope == 1 else ("leaky_relu", [slope], "")
        if transposed:
            sides = sides[0], [0, 0], *sides[1:]
            y = torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, None, *sides, 1, *leaky)
        elif added is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, None, *sides, 1, *leaky)
        else:  # takes no LeakyReLU of the sum
            sum_ = "add", 1.0, None, [], None
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, added, weight, None, *sides, 1, *sum_)
            y = _leaky_relu(y, slope)
        ctx.save_for_backward(x, weight, *([] if slope == 1 else [y]))
        ctx.arguments = [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, *y = ctx.saved_tensors
        if y:
            grad = torch.ops.aten.leaky_relu_backward(grad, y[0], ctx.slope, True)
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *ctx.arguments, wanted)
        return grad_x, grad_weight, grad if ctx.needs_input_grad[2] else None, None, None, None, None


# --------------------------------------------------------------------- convolutions of the encoder


def normalized_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, added: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + added); with `norm` in eval mode, and where no gradient is wanted, in one pass."""
    learned = torch.is_grad_enabled() and any(y.requires_grad for y in (x, conv.weight, norm.weight, norm.bias))
    if norm.training or learned or not can_fuse(x):
        return plain_normalized_conv(x, conv, norm, added)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (conv.weight * factor.view(-1, 1, 1, 1)).contiguous(memory_format=MEMORY_FORMAT)
    bias = norm.bias - norm.running_mean * factor
    sides = conv.padding, conv.stride, conv.dilation, conv.groups
    if added is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *sides, "relu", [], "")
    sum_ = "add", 1.0, "relu", [], None
    return torch.ops.mkldnn._convolution_pointwise.binary(x, added, weight, bias, *sides, *sum_)


def plain_normalized_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, added: Tensor | None = None) -> Tensor:
    y = norm(conv(x))
    return F.relu(y if added is None else y.add_(added), inplace=True)
