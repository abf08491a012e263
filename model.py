"""PyramidFlow: stem, Laplacian pyramid, invertible flow over the pyramid, latent template, anomaly map.

    images (B,3,h,w) -> feature (B,C,H,W) -> pyramid of L levels, level i (B,C,H/2^i,W/2^i)
        -> flow -> latent pyramid -> |latent - template|, composed, mean over channels
        -> anomaly map (B,H,W)

Sections below follow the data.  "Eq." and "Sec." refer to Lei et al., PyramidFlow, CVPR 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoFlow import CouplingModule, LogDets, SequentialNet, SequentialNF, Tensors
from convolution import MEMORY_FORMAT, same_conv2d
from util import size_text

ENCODERS = ("none", "resnet18", "resnet34")
ENCODER_BNS = ("batch", "frozen")
VOLUME_NORMS = ("CVN", "SVN", "none")
CONTRASTS = ("latent", "composed")
TEMPLATES = ("mean", "zero")
LOSSES = ("fourier", "spatial", "likelihood")
RESNET_STRIDE = 4  # conv1 and maxpool each halve the image
RESNET_CHANNELS = 64
CLAMP = 2.0  # of the log-scale
ATAN_FACTOR = 0.636  # stands for 2 / pi in the official code
STRIP_ELEMENTS = 2**17  # per thread: a few float32 strips of this many fit a core's cache


@dataclass(frozen=True)
class PyramidFlowConfig:
    """The architecture; travels inside every checkpoint.

    Attributes:
        encoder: "none" (fixed 1x1 convolution), "resnet18" or "resnet34" (stem up to layer1).
        encoder_bn: "batch", the encoder's BatchNorm follows train()/eval(); "frozen", always eval.
        num_level: L, levels of the pyramid.
        num_stack: how often the schedule of coupling blocks is repeated.
        num_channel: C with encoder "none"; 64 with an encoder whatever this says.
        kernel_size: k of the two k x k convolutions in each coupling block, odd.
        volume_norm: "CVN", "SVN" or "none".
        image_size: (h, w) of the input images.
        contrast: "latent", differences of latents are composed; "composed", latents are composed, and
            then their difference is taken (ablation III of Table 2).
        save_memory: backpropagate by inversion (SequentialNF) or plainly (SequentialNet).

    Raises:
        ValueError: a value is not possible; the message names the remedy.
    """

    encoder: str = "resnet18"
    encoder_bn: str = "batch"
    num_level: int = 4
    num_stack: int = 4
    num_channel: int = 16
    kernel_size: int = 7
    volume_norm: str = "CVN"
    image_size: tuple[int, int] = (1024, 1024)
    contrast: str = "latent"
    save_memory: bool = True

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder {self.encoder!r} is not one of {', '.join(ENCODERS)}")
        if self.encoder_bn not in ENCODER_BNS:
            raise ValueError(f"encoder BN {self.encoder_bn!r} is not one of {', '.join(ENCODER_BNS)}")
        if self.volume_norm not in VOLUME_NORMS:
            raise ValueError(f"volume norm {self.volume_norm!r} is not one of {', '.join(VOLUME_NORMS)}")
        if self.contrast not in CONTRASTS:
            raise ValueError(f"contrast {self.contrast!r} is not one of {', '.join(CONTRASTS)}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel size {self.kernel_size} is not odd; try {self.kernel_size + 1}")
        if self.num_level < 2 or self.num_stack < 1 or self.channels < 1:
            raise ValueError("at least 2 levels, 1 stack and 1 channel are needed")
        self._check_divisible()

    def _check_divisible(self):
        step = self.stride * 2 ** (self.num_level - 1)
        bad = [n for n in self.image_size if n < 1 or n % step]
        if bad:
            below, above = bad[0] // step * step, -(-bad[0] // step) * step
            nearest = " and ".join(str(n) for n in sorted({below, max(above, step)}) if n > 0)
            raise ValueError(
                f"image size {bad[0]} is not divisible by {step} ({self.num_level} levels, encoder "
                f"{self.encoder}); the nearest sizes that work: {nearest}"
            )

    @property
    def stride(self) -> int:
        return 1 if self.encoder == "none" else RESNET_STRIDE

    @property
    def channels(self) -> int:
        return self.num_channel if self.encoder == "none" else RESNET_CHANNELS

    def level_size(self, level: int) -> tuple[int, int]:
        height, width = self.image_size
        return height // self.stride >> level, width // self.stride >> level

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint; `PyramidFlowConfig(**d)` reads them back."""
        return {**asdict(self), "image_size": list(self.image_size)}


class PyramidFlow(nn.Module):
    """The whole network (Fig. 3).  Its state dict has its final shapes from construction on.

    Encoder weights are random here; `load_encoder_weights` fills them in.

    Args:
        config: the architecture.
    """

    def __init__(self, config: PyramidFlowConfig):
        super().__init__()
        self.config = config
        self.stem = _build_stem(config).requires_grad_(False)
        self.pyramid = LaplacianPyramid(config.num_level)
        blocks = [
            CouplingBlock(kind, level, config)
            for _ in range(config.num_stack)
            for kind, level in coupling_schedule(config.num_level)
        ]
        if config.save_memory:
            self.flow = SequentialNF(*blocks, preserve_rng_state=False)  # no block is random
        else:
            self.flow = SequentialNet(*blocks)
        self.to(memory_format=MEMORY_FORMAT)

    def compute_networks_in(self, dtype: torch.dtype | None) -> PyramidFlow:
        """Let the k x k convolutions run in `dtype` (bfloat16); None: in the dtype of their weights.

        Weights, states, normalization, 1x1 convolutions and everything else keep their dtype.
        """
        for block in self.flow:
            block.affine.compute_dtype = dtype
        return self

    @property
    def encoder_is_constant(self) -> bool:
        """An image always has the same feature, which is worth keeping."""
        return self.config.encoder != "none" and self.config.encoder_bn == "frozen"

    def train(self, mode: bool = True) -> PyramidFlow:
        super().train(mode)
        if self.config.encoder_bn == "frozen":
            self.stem.eval()
        return self

    def forward(self, images: Tensor, logdets: bool = False) -> tuple[Tensors, LogDets]:
        """Latent pyramid of a batch of images (B,3,h,w): `encode`, then `latents`."""
        return self.latents(self.encode(images), logdets)

    def encode(self, images: Tensor) -> Tensor:
        """Features (B,C,H,W) of normalised images (B,3,h,w) of the configured size.

        Raises:
            ValueError: images of another size (CVN and the template are tied to one size).
        """
        if tuple(images.shape[-2:]) != self.config.image_size:
            raise ValueError(
                f"the model is for {size_text(self.config.image_size)} images, got {size_text(images.shape[-2:])}"
            )
        return self.stem(images.contiguous(memory_format=MEMORY_FORMAT))

    def latents(
        self, features: Tensor, logdets: bool = False, flow: nn.Module | None = None
    ) -> tuple[Tensors, LogDets]:
        """Latent pyramid of features (B,C,H,W).

        Args:
            logdets: also give the log-determinants, one map per level, per element.
            flow: to run in place of `self.flow`: a DistributedDataParallel of it.

        Returns:
            (latents, log-dets): tuples of L tensors (B,C,H/2^i,W/2^i); None instead of log-dets
            that were not asked for.
        """
        levels = self.pyramid.decompose(features)
        zeros = tuple(torch.zeros_like(x) for x in levels) if logdets else None
        return (flow or self.flow)(levels, zeros)

    def inverse(self, latents: Tensors) -> Tensor:
        """Images (B,3,h,w) from a latent pyramid; of the latent template, the image template (Fig. 7).

        Raises:
            ValueError: the stem has no inverse (a ResNet encoder).
        """
        if self.config.encoder != "none":
            raise ValueError(f"encoder {self.config.encoder} has no inverse; only encoder none has one")
        levels, _ = self.flow.inverse(latents)
        feature = self.pyramid.compose(levels)
        weight = self.stem.weight[:, :, 0, 0]
        pseudo_inverse = torch.linalg.pinv(weight.double()).to(weight.dtype)
        return F.conv2d(feature, pseudo_inverse[:, :, None, None])


# --------------------------------------------------------------------------------------- stem


def _build_stem(config: PyramidFlowConfig) -> nn.Module:
    if config.encoder == "none":
        stem = nn.Conv2d(3, config.channels, 1, bias=False)
        nn.init.orthogonal_(stem.weight)
        return stem
    net = getattr(torchvision.models, config.encoder)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)


def load_encoder_weights(model: PyramidFlow, state_dict: dict[str, Tensor]) -> None:
    """Fill the ResNet stem from a state dict with torchvision's names; further entries are ignored.

    Raises:
        ValueError: an entry is missing, has another shape, or belongs to a deeper network.
    """
    children = {"0": "conv1", "1": "bn1", "4": "layer1"}
    names = {}
    for ours in model.stem.state_dict():
        child, _, rest = ours.partition(".")
        names[ours] = f"{children[child]}.{rest}"
    parts = tuple(f"{child}." for child in children.values())
    for name in state_dict:
        if name.startswith(parts) and name not in names.values():
            raise ValueError(f"entry {name} does not belong to a {model.config.encoder}")
    state = {}
    for ours, name in names.items():
        if name not in state_dict and name.endswith("num_batches_tracked"):
            continue  # files from before 2018 lack it, and nothing reads it
        if name not in state_dict:
            raise ValueError(f"no entry {name}")
        if not isinstance(state_dict[name], Tensor):
            raise ValueError(f"entry {name} is not a tensor")
        wanted, got = tuple(model.stem.state_dict()[ours].shape), tuple(state_dict[name].shape)
        if wanted != got:
            raise ValueError(f"entry {name} has shape {got}, {model.config.encoder} needs {wanted}")
        state[ours] = state_dict[name]
    model.stem.load_state_dict(state, strict=False)


# ------------------------------------------------------------------------------------ pyramid


class LaplacianPyramid(nn.Module):
    """Laplacian pyramid per channel (Sec. 3.2); `compose` undoes `decompose` exactly.

    Down: 5x5 binomial blur, then 2x2 max-pool (the official code; the supplement says nearest).
    Up: nearest neighbour, then the same blur.  Zero padding darkens the borders of composed maps.

    Args:
        num_level: L.
    """

    def __init__(self, num_level: int):
        super().__init__()
        self.num_level = num_level
        self.register_buffer("taps", torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16, persistent=False)

    def decompose(self, x: Tensor) -> Tensors:
        """(B,C,H,W) -> L levels, finest first; H and W divisible by 2^(L-1)."""
        levels = []
        for _ in range(self.num_level - 1):
            smaller = F.max_pool2d(self._blur(x), 2)
            levels.append(x - self._up(smaller))
            x = smaller
        return (*levels, x)

    def compose(self, levels: Tensors) -> Tensor:
        """L levels -> (B,C,H,W).  Linear, and per channel."""
        x = levels[-1]
        for level in levels[-2::-1]:
            x = self._up(x) + level
        return x

    def _up(self, x: Tensor) -> Tensor:
        return self._blur(F.interpolate(x, scale_factor=2, mode="nearest"))

    def _blur(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        for shape, padding in (((1, 1, 5, 1), (2, 0)), ((1, 1, 1, 5), (0, 2))):
            kernel = self.taps.to(x.dtype).view(shape).expand(channels, -1, -1, -1)
            x = F.conv2d(x, kernel, padding=padding, groups=channels)
        return x


# -------------------------------------------------------------------------------------- flow


def coupling_schedule(num_level: int) -> list[tuple[str, int]]:
    """(kind, i) of the coupling blocks of one stack (Fig. 4): even i first, then up(0), then odd i.

    >>> coupling_schedule(4)
    [('dual', 0), ('down', 2), ('up', 0), ('dual', 1)]
    """

    def one_pass(start: int) -> list[tuple[str, int]]:
        return [("dual" if i + 2 < num_level else "down", i) for i in range(start, num_level - 1, 2)]

    return [*one_pass(0), ("up", 0), *one_pass(1)]


class CouplingBlock(CouplingModule):
    """Affine coupling between neighbouring scales, then an invertible 1x1 convolution (Sec. 3.3).

    x_target <- A (exp(s) * x_target + t), with s and t from the neighbours by two convolutions:
    up(i): x_i from x_{i+1};  down(i): x_{i+1} from x_i;  dual(i): x_{i+1} from x_i and x_{i+2}.

    The parameters of the coupling are exp(s) and t, as rows of pixels.

    Args:
        kind: "up", "down" or "dual".
        level: i.
        config: the architecture.
    """

    cast_parameters = False  # t may stay bfloat16

    def __init__(self, kind: str, level: int, config: PyramidFlowConfig):
        super().__init__(target=level if kind == "up" else level + 1)
        self.kind, self.level = kind, level
        sources = 2 if kind == "dual" else 1
        # `down` reads parameters at every second pixel only: unless the mean is over space, they
        # need not be computed elsewhere.
        self.computed_level = level if kind == "down" and config.volume_norm == "SVN" else self.target
        size = config.level_size(self.computed_level)
        stride = 2 if kind == "down" and self.computed_level == self.target else 1
        self.target_size = config.level_size(self.target)
        self.affine = AffineParameters(config, sources * config.channels, size, stride)
        self.conv1x1 = InvertibleConv1x1(config.channels, config.volume_norm != "none")

    def extra_repr(self) -> str:
        return f"{self.kind}({self.level})"

    def transform_parameters(self, inputs: tuple[Tensor | None, ...]) -> Tensors:
        """Scale exp(s) and shift t of the target's pixels, each (B,N,C)."""
        i = self.level
        if self.kind == "up":
            scale, shift = self.affine(upsampled=inputs[i + 1])
        elif self.kind == "dual":
            scale, shift = self.affine(_EverySecondPixel.apply(inputs[i]), upsampled=inputs[i + 2])
        else:
            scale, shift = self.affine(inputs[i])
        if self.computed_level != self.target:
            scale, shift = _EverySecondPixel.apply(scale), _EverySecondPixel.apply(shift)
        return _pixel_rows(scale), _pixel_rows(shift)

    def couple(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling()  # which finds its own way through memory
        function = _affine_coupling if plain else _AffineCoupling.apply
        return _as_map(function(_pixel_rows(x), scale, shift, self.conv1x1.matrix(x.dtype)), x.shape)

    def decouple(self, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        matrix, rows = self.conv1x1.inverse_matrix(y.dtype), _pixel_rows(y)
        if torch.is_grad_enabled():
            x = _undo_affine_coupling(rows, scale, shift, matrix)
        else:
            x = torch.empty_like(rows)
            for strip, *given in _strips(x, rows, scale, shift):
                strip.copy_(_undo_affine_coupling(*given, matrix))
        return _as_map(x, y.shape)

    def log_det(self, scale: Tensor, shift: Tensor) -> Tensor:
        """s, per element.  The 1x1 convolution mixes channels, so its share is spread evenly on them."""
        s = _as_map(scale.log(), (len(scale), self.conv1x1.channels, *self.target_size))
        if self.conv1x1.volume_normalized:
            return s  # log|det A| = 0 by construction
        return s + self.conv1x1.log_det() / self.conv1x1.channels


class AffineParameters(nn.Module):
    """Scale exp(s) and shift t by two k x k convolutions and volume normalization.

    [s0, t] = conv(LeakyReLU(conv(x)));  s = b - mean(b) with b = clamp * 0.636 * atan(s0 / clamp).

    The input is a map, a nearest-upsampled smaller map, or both (their concatenation).

    Args:
        config: the architecture.
        in_channels: of all input maps together.
        size: (H,W) of the parameters.
        stride: of the second convolution.
    """

    def __init__(self, config: PyramidFlowConfig, in_channels: int, size, stride: int):
        super().__init__()
        k, width = config.kernel_size, 2 * config.channels
        self.conv1 = nn.Conv2d(in_channels, width, k, padding=k // 2, bias=False)
        self.conv2 = nn.Conv2d(width, width, k, padding=k // 2, stride=stride, bias=False)
        nn.init.zeros_(self.conv2.weight)  # the untrained block is its 1x1 convolution alone
        self.norm = VolumeNorm(config.volume_norm, config.channels, size)
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor | None = None, upsampled: Tensor | None = None) -> Tensors:
        """x (B,I,H,W) and/or `upsampled` (B,I,H/2,W/2) -> (scale, shift), each (B,C,H,W)."""
        hidden = same_conv2d(self._cast(self.conv1.weight), self._cast(x), self._cast(upsampled))
        hidden = F.leaky_relu(hidden, 0.01, inplace=True)
        raw = same_conv2d(self._cast(self.conv2.weight), hidden, stride=self.conv2.stride[0])
        return self.norm(raw)

    def _cast(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.to(self.compute_dtype or x.dtype, memory_format=MEMORY_FORMAT)


class VolumeNorm(nn.Module):
    """Subtracts a mean from s, so that the volume change averages to zero (Sec. 3.3); never divides.

    CVN: mean over batch and channels, per pixel.  SVN: mean over batch and space, per channel.
    Training takes the batch's mean and moves the running mean, eval takes the running mean.

    Args:
        kind: "CVN", "SVN" or "none".
        channels: C.
        size: (H,W), which CVN ties the model to.
    """

    momentum = 0.1

    def __init__(self, kind: str, channels: int, size: tuple[int, int]):
        super().__init__()
        self.kind = kind
        shape = {"CVN": (1, 1, *size), "SVN": (1, channels, 1, 1), "none": None}[kind]
        self.register_buffer("running_mean", None if shape is None else torch.zeros(shape))

    def forward(self, raw: Tensor) -> Tensors:
        """Raw output [s0, t] (B,2C,H,W) -> scale exp(s), at least float32, and shift t, each (B,C,H,W)."""
        batch, width, *size = raw.shape
        mean, dims = None, ()
        if self.running_mean is None:
            mean = raw.new_zeros(1, 1, 1, dtype=_state_dtype(raw))
        elif not self.training:
            mean = _pixel_rows(self.running_mean)
        else:
            dims = (2, 0) if self.kind == "CVN" else (0, 1)
        plain = torch.compiler.is_compiling() and mean is not None
        function = _scale_and_shift if plain else _ScaleAndShift.apply
        scale, shift, mean = function(_pixel_rows(raw), mean, dims)
        if dims:
            update = mean.to(self.running_mean.dtype).view(self.running_mean.shape)
            self.running_mean.lerp_(update, self.momentum)
        shape = (batch, width // 2, *size)
        return _as_map(scale, shape), _as_map(shift, shape)


class InvertibleConv1x1(nn.Module):
    """1x1 convolution with A = P L (U + diag(sign * exp(s~))), from a random orthogonal matrix.

    P and sign are constants; L (unit lower), U (strictly upper) and s are trained.

    Args:
        channels: C.
        volume_normalized: s~ = s - mean(s), so that |det A| = 1; else s~ = s.
    """

    def __init__(self, channels: int, volume_normalized: bool):
        super().__init__()
        self.channels, self.volume_normalized = channels, volume_normalized
        orthogonal = nn.init.orthogonal_(torch.empty(channels, channels))
        permutation, lower, upper = torch.linalg.lu(orthogonal)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """A, (C,C)."""
        lower, upper = self._factors(dtype)
        return self.permutation.to(dtype) @ lower @ upper

    def inverse_matrix(self, dtype: torch.dtype) -> Tensor:
        """The inverse of A, by triangular solves in float64."""
        lower, upper = self._factors(torch.float64)
        inverse = self.permutation.to(torch.float64).T
        inverse = torch.linalg.solve_triangular(lower, inverse, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inverse, upper=True).to(dtype)

    def log_det(self) -> Tensor:
        """log|det A|, a scalar; a map of H x W pixels has H * W times that."""
        return self._log_diagonal().sum()

    def _log_diagonal(self) -> Tensor:
        return self.log_scale - self.log_scale.mean() if self.volume_normalized else self.log_scale

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.channels, dtype=dtype, device=self.lower.device)
        diagonal = self.sign.to(dtype) * self._log_diagonal().to(dtype).exp()
        return self.lower.to(dtype).tril(-1) + eye, self.upper.to(dtype).triu(1) + diagonal.diag()


# ------------------------------------------------------------------- coupling, strip by strip
#
# Memory bandwidth is what elementwise work on full-size maps waits for: written as one operator after the
# other, the coupling would take longer than its convolutions in bfloat16.  So the functions below take
# maps as rows of pixels (B,N,C), and work through strips of N that fit the processor's cache.


def _pixel_rows(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H*W,C), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _as_map(rows: Tensor, shape: Iterable[int]) -> Tensor:
    """(B,H*W,C) -> (B,C,H,W) of the given shape, channels_last; undoes `_pixel_rows`."""
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _strips(*rows: Tensor) -> Iterator[Tensors]:
    """The same pixels of each (B,N,C), a strip at a time; means over pixels (1,1,C) whole."""
    batch, pixels, channels = rows[0].shape
    count = pixels
    if not rows[0].is_cuda:
        count = max(1, STRIP_ELEMENTS * torch.get_num_threads() // (batch * channels))
    for start in range(0, pixels, count):
        yield tuple(x if x.shape[1] == 1 else x[:, start : start + count] for x in rows)


def _state_dtype(raw: Tensor) -> torch.dtype:
    return torch.promote_types(raw.dtype, torch.float32)


def _bounded_log_scale(raw: Tensor, out: Tensor | None = None) -> Tensor:
    """Raw output (B,N,2C) -> clamp * 0.636 * atan(s0 / clamp), (B,N,C), at least float32."""
    s0 = raw[..., : raw.shape[-1] // 2]
    s0 = s0.to(_state_dtype(raw), copy=True) if out is None else out.copy_(s0)
    return s0.div_(CLAMP).atan_().mul_(CLAMP * ATAN_FACTOR)


def _bounded_log_scale_slope(raw: Tensor) -> Tensor:
    """Its derivative, 0.636 / (1 + (s0 / clamp)^2)."""
    u = raw[..., : raw.shape[-1] // 2].to(_state_dtype(raw)) * (ATAN_FACTOR**-0.5 / CLAMP)
    return u.square_().add_(1 / ATAN_FACTOR).reciprocal_()


class _ScaleAndShift(torch.autograd.Function):
    """Raw output [s0, t] (B,N,2C) -> exp(b - mean), t, and the mean: what is given, or that of b over `dims`."""

    @staticmethod
    def forward(ctx, raw: Tensor, mean: Tensor | None, dims: tuple[int, ...]) -> Tensors:
        channels = raw.shape[-1] // 2
        scale = raw.new_empty((*raw.shape[:2], channels), dtype=_state_dtype(raw))
        for into, part in _strips(scale, raw):
            _bounded_log_scale(part, out=into)
        if mean is None:
            mean = _mean_over(dims, scale)
        for into, mean_part in _strips(scale, mean):
            into.sub_(mean_part).exp_()
        ctx.save_for_backward(raw, scale)
        ctx.mark_non_differentiable(mean)
        ctx.dims = dims
        return scale, raw[..., channels:], mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scale: Tensor, grad_shift: Tensor, _) -> tuple[Tensor | None, ...]:
        raw, scale = ctx.saved_tensors
        channels = scale.shape[-1]
        grad_raw, grad_s = torch.empty_like(raw), grad_scale * scale
        if ctx.dims:
            grad_s -= _mean_over(ctx.dims, grad_s)
        for into, grad, part, shift in _strips(grad_raw, grad_s, raw, grad_shift):
            into[..., :channels] = grad.mul_(_bounded_log_scale_slope(part))
            into[..., channels:] = shift
        return grad_raw, None, None


def _mean_over(dims: tuple[int, ...], x: Tensor) -> Tensor:
    total = x
    for dim in dims:  # one by one is faster
        total = total.sum(dim, keepdim=True)
    return total.mul_(total.numel() / x.numel())


class _AffineCoupling(torch.autograd.Function):
    """y = A (scale * x + shift) in rows of pixels (B,N,C); A (C,C)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift, matrix)
        y = torch.empty_like(x)
        for into, *given in _strips(y, x, scale, shift):
            into.copy_(_affine_coupling(*given, matrix))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> Tensors:
        x, scale, shift, matrix = ctx.saved_tensors
        grads = torch.empty_like(x), torch.empty_like(scale), shift.new_empty(scale.shape)
        grad_matrix = torch.zeros_like(matrix)
        for grad, x_part, scale_part, shift_part, *into in _strips(grad_y, x, scale, shift, *grads):
            into_x, into_scale, into_shift = into
            mixed = (scale_part * x_part).add_(shift_part).view(-1, len(matrix))
            grad = grad.reshape(-1, len(matrix))
            grad_matrix.addmm_(grad.T, mixed)
            grad = (grad @ matrix).view(x_part.shape)
            torch.mul(grad, scale_part, out=into_x)
            torch.mul(grad, x_part, out=into_scale)
            into_shift.copy_(grad)
        return *grads, grad_matrix


def _scale_and_shift(raw: Tensor, mean: Tensor, dims: tuple[()]) -> Tensors:
    """`_ScaleAndShift` with a given mean, operator by operator."""
    scale = (_bounded_log_scale(raw) - mean).exp()
    return scale, raw[..., scale.shape[-1] :], mean


def _affine_coupling(x: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
    """y = A (scale * x + shift), likewise."""
    return (scale * x + shift) @ matrix.T


def _undo_affine_coupling(y: Tensor, scale: Tensor, shift: Tensor, inverse_matrix: Tensor) -> Tensor:
    """x = (A^-1 y - shift) / scale, likewise."""
    return (y @ inverse_matrix.T - shift) / scale


class _EverySecondPixel(torch.autograd.Function):
    """x[:, :, ::2, ::2], with gradients that keep the memory format."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x[:, :, ::2, ::2]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        grad_x = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=MEMORY_FORMAT
        )
        grad_x.zero_()[:, :, ::2, ::2] = grad
        return grad_x


# --------------------------------------------------------------------- loss, template and map


def training_loss(
    model: PyramidFlow,
    features: Tensor,
    kind: str = "fourier",
    template: str = "mean",
    flow: nn.Module | None = None,
) -> Tensor:
    """The loss of a batch of features (B,C,H,W), a scalar.

    Args:
        kind: "fourier" (Sec. 3.4); "spatial" (ablation IV) or "likelihood" (ablation I of Table 2).
        template: "mean", latents are pulled together; "zero", to zero (ablation II).
        flow: as in `PyramidFlow.latents`.
    """
    latents, logdets = model.latents(features, logdets=kind == "likelihood", flow=flow)
    if kind == "likelihood":
        return likelihood_loss(latents, logdets)
    if template == "zero":
        return zero_loss(model.pyramid, latents, kind, model.config.contrast)
    return pair_loss(model.pyramid, latents, kind, model.config.contrast)


def pair_loss(
    pyramid: LaplacianPyramid, latents: Tensors, kind: str = "fourier", contrast: str = "latent"
) -> Tensor:
    """Composed squared differences of all pairs of a batch, averaged over channels; a scalar.

    "fourier": the mean magnitude of their 2-D spectrum.  "spatial": their mean.

    Args:
        latents: L levels (B,C,H/2^i,W/2^i), B >= 2.

    Raises:
        ValueError: fewer than two images.
    """
    batch = latents[0].shape[0]
    if batch < 2:
        raise ValueError("the loss compares pairs of images: the batch needs at least 2")
    # Split once: unlike those of indexing, its gradients keep the memory format.
    singles = [z.split(1) for z in latents]
    pairs = list(zip(*itertools.combinations(range(batch), 2), strict=True))
    first, second = (tuple(_joined([z[i] for i in numbers]) for z in singles) for numbers in pairs)
    return _magnitude(compare(pyramid, first, second, torch.square, contrast), kind)


def zero_loss(
    pyramid: LaplacianPyramid, latents: Tensors, kind: str = "fourier", contrast: str = "latent"
) -> Tensor:
    """`pair_loss` with zero in the place of every second image; a batch of one will do."""
    zeros = tuple(torch.zeros_like(z[:1]) for z in latents)
    return _magnitude(compare(pyramid, latents, zeros, torch.square, contrast), kind)


def _magnitude(maps: Tensor, kind: str) -> Tensor:
    return torch.fft.fft2(maps).abs().mean() if kind == "fourier" else maps.mean()


def _joined(maps: list[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(maps)


def likelihood_loss(latents: Tensors, logdets: Tensors) -> Tensor:
    """-log p of a standard normal latent, per dimension: mean of z^2 / 2 - log-det (Eq. 8), a scalar."""
    energy = sum(z.square().sum() / 2 for z in latents) - sum(d.sum() for d in logdets)
    return energy / sum(z.numel() for z in latents)


def compare(
    pyramid: LaplacianPyramid,
    latents: Tensors,
    others: Tensors,
    distance: Callable[[Tensor], Tensor],
    contrast: str,
) -> Tensor:
    """Distance of latent pyramids at full resolution, (B,H,W), mean over channels.

    Composition is linear and the same for every channel, so the mean over channels comes first.

    Args:
        latents, others: L levels (B,C,H/2^i,W/2^i) and (B or 1,C,H/2^i,W/2^i).
        distance: of the difference, elementwise: torch.square or torch.abs.
        contrast: see `PyramidFlowConfig`.
    """
    if contrast == "composed":
        latents, others = (pyramid.compose(latents),), (pyramid.compose(others),)
    channels = latents[0].shape[1]
    # Not mean(), whose gradient is laid out otherwise.
    levels = (
        distance(a - b).sum(1, keepdim=True) / channels for a, b in zip(latents, others, strict=True)
    )
    return pyramid.compose(tuple(levels))[:, 0]


@torch.no_grad()
def latent_template(
    model: PyramidFlow,
    features: Iterable[Tensor],
    total: Callable[[list[Tensor], int], tuple[list[Tensor], int]] | None = None,
) -> Tensors:
    """Mean latent of un-augmented training images: L levels (1,C,H/2^i,W/2^i) (Sec. 3.4).

    Always to be computed with the weights it is used with.  The model is put into eval mode.

    Args:
        features: batches (B,C,H,W) from `model.encode`.
        total: adds up the sums of latents, and the number of images, of several processes.

    Raises:
        ValueError: no images.
    """
    model.eval()
    sums, count = None, 0
    for batch in features:
        latents, _ = model.latents(batch)
        batch_sums = [_sum_of_images(z) for z in latents]
        sums = batch_sums if sums is None else [a + b for a, b in zip(sums, batch_sums, strict=True)]
        count += len(batch)
    if sums is None:
        raise ValueError("a template needs at least one image")
    if total is not None:
        sums, count = total(sums, count)
    return tuple((x / count).float() for x in sums)


def _sum_of_images(z: Tensor) -> Tensor:
    """(B,C,H,W) -> (1,C,H,W) in float64; unlike z.sum(0), in the same memory format."""
    return _as_map(_pixel_rows(z).sum(0, keepdim=True, dtype=torch.float64), (1, *z.shape[1:]))


@torch.no_grad()
def anomaly_map(model: PyramidFlow, features: Tensor, template: Tensors) -> Tensor:
    """Anomaly map (B,H,W) of features (B,C,H,W): |latent - template|, composed, channel mean.

    No smoothing.  The image score is the map's maximum.  The model is put into eval mode.
    """
    model.eval()
    latents, _ = model.latents(features)
    return compare(model.pyramid, latents, template, torch.abs, model.config.contrast)
