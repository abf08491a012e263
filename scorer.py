"""From a trained model to scores: templates, anomaly maps, and the file that holds them.

    images uint8 (B,h,w,3) -> latents z -> |z - template|, composed -> anomaly maps (B,H,W) -> scores (B,)

`Scorer.fit` makes one of a model and good images, `Scorer.load` reads one from a file; `Scorer.inspect` gives
the verdict on an image (verdict.py).  Two scores:

paper: one template, the mean latent of the good images (Sec. 3.4).
bank: the mean and several good images as templates, differences divided by their usual size, and at each
    pixel the map of the template that fits best (docs/plus.md).  Any trained weights will do.
"""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from autoFlow import Tensors
from dataset import AnomalyClass, Images, evaluation_order, load_masks, normalize
from metrics import GroundTruth, all_finite
from model import PyramidFlow, PyramidFlowConfig, compare, coupling_schedule
from util import (
    DivergedError,
    InputError,
    apply_precision,
    choose_precision,
    free_memory,
    gather,
    is_dense,
    is_plain,
    load_tensors,
    progress,
    save_tensors,
    share,
    shortened,
    total,
)
from verdict import Calibration, Inspector, Scored, distribution, is_rate, named_thresholds, require

FORMAT, VERSION = "PyramidFlow checkpoint", 3
LARGEST = 2**14  # of any number in a configuration: a damaged file must not make a huge model
LAST_FILE = "last.pt"  # of a run, the scorer of its last epoch
NO_MODEL = (".json", ".csv", ".txt", ".html", ".png", ".jpg")
SCORES = ("paper", "bank")
IMAGE_SCORES = ("max", "top", "detail")
USUAL_IMAGE_SCORE = {"paper": "max", "bank": "detail"}
TOP_ONE_IN = 1000  # pixels, whose mean is the image's score by "top" and "detail"
DETAIL = 1.0  # deviation in pixels of the Gaussian over a map that "detail" takes away from it
MOST_SMOOTH = 64.0
LATENT_SHARE = 1 / 4  # of the free memory, for latents that are needed more than once
MOST_TEMPLATES = 1024
TYPICAL = 0.75  # share of good images that an image's score may take templates from: an odd one excuses defects
COARSE_SIZE = 64  # latents are chosen by their two coarsest levels, averaged to at most this size
CPU_BATCH_ELEMENTS = 2**24  # of features: what computes a kernel's spectrum once for several images
CUDA_BATCH_ELEMENTS = 2**26
BANK_ELEMENTS = 2**24  # of maps that are compared with all templates at once: 64 MiB, several times over
CUDA_BYTES = 64  # of memory, generously, per element of a feature: stem, hidden maps, latents


@dataclass(frozen=True)
class ScoreOptions:
    """How good images become a scorer.

    Attributes:
        score: "paper", one template, the mean; "bank", the mean and several good images.
        num_template: K of the bank; with 1 the bank is the mean, whitened.
        whiten: divide the bank's differences by their usual size, for each level and channel.
        smooth: deviation in pixels of a Gaussian over the bank's anomaly maps; 0: none.
        image_score: of an image, "max", its map's highest pixel; "top", the mean of the highest in a thousand;
            "detail", the same of what a Gaussian takes away from the map, and `see_level`; "auto", the usual one
            of the score.
    """

    score: str = "paper"
    num_template: int = 64
    whiten: bool = True
    smooth: float = 1.0
    image_score: str = "auto"

    def __post_init__(self):
        if self.image_score == "auto":
            object.__setattr__(self, "image_score", USUAL_IMAGE_SCORE[self.score])

    @property
    def with_papers(self) -> list[ScoreOptions]:
        """The paper's score, and these options unless they are the paper's."""
        usual = self.image_score == USUAL_IMAGE_SCORE[self.score]
        papers = ScoreOptions(image_score="auto" if usual else self.image_score)
        return [papers, self] if self.score == "bank" else [papers]


@dataclass
class Scorer(Inspector):
    """A model with templates and thresholds: images in, anomaly maps out.

    Attributes:
        model: in eval mode, on the device.
        templates: L levels (K,C,H/2^i,W/2^i) there, in units of `sigma`; the first is the mean.
        num_typical: so many of them, the first ones, are typical: image scores "max" and "top" come from these.
        sigma: L tensors (C,), by which differences are divided; None: they are not.
        smooth: deviation in pixels of the Gaussian over maps; 0: none.
        image_score: one of `IMAGE_SCORES`.
        roi: bool (H,W) of the map size, outside of which nothing counts; None: everything does.
        calibration: scores of good images, held-out ones if there are; None if there were too few.
        metrics: of the class's test images, with the thresholds of best F1; may be empty.
        class_name: what it was fitted on.
        settings: flags of the training.
    """

    model: PyramidFlow
    templates: Tensors
    num_typical: int = 1
    sigma: Tensors | None = None
    smooth: float = 0.0
    image_score: str = "max"
    roi: Tensor | None = None
    calibration: Calibration | None = None
    metrics: dict = field(default_factory=dict)
    class_name: str = ""
    settings: dict = field(default_factory=dict)

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
        """Anomaly maps (B,H,W) of the map size and scores (B,) of images uint8 (B,h,w,3) of the model's size.

        Args:
            roi: bool (H,W), where scores are taken, instead of the scorer's own; maps are whole.
        """
        latents = latents_of(self.model, images.to(self.device))
        return self.score_latents(latents, roi=None if roi is None else roi.to(self.device))

    def score_latents(
        self, latents: Tensors, left_out: Tensor | None = None, mean_factor: float = 1.0,
        roi: Tensor | None = None,
    ) -> Scored:  # fmt: skip
        """Anomaly maps and scores of a latent pyramid (Sec. 3.4).

        Args:
            roi: as in `score`.
            left_out: (B,) the template that each image is not compared with; -1: none.
            mean_factor: by which differences to the first template, the mean, are multiplied.
        """
        maps, typical = self.differences(latents, left_out, mean_factor)
        maps = resize_maps(maps, self.map_size)
        if self.image_score == "detail":
            judged = maps - gaussian(maps, DETAIL)
        else:
            judged = maps if typical is None else resize_maps(typical, self.map_size)
        roi, maps = self.roi if roi is None else roi, gaussian(maps, self.smooth)
        return Scored(maps, self.image_scores(judged, maps, roi))

    def image_scores(self, judged: Tensor, maps: Tensor, roi: Tensor | None) -> Tensor:
        """`image_scores` (B,) of what is judged; of details with `see_level` of the anomaly maps; both (B,H,W)."""
        scores = image_scores(judged, self.image_score, roi)
        if self.image_score != "detail" or self.calibration is None:
            return scores
        return see_level(scores, maps, self.calibration.thresholds().pixel, roi)

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
        parts = zip(*(z.split(count) for z in latents), strict=True)
        left_out = itertools.repeat(None) if left_out is None else left_out.split(count)
        found = [self._best_of(*part, mean_factor) for part in zip(parts, left_out, strict=False)]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def _best_of(self, latents: Tensors, left_out: Tensor | None, mean_factor: float) -> Tensors:
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
        pair = self._whitened(latents), self.templates
        return compare(self.model.pyramid, *pair, torch.abs, self.config.contrast)

    def _differences_to_all(self, latents: Tensors) -> Tensor:
        """The same for each template, (B,K,H,W)."""
        latents, templates = self._whitened(latents), self.templates
        if self.config.contrast == "composed":
            latents, templates = ((self.model.pyramid.compose(x),) for x in (latents, templates))
        pairs = zip(latents, templates, strict=True)
        return self.model.pyramid.compose_maps(tuple(kernels.template_distances(z, t) for z, t in pairs))

    def _whitened(self, latents: Tensors) -> Tensors:
        if self.sigma is None:
            return latents
        return tuple(z / s[:, None, None] for z, s in zip(latents, self.sigma, strict=True))

    def empty_scores(self) -> Scored:
        """Of no image."""
        zeros = torch.zeros(0, *self.map_size, device=self.device)
        return Scored(zeros, zeros[:, 0, 0])

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
    def map_size(self) -> tuple[int, int]:
        return self.config.map_size

    @property
    def options(self) -> ScoreOptions:
        """What it was fitted with; of templates, as many as there are."""
        count, whiten = len(self.templates[0]), self.sigma is not None
        score = "bank" if count > 1 or whiten or self.smooth else "paper"
        return ScoreOptions(score, count, whiten, self.smooth, self.image_score)

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
            "image_score": self.image_score,
            "roi": None if self.roi is None else self.roi.cpu(),
            "metrics": self.metrics,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            # For people: `load` finds them anew.
            "thresholds": named_thresholds(self.metrics, self.calibration, self.image_score),
        }
        save_checkpoint(path, content)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", precision: str = "auto") -> Scorer:
        """Read what `save` wrote, as every run does; nothing in the file is executed.

        Raises:
            InputError: it is missing, damaged, of another version, or holds what does not fit together.
        """
        path, device = find_checkpoint(path), torch.device(device)
        if path.suffix.lower() == ".onnx":
            raise InputError(f"{path} is an ONNX file, whose scores are fixed; choose the last.pt it is of")
        content = load_checkpoint(path)
        if "optimizer" in content:
            raise InputError(f"{path} is what --resume needs; choose last.pt beside it")
        try:
            scorer = cls._from_content(content)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else shortened(str(error))
            message = f"{path} is damaged ({reason}); use another checkpoint, or train again"
            raise InputError(message) from None
        precision = choose_precision(precision, device, scorer.settings.get("precision"))
        return scorer.to(device, precision)

    @classmethod
    def _from_content(cls, content: dict) -> Scorer:
        """Raises one of many errors unless the content is what `save` writes."""
        config = read_config(content["config"])
        model = read_model(config, content["model"]).eval()
        templates = read_templates(config, content["templates"])
        sigma, calibration = content["sigma"], content["calibration"]
        num_typical, smooth = content["num_typical"], content["smooth"]
        require(isinstance(content["class"], str), "class name")
        typical = type(num_typical) is int and 1 <= num_typical <= len(templates[0])
        require(typical, "number of typical templates")
        require(isinstance(smooth, (int, float)) and 0 <= smooth <= MOST_SMOOTH, "smoothing")
        image_score, roi = content.get("image_score", "max"), content.get("roi")  # old files lack them
        settings = dict(content["settings"])
        flat = (x for value in settings.values() for x in (value if isinstance(value, list) else [value]))
        require(all(isinstance(x, str) for x in settings) and all(map(is_plain, flat)), "settings")
        require(image_score in IMAGE_SCORES, "image score")
        if roi is not None:
            read_tensor(roi, config.map_size, torch.bool, "region of the part")
            require(bool(roi.any()), "region of the part is empty")
        return cls(
            model, templates, num_typical,
            None if sigma is None else read_sigma(config, sigma), smooth, image_score, roi,
            None if calibration is None else Calibration.from_dict(calibration),
            read_metrics(content["metrics"]), content["class"], settings,
        )  # fmt: skip

    def to(self, device: torch.device, precision: str) -> Scorer:
        """Move everything to the device, its networks to compute in the precision."""
        self.model.to(device).compute_networks_in(apply_precision(precision))
        self.templates = tuple(lay_out(t.to(device)) for t in self.templates)
        self.sigma = None if self.sigma is None else tuple(s.to(device) for s in self.sigma)
        self.roi = None if self.roi is None else self.roi.to(device)
        return self


@torch.no_grad()
def score_all(scorers: Sequence[Scorer], images: Images, description: str = "test") -> list[Scored]:
    """Maps and scores of all images, in every process, by each scorer of one model.

    Raises:
        DivergedError: a score is not finite.
    """
    model, device = scorers[0].model.eval(), scorers[0].device
    indices = evaluation_order(share(range(len(images))), batch_size(model.config, device))
    parts = [[scorer.empty_scores()] for scorer in scorers]
    for batch in progress(images.batches(indices), description, len(indices)):
        latents = latents_of(model, batch)
        for scorer, found in zip(scorers, parts, strict=True):
            found.append(scorer.score_latents(latents))
    return [collect(found, len(images)) for found in parts]


def collect(parts: Sequence[Scored], count: int) -> Scored:
    """The scores of all images, of the parts that each process has.

    Raises:
        DivergedError: one is not finite.
    """
    found = Scored(*(gather(torch.cat(x), count) for x in zip(*parts, strict=True)))
    if not all(map(all_finite, found)):
        raise DivergedError("anomaly maps are no longer finite")
    return found


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,H,W) -> (B,*size), where maps and masks meet."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", antialias=True)[:, 0]


def image_scores(maps: Tensor, kind: str, roi: Tensor | None = None) -> Tensor:
    """(B,) of maps (B,H,W), inside of `roi`, bool (H,W).

    Args:
        maps: what is judged; for "detail" what a Gaussian takes away from anomaly maps.
        kind: one of `IMAGE_SCORES`.
    """
    inside = maps if roi is None else maps.where(roi, -torch.inf)
    if kind == "max":
        return inside.amax((1, 2))
    highest = inside.flatten(1).topk(math.ceil(maps[0].numel() / TOP_ONE_IN)).values
    if roi is None:
        return highest.mean(1)
    count = (roi.sum() + TOP_ONE_IN - 1) // TOP_ONE_IN  # a graph may not depend on its value
    return highest.where(torch.arange(highest.shape[1], device=maps.device) < count, 0).sum(1) / count


def see_level(details: Tensor, maps: Tensor, level: float, roi: Tensor | None = None) -> Tensor:
    """Image scores (B,) by "detail"; of an image of whose map (B,H,W) most reaches the level, the highest pixel.

    An image that is unlike the good ones all over, such as a black one, may have no detail.

    Args:
        level: what one pixel in a thousand of good images reaches.
        roi: bool (H,W), as in `image_scores`.
    """
    inside = torch.ones_like(maps[0], dtype=torch.bool) if roi is None else roi
    reached = ((maps >= level) & inside).sum((1, 2))
    return torch.where(2 * reached > inside.sum(), torch.maximum(details, image_scores(maps, "max", roi)), details)


def gaussian(maps: Tensor, deviation: float) -> Tensor:
    """Maps (B,H,W), smoothed; reflected at the border."""
    if not deviation:
        return maps
    from torchvision.transforms.functional import gaussian_blur  # see model.py

    size = 2 * min(int(4 * deviation + 0.5), *(n - 1 for n in maps.shape[-2:])) + 1
    return gaussian_blur(maps, [size, size], [deviation] * 2)


def latents_of(model: PyramidFlow, images: Tensor) -> Tensors:
    """Latent pyramid, L levels (B,C,H/2^i,W/2^i), of images uint8 (B,h,w,3)."""
    return model(normalize(images))[0]


def batch_size(config: PyramidFlowConfig, device: torch.device) -> int:
    """Images that are scored together; on CUDA no more than half of the free memory holds."""
    height, width = config.level_size(0)
    elements = CPU_BATCH_ELEMENTS
    if device.type == "cuda":
        elements = min(CUDA_BATCH_ELEMENTS, free_memory(device) // 2 // CUDA_BYTES)
    largest = max(height * width * config.channels, math.prod(config.map_size))
    return max(1, elements // largest)


# ------------------------------------------------------------------------------------ fitting


def fit_all(
    model: PyramidFlow, images: Images, options: Sequence[ScoreOptions], template: str = "mean",
    class_name: str = "", settings: dict | None = None, held_out: Images | None = None,
    roi: Tensor | None = None,
) -> list[Scorer]:  # fmt: skip
    """`Scorer.fit` for each of the options, with one pass of the images through the network.

    Args:
        held_out: good images that are not among `images`; the calibration is theirs then.
        roi: bool (H,W) of the map size.
    """
    model.eval()
    latents = Latents(model, images)
    roi = None if roi is None else roi.to(latents.device)
    statistics = Statistics.of(latents, any(option.score == "bank" for option in options))
    zero = tuple(torch.zeros_like(t) for t in statistics.mean)
    mean = zero if template == "zero" else statistics.mean
    scorers = []
    for option in options:
        scorer = Scorer(model, mean, class_name=class_name, settings=settings or {})
        scorer.image_score, scorer.roi = option.image_score, roi
        chosen = make_bank(scorer, latents, statistics, option) if option.score == "bank" else []
        if len(images) > 1 and not held_out:
            scorer.calibration = calibrate(scorer, latents, chosen, template)
        scorers.append(scorer)
    if held_out:
        found = score_all(scorers, held_out, "held-out images")
        for scorer, scored in zip(scorers, found, strict=True):
            scorer.calibration = replace(distribution(scored, roi), held_out=True)
    rate = (settings or {}).get("falseAlarm")
    for scorer in scorers:
        if scorer.calibration is not None and is_rate(rate):
            scorer.calibration = replace(scorer.calibration, false_alarm=rate)
    return scorers


def make_bank(scorer: Scorer, latents: Latents, statistics: Statistics, option: ScoreOptions) -> list[int]:
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


def left_out_factor(count: int, template: str) -> float:
    """By which a map against the template is multiplied to be that against the template without the image itself.

    The mean m of N latents and the mean m' of all but z satisfy z - m' = (z - m) N / (N - 1), and a map is
    linear in |z - m|: the map against m' is the map against m times N / (N - 1), exactly.  Zero stays zero.
    """
    return count / (count - 1) if template == "mean" else 1.0


def calibrate(scorer: Scorer, latents: Latents, chosen: list[int], template: str) -> Calibration:
    """Score the images that the scorer was fitted on, each as if it had not been one of them.

    Its map is that of `left_out_factor`.  An image in the bank is compared with the other templates only.
    The weights have seen the image, which this does not correct.

    Args:
        chosen: the images in the bank.
        template: "mean", of these images; or "zero".
    """
    count = len(latents.images)
    place = torch.full((count,), -1)
    place[chosen] = 1 + torch.arange(len(chosen))
    factor = left_out_factor(count, template)
    parts = [scorer.empty_scores()]
    for indices, levels in latents:
        left_out = place[indices].to(latents.device) if chosen else None
        parts.append(scorer.score_latents(levels, left_out, factor))
    return distribution(collect(parts, count), scorer.roi)


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
        cls, data: AnomalyClass, config: PyramidFlowConfig, cache: str, num_workers: int, device: torch.device,
        roi: Tensor | None = None,
    ) -> TestSet:  # fmt: skip
        paths = [image.path for image in data.test]
        images = Images(paths, config.image_size, cache, device, num_workers, "test images")
        masks = load_masks(data, num_workers, config.map_size, roi)
        return cls(data, images, GroundTruth.from_masks(data.defective, masks, device, roi))


# ---------------------------------------------------------------------------------- checkpoints


def find_checkpoint(path: Path | str) -> Path:
    """A file itself; of a run's folder, or the newest run in a folder or that fits a pattern, its last.pt.

    Which one it is, is printed unless it was given.

    Raises:
        InputError: no run is there.
    """
    path = Path(path)
    if path.is_dir():
        found = list(path.glob(LAST_FILE)) or list(path.glob(f"*/{LAST_FILE}"))
    elif not path.exists() and glob.has_magic(str(path)):
        found = list(map(Path, glob.glob(f"{path}/{LAST_FILE}")))
    elif path.is_file() and path.suffix.lower() in NO_MODEL:
        raise InputError(f"{path} is no model; choose a run's folder, or the {LAST_FILE} in it")
    else:
        return path
    if not found:
        raise InputError(f"{path} holds no run's {LAST_FILE}; choose a run's folder, or a checkpoint")
    newest = max(found, key=lambda file: (file.stat().st_mtime_ns, file.parent.name))
    print(f"checkpoint {newest}")
    return newest


def save_checkpoint(path: Path, content: dict) -> None:
    """`util.save_tensors`, with format, version and library versions."""
    versions = {"torch": str(torch.__version__), "torchvision": metadata.version("torchvision")}
    save_tensors(path, {"format": FORMAT, "version": VERSION, "versions": versions, **content})


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote; nothing in the file is executed.

    Raises:
        InputError: missing, damaged, or not such a file.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        remedy = "choose a .pt file that train.py wrote"
        raise InputError(f"{path} is not a PyramidFlow checkpoint; {remedy}")
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        version = version if isinstance(version, int) and 0 <= version < 1000 else "unknown"
        raise InputError(
            f"{path} is of checkpoint version {version}, this program reads {VERSION}; train again "
            "or use the program that wrote it"
        )
    return content


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


# What a file holds can be anything.  Each of these gives it back, or raises a ValueError that names it.


def read_config(given: dict) -> PyramidFlowConfig:
    """What `PyramidFlowConfig.to_dict` gave."""
    names = {item.name for item in fields(PyramidFlowConfig)}
    known = isinstance(given, dict) and names - {"map_size"} <= given.keys() <= names
    require(known, "not a configuration")  # those without a map size have the default
    for name, value in given.items():
        kind, parts = type(getattr(PyramidFlowConfig, name)), [value]  # of the default
        if kind is tuple:
            kind, parts = int, value if isinstance(value, list) and len(value) == 2 else [None]
        usual = all(type(x) is kind and (kind is not int or 1 <= x <= LARGEST) for x in parts)
        require(usual, f"configuration value {name}")
    return PyramidFlowConfig(**given)


def read_model(config: PyramidFlowConfig, state_dict: dict[str, Tensor]) -> PyramidFlow:
    """The model that has the configuration and these weights."""
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("flow.")}
    count = config.num_stack * len(coupling_schedule(config.num_level))
    require(len(blocks) == count, "number of coupling blocks")
    with torch.device("meta"):
        expected = PyramidFlow(config).state_dict()
    for name in expected.keys() ^ state_dict.keys():
        raise ValueError(f"entry {name} is missing or unexpected")
    for name, x in state_dict.items():
        read_tensor(x, expected[name].shape, expected[name].dtype, f"entry {name}")
    model = PyramidFlow(config)
    model.load_state_dict(state_dict)
    return model


def read_tensor(x: object, shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
    """A dense, finite tensor of that shape and dtype."""
    require(is_dense(x), f"{name} is not a tensor")
    same = tuple(x.shape) == tuple(shape) and x.dtype == dtype
    require(same, f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}")
    enough = x.numel() * x.element_size() <= x.untyped_storage().nbytes()
    require(enough, f"{name} has fewer numbers than its shape")
    require(bool(x.isfinite().all()), f"{name} is not finite")
    return x


def read_templates(config: PyramidFlowConfig, given: list) -> Tensors:
    """Templates for the configuration, of what `pack_templates` gave for each level."""
    right = isinstance(given, list) and len(given) == config.num_level
    require(right, "number of template levels")
    for parts in given:
        packed = isinstance(parts, tuple) and len(parts) == 3
        packed = packed and all(isinstance(x, Tensor) and x.dim() for x in parts)
        require(packed, "templates that are not packed")
    count = len(given[0][1])
    require(count < MOST_TEMPLATES, "number of templates")
    templates = []
    for i, (first, codes, steps) in enumerate(given):
        shape, name = (config.channels, *config.level_size(i)), f"template level {i}"
        read_tensor(first, (1, *shape), torch.float32, name)
        read_tensor(codes, (count, *shape), torch.int8, name)
        read_tensor(steps, shape[:1], torch.float32, name)
        templates.append(unpack_templates(first, codes, steps))
        require(bool(templates[-1].isfinite().all()), f"{name} is not finite")
    return tuple(templates)


def read_sigma(config: PyramidFlowConfig, given: list[Tensor]) -> Tensors:
    """The whitening of templates for the configuration."""
    right = isinstance(given, list) and len(given) == config.num_level
    require(right, "number of whitening levels")
    sigma = tuple(read_tensor(s, (config.channels,), torch.float32, "whitening") for s in given)
    require(all((s > 0).all() for s in sigma), "whitening that is not positive")
    return sigma


def read_metrics(given: dict) -> dict:
    """Finite numbers by name, None, and the name of the score."""
    for name, value in dict(given).items():
        finite = isinstance(value, (int, float)) and np.isfinite(value)
        right = finite or value is None or (name == "score" and value in SCORES)
        require(right, f"metric {name}")
    return dict(given)
