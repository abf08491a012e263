"""From scores to decisions: thresholds that good images give, and the verdict on an image of any size.

maps (N,H,W) and scores (N,) of good images -> Calibration -> Thresholds
image -> its map and score, by `scorer.Scorer` or `export.OnnxScorer` -> Inspection, with its defects
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import alpha_varies, image_shape, open_image, read_image
from metrics import sorted_scores
from util import InputError, fraction, size_text

PIXEL_QUANTILE, FALSE_ALARM, LOWEST_RATE = 0.999, 0.05, 1e-4
IMAGE_QUANTILE = None  # of good images: the rest is the false-alarm rate that was chosen in training
INTERVAL = (0.025, 0.975)
PROPORTION_MARGIN = 0.02  # by which the sides of --roi and of an image may differ in their proportion
RECALL_MARGIN = 0.01  # scores in another precision, or resized in an ONNX graph, differ by up to 0.7 %
LOWEST, HIGHEST = (float(np.finfo(np.float32).tiny), 1e30)  # of thresholds, and of scores that mean something
COLOR_QUANTILE = 0.999  # of good pixels; twice that score has the scale's highest color
# Where the distribution of pixel scores is stored: every percent, and ever finer towards the highest.
LEVELS = np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -6, 41)[1:], [1.0]])

Picture = np.ndarray | str | Path  # uint8 (h,w), (h,w,3) or (h,w,4), or a file


class Scored(NamedTuple):
    """Anomaly maps (N,H,W), and the images' scores (N,)."""

    maps: Tensor
    scores: Tensor


def require(condition: bool, problem: str) -> None:
    """Of what a file holds: raises ValueError unless it is so."""
    if not condition:
        raise ValueError(problem)


# ---------------------------------------------------------------------------------- thresholds


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

    @classmethod
    def from_dict(cls, given: object) -> Calibration:
        """Raises ValueError unless `given` is what `dataclasses.asdict` gives."""
        names, more = {"image_scores", "pixel_scores"}, {"held_out", "false_alarm"}
        known = isinstance(given, dict) and names <= given.keys() <= names | more
        require(known, "not a calibration")
        require(type(given.get("held_out", False)) is bool, "held-out images that are not true or false")
        require(is_rate(given.get("false_alarm", FALSE_ALARM)), "no false-alarm rate")
        for scores in (given[name] for name in names):
            is_list = isinstance(scores, list) and scores and all(isinstance(x, float) for x in scores)
            require(is_list, "not a list of scores")
            ascending = np.isfinite(scores).all() and (np.diff(scores) >= 0).all()
            require(ascending, "scores that are not ascending")
        require(len(given["pixel_scores"]) == len(LEVELS), "wrong number of scores")
        return cls(**given)

    def thresholds(
        self, pixel_quantile: float = PIXEL_QUANTILE, image_quantile: float | None = IMAGE_QUANTILE
    ) -> Thresholds:
        """Thresholds below which these shares of good pixels and of good images stay.

        Args:
            image_quantile: None: all but the false-alarm rate.  Of n held-out images the quantile q is the
                conformal one, the ceil((n+1)q)-th smallest score: of new good images, a share of q stays below
                it on average.  Where n is too small for that it is the largest.
        """
        quantile = 1 - self.false_alarm if image_quantile is None else image_quantile
        if self.held_out:
            image = self.image_scores[min(self.rank(quantile), len(self.image_scores)) - 1]
        else:
            image = float(np.quantile(self.image_scores, quantile))
        # Of images that are all alike scores are 0, which is not defective.
        return Thresholds(*(max(x, LOWEST) for x in (self._pixel_score(pixel_quantile), image)))

    def rank(self, quantile: float) -> int:
        """ceil((n+1)q), at least 1; n + 1 if there are too few images for it."""
        return max(1, math.ceil((len(self.image_scores) + 1) * quantile - 1e-9))

    def no_false_alarm(self) -> Thresholds:
        """Just above the highest scores."""
        highest = np.float32([self.pixel_scores[-1], self.image_scores[-1]])
        return Thresholds(*np.nextafter(highest, np.float32(np.inf)).tolist())

    @property
    def meaning(self) -> str:
        """What the usual image threshold is, in a few words."""
        count, quantile = len(self.image_scores), 1 - self.false_alarm
        if self.held_out and self.rank(quantile) > count:
            return f"the highest of {count} held-out image{'s' * (count != 1)}"
        return f"{100 * quantile:.4g}% of {'held-out' if self.held_out else 'training'} images"

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
            line += f"a quantile of {count} training images, which the weights have seen; new good images score "
            return line + "higher: --holdout 0.2 tells how many are called defective"
        rank = self.rank(quantile)
        mean, low, high = self.expected_false_alarms(min(rank, count))
        line += f"expect {mean:.1%} of new good images to be called defective (95 % interval {low:.1%} to "
        line += f"{high:.1%}), by {count} held-out ones"
        if rank > count:
            needed = math.ceil(quantile / (1 - quantile) - 1e-9)
            line += f", which are too few: it is their largest score; hold out {needed}"
        return line

    def color_scale(self) -> tuple[float, float]:
        """(lowest, highest) score of a color scale on which good images look good."""
        low = self.pixel_scores[0]
        return low, max(2 * self._pixel_score(COLOR_QUANTILE), low + 1e-12 + 1e-6 * abs(low))

    def _pixel_score(self, quantile: float) -> float:
        return float(np.interp(quantile, LEVELS, self.pixel_scores))


def distribution(scored: Scored, roi: Tensor | None = None) -> Calibration:
    """What there is to know about the scores of good images, of pixels inside of `roi`, bool (H,W)."""
    maps = scored.maps if roi is None else scored.maps[:, roi]
    pixels = sorted_scores(maps.flatten()).cpu().numpy()
    places = LEVELS * (len(pixels) - 1)
    below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
    pixel_scores = pixels[below] + (places - below) * (pixels[above] - pixels[below])
    return Calibration(scored.scores.sort().values.tolist(), pixel_scores.tolist())


def is_rate(given: object) -> bool:
    """Whether `given` is what --falseAlarm takes."""
    return isinstance(given, float) and LOWEST_RATE <= given <= 1


def choose_thresholds(
    choice: str, metrics: dict, calibration: Calibration | None,
    quantiles: tuple[float, float | None] = (PIXEL_QUANTILE, IMAGE_QUANTILE), image_score: str = "max",
) -> Thresholds:  # fmt: skip
    """`--threshold`: quantile, none, f1, recall, or a number for images, or two for images and pixels.

    quantile: of good pixels and of good images.  none: just above the highest of them.  f1: the best F1 on the
    test images.  recall: an image threshold that misses no defective test image, with f1's for pixels.

    Where there is none for pixels, it is that of images if the highest pixel is their score, else the quantile.

    Args:
        metrics: of the checkpoint.
        quantiles: of good pixels and of good images; None: as `Calibration.thresholds`.
        image_score: of the checkpoint.

    Raises:
        InputError: the checkpoint does not hold what the choice needs.
    """
    if choice in ("quantile", "none"):
        if calibration is None:
            remedy = "fit it on at least two, or use --threshold f1 or a number"
            raise InputError(f"the checkpoint has no scores of good images; {remedy}")
        return calibration.no_false_alarm() if choice == "none" else calibration.thresholds(*quantiles)
    if choice in ("f1", "recall"):
        name = "image_threshold" if choice == "f1" else "image_recall_threshold"
        pixel, image = metrics.get("pixel_threshold"), metrics.get(name)
        if image is None:
            raise InputError(
                f"--threshold {choice} needs metrics of defective and good test images, which the checkpoint "
                "lacks; use --threshold quantile or a number, or a file of train.py or of evaluate.py --score"
            )
        if choice == "recall":
            image -= RECALL_MARGIN * abs(image)
    else:
        image, pixel = _numbers(choice)
    if pixel is None:
        alike = image_score == "max" or calibration is None
        pixel = image if alike else calibration.thresholds(*quantiles).pixel
    return Thresholds(pixel, image)


def _numbers(choice: str) -> tuple[float, float | None]:
    """The numbers for images and for pixels in a text such as 0.5 or 0.5,3; raises InputError for another."""
    with contextlib.suppress(ValueError):
        image, *pixel = map(float, choice.split(","))
        if len(pixel) < 2 and all(abs(x) < HIGHEST for x in (image, *pixel)):  # false of NaN, too
            return image, pixel[0] if pixel else None
    raise InputError(
        f"--threshold {choice}: use quantile, none, f1, recall, a number, or two with a comma: IMAGE,PIXEL"
    )


def add_threshold_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of `thresholds_of_flags`."""
    add = parser.add_argument
    # fmt: off
    add("--threshold", default="auto",
        help="quantile: of the scores of good images; none: above all of them; f1: where F1 is best on the test "
        "images; recall: where none of their defective images is missed; a number, or two, IMAGE,PIXEL; auto: "
        "what an .onnx file was exported with, else, or with one of the next two, quantile")
    add("--pixelQuantile", type=fraction, default=PIXEL_QUANTILE,
        help="share of good pixels that stay below --threshold quantile")
    add("--imageQuantile", type=fraction, default=IMAGE_QUANTILE,
        help="share of good images that stay below --threshold quantile")
    # fmt: on


def thresholds_of_flags(args: argparse.Namespace, scorer: Inspector) -> Thresholds:
    """The thresholds that the flags of `add_threshold_flags` ask for."""
    quantiles = args.pixelQuantile, args.imageQuantile
    if args.threshold == "auto" and quantiles == (PIXEL_QUANTILE, IMAGE_QUANTILE):
        return scorer.usual_thresholds()
    choice = "quantile" if args.threshold == "auto" else args.threshold
    return choose_thresholds(choice, scorer.metrics, scorer.calibration, quantiles, scorer.image_score)


def named_thresholds(metrics: dict, calibration: Calibration | None, image_score: str) -> dict[str, dict]:
    """Pixel and image threshold of each choice of `choose_thresholds` that can be had, and what it means."""
    meanings, named = ({"f1": "best F1 on the test images", "recall": "no defective test image is missed"}, {})
    if calibration is not None:
        good = "held-out" if calibration.held_out else "training"
        quantile = f"above {calibration.meaning}"
        meanings = {"quantile": quantile, "none": f"no false alarm on {good} images", **meanings}
    for choice, meaning in meanings.items():
        with contextlib.suppress(InputError):
            thresholds = choose_thresholds(choice, metrics, calibration, image_score=image_score)
            named[choice] = {**asdict(thresholds), "meaning": meaning}
    return named


# ---------------------------------------------------------------------------------- inspecting


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


class Inspector:
    """What a `scorer.Scorer` and an `export.OnnxScorer` do alike.

    Both have image_size, map_size, image_score, roi, metrics, calibration and `score`.

    Attributes:
        thresholds: those that came with it; None: none did.
    """

    thresholds = None

    def usual_thresholds(self) -> Thresholds:
        """Those that came with it, else the quantiles; raises InputError as `choose_thresholds`."""
        return self.thresholds or choose_thresholds("quantile", self.metrics, self.calibration)

    def region(self, roi: Picture | None) -> np.ndarray | None:
        """bool of any size: the given one by `read_roi`, else the one it was fitted with, if any."""
        if roi is not None:
            return read_roi(roi)
        return None if self.roi is None else self.roi.cpu().numpy()

    def inspect(
        self, images: Picture | Sequence[Picture], thresholds: Thresholds | None = None, min_area: int = 1,
        roi: Picture | None = None, batch_size: int = 4,
    ) -> Inspection | list[Inspection]:  # fmt: skip
        """The verdict on an image, or a list of verdicts on a list of images.

        Args:
            images: of any size.
            thresholds: None: `usual_thresholds`.
            min_area: regions of fewer pixels are no defects.
            roi: white where the part is; what lies outside does not count.  None: as it was fitted.
            batch_size: images that are scored together.

        Raises:
            InputError: no image, one that cannot be read, no thresholds, or a score that is not finite.
        """
        if not isinstance(images, (list, tuple)):
            return self.inspect([images], thresholds, min_area, roi)[0]
        thresholds = thresholds or self.usual_thresholds()
        roi, results = self.region(roi), []
        for start in range(0, len(images), batch_size):
            batch = [to_rgb(image) for image in images[start : start + batch_size]]
            resized = [resize_image(image, self.image_size) for image in batch]
            names = [f"image {start + i}" for i in range(len(batch))]
            for image, found in zip(batch, self.score_arrays(resized, names, roi), strict=True):
                results.append(judge(*found, image.shape[:2], thresholds, min_area, roi))
        return results

    def score_arrays(
        self, images: Sequence[np.ndarray], names: Sequence, roi: np.ndarray | None
    ) -> list[tuple[np.ndarray, float]]:
        """(map (H,W), score) of each image, uint8 (h,w,3) of the model's size.

        Args:
            names: of the images, for messages.
            roi: bool of any size.

        Raises:
            InputError: a score is not finite.
        """
        inside = None if roi is None else torch.from_numpy(resize_roi(roi, self.map_size))
        maps, scores = (x.cpu().numpy() for x in self.score(torch.from_numpy(np.stack(images)), inside))
        for name, anomaly, score in zip(names, maps, scores, strict=True):
            if not (np.abs(anomaly).max() < HIGHEST and abs(score) < HIGHEST):  # false of NaN, too
                raise InputError(f"{name}: no finite score; use another model")
        return list(zip(maps, scores.tolist(), strict=True))


def to_rgb(image: Picture) -> np.ndarray:
    """uint8 (h,w,3) of an array or a file; raises InputError if it is no image."""
    if isinstance(image, (str, Path)):
        if Path(image).is_dir():
            raise InputError(f"{image} is a folder; give an image in it")
        return read_image(Path(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        given = f"an image of {array.dtype} {array.shape}"
        raise InputError(f"{given}; give uint8 (h,w), (h,w,3) or (h,w,4), or a list")
    if not array.size:
        raise InputError(f"an image of no pixels, {array.shape}; give another")
    return np.asarray(Image.fromarray(array).convert("RGB"))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h,w,3) -> (*size,3), as training images are resized; float32 (h,w) -> `size`."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def round_off(values: np.ndarray) -> np.ndarray:
    """float32 to 16 significant bits, so that files of maps are a quarter smaller, and written as much faster."""
    bits = values.view(np.uint32) + np.uint32(0x80)
    bits &= np.uint32(0xFFFFFF00)
    return bits.view(np.float32)


def judge(
    anomaly: np.ndarray, score: float, size: tuple[int, int], thresholds: Thresholds, min_area: int = 1,
    roi: np.ndarray | None = None,
) -> Inspection:  # fmt: skip
    """The verdict on an image of size (h, w), of its map (H,W) and score.

    Args:
        roi: bool of any size; outside, the map gets its lowest score.
    """
    values = round_off(resize_image(anomaly, size))
    mask, peak = values >= np.float32(thresholds.pixel), values.argmax()
    if roi is not None:
        inside = resize_roi(roi, size)
        values, mask = np.where(inside, values, values.min()), mask & inside
        peak = np.where(inside, values, -np.inf).argmax()
    mask, defects = find_defects(mask, values, min_area)
    y, x = map(int, np.unravel_index(peak, size))
    return Inspection(score, score >= thresholds.image, values, mask, defects, (x, y))


def find_defects(mask: np.ndarray, values: np.ndarray, min_area: int = 1) -> tuple[np.ndarray, list[Defect]]:
    """The mask (h,w) without regions of less than `min_area` pixels, and the others; values: scores (h,w)."""
    from skimage.measure import label, regionprops_table  # takes a moment that other commands save

    if not mask.any():
        return mask, []
    labels = label(mask, connectivity=2)
    if min_area > 1:
        mask = mask & (np.bincount(labels.ravel()) >= min_area)[labels]
        labels *= mask
    properties = ("bbox", "area", "intensity_max", "intensity_mean")
    columns = regionprops_table(labels, values, properties).values()
    return mask, [
        Defect((int(x0), int(y0), int(x1), int(y1)), int(area), float(peak), float(mean))
        for y0, x0, y1, x1, area, peak, mean in zip(*columns, strict=True)
    ]


def read_roi(roi: Picture) -> np.ndarray:
    """bool (h,w) of a file or array: true where it is brighter than half of its brightest.

    Raises:
        InputError: not readable, all black, or with an alpha channel that is not of one value.
    """
    name = roi if isinstance(roi, (str, Path)) else "the mask of the part"
    if isinstance(roi, np.ndarray) and roi.dtype == bool:
        roi = roi.astype(np.uint8)
    brightness = to_rgb(roi).max(2)
    if has_shape_in_alpha(roi):
        raise InputError(f"{name} has an alpha channel; save it in black and white, without one")
    if not brightness.any():
        raise InputError(f"{name} is all black; paint white what is to be inspected")
    return brightness > brightness.max() / 2


def roi_remarks(roi: Path | str | None, images: Sequence[Path]) -> list[str]:
    """A line if --roi has other proportions than the first image, or none."""
    if roi is None or not images:
        return []
    unknown = (1, 1)
    (height, width), (h, w) = (image_shape(Path(path), unknown) for path in (roi, images[0]))
    if unknown in ((h, w), (height, width)) or abs(height * w / (width * h) - 1) < PROPORTION_MARGIN:
        return []
    sizes = f"is {size_text((height, width))}, {images[0]} {size_text((h, w))}"
    return [f"--roi {roi} {sizes}: it is stretched over the images; is it of another camera?"]


def has_shape_in_alpha(picture: Picture) -> bool:
    """Whether some pixels of an array or of a file are more transparent than others."""
    is_file = isinstance(picture, (str, Path))
    return alpha_varies(open_image(Path(picture)) if is_file else Image.fromarray(np.asarray(picture)))


def resize_roi(roi: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool of any size -> `size`; what is not empty does not become empty."""
    resized = resize_image(roi.astype(np.float32), size)  # 8 bits would lose what is small
    return resized >= min(0.5, resized.max())
