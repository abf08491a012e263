"""Small data of the tests' own, and a way to run a script's main as the command line does."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import figures
import train
from dataset import read_image
from util import atomic_path, run_script

SIZE = 32


def save_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_class(root: Path, name="widget", masks=True, num_train=6, num_test=3) -> Path:
    """A class in MVTec's layout: a smooth pattern, brighter or darker; the defect `hole` is a dark square."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    pattern = 128 + 60 * np.sin(x / 3)[..., None] * np.cos(y / 4)[..., None] * np.array([1.0, 0.8, 0.6])

    def picture():
        return np.clip(pattern * rng.uniform(0.8, 1.2) + rng.normal(0, 4, pattern.shape), 0, 255).astype(np.uint8)

    folder = root / name
    for i in range(num_train):
        save_image(folder / "train" / "good" / f"{i:03}.png", picture())
    for i in range(num_test):
        save_image(folder / "test" / "good" / f"{i:03}.png", picture())
        defective, mask = picture(), np.zeros((SIZE, SIZE), np.uint8)
        top = 4 + 5 * i
        defective[top : top + 8, 10:18] = 10
        mask[top : top + 8, 10:18] = 255
        save_image(folder / "test" / "hole" / f"{i:03}.png", defective)
        if masks:
            save_image(folder / "ground_truth" / "hole" / f"{i:03}_mask.png", mask)
    return folder


@pytest.fixture
def widget(tmp_path):
    """The folder of a small class, in tmp_path / "data"."""
    return make_class(tmp_path / "data")


def read_images(paths, size):
    """uint8 (N,h,w,3)."""
    return torch.from_numpy(np.stack([read_image(path, size) for path in paths]))


class Pictures:
    """What scorer.py reads of dataset.Images, of images uint8 (N,h,w,3)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batches(self, batches):
        return (self.images[batch] for batch in batches)


SMALL = ["--cls", "widget", "--encoder", "none", "--imageSize", 32, "--numLayer", 2, "--numStack", 1,
         "--numChannel", 4, "--kernelSize", 3, "--epochs", 2, "--gpu", "cpu", "--numWorkers", 2,
         "--precision", "fp32"]  # fmt: skip


draw = figures._save


@pytest.fixture(scope="session", autouse=True)
def few_figures():
    """Drawing takes longer than the trainings: few panels, and of figures with the same parts the first one."""
    drawn = set()

    def draw_once(figure, path):
        parts = tuple(
            (axes.get_title(), *(len(x) for x in (axes.lines, axes.images, axes.patches, axes.texts)))
            for axes in figure.axes
        )
        if parts not in drawn:
            drawn.add(parts)
            return draw(figure, path)
        with atomic_path(path) as temporary:
            Image.new("RGB", [round(100 * x) for x in figure.get_size_inches()]).save(temporary, "png")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "PANELS_PER_KIND", 1)
        patch.setattr(figures, "_save", draw_once)
        yield


@dataclass
class Trained:
    """A finished run on a small class: the data, the run's folder, its checkpoint."""

    data: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "last.pt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    make_class(root / "data")
    train.main([*map(str, SMALL), "--datapath", str(root / "data"), "--saveDir", str(root / "runs")])
    (run,) = (root / "runs").iterdir()
    return Trained(root / "data", run)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(main, arguments) -> (exit code, stdout, stderr), as from the command line."""

    def run(main, arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        code = 0
        try:
            run_script(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
