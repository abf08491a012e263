"""From a trained model to a verdict: templates, anomaly maps, thresholds, and the file that holds them.

    images uint8 (B,h,w,3) -> latents z -> |z - template|, composed -> anomaly map (B,256,256) -> score

`Scorer.fit` makes one of a model and good images, `Scorer.load` reads one from a file.  Two scores:

paper: one template, the mean latent of the good images (Sec. 3.4).
bank: the mean and several good images as templates, differences divided by their usual size, and at each
    pixel the map of the template that fits best (docs/plus.md).  Any trained weights will do.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

import kernels
from autoFlow import Tensors
from dataset import MASK_SIZE, AnomalyClass, Images, evaluation_order, load_masks, normalize, read_image
from metrics import GroundTruth, sorted_scores
from model import PyramidFlow, PyramidFlowConfig, compare, coupling_schedule
from util import (
    DivergedError,
    InputError,
    apply_precision,
    boolean,
    choose_precision,
    fraction,
    free_memory,
    gather,
    load_tensors,
    number,
    progress,
    save_tensors,
    share,
    total,
    whole_number,
)

FORMAT, VERSION = "PyramidFlow checkpoint", 3
LARGEST = 2**14  # of any number in a configuration: a damaged file must not make a huge model
LAST_FILE = "last.pt"  # of a run, the scorer of its last epoch
SCORES = ("paper", "bank")
MOST_SMOOTH = 64.0
LATENT_SHARE = 1 / 4  # of the free memory, for latents that are needed more than once
MOST_TEMPLATES = 1024
TYPICAL = 0.75  # share of good images that an image's score may take templates from: an odd one excuses defects
COARSE_SIZE = 64  # latents are chosen by their two coarsest levels, averaged to at most this size
CPU_BATCH_ELEMENTS = 2**24  # of features: what computes a kernel's spectrum once for several images
CUDA_BATCH_ELEMENTS = 2**26
BANK_ELEMENTS = 2**24  # of maps that are compared with all templates at once: 64 MiB, several times over
CUDA_BYTES = 64  # of memory, generously, per element of a feature: stem, hidden maps, latents
PIXEL_QUANTILE, FALSE_ALARM, LOWEST_RATE = 0.999, 0.05, 1e-4
IMAGE_QUANTILE = None  # of good images: the rest is the false-alarm rate that was chosen in training
INTERVAL = (0.025, 0.975)
COLOR_QUANTILE = 0.999  # of good pixels; twice that score has the scale's highest color
# Where the distribution of pixel scores is stored: every percent, and ever finer towards the highest.
LEVELS = np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -6, 41)[1:], [1.0]])


class Scored(NamedTuple):
    """Anomaly maps (N,256,256), and the images' scores (N,)."""

    maps: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ScoreOptions:
    """How good images become a scorer.

    Attributes:
        score: "paper", one template, the mean; "bank", the mean and several good images.
        num_template: K of the bank; with 1 the bank is the mean, whitened.
        whiten: divide the bank's differences by their usual size, for each level and channel.
        smooth: deviation in pixels of a Gaussian over the bank's anomaly maps; 0: none.
    """

    score: str = "paper"
    num_template: int = 64
    whiten: bool = True
    smooth: float = 1.0

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> ScoreOptions:
        """The options that the flags of `add_score_flags` ask for."""
        return cls(args.score, args.numTemplate, args.whiten, args.smooth)


def add_score_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of all scripts that fit a scorer."""
    default = ScoreOptions()  # the formatter of util.Parser shows each flag's default
    parser.add_argument(
        "--score", choices=SCORES, default=default.score,
        help="paper: difference to the mean latent; bank: to the best fitting of several good images, "
        "for parts at any angle and wandering textures",
    )  # fmt: skip
    parser.add_argument(
        "--numTemplate", type=whole_number(1, MOST_TEMPLATES), default=default.num_template, metavar="K",
        help="--score bank: templates, the mean among them",
    )  # fmt: skip
    parser.add_argument(
        "--whiten", type=boolean, default=default.whiten, metavar="{true,false}",
        help="--score bank: divide differences by their usual size, per level and channel",
    )  # fmt: skip
    parser.add_argument(
        "--smooth", type=number(0, MOST_SMOOTH), default=default.smooth, metavar="PIXELS",
        help="--score bank: deviation of a Gaussian over the anomaly map",
    )  # fmt: skip


def check_score_flags(args: argparse.Namespace) -> None:
    """Raises InputError if a flag of the bank was given without the bank."""
    if args.score != "bank" and ScoreOptions.from_flags(args) != ScoreOptions(args.score):
        raise InputError("--numTemplate, --whiten and --smooth need --score bank; add it")


@dataclass
class Scorer:
    """A model with templates and thresholds: images in, anomaly maps out.

    Attributes:
        model: in eval mode, on the device.
        templates: L levels (K,C,H/2^i,W/2^i) there, in units of `sigma`; the first is the mean.
        num_typical: so many of them, the first ones, are typical: image scores come from these.
        sigma: L tensors (C,), by which differences are divided; None: they are not.
        smooth: deviation in pixels of the Gaussian over maps; 0: none.
        calibration: scores of good images, held-out ones if there are; None if there were too few.
        metrics: of the class's test images, with the thresholds of best F1; may be empty.
        class_name: what it was fitted on.
        settings: flags of the training.
        path: of the file it was read from.
    """

    model: PyramidFlow
    templates: Tensors
    num_typical: int = 1
    sigma: Tensors | None = None
    smooth: float = 0.0
    calibration: Calibration | None = None
    metrics: dict = field(default_factory=dict)
    class_name: str = ""
    settings: dict = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def fit(
        cls, model: PyramidFlow, images: Images, options: ScoreOptions | None = None, template: str = "mean",
        class_name: str = "", settings: dict | None = None,
    ) -> Scorer:  # fmt: skip
        """Templates, whitening and calibration of good images, always of the weights as they are.

        Works over all processes, with the same result in each.

        Args:
            images: good ones, un-augmented.
            template: "zero" takes zero in place of the mean (ablation II of Table 2).

        Raises:
            ValueError: no images.
        """
        return fit_all(model, images, [options or ScoreOptions()], template, class_name, settings)[0]

    @torch.no_grad()
    def score(self, images: Tensor, roi: Tensor | None = None) -> Scored:
        """Anomaly maps (B,256,256) and scores (B,) of images uint8 (B,h,w,3) of the model's size.

        Args:
            roi: bool (256,256), where scores are taken; maps are whole.  None: everywhere.
        """
        latents = latents_of(self.model, images.to(self.device))
        return self.score_latents(latents, roi=None if roi is None else roi.to(self.device))

    def inspect(
        self, images: Picture | Sequence[Picture], thresholds: Thresholds | None = None,
        min_area: int = 1, roi: Picture | None = None, batch_size: int = 4,
    ) -> Inspection | list[Inspection]:  # fmt: skip
        """`scorer.inspect`: the verdict on an image of any size, or a list of them."""
        return inspect(self, images, thresholds, min_area, roi, batch_size)

    def score_latents(
        self,
        latents: Tensors,
        left_out: Tensor | None = None,
        mean_factor: float = 1.0,
        roi: Tensor | None = None,
    ) -> Scored:
        """Anomaly maps and scores of a latent pyramid (Sec. 3.4).

        Args:
            roi: as in `score`.
            left_out: (B,) the template that each image is not compared with; -1: none.
            mean_factor: by which differences to the first template, the mean, are multiplied.
        """
        maps, typical = self.differences(latents, left_out, mean_factor)
        maps = at_mask_size(maps)
        scores = highest(maps if typical is None else at_mask_size(typical), roi)
        return Scored(gaussian(maps, self.smooth) if self.smooth else maps, scores)

    def differences(
        self, latents: Tensors, left_out: Tensor | None = None, mean_factor: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """The difference to the template that fits best at each pixel, and to the best of the typical ones.

        Arguments as in `score_latents`.

        Returns:
            Two maps (B,H,W) of the finest level's size; None for the second if it is the first.
        """
        if len(self.templates[0]) == 1:
            return self._difference_to_mean(latents) * mean_factor, None
        if torch.compiler.is_compiling():  # where the batch has any size
            return self._best_of(latents, left_out, mean_factor)
        count = max(1, BANK_ELEMENTS // (len(self.templates[0]) * latents[0][0, 0].numel()))
        parts = []
        for start in range(0, len(latents[0]), count):
            part = slice(start, start + count)
            excluded = None if left_out is None else left_out[part]
            parts.append(self._best_of(tuple(z[part] for z in latents), excluded, mean_factor))
        best, typical = map(torch.cat, zip(*parts, strict=True))
        return best, typical

    def _best_of(
        self, latents: Tensors, left_out: Tensor | None, mean_factor: float
    ) -> tuple[Tensor, Tensor]:
        maps = self._differences_to_all(latents)
        if mean_factor != 1.0:
            maps[:, 0] *= mean_factor
        if left_out is not None:
            numbers = torch.arange(maps.shape[1], device=maps.device)
            maps[left_out[:, None] == numbers] = torch.inf
        typical, odd = maps[:, : self.num_typical].amin(1), maps[:, self.num_typical :]
        return torch.minimum(typical, odd.amin(1)) if odd.shape[1] else typical, typical

    def _difference_to_mean(self, latents: Tensors) -> Tensor:
        """|z - mean|, composed (B,H,W)."""
        return compare(
            self.model.pyramid, self._whitened(latents), self.templates, torch.abs, self.config.contrast
        )

    def _differences_to_all(self, latents: Tensors) -> Tensor:
        """The same for each template, (B,K,H,W)."""
        latents, templates = self._whitened(latents), self.templates
        if self.config.contrast == "composed":
            latents, templates = ((self.model.pyramid.compose(x),) for x in (latents, templates))
        pairs = zip(latents, templates, strict=True)
        return kernels.compose_maps(tuple(kernels.template_distances(z, t) for z, t in pairs))

    def _whitened(self, latents: Tensors) -> Tensors:
        if self.sigma is None:
            return latents
        return tuple(z / s[:, None, None] for z, s in zip(latents, self.sigma, strict=True))

    def score_all(self, images: Images, description: str = "test") -> Scored:
        """Maps and scores of all images, in every process; raises DivergedError as `score_all`."""
        return score_all([self], images, description)[0]

    @torch.no_grad()
    def image_template(self, image: np.ndarray | None = None) -> Tensor | None:
        """Normalized image (3,h,w) of a template by inverse flow (Fig. 7); None where the stem has no inverse.

        Args:
            image: uint8 (h,w,3), to choose the template that is nearest to it; None: the mean.
        """
        if self.config.encoder != "none":
            return None
        nearest = 0
        if image is not None and len(self.templates[0]) > 1:
            latents = latents_of(self.model, torch.from_numpy(image)[None].to(self.device))
            nearest = int(self._differences_to_all(latents)[0].mean((1, 2)).argmin())
        template = tuple(t[nearest : nearest + 1] for t in self.templates)
        if self.sigma is not None:
            template = tuple(t * s[:, None, None] for t, s in zip(template, self.sigma, strict=True))
        return self.model.eval().inverse(template)[0]

    @property
    def config(self) -> PyramidFlowConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.templates[0].device

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def options(self) -> ScoreOptions:
        """What it was fitted with; of templates, as many as there are."""
        count, whiten = len(self.templates[0]), self.sigma is not None
        score = "bank" if count > 1 or whiten or self.smooth else "paper"
        return ScoreOptions(score, count, whiten, self.smooth)

    def save(self, path: Path) -> None:
        """Write everything to one file of tensors and plain values that `load` reads.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        content = {
            "class": self.class_name,
            "config": self.config.to_dict(),
            "settings": self.settings,
            "model": {name: x.cpu() for name, x in self.model.state_dict().items()},
            "templates": [pack_templates(t.cpu()) for t in self.templates],
            "num_typical": self.num_typical,
            "sigma": None if self.sigma is None else [s.cpu() for s in self.sigma],
            "smooth": self.smooth,
            "metrics": self.metrics,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            # For people: `load` finds them anew.
            "thresholds": named_thresholds(self.metrics, self.calibration),
        }
        save_checkpoint(path, content)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", precision: str = "auto") -> Scorer:
        """Read what `save` wrote, as every run does; nothing in the file is executed.

        Raises:
            InputError: it is missing, damaged, of another version, or holds what does not fit together.
        """
        path, device = find_checkpoint(path), torch.device(device)
        content = load_checkpoint(path)
        if "optimizer" in content:
            raise InputError(f"{path} is what --resume needs; choose last.pt beside it")
        try:
            scorer = cls._from_content(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(
                f"{path} is damaged ({reason}); use another checkpoint, or train again"
            ) from None
        scorer.path = path
        precision = choose_precision(precision, device, scorer.settings.get("precision"))
        return scorer.to(device, precision)

    @classmethod
    def _from_content(cls, content: dict) -> Scorer:
        """Raises one of many errors unless the content is what `save` writes."""
        config = read_config(content["config"])
        sigma, calibration = content["sigma"], content["calibration"]
        return cls(
            model=read_model(config, content["model"]).eval(),
            templates=(templates := read_templates(config, content["templates"])),
            num_typical=read_count(content["num_typical"], len(templates[0])),
            sigma=None if sigma is None else read_sigma(config, sigma),
            smooth=read_smooth(content["smooth"]),
            calibration=None if calibration is None else Calibration.from_dict(calibration),
            metrics=read_metrics(content["metrics"]),
            class_name=str(content["class"]),
            settings=dict(content["settings"]),
        )

    def to(self, device: torch.device, precision: str) -> Scorer:
        """Move everything to the device, its networks to compute in the precision."""
        self.model.to(device).compute_networks_in(apply_precision(precision))
        self.templates = tuple(lay_out(t.to(device)) for t in self.templates)
        self.sigma = None if self.sigma is None else tuple(s.to(device) for s in self.sigma)
        return self


@torch.no_grad()
def score_all(scorers: Sequence[Scorer], images: Images, description: str = "test") -> list[Scored]:
    """Maps and scores of all images, in every process, by each scorer of one model.

    Raises:
        DivergedError: a score is not finite.
    """
    model, device = scorers[0].model.eval(), scorers[0].device
    indices = evaluation_order(share(range(len(images))), batch_size(model.config, device))
    parts = [[empty_scores(device)] for _ in scorers]
    for batch in progress(images.batches(indices), description, len(indices)):
        latents = latents_of(model, batch)
        for scorer, found in zip(scorers, parts, strict=True):
            found.append(scorer.score_latents(latents))
    return [collect(found, len(images)) for found in parts]


def empty_scores(device: torch.device) -> Scored:
    """Of no image."""
    return Scored(torch.zeros(0, *MASK_SIZE, device=device), torch.zeros(0, device=device))


def collect(parts: Sequence[Scored], count: int) -> Scored:
    """The scores of all images, of the parts that each process has.

    Raises:
        DivergedError: one is not finite.
    """
    maps, scores = (gather(torch.cat(x), count) for x in zip(*parts, strict=True))
    if not torch.isfinite(maps).all():
        raise DivergedError("anomaly maps are no longer finite")
    return Scored(maps, scores)


def at_mask_size(maps: Tensor) -> Tensor:
    """(B,H,W) -> (B,256,256), where maps and masks meet."""
    if maps.shape[-2:] == MASK_SIZE:
        return maps
    return F.interpolate(maps[:, None], MASK_SIZE, mode="bilinear", antialias=True)[:, 0]


def highest(maps: Tensor, roi: Tensor | None = None) -> Tensor:
    """(B,) of maps (B,H,W), inside of `roi`, bool (H,W)."""
    return (maps if roi is None else maps.where(roi, -torch.inf)).amax((1, 2))


def gaussian(maps: Tensor, deviation: float) -> Tensor:
    """Maps (B,H,W), smoothed; reflected at the border."""
    size = 2 * min(int(4 * deviation + 0.5), *(n - 1 for n in maps.shape[-2:])) + 1
    return torchvision.transforms.functional.gaussian_blur(maps, [size, size], [deviation] * 2)


def latents_of(model: PyramidFlow, images: Tensor) -> Tensors:
    """Latent pyramid, L levels (B,C,H/2^i,W/2^i), of images uint8 (B,h,w,3)."""
    return model(normalize(images))[0]


def batch_size(config: PyramidFlowConfig, device: torch.device) -> int:
    """Images that are scored together; on CUDA no more than half of the free memory holds."""
    height, width = config.level_size(0)
    elements = CPU_BATCH_ELEMENTS
    if device.type == "cuda":
        elements = min(CUDA_BATCH_ELEMENTS, free_memory(device) // 2 // CUDA_BYTES)
    maps = MASK_SIZE[0] * MASK_SIZE[1]
    return max(1, elements // max(height * width * config.channels, maps))


# ------------------------------------------------------------------------------------ fitting


def fit_all(
    model: PyramidFlow, images: Images, options: Sequence[ScoreOptions], template: str = "mean",
    class_name: str = "", settings: dict | None = None, held_out: Images | None = None,
) -> list[Scorer]:  # fmt: skip
    """`Scorer.fit` for each of the options, with one pass of the images through the network.

    Args:
        held_out: good images that are not among `images`; the calibration is theirs then.
    """
    model.eval()
    latents = Latents(model, images)
    statistics = Statistics.of(latents, any(option.score == "bank" for option in options))
    zero = tuple(torch.zeros_like(t) for t in statistics.mean)
    mean = zero if template == "zero" else statistics.mean
    scorers = []
    for option in options:
        scorer = Scorer(model, mean, class_name=class_name, settings=settings or {})
        chosen = make_bank(scorer, latents, statistics, option) if option.score == "bank" else []
        if len(images) > 1 and not held_out:
            scorer.calibration = calibrate(scorer, latents, chosen, template == "mean")
        scorers.append(scorer)
    if held_out:
        found = score_all(scorers, held_out, "held-out images")
        for scorer, scored in zip(scorers, found, strict=True):
            scorer.calibration = replace(distribution(scored), held_out=True)
    rate = (settings or {}).get("falseAlarm")
    for scorer in scorers:
        if scorer.calibration is not None and is_rate(rate):
            scorer.calibration = replace(scorer.calibration, false_alarm=rate)
    return scorers


def make_bank(
    scorer: Scorer, latents: Latents, statistics: Statistics, option: ScoreOptions
) -> list[int]:
    """Give a scorer whose template is the mean the bank that the option asks for; the images in it."""
    chosen, scorer.num_typical = statistics.choose(option.num_template - 1)
    scorer.num_typical += 1  # the mean
    scorer.sigma = statistics.sigma if option.whiten else None
    scorer.smooth = option.smooth
    templates = zip(scorer.templates, latents.select(chosen), strict=True) if chosen else ()
    scorer.templates = scorer._whitened(tuple(map(torch.cat, templates)) or scorer.templates)
    scorer.templates = tuple(lay_out(unpack_templates(*pack_templates(t))) for t in scorer.templates)
    return chosen


class Latents:
    """Latents of the images in eval mode, a batch at a time; kept in memory where they fit.

    Args:
        images: all of them; each process computes its share.
    """

    def __init__(self, model: PyramidFlow, images: Images):
        self.model, self.images = model, images
        self.device = next(model.parameters()).device
        indices = share(range(len(images)))
        self._batches = evaluation_order(indices, batch_size(model.config, self.device))
        sizes = (model.config.level_size(i) for i in range(model.config.num_level))
        num_bytes = sum(4 * model.config.channels * h * w for h, w in sizes) * len(indices)
        self._fit = num_bytes < LATENT_SHARE * free_memory(self.device)
        self._kept: list[tuple[Tensor, Tensors]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensors]]:
        """(indices (B,), latents) of each batch."""
        if self._kept:
            yield from self._kept
            return
        batches = progress(self.images.batches(self._batches), "good images", len(self._batches))
        for indices, batch in zip(self._batches, batches, strict=True):
            with torch.no_grad():
                pair = indices, latents_of(self.model, batch)
            if self._fit:
                self._kept.append(pair)
            yield pair

    def select(self, chosen: list[int]) -> Tensors:
        """Latents of some images, L levels (K,C,H/2^i,W/2^i), in every process."""
        order = evaluation_order(chosen, batch_size(self.model.config, self.device))
        with torch.no_grad():
            parts = [latents_of(self.model, batch) for batch in self.images.batches(order)]
        return tuple(torch.cat(level) for level in zip(*parts, strict=True))


@dataclass
class Statistics:
    """What the good images have in common.

    Attributes:
        mean: L levels (1,C,H/2^i,W/2^i), the paper's latent template.
        sigma: L tensors (C,), the root of the variance over images, averaged over pixels.
        coarse: (N,D) each image's coarsest levels, in units of `sigma`, to tell images apart.
    """

    mean: Tensors
    sigma: Tensors = ()
    coarse: Tensor | None = None

    @classmethod
    def of(cls, latents: Latents, bank: bool) -> Statistics:
        """Statistics of all images.

        Args:
            bank: more than the mean is needed.

        Raises:
            ValueError: there are no images.
        """
        count = len(latents.images)
        if not count:
            raise ValueError("a template needs at least one image")
        config = latents.model.config
        zeros = {"dtype": torch.float64, "device": latents.device}
        shapes = [(1, config.channels, *config.level_size(i)) for i in range(config.num_level)]
        sums = [torch.zeros(s, **zeros).contiguous(memory_format=kernels.MEMORY_FORMAT) for s in shapes]
        squares = [torch.zeros(config.channels, **zeros) for _ in shapes]
        coarse = [coarse_levels(tuple(s[:0].float() for s in sums))]
        for _, levels in latents:
            for z, s in zip(levels, sums, strict=True):
                s += _sum_of_images(z)
            for z, q in zip(levels, squares, strict=True) if bank else ():
                q += _rows(z).square().sum(0, dtype=torch.float64)
            coarse += [coarse_levels(levels)] if bank else []
        total([*sums, *squares])
        mean = [s / count for s in sums]
        found = cls(tuple(m.float() for m in mean))
        if bank:
            found.sigma = tuple(_deviation(q / count, m) for q, m in zip(squares, mean, strict=True))
            pairs = zip(found.sigma, mean, strict=True)
            units = coarse_levels(tuple(s[:, None, None].expand(m.shape) for s, m in pairs))
            found.coarse = gather(torch.cat(coarse), count) / units
        return found

    def choose(self, count: int) -> tuple[list[int], int]:
        """Images that stand for all by greedy k-center, starting at the one nearest to the mean.

        Returns:
            The images, and how many of them, the first ones, are typical: k-center likes images that are
            unlike all others, and such an image may have a blemish, which as a template excuses defects.
        """
        if not count:
            return [], 0
        chosen = [int(torch.cdist(self.coarse.mean(0, keepdim=True), self.coarse).argmin())]
        distance = torch.full((len(self.coarse),), torch.inf, device=self.coarse.device)
        while len(chosen) < min(count, len(self.coarse)):
            distance = distance.minimum((self.coarse - self.coarse[chosen[-1]]).norm(dim=1))
            chosen.append(int(distance.argmax()))
        apart = torch.cdist(self.coarse, self.coarse).fill_diagonal_(torch.inf).amin(1)
        limit = apart.sort().values[int(TYPICAL * (len(apart) - 1))]
        typical = [i for i in chosen if apart[i] <= limit]
        return typical + [i for i in chosen if apart[i] > limit], len(typical)


def _deviation(square_sums: Tensor, mean: Tensor) -> Tensor:
    """(C,) root of the variance, averaged over pixels, of the means over images of z^2, summed, and of z."""
    variance = square_sums / mean[0, 0].numel() - _rows(mean).square().mean(0)
    return variance.clamp(min=1e-12).sqrt().float()


def _rows(z: Tensor) -> Tensor:
    """(B,C,H,W) -> (B*H*W,C), a view of a channels_last map."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _sum_of_images(z: Tensor) -> Tensor:
    """(B,C,H,W) -> (1,C,H,W) in float64; unlike z.sum(0), in the same memory format."""
    rows = z.permute(0, 2, 3, 1).reshape(len(z), -1)
    _, channels, height, width = z.shape
    return rows.sum(0, dtype=torch.float64).view(1, height, width, channels).permute(0, 3, 1, 2)


def coarse_levels(latents: Tensors) -> Tensor:
    """(B,D) the two coarsest levels, averaged to at most 64x64."""
    small = []
    for z in latents[-2:]:
        factor = -(-max(z.shape[-2:]) // COARSE_SIZE)
        small.append((F.avg_pool2d(z, factor, ceil_mode=True) if factor > 1 else z).flatten(1).float())
    return torch.cat(small, 1)


# ------------------------------------------------------------------------------------ thresholds


@dataclass(frozen=True)
class Thresholds:
    """From these scores on, a pixel and an image are called defective."""

    pixel: float
    image: float


@dataclass(frozen=True)
class Calibration:
    """Scores of good images, known without any defective one.

    Attributes:
        image_scores: ascending.
        pixel_scores: at `LEVELS`.
        held_out: nothing was fitted to the images.  Else each is scored as if the templates had not seen it,
            but the weights have.
        false_alarm: the share of good images that may be called defective, unless told otherwise.
    """

    image_scores: list[float]
    pixel_scores: list[float]
    held_out: bool = False
    false_alarm: float = FALSE_ALARM

    def thresholds(
        self, pixel_quantile: float = PIXEL_QUANTILE, image_quantile: float | None = IMAGE_QUANTILE
    ) -> Thresholds:
        """Thresholds below which these shares of good pixels and of good images stay.

        Args:
            image_quantile: None: all but the false-alarm rate.  Of n held-out images the quantile q is the
                conformal one, the ceil((n+1)q)-th smallest score: of new good images, a share of q stays below
                it in the mean.  Where n is too small for that it is the largest.
        """
        quantile = 1 - self.false_alarm if image_quantile is None else image_quantile
        if self.held_out:
            image = self.image_scores[min(self.rank(quantile), len(self.image_scores)) - 1]
        else:
            image = float(np.quantile(self.image_scores, quantile))
        return Thresholds(float(np.interp(pixel_quantile, LEVELS, self.pixel_scores)), image)

    def rank(self, quantile: float) -> int:
        """ceil((n+1)q), at least 1; n + 1 if there are too few images for it."""
        return max(1, math.ceil((len(self.image_scores) + 1) * quantile - 1e-9))

    def no_false_alarm(self) -> Thresholds:
        """Just above the highest scores."""
        highest = self.pixel_scores[-1], self.image_scores[-1]
        return Thresholds(*(float(np.nextafter(np.float32(x), np.float32(np.inf))) for x in highest))

    def expected_false_alarms(self, rank: int) -> tuple[float, float, float]:
        """Of new good images, the share above the rank-th smallest held-out score: mean, 95 % interval.

        The share below it is the rank-th smallest of n uniform numbers, so that the share above it is
        Beta(n + 1 - rank, rank), whatever the scores' distribution is.
        """
        from scipy.stats import beta  # half a second that nobody else needs to wait for

        count = len(self.image_scores)
        low, high = beta.ppf(INTERVAL, count + 1 - rank, rank)
        return 1 - rank / (count + 1), float(low), float(high)

    def describe(self) -> str:
        """The image threshold, and the false alarms that are to be expected, in a line."""
        count, quantile = len(self.image_scores), 1 - self.false_alarm
        line = f"image threshold {self.thresholds().image:.4g}, for a false-alarm rate of {self.false_alarm:.3g}: "
        if not self.held_out:
            return line + (
                f"a quantile of {count} training images, which the weights have seen; new good images score a "
                "little higher: --holdout 0.2 tells how many are called defective"
            )
        rank = self.rank(quantile)
        mean, low, high = self.expected_false_alarms(min(rank, count))
        line += (
            f"expect {mean:.1%} of new good images to be called defective (95 % interval {low:.1%} to "
            f"{high:.1%}), by {count} held-out ones"
        )
        if rank > count:
            needed = math.ceil(quantile / (1 - quantile) - 1e-9)
            line += f", which are too few: it is their largest score; hold out {needed}"
        return line

    def color_scale(self) -> tuple[float, float]:
        """(lowest, highest) score of a color scale on which good images look good."""
        low = self.pixel_scores[0]
        return low, max(2 * float(np.interp(COLOR_QUANTILE, LEVELS, self.pixel_scores)), low + 1e-12)

    @classmethod
    def from_dict(cls, given: object) -> Calibration:
        """Raises ValueError unless `given` is what `dataclasses.asdict` gives."""
        names, more = {"image_scores", "pixel_scores"}, {"held_out", "false_alarm"}
        if not isinstance(given, dict) or not names <= given.keys() <= names | more:
            raise ValueError("not a calibration")
        rate = given.get("false_alarm", FALSE_ALARM)
        if type(given.get("held_out", False)) is not bool or not is_rate(rate):
            raise ValueError("no false-alarm rate")
        for scores in (given[name] for name in names):
            if not (isinstance(scores, list) and scores and all(isinstance(x, float) for x in scores)):
                raise ValueError("not a list of scores")
            if not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
                raise ValueError("scores that are not ascending")
        if len(given["pixel_scores"]) != len(LEVELS):
            raise ValueError("wrong number of scores")
        return cls(**given)


def is_rate(given: object) -> bool:
    """Whether `given` is what --falseAlarm takes."""
    return isinstance(given, float) and LOWEST_RATE <= given <= 1


def calibrate(
    scorer: Scorer, latents: Latents, chosen: list[int], template_is_mean: bool
) -> Calibration:
    """Score the images that the scorer was fitted on, each as if it had not been one of them.

    The mean m of N latents and the mean m' of all but z satisfy z - m' = (z - m) N / (N - 1), and a map is
    linear in |z - m|: the map against m' is the map against m times N / (N - 1), exactly.  An image in the
    bank is compared with the other templates only.  The weights have seen the image, which this does not
    correct.

    Args:
        chosen: the images in the bank.
        template_is_mean: of these images; else, and without a bank, it does not depend on them.
    """
    count = len(latents.images)
    place = torch.full((count,), -1)
    place[chosen] = 1 + torch.arange(len(chosen))
    factor = count / (count - 1) if template_is_mean else 1.0
    parts = [empty_scores(latents.device)]
    for indices, levels in latents:
        left_out = place[indices].to(latents.device) if chosen else None
        parts.append(scorer.score_latents(levels, left_out, factor))
    return distribution(collect(parts, count))


def distribution(scored: Scored) -> Calibration:
    """What there is to know about the scores of good images."""
    maps, scores = scored
    pixels = sorted_scores(maps.flatten()).cpu().numpy()
    places = LEVELS * (len(pixels) - 1)
    below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
    pixel_scores = pixels[below] + (places - below) * (pixels[above] - pixels[below])
    return Calibration(
        image_scores=scores.sort().values.tolist(),
        pixel_scores=pixel_scores.tolist(),
    )


def choose_thresholds(
    choice: str,
    metrics: dict,
    calibration: Calibration | None,
    quantiles: tuple[float, float | None] = (PIXEL_QUANTILE, IMAGE_QUANTILE),
) -> Thresholds:
    """`--threshold`: quantile, none, f1, recall, or a number for pixels and images alike.

    quantile: of good pixels and of good images.  none: just above the highest of them.  f1: the best F1 on the
    test images.  recall: the highest image threshold that misses no defective test image, with f1's for pixels.

    Args:
        metrics: of the checkpoint.
        quantiles: of good pixels and of good images; None: as `Calibration.thresholds`.

    Raises:
        InputError: the checkpoint does not hold what the choice needs.
    """
    if choice in ("quantile", "none"):
        if calibration is None:
            raise InputError(
                "the checkpoint has no scores of good images; fit it on at least two, or use --threshold f1 "
                "or a number"
            )
        return calibration.no_false_alarm() if choice == "none" else calibration.thresholds(*quantiles)
    if choice in ("f1", "recall"):
        name = "image_threshold" if choice == "f1" else "image_recall_threshold"
        pixel, image = metrics.get("pixel_threshold"), metrics.get(name)
        if image is None:
            raise InputError(
                f"--threshold {choice} needs defective and good test images, which the checkpoint's data set "
                "lacks; use --threshold quantile or a number"
            )
        return Thresholds(image if pixel is None else pixel, image)
    try:
        value = float(choice)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"--threshold {choice}: use quantile, none, f1, recall or a number")
    return Thresholds(value, value)


def add_threshold_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of `choose_thresholds`."""
    parser.add_argument(
        "--threshold", default="quantile",
        help="quantile: of the scores of good images; none: above all of them; f1: where F1 is best on the test "
        "images; recall: where none of their defective images is missed; or a number",
    )  # fmt: skip
    parser.add_argument(
        "--pixelQuantile", type=fraction, default=PIXEL_QUANTILE,
        help="share of good pixels that stay below --threshold quantile",
    )  # fmt: skip
    parser.add_argument(
        "--imageQuantile", type=fraction, default=IMAGE_QUANTILE,
        help="share of good images that stay below --threshold quantile",
    )  # fmt: skip


def named_thresholds(metrics: dict, calibration: Calibration | None) -> dict[str, dict]:
    """Pixel and image threshold of each choice of `choose_thresholds` that can be had, and what it means."""
    rate = FALSE_ALARM if calibration is None else calibration.false_alarm
    good = "held-out" if calibration is not None and calibration.held_out else "training"
    meanings = {
        "quantile": f"a share of {rate:g} of good images is called defective, by {good} images",
        "none": f"no false alarm on {good} images",
        "f1": "best F1 on the test images",
        "recall": "no defective test image is missed",
    }
    named = {}
    for choice, meaning in meanings.items():
        with contextlib.suppress(InputError):
            thresholds = choose_thresholds(choice, metrics, calibration)
            named[choice] = {**asdict(thresholds), "meaning": meaning}
    return named


@dataclass
class TestSet:
    """The test images of a class.

    Attributes:
        data: the class.
        images: of it, as the model takes them.
        truth: the masks as the metrics need them, on the device.
    """

    data: AnomalyClass
    images: Images
    truth: GroundTruth
    __test__ = False  # for pytest: its name is no test's

    @classmethod
    def load(
        cls, data: AnomalyClass, config: PyramidFlowConfig, cache: str, num_workers: int, device: torch.device
    ) -> TestSet:  # fmt: skip
        paths = [image.path for image in data.test]
        images = Images(paths, config.image_size, cache, device, num_workers, "test images")
        truth = GroundTruth.from_masks(data.defective, load_masks(data, num_workers), device)
        return cls(data, images, truth)


# ---------------------------------------------------------------------------------- inspecting


Picture = np.ndarray | str | Path  # uint8 (h,w), (h,w,3) or (h,w,4), or a file


@dataclass(frozen=True)
class Defect:
    """A region of a mask, connected along sides and corners.

    Attributes:
        box: (x0,y0,x1,y1), the smallest around it; x1 and y1 lie outside.
        area: pixels.
        peak, mean: highest and mean score of its pixels.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mean: float


@dataclass(frozen=True)
class Inspection:
    """The verdict on one image.

    Attributes:
        score: of the image.
        defective: whether that reaches the image threshold.
        map: float32 (h,w), scores of pixels at the image's own size.
        mask: bool (h,w), the pixels that reach the pixel threshold.
        defects: the mask's regions, from the top.
        peak: (x,y) of the highest score.
    """

    score: float
    defective: bool
    map: np.ndarray
    mask: np.ndarray
    defects: list[Defect]
    peak: tuple[int, int]


def inspect(
    scorer, images: Picture | Sequence[Picture], thresholds: Thresholds | None = None, min_area: int = 1,
    roi: Picture | None = None, batch_size: int = 4,
) -> Inspection | list[Inspection]:  # fmt: skip
    """The verdict on an image, or a list of verdicts on a list of images.

    Args:
        scorer: a `Scorer` or an `export.OnnxScorer`.
        images: of any size.
        thresholds: None: those of `choose_thresholds("quantile")`.
        min_area: regions of fewer pixels are no defects.
        roi: white where the part is; what lies outside does not count.
        batch_size: images that are scored together.

    Raises:
        InputError: no image, an image that cannot be read, or there are no thresholds.
    """
    if not isinstance(images, (list, tuple)):
        return inspect(scorer, [images], thresholds, min_area, roi)[0]
    if thresholds is None:
        quantiles = PIXEL_QUANTILE, IMAGE_QUANTILE
        thresholds = choose_thresholds("quantile", scorer.metrics, scorer.calibration, quantiles)
    roi, results = None if roi is None else read_roi(roi), []
    for start in range(0, len(images), batch_size):
        originals = [to_rgb(image) for image in images[start : start + batch_size]]
        names = [f"image {start + i}" for i in range(len(originals))]
        resized = [resize_image(image, scorer.image_size) for image in originals]
        for image, (anomaly, score) in zip(
            originals, score_arrays(scorer, resized, names, roi), strict=True
        ):
            results.append(judge(anomaly, score, image.shape[:2], thresholds, min_area, roi))
    return results


def to_rgb(image: Picture) -> np.ndarray:
    """uint8 (h,w,3) of an array or a file; raises InputError if it is no image."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        raise InputError(
            f"an image of {array.dtype} {array.shape}; give uint8 (h,w), (h,w,3) or (h,w,4), or a list"
        )
    if not array.size:
        raise InputError(f"an image of no pixels, {array.shape}; give another")
    return np.asarray(Image.fromarray(array).convert("RGB"))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h,w,3) -> (*size,3), as training images are resized."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def score_arrays(
    scorer, images: Sequence[np.ndarray], names: Sequence, roi: np.ndarray | None
) -> list[tuple[np.ndarray, float]]:
    """(map (256,256), score) of each image, uint8 (h,w,3) of the model's size.

    Args:
        names: of the images, for messages.
        roi: bool of any size.

    Raises:
        InputError: a score is not finite.
    """
    inside = None if roi is None else torch.from_numpy(resize_roi(roi, MASK_SIZE))
    maps, scores = (x.cpu().numpy() for x in scorer.score(torch.from_numpy(np.stack(images)), inside))
    for name, anomaly, score in zip(names, maps, scores, strict=True):
        if not (np.isfinite(anomaly).all() and np.isfinite(score)):
            raise InputError(f"{name}: no finite score; use another model")
    return list(zip(maps, scores.tolist(), strict=True))


def judge(
    anomaly: np.ndarray, score: float, size: tuple[int, int], thresholds: Thresholds, min_area: int = 1,
    roi: np.ndarray | None = None,
) -> Inspection:  # fmt: skip
    """The verdict on an image of size (h, w), of its map (256,256) and score.

    Args:
        roi: bool of any size; outside, the map gets its lowest score.
    """
    values = np.asarray(Image.fromarray(anomaly).resize(size[::-1], Image.Resampling.BILINEAR))
    mask = values >= np.float32(thresholds.pixel)
    peak = values.argmax()
    if roi is not None:
        inside = resize_roi(roi, size)
        values, mask = np.where(inside, values, values.min()), mask & inside
        peak = np.where(inside, values, -np.inf).argmax()
    mask, defects = find_defects(mask, values, min_area)
    y, x = map(int, np.unravel_index(peak, size))
    return Inspection(score, score >= thresholds.image, values, mask, defects, (x, y))


def find_defects(
    mask: np.ndarray, values: np.ndarray, min_area: int = 1
) -> tuple[np.ndarray, list[Defect]]:
    """The mask (h,w) without regions of less than `min_area` pixels, and the others; values: scores (h,w)."""
    from skimage.measure import label, regionprops_table  # takes a moment that other commands save

    if not mask.any():
        return mask, []
    labels = label(mask, connectivity=2)
    if min_area > 1:
        large = np.bincount(labels.ravel()) >= min_area
        large[0] = False
        labels = (np.cumsum(large) * large)[labels]
        mask = labels > 0
    properties = ("bbox", "area", "intensity_max", "intensity_mean")
    columns = regionprops_table(labels, values, properties).values()
    return mask, [
        Defect((int(x0), int(y0), int(x1), int(y1)), int(area), float(peak), float(mean))
        for y0, x0, y1, x1, area, peak, mean in zip(*columns, strict=True)
    ]


def read_roi(roi: Picture) -> np.ndarray:
    """bool (h,w) of a file or array: true where it is brighter than half of its brightest.

    Raises:
        InputError: not readable, or all black.
    """
    if isinstance(roi, np.ndarray) and roi.dtype == bool:
        roi = roi.astype(np.uint8)
    name = roi if isinstance(roi, (str, Path)) else "the mask of the part"
    brightness = to_rgb(roi).max(2)
    if not brightness.any():
        raise InputError(f"{name} is all black; paint white what is to be inspected")
    return brightness > brightness.max() / 2


def resize_roi(roi: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool of any size -> `size`; what is not empty does not become empty."""
    gray = Image.fromarray(roi.astype(np.float32))  # 8 bits would lose what is small
    resized = np.asarray(gray.resize(size[::-1], Image.Resampling.BILINEAR))
    return resized >= min(0.5, resized.max())


# ---------------------------------------------------------------------------------- checkpoints


def find_checkpoint(path: Path | str) -> Path:
    """A file itself; of a run's folder, or the newest run in a folder or that fits a pattern, its last.pt.

    Which one it is, is printed unless it was given.

    Raises:
        InputError: no run is there.
    """
    path = Path(path)
    if path.is_dir():
        places = [path] if (path / LAST_FILE).is_file() else path.iterdir()
    elif not path.exists() and glob.has_magic(str(path)):
        places = map(Path, glob.glob(str(path)))
    else:
        return path
    found = [place / LAST_FILE for place in places if (place / LAST_FILE).is_file()]
    if not found:
        raise InputError(f"{path} holds no run's {LAST_FILE}; choose a run's folder, or a checkpoint")
    newest = max(found, key=lambda file: (file.stat().st_mtime_ns, file.parent.name))
    print(f"checkpoint {newest}")
    return newest


def save_checkpoint(path: Path, content: dict) -> None:
    """`util.save_tensors`, with format, version and library versions."""
    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    save_tensors(path, {"format": FORMAT, "version": VERSION, "versions": versions, **content})


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote; nothing in the file is executed.

    Raises:
        InputError: missing, damaged, or not such a file.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a PyramidFlow checkpoint; choose a .pt file that train.py wrote"
        )
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise InputError(
            f"{path} is of checkpoint version {str(version)[:20]}, this program reads {VERSION}; train again "
            "or use the program that wrote it"
        )
    return content


def read_config(given: dict) -> PyramidFlowConfig:
    """Raises ValueError unless `given` is what `PyramidFlowConfig.to_dict` gives."""
    names = {item.name for item in fields(PyramidFlowConfig)}
    if not isinstance(given, dict) or given.keys() != names:
        raise ValueError("not a configuration")
    for value in (*given.values(), *given["image_size"]):
        if not isinstance(value, (str, bool, int, list)) or (isinstance(value, int) and value > LARGEST):
            raise ValueError(f"configuration value {value!r}")
    if len(given["image_size"]) != 2:
        raise ValueError("image size")
    return PyramidFlowConfig(**given)


def read_model(config: PyramidFlowConfig, state_dict: dict[str, Tensor]) -> PyramidFlow:
    """Raises ValueError or RuntimeError unless the weights are those of the configuration, and finite."""
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("flow.")}
    if len(blocks) != config.num_stack * len(coupling_schedule(config.num_level)):
        raise ValueError("number of coupling blocks")
    with torch.device("meta"):
        model = PyramidFlow(config)
    expected = model.state_dict()
    for name in expected.keys() ^ state_dict.keys():
        raise ValueError(f"entry {name} is missing or unexpected")
    for name, x in state_dict.items():
        read_tensor(x, expected[name].shape, expected[name].dtype, f"entry {name}")
    model = PyramidFlow(config)
    model.load_state_dict(state_dict)
    return model


def read_tensor(x: object, shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
    """Raises ValueError unless `x` is a dense, finite tensor of that shape and dtype."""
    if (
        not isinstance(x, Tensor)
        or x.layout != torch.strided
        or x.device.type == "meta"
        or x.is_quantized
    ):
        raise ValueError(f"{name} is not a tensor")
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}")
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise ValueError(f"{name} has fewer numbers than its shape")
    return read_finite(x, name)


def read_finite(x: Tensor, name: str) -> Tensor:
    """Raises ValueError unless all numbers are finite."""
    if not x.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return x


def pack_templates(templates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K,C,H,W) -> the first (1,C,H,W), the others' differences to it in steps (K-1,C,H,W) int8, steps (C,).

    Steps are powers of two, so that packing what was unpacked gives the same numbers again.
    """
    first, others = templates[:1], templates[1:] - templates[:1]
    largest = others.abs().amax((0, 2, 3)) if len(others) else templates.new_zeros(templates.shape[1])
    steps = torch.exp2((largest.clamp(min=1e-30) / 127).log2().ceil())
    codes = (others / steps[:, None, None]).round().clamp(-127, 127).to(torch.int8)
    return first.contiguous(), codes.contiguous(), steps


def unpack_templates(first: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """(K,C,H,W) of what `pack_templates` gave."""
    return torch.cat([first, first + codes * steps[:, None, None]])


def lay_out(templates: Tensor) -> Tensor:
    """The same (K,C,H,W), in the memory format in which it is compared with latents."""
    if len(templates) == 1:
        return templates.contiguous(memory_format=kernels.MEMORY_FORMAT)
    return kernels.bank_layout(templates)


def read_templates(config: PyramidFlowConfig, given: list) -> Tensors:
    """Raises ValueError unless `given` are packed templates for the configuration, and finite."""
    if not isinstance(given, list) or len(given) != config.num_level:
        raise ValueError("number of template levels")
    if not all(
        isinstance(parts, tuple)
        and len(parts) == 3
        and all(isinstance(x, Tensor) and x.dim() for x in parts)
        for parts in given
    ):
        raise ValueError("templates that are not packed")
    counts = {len(codes) for _, codes, _ in given}
    if len(counts) != 1 or min(counts) >= MOST_TEMPLATES:
        raise ValueError("number of templates")
    templates, (count,) = [], counts
    for i, (first, codes, steps) in enumerate(given):
        shape, name = (config.channels, *config.level_size(i)), f"template level {i}"
        read_tensor(first, (1, *shape), torch.float32, name)
        read_tensor(codes, (count, *shape), torch.int8, name)
        read_tensor(steps, shape[:1], torch.float32, name)
        templates.append(read_finite(unpack_templates(first, codes, steps), name))
    return tuple(templates)


def read_count(given: object, most: int) -> int:
    """Raises ValueError unless `given` is a number from 1 to `most`."""
    if type(given) is not int or not 1 <= given <= most:
        raise ValueError("number of typical templates")
    return given


def read_sigma(config: PyramidFlowConfig, given: list[Tensor]) -> Tensors:
    """Raises ValueError unless `given` is the whitening of templates for the configuration."""
    if not isinstance(given, list) or len(given) != config.num_level:
        raise ValueError("number of whitening levels")
    sigma = tuple(read_tensor(s, (config.channels,), torch.float32, "whitening") for s in given)
    if any((s <= 0).any() for s in sigma):
        raise ValueError("whitening that is not positive")
    return sigma


def read_smooth(given: float) -> float:
    """Raises ValueError unless `given` is what --smooth takes."""
    if not isinstance(given, (int, float)) or not 0 <= given <= MOST_SMOOTH:
        raise ValueError("smoothing")
    return given


def read_metrics(given: dict) -> dict:
    """Raises ValueError unless `given` are finite numbers by name, None, and the name of the score."""
    for name, value in dict(given).items():
        number_ = isinstance(value, (int, float)) and np.isfinite(value)
        if not (number_ or value is None or (name == "score" and value in SCORES)):
            raise ValueError(f"metric {name}")
    return dict(given)
