"""The figures of an evaluation: which there are, what they show, and that any file name can be drawn."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.io
import torch
from conftest import draw
from matplotlib.figure import Figure
from PIL import Image

import dataset
import figures
from dataset import IMAGENET_MEAN, IMAGENET_STD, read_image
from metrics import METRICS, GroundTruth, Ranking
from verdict import Scored, distribution

pytestmark = pytest.mark.filterwarnings("error")
SIZE = 32


@pytest.fixture(autouse=True)
def as_many_figures_as_in_use(few_figures, monkeypatch):
    monkeypatch.setattr(figures, "PANELS_PER_KIND", 3)
    monkeypatch.setattr(figures, "_save", draw)


def make_test_set(kinds, names=None, masks=True):
    """A few gray images whose defect is a square, and maps that find it."""
    rng = np.random.default_rng(0)
    names = names or [f"{i:03}.png" for i in range(len(kinds))]
    test = [dataset.TestImage(Path("x") / name, kind, None) for name, kind in zip(names, kinds, strict=True)]
    truth = torch.zeros(len(kinds), SIZE, SIZE, dtype=torch.bool)
    defective = torch.tensor([image.defective for image in test])
    truth[defective, 8:16, 8:16] = True
    maps = torch.from_numpy(rng.gamma(2.0, 0.3, truth.shape).astype(np.float32)) + truth
    images = [np.full((SIZE, SIZE, 3), 100 + i, np.uint8) for i in range(len(kinds))]
    data = SimpleNamespace(name="widget", test=test)
    ground_truth = GroundTruth.from_masks(defective, truth if masks else None)
    return SimpleNamespace(data=data, images=images, truth=ground_truth), Scored(maps, maps.amax((1, 2)))


class ScorerStub:
    """Its template is a normalized black image, and it remembers what it was asked for."""

    def __init__(self, calibration=None, has_template=True):
        self.calibration, self.has_template, self.asked, self.roi = calibration, has_template, [], None

    def image_template(self, image):
        self.asked.append(image)
        return -torch.tensor(IMAGENET_MEAN).view(3, 1, 1).expand(3, SIZE, SIZE) if self.has_template else None


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_normalized_image_becomes_the_picture_it_was():
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert np.array_equal(figures.to_picture((image - mean) / std), picture)


def test_an_overlay_leaves_low_scores_as_they_are_and_covers_high_ones():
    image = np.full((1, 4, 3), 100, np.uint8)
    covered = figures.overlay(image, np.array([[-5.0, 0.0, 1.0, 7.0]]), scale=(0.0, 1.0))
    assert covered.dtype == np.uint8
    assert np.array_equal(covered[0, :2], image[0, :2])
    assert np.array_equal(covered[0, 2], covered[0, 3])
    assert covered[0, 2, 0] > covered[0, 2, 1]  # turbo ends in dark red


def test_examples_are_spread_over_each_kind():
    kinds = ["good"] * 9 + ["hole", "cut", "hole"]
    test = make_test_set(kinds)[0].data.test
    assert figures.choose_examples(test) == [10, 0, 4, 8, 9, 11]


def test_an_evaluation_has_panels_histogram_and_curves(tmp_path):
    test_set, scored = make_test_set(["good"] * 5 + ["hole"] * 2)
    scorer = ScorerStub(distribution(Scored(*(x[:5] for x in scored))))
    curves = figures.save_evaluation(tmp_path / "figures", test_set, scored, scorer)
    assert curves == [tmp_path / "figures" / "roc_pro.png"]
    panels = ["good/000_png.png", "good/002_png.png", "good/004_png.png"]
    panels += ["hole/005_png.png", "hole/006_png.png"]
    assert files_in(tmp_path / "figures") == {*panels, "histogram.png", "roc_pro.png"}
    assert [int(image[0, 0, 0]) for image in scorer.asked] == [100, 102, 104, 105, 106]
    assert read_image(tmp_path / "figures" / "hole" / "005_png.png").shape[1] > 600


def test_what_is_not_known_is_left_out(tmp_path):
    kinds = ["good", "hole"]
    figures.save_evaluation(tmp_path / "all", *make_test_set(kinds), ScorerStub())
    figures.save_evaluation(tmp_path / "few", *make_test_set(kinds, masks=False), ScorerStub(None, False))
    assert files_in(tmp_path / "all") == files_in(tmp_path / "few")
    wide, narrow = (read_image(tmp_path / x / "roc_pro.png").shape[1] for x in ("all", "few"))
    assert narrow == pytest.approx(2 / 3 * wide, abs=2)  # no PRO without masks
    wide, narrow = (read_image(tmp_path / x / "hole" / "001_png.png").shape[1] for x in ("all", "few"))
    assert narrow < 0.6 * wide  # two pictures instead of four


@pytest.mark.parametrize("kinds", [["good", "good"], ["hole", "hole"]])
def test_one_kind_alone_can_be_drawn(tmp_path, kinds):
    test_set, scored = make_test_set(kinds)
    figures.save_evaluation(tmp_path / "figures", test_set, scored, ScorerStub())
    assert ("roc_pro.png" in files_in(tmp_path / "figures")) == (kinds[0] == "hole")


def test_any_file_name_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PANELS_PER_KIND", 4)
    names = ["$x^{.png", "two\nlines.png", os.fsdecode(b"latin-\xe9.png"), "螺" * 80 + ".png"]
    test_set, scored = make_test_set([os.fsdecode(b"gro\xdf\n")] * 4, names)
    figures.save_evaluation(tmp_path / "figures", test_set, scored, ScorerStub())
    panels = [name for name in files_in(tmp_path / "figures") if "/" in name]
    assert len(panels) == len(names)
    assert all(panel.isprintable() for panel in panels)


def test_names_of_different_images_stay_different_and_within_200_bytes():
    names = ["a.b.png", "a_b.png", "a.png", "a.jpg", "a\n.png", "x" * 250 + ".png", "x" * 251 + ".png",
             os.fsdecode(b"\xe9.png"), os.fsdecode(b"\xe8.png"), "螺" * 80 + ".png"]  # fmt: skip
    given = [figures._example_name(Path(name)) for name in names]
    assert len(set(given)) == len(names)
    assert max(len(name.encode()) for name in given) <= 200


def test_ordinary_names_stay():
    for name in ("000_png", "Schraube größer", "a" * 180):
        assert figures.file_name(name) == name
    assert figures.file_name("é" * 100).startswith("é" * 90 + "-")  # 180 bytes, no half character


@pytest.mark.parametrize("name", ["", ".", "..", "/tmp/a", "a/b", "..\\a"])
def test_a_name_is_that_of_a_file_in_the_folder(tmp_path, name):
    assert (tmp_path / figures.file_name(name)).parent == tmp_path
    assert not set(figures.file_name(name)) & set("/\\")
    assert figures.file_name(name) not in ("", ".", "..")


def test_curves_of_many_points_are_thinned_out_and_keep_their_ends(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    torch.manual_seed(0)
    pixels = Ranking(torch.rand(100_000), torch.rand(10_000) + 0.5)
    shares = torch.full((10_000,), 1e-4, dtype=torch.float64)
    figures.save_roc_and_pro(Path("x"), {"pixels": pixels}, shares, pro_limit=0.1)
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["ROC", "precision-recall", "PRO"]
    for axes, start, end in zip(figure.axes, [(0, 0), None, (0, 0)], [(1, 1), (0, 1), (1, 1)], strict=True):
        (line,) = axes.lines
        points = line.get_xydata()
        assert len(points) <= figures.CURVE_POINTS
        assert start is None or tuple(points[0]) == start
        assert tuple(points[-1]) == pytest.approx(end)
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels[1] == f"PRO@0.1: {pixels.area(shares, 0.1):.4f}"


def test_the_area_under_the_drawn_steps_is_the_average_precision(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    torch.manual_seed(0)
    items = Ranking(torch.rand(300), torch.rand(100) + 0.3)
    figures.save_roc_and_pro(Path("x"), {"images": items}, None)
    recall, precision = drawn[0].axes[1].lines[0].get_data()
    area = -np.sum(np.diff(recall) * precision[:-1])
    assert area == pytest.approx(items.average_precision())


def test_metrics_over_epochs_leave_out_what_is_undefined(tmp_path, monkeypatch):
    rows = [{"epoch": i, "loss": 1 / i, **dict.fromkeys(METRICS, 0.9), "pixel_ap": None} for i in (1, 2)]
    labels = []
    monkeypatch.setattr(
        figures, "_save", lambda figure, path: labels.extend(figure.axes[1].get_legend_handles_labels()[1])
    )
    figures.save_curves(tmp_path / "curves.png", rows, pro_limit=0.05)
    assert labels == ["pixel AUROC", "image AUROC", "PRO", "PRO@0.05", "image AP"]
    monkeypatch.setattr(figures, "_save", lambda figure, path: labels.append(len(figure.axes)))
    undefined = [{"epoch": 1, "loss": 1.0, **dict.fromkeys(METRICS)}]
    figures.save_curves(tmp_path / "curves.png", undefined)
    assert labels[-1] == 1  # the loss alone


def test_a_stack_holds_its_pictures_one_below_the_other(tmp_path):
    for i, width in enumerate((20, 30)):
        Image.new("RGB", (width, 10), (i, i, i)).save(tmp_path / f"{i}.png")
    figures.save_stack(tmp_path / "stack.png", [tmp_path / "0.png", tmp_path / "1.png"])
    stack = read_image(tmp_path / "stack.png")
    assert stack.shape == (20, 30, 3)
    assert (stack[0, 0, 0], stack[0, 25, 0], stack[15, 25, 0]) == (0, 255, 1)


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(figure, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.save_curves(path, [{"epoch": 1, "loss": 1.0, **dict.fromkeys(METRICS)}])
    assert files_in(tmp_path) == {"curves.png"}
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (256, 3), (300, 200), (1025, 16)])
def test_files_in_a_hurry_are_read_by_others_without_loss(tmp_path, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    values = np.cumsum(rng.normal(size=size), 1, dtype=np.float32)
    values.flat[0] = -1e-30
    figures.write_png(tmp_path / "a.png", image)
    figures.write_tiff(tmp_path / "a.tiff", values)
    for read in (lambda path: np.asarray(Image.open(path)), skimage.io.imread):
        assert np.array_equal(read(tmp_path / "a.png"), image)
        assert read(tmp_path / "a.tiff").dtype == np.float32
        assert np.array_equal(read(tmp_path / "a.tiff"), values)
    smooth = np.linspace(0, 1, 10**6, dtype=np.float32).reshape(1000, 1000)
    figures.write_tiff(tmp_path / "b.tiff", smooth)
    assert (tmp_path / "b.tiff").stat().st_size < smooth.nbytes / 2
