"""report.html: one file that shows every image of a run, an evaluation or a prediction, and what a threshold does.

It opens from disk without network: template, style, script, pictures and curves are in it.  File names are
untrusted: Jinja2 escapes them, the script sets them as text, and the page's policy runs no other script.
"""

from __future__ import annotations

import base64
import heapq
import io
import os
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

import figures
from dataset import image_shape
from figures import TEST_IMAGES
from metrics import METRICS, PRO_LIMIT, metric_labels
from scorer import Scorer, TestSet
from util import describe_environment, percent, write_text
from verdict import Scored, Thresholds, distribution, resize_image

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
THUMBNAIL, MAP_THUMBNAIL = 160, 96  # pixels of the longer side; a map is smooth
# 1,000 images stay below 30 MB: image, overlay and map of so many bytes at most, times 4/3 for base64.
PICTURE_BYTES, QUALITIES = 6000, (80, 65, 50, 35, 20)
MOST_TILES = 1000  # beyond, those with the highest scores; counts are of all images
BINS = 40
WIDTH, HEIGHT = 320, 206  # of the histogram, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 310, 12, 184  # of what is drawn in it


# ------------------------------------------------------------------------------------ pictures


def thumbnail(image: np.ndarray, longest: int = THUMBNAIL) -> np.ndarray:
    """Shrink an image (h,w,3) so that no side is longer; smaller ones stay."""
    small = Image.fromarray(image)
    small.thumbnail((longest, longest), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(small)


def jpeg_uri(image: np.ndarray) -> str:
    """The best of a few qualities that fits into `PICTURE_BYTES`, as a data URI; uint8 (h,w,3)."""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="jpeg", quality=quality, optimize=True)
        if buffer.tell() <= PICTURE_BYTES:
            break
    return _uri("jpeg", buffer.getvalue())


def mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """A bool mask (H,W) as a data URI of two colors; size is (width, height)."""
    small, buffer = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX), io.BytesIO()
    Image.fromarray(np.asarray(small) > 0).save(buffer, format="png", optimize=True)
    return _uri("png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def colored(scores: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Scores (h,w) in the colors of all figures, uint8 (h,w,3)."""
    low, high = scale
    levels = ((scores - low) / (high - low)).clip(0, 1)
    return (matplotlib.colormaps[figures.COLOR_MAP](levels)[..., :3] * 255).round().astype(np.uint8)


def in_proportion(image: np.ndarray, path: Path) -> np.ndarray:
    """A thumbnail of an image uint8 (h,w,3), which may be stretched, in the proportions of its file."""
    shape = image_shape(path, image.shape[:2])
    return _resized(image, min(THUMBNAIL, max(shape)), shape)


def _resized(picture: np.ndarray, longest: int, shape: Sequence[int]) -> np.ndarray:
    """An image or a map in an image's proportions; shape is the image's (h, w)."""
    height, width = (max(1, round(side * longest / max(shape))) for side in shape[:2])
    return resize_image(picture, (height, width))


def text(value: object) -> str:
    """What is shown of a value or a name: what is no UTF-8 as in scores.csv, the rest as it is."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


# -------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """Collects images, from any number of threads, and writes the page.

    Attributes:
        title: of the page.
        scale: lowest and highest score of the colors.
        presets: image thresholds by name; the page starts at the first.
        group: what images are grouped by, "kind" or "folder".
        earlier: images whose pictures are not at hand.
    """

    title: str
    scale: tuple[float, float]
    presets: dict[str, float]
    group: str = "kind"
    earlier: int = 0
    _items: list[tuple] = field(default_factory=list)
    _kept: list[tuple] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, path: Path, kind: str, defective: bool | None, score: float, image: np.ndarray,
        anomaly: np.ndarray, masks: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        """Take one image; its pictures are made if it is among those shown so far.

        Args:
            defective: its label; None if it has none.
            image: uint8 (h,w,3) of any size.
            anomaly: its map, float32 (H,W) of any size.
            masks: bool (H,W) by what they are called.
        """
        name = text(path)
        with self._lock:
            self._items.append((score, name, text(kind), defective))
            number = len(self._items)
            if len(self._kept) >= MOST_TILES and score <= self._kept[0][0]:
                return
        small = thumbnail(image)
        size = small.shape[1::-1]
        fine = resize_image(anomaly, small.shape[:2])
        coarse = _resized(anomaly, MAP_THUMBNAIL, image.shape[:2])
        pictures = {
            "image": jpeg_uri(small),
            "overlay": jpeg_uri(figures.overlay(small, fine, self.scale)),
            "map": jpeg_uri(colored(coarse, self.scale)),
            **{name: mask_uri(mask, size) for name, mask in masks.items()},
        }
        with self._lock:
            heapq.heappush(self._kept, (score, name, number, pictures))
            if len(self._kept) > MOST_TILES:
                heapq.heappop(self._kept)

    def add_prediction(
        self, path: Path, image: np.ndarray, anomaly: np.ndarray, score: float, mask: np.ndarray
    ) -> None:
        """Take an image without label, with the mask of its verdict."""
        self.add(path, str(path.parent), None, score, image, anomaly, {"mask": mask})

    def add_earlier(self, path: Path, score: float) -> None:
        """Take an image without label and without pictures: it counts, and is not shown."""
        self._items.append((score, text(path), text(path.parent), None))
        self.earlier += 1

    def save(
        self, path: Path, sections: dict[str, dict], environment: Iterable[str] = (),
        table: tuple[list[str], list[list[str]]] | None = None, curves: Sequence[Path] = (),
        template: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Write the page, whole or not at all.

        Args:
            sections: settings by title.
            environment: versions and hardware, a line each.
            table: header and rows of the metrics.
            curves: .png files.
            template: uint8 (h,w,3), the image template.

        Raises:
            OSError: it cannot be written.
        """
        pictures = {number: shown for _, _, number, shown in self._kept}
        items = [(*item, pictures.get(i)) for i, item in enumerate(self._items, 1)]
        items.sort(key=lambda item: (-item[0], item[1]))
        if self.group == "folder":
            items = _below_common_folder(items)
        labeled = bool(items) and None not in [item[3] for item in items]
        low, high = self._range([item[0] for item in items])
        names = ("score", "name", "kind", "defective", "pictures")
        data = {
            "tiles": [dict(zip(names, item, strict=True)) for item in items],
            "labeled": labeled, "low": low, "high": high, "group": self.group,
            "template": None if template is None else jpeg_uri(thumbnail(template)),
            "plot": {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        }  # fmt: skip
        shown = {title: {name: text(value) for name, value in given.items()} for title, given in sections.items()}
        page = _page_template().render(
            title=text(self.title), data=data, sections=shown, environment=[text(x) for x in environment],
            table=table, curves=[_uri("png", curve.read_bytes()) for curve in curves],
            histogram=_histogram(items, low, high, labeled),
            presets={name: float(value) for name, value in self.presets.items()}, labeled=labeled,
            kinds=sorted({item[2] for item in items}), group=self.group,
            views=list(dict.fromkeys(name for item in items for name in item[4] or ())),
            count=len(items), kept=len(self._kept), earlier=self.earlier,
            width=WIDTH, height=HEIGHT, plot=data["plot"], nonce=secrets.token_urlsafe(16),
        )  # fmt: skip
        write_text(path, page)

    def _range(self, scores: list[float]) -> tuple[float, float]:
        """Of the slider: from calling all images defective to calling none so."""
        values = [*scores, *self.presets.values()] or [0.0]
        low, high = min(values), max(values)
        return low, high + (0.02 * (high - low) or max(1e-6, 0.02 * abs(high)))


def _page_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # pictures stay in their order
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _below_common_folder(items: list[tuple]) -> list[tuple]:
    """Shorten the folders to what they differ in."""
    folders = {folder for _, _, folder, *_ in items}
    if len(folders) < 2:
        return items
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # some are absolute, or they are on several drives
        return items
    return [(score, name, os.path.relpath(folder, common), *rest) for score, name, folder, *rest in items]


def _histogram(items: list[tuple], low: float, high: float, labeled: bool) -> dict:
    """Bars of the scores (x, y, width, height, class), defective ones on top of good ones."""
    edges = np.linspace(low, high, BINS + 1)
    groups = {"good": [], "defective": []} if labeled else {"all": []}
    for score, _, _, defective, _ in items:
        groups[("good", "defective")[defective] if labeled else "all"].append(score)
    counts = {name: np.histogram(scores, edges)[0] for name, scores in groups.items()}
    highest = max(1, int(sum(counts.values()).max()))
    width, bars, below = (RIGHT - LEFT) / BINS, [], np.zeros(BINS)
    for name, count in counts.items():
        unit = (BOTTOM - TOP) / highest
        for i in np.flatnonzero(count):
            top = BOTTOM - unit * (below[i] + count[i])
            x = LEFT + i * width
            bars.append([round(float(v), 2) for v in (x, top, width - 0.6, unit * count[i])] + [name])
        below = below + count
    sizes = {name: len(scores) for name, scores in groups.items()}
    x_ticks, y_ticks = _ticks((low, high), (LEFT, RIGHT)), _ticks((0, highest), (BOTTOM, TOP), integer=True)
    return {"bars": bars, "sizes": sizes, "x_ticks": x_ticks, "y_ticks": y_ticks}


def _ticks(values: tuple[float, float], places: tuple[float, float], integer=False) -> list[tuple[float, str]]:
    """(place, label) of a few round values between two, which have places in the histogram."""
    (low, high), ticks = values, MaxNLocator(4, integer=integer).tick_values(*values)
    margin = 1e-9 * (high - low)
    ticks = [v for v in ticks if low - margin <= v <= high + margin]
    return [(round(float(np.interp(v, values, places)), 1), f"{v:.4g}") for v in ticks]


def metric_table(rows: list[dict], pro_limit: float = PRO_LIMIT) -> tuple[list[str], list[list[str]]]:
    """All metrics in percent, a column for each row of metrics.csv that is of the last epoch."""
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    labels = metric_labels(pro_limit)
    names = ["last epoch" if row["epoch"] is None else f"epoch {row['epoch']}" for row in last]
    header = ["percent", *(f"{name}, {row['score']}" for name, row in zip(names, last, strict=True))]
    return header, [[labels[key], *(percent(row[key]) for row in last)] for key in METRICS]


def save_evaluation(
    folder: Path, test_set: TestSet, scored: Scored, scorer: Scorer, rows: list[dict], settings: dict,
    pro_limit: float = PRO_LIMIT, shown: str = TEST_IMAGES,
) -> None:  # fmt: skip
    """Write the pictures and the report of a run or of an evaluation.

    Args:
        folder: gets `pictures/` and report.html.
        scored: maps and scores of all test images.
        rows: of metrics.csv; those with a loss are a run's, whose epochs are drawn.
        settings: flags of the command.
        pro_limit: false-positive rate up to which PRO is taken.
        shown: what the images are; good ones in place of test images have no label and no metrics.
    """
    pictures, presets, truth = folder / "pictures", {}, test_set.truth
    if scorer.roi is not None:  # outside, nothing is shown
        lowest = scored.maps.amin((1, 2), keepdim=True)
        scored = scored._replace(maps=scored.maps.where(scorer.roi.to(lowest.device), lowest))
    has_test = shown == TEST_IMAGES
    curves = figures.save_evaluation(pictures, test_set, scored, scorer, pro_limit, shown)
    if epochs := [row for row in rows if row["score"] == rows[-1]["score"] and "loss" in row]:
        curves.append(pictures / "curves.png")
        figures.save_curves(curves[-1], epochs, pro_limit)
    if scorer.calibration is not None:
        presets[scorer.calibration.meaning] = scorer.calibration.thresholds().image
    if scorer.metrics.get("image_threshold") is not None:
        presets["best F1"] = scorer.metrics["image_threshold"]
    presets = presets or {"median score": float(scored.scores.median())}
    scale = (scorer.calibration or distribution(scored)).color_scale()
    page = Report(f"{test_set.data.name}: {shown}, score {scorer.options.score}", scale, presets)
    maps, scores = (x.cpu() for x in scored)
    for i, image in enumerate(test_set.data.test):
        masks = {} if truth.masks is None else {"ground truth": truth.masks[i].cpu().numpy()}
        picture = in_proportion(test_set.images[i], image.path)
        arguments = (float(scores[i]), picture, maps[i].numpy(), masks)
        page.add(Path(image.path.name), image.kind, image.defective if has_test else None, *arguments)
    template = scorer.image_template()
    page.save(
        folder / FILE,
        _sections(scorer, settings),
        describe_environment(scorer.device),
        metric_table(rows, pro_limit) if has_test else None,
        curves,
        None if template is None else figures.to_picture(template),
    )


def start_predictions(scorer, thresholds: Thresholds, scale: tuple[float, float]) -> Report:
    """A report for images without labels; the page starts at the threshold of scores.csv."""
    name = scorer.class_name or "model"
    return Report(f"{name}: predictions", scale, {"scores.csv": thresholds.image}, "folder")


def save_predictions(page: Report, path: Path, scorer, settings: dict) -> None:
    """Write it.

    Args:
        scorer: a Scorer or an OnnxScorer, which has no image template.
        settings: flags of the command.
    """
    template = scorer.image_template() if isinstance(scorer, Scorer) else None
    environment = describe_environment(scorer.device)
    picture = None if template is None else figures.to_picture(template)
    page.save(path, _sections(scorer, settings), environment, template=picture)


def _sections(scorer, settings: dict) -> dict[str, dict]:
    """The command's settings, and those of the training if they are others."""
    training = getattr(scorer, "settings", {})
    sections = {"Settings": settings, "Settings of the training": {} if training == settings else training}
    return {title: _read_ones(given) for title, given in sections.items() if given}


def _read_ones(settings: dict) -> dict:
    """Without the data set's folder, if the images come from --good."""
    return {flag: value for flag, value in settings.items() if flag != "datapath" or not settings.get("good")}
