"""PyramidFlow: stem, Laplacian pyramid, invertible flow over the pyramid, losses.

    images (B,3,h,w) -> features (B,C,H,W) -> pyramid of L levels, level i (B,C,H/2^i,W/2^i)
        -> flow -> latent pyramid -> compared with another image's, or with a template's

Sections below follow the data.  "Eq." and "Sec." refer to Lei et al., PyramidFlow, CVPR 2023.  What a kernel
computes is said where it is called, and once more, in plain operators, beside it in kernels.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from autoFlow import CouplingModule, LogDets, SequentialNet, SequentialNF, Tensors
from util import is_dense, size_text

ENCODERS = ("none", "resnet18", "resnet34")
ENCODER_BNS = ("batch", "frozen")
VOLUME_NORMS = ("CVN", "SVN", "none")
CONTRASTS = ("latent", "composed")
TEMPLATES = ("mean", "zero")
LOSSES = ("fourier", "spatial", "likelihood")
LEAKY_SLOPE = 0.01
RESNET_STRIDE = 4  # conv1 and maxpool each halve the image
RESNET_CHANNELS = 64


@dataclass(frozen=True)
class PyramidFlowConfig:
    """The architecture; travels inside every checkpoint.

    Raises:
        ValueError: a value is not possible; the message names the remedy.
    """

    encoder: str = "resnet18"  # stem up to layer1, or resnet34's; "none": a fixed 1x1 convolution
    encoder_bn: str = "batch"  # the encoder's BatchNorm follows train()/eval(); "frozen": always eval
    num_level: int = 4  # L, levels of the pyramid
    num_stack: int = 4  # how often the schedule of coupling blocks is repeated
    num_channel: int = 16  # C with encoder "none"; 64 with an encoder whatever this says
    kernel_size: int = 7  # k of the two k x k convolutions in each coupling block, odd
    volume_norm: str = "CVN"  # or "SVN", or "none" (ablation I)
    image_size: tuple[int, int] = (1024, 1024)  # (h, w) of the input images
    contrast: str = "latent"  # compose differences; "composed": subtract what is composed (ablation III)
    save_memory: bool = True  # backpropagate by inversion (SequentialNF), or plainly (SequentialNet)
    map_size: tuple[int, int] = (256, 256)  # (h, w) of anomaly maps, whatever the images' is, as the paper's

    def __post_init__(self):
        for name in ("image_size", "map_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = ("encoder", "encoder_bn", "volume_norm", "contrast")
        allowed = (ENCODERS, ENCODER_BNS, VOLUME_NORMS, CONTRASTS)
        for name, choices in zip(names, allowed, strict=True):
            if (value := getattr(self, name)) not in choices:
                name = name.replace("_", " ")
                raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel size {self.kernel_size} is not odd; try {self.kernel_size + 1}")
        if self.num_level < 2 or self.num_stack < 1 or self.channels < 1:
            raise ValueError("at least 2 levels, 1 stack and 1 channel are needed")
        step = self.stride * 2 ** (self.num_level - 1)
        for n in self.image_size:
            if n < 1 or n % step:
                nearest = sorted({max(n // step, 1) * step, max(-(-n // step), 1) * step})
                raise ValueError(
                    f"image size {n} is not divisible by {step} ({self.num_level} levels, encoder "
                    f"{self.encoder}); the nearest sizes that work: {' and '.join(map(str, nearest))}"
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
        return {**asdict(self), "image_size": list(self.image_size), "map_size": list(self.map_size)}


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
        schedule = coupling_schedule(config.num_level) * config.num_stack
        blocks = [CouplingBlock(kind, level, config) for kind, level in schedule]
        if config.save_memory:  # no block is random
            self.flow = SequentialNF(*blocks, preserve_rng_state=False, around=matrices_at_once)
        else:
            self.flow = SequentialNet(*blocks, around=matrices_at_once)
        self.to(memory_format=kernels.MEMORY_FORMAT)

    def compute_networks_in(self, dtype: torch.dtype | None) -> PyramidFlow:
        """Let the k x k convolutions run in `dtype` (bfloat16); None: in the dtype of their weights.

        Weights, states, normalization, 1x1 convolutions and everything else keep their dtype.
        """
        for block in self.flow:
            block.affine.compute_dtype = dtype
        return self

    def train(self, mode: bool = True) -> PyramidFlow:
        super().train(mode)
        if self.config.encoder_bn == "frozen":
            self.stem.eval()
        return self

    def forward(self, images: Tensor, logdets: bool = False) -> tuple[Tensors, LogDets]:
        """Latent pyramid of normalized images (B,3,h,w): `encode`, then `latents`."""
        return self.latents(self.encode(images), logdets)

    def encode(self, images: Tensor) -> Tensor:
        """Features (B,C,H,W) of normalized images (B,3,h,w) of the configured size.

        Raises:
            ValueError: images of another size (CVN and the template are tied to one size).
        """
        wanted, got = self.config.image_size, tuple(images.shape[-2:])
        if got != wanted:
            raise ValueError(f"the model is for {size_text(wanted)} images, got {size_text(got)}")
        images = images.contiguous(memory_format=kernels.MEMORY_FORMAT)
        return self.stem(images) if self.config.encoder == "none" else _resnet_features(self.stem, images)

    def latents(self, features: Tensor, logdets: bool = False) -> tuple[Tensors, LogDets]:
        """Latent pyramid of features (B,C,H,W).

        Args:
            logdets: also give the log-determinants, one map per level, per element.

        Returns:
            (latents, log-dets): tuples of L tensors (B,C,H/2^i,W/2^i); None instead of log-dets
            that were not asked for.
        """
        levels = self.pyramid.decompose(features)
        return self.flow(levels, tuple(torch.zeros_like(x) for x in levels) if logdets else None)

    def inverse(self, latents: Tensors) -> Tensor:
        """Images (B,3,h,w) from a latent pyramid; of the latent template, the image template (Fig. 7).

        Raises:
            ValueError: the stem has no inverse (a ResNet encoder).
        """
        if self.config.encoder != "none":
            raise ValueError(f"encoder {self.config.encoder} has no inverse; only encoder none has one")
        levels, _ = self.flow.inverse(latents)
        weight = self.stem.weight[:, :, 0, 0]
        pseudo_inverse = torch.linalg.pinv(weight.double()).to(weight.dtype)
        return F.conv2d(self.pyramid.compose(levels), pseudo_inverse[:, :, None, None])


# --------------------------------------------------------------------------------------- stem


def _build_stem(config: PyramidFlowConfig) -> nn.Module:
    if config.encoder == "none":
        stem = nn.Conv2d(3, config.channels, 1, bias=False)
        nn.init.orthogonal_(stem.weight)
        return stem
    from torchvision import models  # here: importing it takes as long as all else together

    net = getattr(models, config.encoder)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)


def _resnet_features(stem: nn.Sequential, x: Tensor) -> Tensor:
    """`stem(x)`; relu(norm(conv(x)) + added) is one kernel."""
    conv, norm, _, pool, layer = stem
    x = pool(kernels.normalized_conv(x, conv, norm))
    for block in layer:
        hidden = kernels.normalized_conv(x, block.conv1, block.bn1)
        x = kernels.normalized_conv(hidden, block.conv2, block.bn2, added=x)
    return x


def load_encoder_weights(model: PyramidFlow, state_dict: dict[str, Tensor]) -> None:
    """Fill the ResNet stem from a state dict with torchvision's names; further entries are ignored.

    Raises:
        ValueError: an entry is missing, has another shape, is not finite, or belongs to a deeper network.
    """
    encoder, own = model.config.encoder, model.stem.state_dict()
    parts = {"0": "conv1", "1": "bn1", "4": "layer1"}
    names = {ours: parts[ours[0]] + ours[1:] for ours in own}
    for name in state_dict:
        if not isinstance(name, str):
            raise ValueError(f"entry {name!r:.20} has no name")
        if name.split(".")[0] in parts.values() and name not in names.values():
            raise ValueError(f"entry {name} does not belong to a {encoder}")
    for ours, name in names.items():
        x = state_dict.get(name)
        if name not in state_dict and name.endswith("num_batches_tracked"):
            continue  # files from before 2018 lack it, and nothing reads it
        if name not in state_dict:
            raise ValueError(f"no entry {name}")
        if not is_dense(x):
            raise ValueError(f"entry {name} is not a tensor")
        if x.shape != own[ours].shape:
            shapes = f"{tuple(x.shape)}, {encoder} needs {tuple(own[ours].shape)}"
            raise ValueError(f"entry {name} has shape {shapes}")
        right = not x.is_complex() and (x.is_floating_point() or not own[ours].is_floating_point())
        if not right or not x.isfinite().all():
            raise ValueError(f"entry {name} has values that are not finite numbers")
        own[ours] = x
    model.stem.load_state_dict(own)


# ------------------------------------------------------------------------------------ pyramid


class LaplacianPyramid(nn.Module):
    """Laplacian pyramid per channel (Sec. 3.2); `compose` undoes `decompose` exactly.

    Down: 5x5 binomial blur, then 2x2 max-pool (the official code; the supplement says nearest).
    Up: nearest neighbor, then the same blur.  Zero padding darkens the borders of composed maps.

    Args:
        num_level: L.
    """

    def __init__(self, num_level: int):
        super().__init__()
        self.num_level = num_level

    def decompose(self, x: Tensor) -> Tensors:
        """(B,C,H,W) -> L levels, finest first; H and W divisible by 2^(L-1)."""
        levels = []
        for _ in range(self.num_level - 1):
            smaller = F.max_pool2d(kernels.blur(x), 2)
            levels.append(x - kernels.blur_upsampled(smaller))
            x = smaller
        return (*levels, x)

    def compose(self, levels: Tensors) -> Tensor:
        """L levels -> (B,C,H,W).  Linear, and per channel."""
        x = levels[-1]
        for level in levels[-2::-1]:
            x = kernels.blur_upsampled(x) + level
        return x

    def compose_maps(self, levels: Tensors) -> Tensor:
        """`compose`, faster where channels are few or do not lie side by side in memory."""
        return self.compose(levels) if torch.compiler.is_compiling() else kernels.compose_maps(levels)


# --------------------------------------------------------------------------------------- flow


def coupling_schedule(num_level: int) -> list[tuple[str, int]]:
    """(kind, i) of the coupling blocks of one stack (Fig. 4): even i first, then up(0), then odd i.

    >>> coupling_schedule(4)
    [('dual', 0), ('down', 2), ('up', 0), ('dual', 1)]
    """

    def one_pass(start: int) -> list[tuple[str, int]]:
        return [("dual" if i + 2 < num_level else "down", i) for i in range(start, num_level - 1, 2)]

    return [*one_pass(0), ("up", 0), *one_pass(1)]


class CouplingBlock(CouplingModule):
    """Affine coupling between neighboring scales, then an invertible 1x1 convolution (Sec. 3.3).

    x_target <- A (exp(s) * x_target + t), with s and t from the neighbors by two convolutions:
    up(i): x_i from x_{i+1};  down(i): x_{i+1} from x_i;  dual(i): x_{i+1} from x_i and x_{i+2}.

    The parameters of the coupling are exp(s) and t, each (B,C,H,W) of the target.

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
        stride = 2 if kind == "down" and self.computed_level == self.target else 1
        size = config.level_size(self.computed_level)
        self.affine = AffineParameters(config, sources * config.channels, size, stride)
        self.conv1x1 = InvertibleConv1x1(config.channels, config.volume_norm != "none")

    def extra_repr(self) -> str:
        return f"{self.kind}({self.level})"

    def transform_parameters(self, inputs: tuple[Tensor | None, ...]) -> Tensors:
        """exp(s) and t."""
        i = self.level
        if self.kind == "up":
            return self.affine(upsampled=inputs[i + 1])
        if self.kind == "dual":
            return self.affine(kernels.every_second_pixel(inputs[i]), upsampled=inputs[i + 2])
        scale, shift = self.affine(inputs[i])
        if self.computed_level == self.target:
            return scale, shift
        return kernels.every_second_pixel(scale), kernels.every_second_pixel(shift)

    def couple(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """A (exp(s) * x + t)."""
        return kernels.affine_coupling(self.conv1x1.matrix(x.dtype), scale, x, shift)

    def decouple(self, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """(A^-1 y - t) / exp(s)."""
        return kernels.undo_affine_coupling(self.conv1x1.inverse_matrix(y.dtype), y, shift, scale)

    def log_det(self, scale: Tensor, shift: Tensor) -> Tensor:
        """s, per element.  The 1x1 convolution mixes channels, so its share is spread evenly on them."""
        if self.conv1x1.volume_normalized:
            return scale.log()  # log|det A| = 0 by construction
        return scale.log() + self.conv1x1.log_det() / self.conv1x1.channels


class AffineParameters(nn.Module):
    """exp(s) and t by two k x k convolutions, [s0, t] = conv(LeakyReLU(conv(x))), and volume normalization.

    The input is a map, a nearest-upsampled smaller map, or both (their concatenation).

    Args:
        config: the architecture.
        in_channels: of all input maps together.
        size: (H,W) of the parameters.
        stride: of the second convolution.
    """

    def __init__(self, config: PyramidFlowConfig, in_channels: int, size: tuple[int, int], stride: int):
        super().__init__()
        k, width = config.kernel_size, 2 * config.channels
        self.conv1 = nn.Conv2d(in_channels, width, k, padding=k // 2, bias=False)
        self.conv2 = nn.Conv2d(width, width, k, padding=k // 2, stride=stride, bias=False)
        nn.init.zeros_(self.conv2.weight)  # the untrained block is its 1x1 convolution alone
        self.norm = VolumeNorm(config.volume_norm, config.channels, size)
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor | None = None, upsampled: Tensor | None = None) -> Tensors:
        """x (B,I,H,W) and/or `upsampled` (B,I,H/2,W/2) -> (scale, shift), each (B,C,H,W)."""
        dtype = self._dtype(x, upsampled)
        maps = _cast(x, dtype), _cast(upsampled, dtype)
        hidden = kernels.conv2d(_cast(self.conv1.weight, dtype), *maps, slope=LEAKY_SLOPE)
        raw = kernels.conv2d(_cast(self.conv2.weight, dtype), hidden, stride=self.conv2.stride[0])
        return self.norm(raw)

    def _dtype(self, x: Tensor | None, upsampled: Tensor | None) -> torch.dtype:
        """That of the convolutions."""
        own, channels, k = self.conv1.weight, self.conv2.out_channels // 2, self.conv1.kernel_size[0]
        side = 2 * min(upsampled.shape[-2:]) if x is None else min(x.shape[-2:])
        return kernels.convolution_dtype(self.compute_dtype, own.device, channels, side, k) or own.dtype


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype, memory_format=kernels.MEMORY_FORMAT)


class VolumeNorm(nn.Module):
    """s = b - mean with b = clamp * 0.636 * atan(s0 / clamp), so that the volume change averages to zero.

    CVN: mean over batch and channels, per pixel.  SVN: mean over batch and space, per channel (Sec. 3.3).
    Training takes the batch's mean and moves the running mean, eval takes the running mean.

    Args:
        kind: "CVN", "SVN" or "none" (the mean is 0).
        channels: C.
        size: (H,W), which CVN ties the model to.
    """

    momentum = 0.1

    def __init__(self, kind: str, channels: int, size: tuple[int, int]):
        super().__init__()
        self.dims = {"CVN": kernels.OF_PIXEL, "SVN": kernels.OF_CHANNEL, "none": None}[kind]
        shape = {"CVN": (1, 1, *size), "SVN": (1, channels, 1, 1), "none": None}[kind]
        self.register_buffer("running_mean", None if shape is None else torch.zeros(shape))

    def forward(self, raw: Tensor) -> Tensors:
        """[s0, t] (B,2C,H,W) -> exp(s), at least float32, and t, each (B,C,H,W)."""
        if self.dims is None:
            exp_s, t, _ = kernels.scale_and_shift(raw, raw.new_zeros(1, 1, 1, 1))  # exp(b), t
        elif not self.training:
            exp_s, t, _ = kernels.scale_and_shift(raw, self.running_mean)  # exp(b - running mean), t
        else:
            exp_s, t, mean = kernels.scale_and_shift(raw, self.dims)  # exp(b - mean(b)), t
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        return exp_s, t


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
        self.at_hand: tuple[Callable | None, Tensor | None] = None, None  # how it was computed, and it
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """A, (C,C)."""
        return self._found(_products, dtype)

    def inverse_matrix(self, dtype: torch.dtype) -> Tensor:
        """The inverse of A, by triangular solves in float64."""
        return self._found(_inverse_products, dtype)

    def log_det(self) -> Tensor:
        """log|det A|, a scalar; a map of H x W pixels has H * W times that."""
        return _log_diagonals(self.log_scale, self.volume_normalized).sum()

    def _found(self, compute: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        """What `compute` gives, at hand inside of `matrices_at_once` unless only gradients are missing."""
        known, found = self.at_hand
        if known is not compute or (torch.is_grad_enabled() and not found.requires_grad):
            found = compute(*self.factors(), self.volume_normalized)
        return found.to(dtype)

    def factors(self) -> Tensors:
        """P, L below its diagonal, U above its diagonal, sign and s."""
        return self.permutation, self.lower, self.upper, self.sign, self.log_scale


# Of the factors of one convolution, or of several: (N,C,C) and (N,C).


def _products(
    permutation: Tensor, lower: Tensor, upper: Tensor, sign: Tensor, log_scale: Tensor, normalized: bool
) -> Tensor:
    """A = P L (U + diagonal)."""
    left = permutation @ lower.tril(-1) + permutation
    diagonal = sign * _log_diagonals(log_scale, normalized).exp()
    return left @ upper.triu(1) + left * diagonal[..., None, :]


def _inverse_products(
    permutation: Tensor, lower: Tensor, upper: Tensor, sign: Tensor, log_scale: Tensor, normalized: bool
) -> Tensor:
    """The inverses, in float64; `solve_triangular` takes diagonals for ones and reads one side of them."""
    diagonal = (sign * _log_diagonals(log_scale, normalized).exp())[..., None]
    permutation, lower, upper, diagonal = (x.double() for x in (permutation, lower, upper, diagonal))
    inverse = torch.linalg.solve_triangular(lower, permutation.mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper / diagonal, inverse / diagonal, upper=True, unitriangular=True)


def _log_diagonals(log_scale: Tensor, normalized: bool) -> Tensor:
    return log_scale - log_scale.mean(-1, keepdim=True) if normalized else log_scale


@contextlib.contextmanager
def matrices_at_once(blocks: Sequence[CouplingBlock], inverse: bool) -> Iterator[None]:
    """While it is open, the blocks' matrices, or their inverses, are at hand: for all blocks a GPU launches as
    many kernels as for one otherwise.  Nothing is while a model is traced, or where matrices are fixed."""
    convolutions = [block.conv1x1 for block in blocks]
    if torch.compiler.is_compiling() or not isinstance(convolutions[0], InvertibleConv1x1):
        yield
        return
    compute = _inverse_products if inverse else _products
    with torch.autocast(convolutions[0].lower.device.type, enabled=False):
        factors = map(torch.stack, zip(*(x.factors() for x in convolutions), strict=True))
        found = compute(*factors, convolutions[0].volume_normalized).unbind()
    for convolution, matrix in zip(convolutions, found, strict=True):
        convolution.at_hand = compute, matrix
    try:
        yield
    finally:
        for convolution in convolutions:
            convolution.at_hand = None, None


# ------------------------------------------------------------------------------------- losses


def training_loss(
    model: PyramidFlow, latents: Tensors, logdets: LogDets = None, kind: str = "fourier", template: str = "mean"
) -> Tensor:
    """The loss of what the model gave for a batch of images, a scalar.

    Args:
        logdets: read by kind "likelihood" only.
        kind: "fourier" (Sec. 3.4); "spatial" (ablation IV) or "likelihood" (ablation I of Table 2).
        template: "mean", latents are pulled together; "zero", to zero (ablation II).
    """
    if kind == "likelihood":
        return likelihood_loss(latents, logdets)
    loss = zero_loss if template == "zero" else pair_loss
    return loss(model.pyramid, latents, kind, model.config.contrast)


def pair_loss(
    pyramid: LaplacianPyramid, latents: Tensors, kind: str = "fourier", contrast: str = "latent"
) -> Tensor:
    """Composed |z_i - z_j|^2 of all pairs i < j of a batch, averaged over channels; a scalar.

    "fourier": the mean magnitude of their 2-D spectrum.  "spatial": their mean.

    Args:
        latents: L levels (B,C,H/2^i,W/2^i), B >= 2.

    Raises:
        ValueError: fewer than two images.
    """
    if len(latents[0]) < 2:
        raise ValueError("the loss compares pairs of images: the batch needs at least 2")
    first, second = zip(*(kernels.pairs(z) for z in latents), strict=True)
    return _magnitude(compare(pyramid, first, second, torch.square, contrast), kind)


def zero_loss(
    pyramid: LaplacianPyramid, latents: Tensors, kind: str = "fourier", contrast: str = "latent"
) -> Tensor:
    """`pair_loss` with zero in the place of every second image; a batch of one will do."""
    zeros = tuple(torch.zeros_like(z[:1]) for z in latents)
    return _magnitude(compare(pyramid, latents, zeros, torch.square, contrast), kind)


def _magnitude(maps: Tensor, kind: str) -> Tensor:
    return torch.fft.fft2(maps).abs().mean() if kind == "fourier" else maps.mean()


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
    pairs = zip(latents, others, strict=True)
    return pyramid.compose_maps(tuple(kernels.channel_mean(distance(a - b)) for a, b in pairs))[:, 0]
