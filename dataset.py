"""Data sets in the layout of MVTec AD: which files there are, and what they are.

    <datapath>/<class>/train/good/*            good images to learn from
    <datapath>/<class>/test/<kind>/*           kind "good", or a kind of defect
    <datapath>/<class>/ground_truth/<kind>/<name>_mask.png

Any class name works.  Images: png, jpg, jpeg, bmp, tif, tiff in any case; gray, RGB, RGBA, 16 bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from util import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
MASK_SIZE = (256, 256)  # the official program evaluates at this size whatever the input's
MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
MVTEC_HOME = "https://www.mvtec.com/company/research/datasets/mvtec-ad"


@dataclass(frozen=True)
class TestImage:
    """One test image.

    Attributes:
        path: of the image.
        kind: the folder's name, "good" or a kind of defect.
        mask: path of its mask; None for good images and in classes without masks.
    """

    path: Path
    kind: str
    mask: Path | None

    @property
    def defective(self) -> bool:
        return self.kind != "good"


@dataclass(frozen=True)
class AnomalyClass:
    """The files of one class.

    Attributes:
        name: of the class.
        train: paths of the good images to learn from, sorted.
        test: sorted by kind and name.
    """

    name: str
    train: list[Path]
    test: list[TestImage]

    @property
    def has_masks(self) -> bool:
        return any(image.mask for image in self.test)

    @property
    def defective(self) -> Tensor:
        """(N,) bool."""
        return torch.tensor([image.defective for image in self.test], dtype=torch.bool)


def open_class(datapath: Path, name: str, need_train: bool = True) -> AnomalyClass:
    """Find the files of one class.

    Raises:
        InputError: path, class, training images, test images or a mask missing.
    """
    if not datapath.is_dir():
        raise InputError(
            f"--datapath {datapath} is not a folder; get MVTec AD from {MVTEC_HOME} and unpack it there, "
            "or try `make demo`, which needs no download"
        )
    folder = datapath / name
    if name in ("", ".", "..") or name != Path(name).name or not folder.is_dir():
        present = [p.name for p in sorted(datapath.iterdir()) if (p / "test").is_dir()]
        have = f"classes there: {', '.join(present)}" if present else "no class folders there"
        raise InputError(f"no class {name!r} in {datapath}; {have}")
    train = list_images(folder / "train" / "good")
    if not train and need_train:
        raise InputError(f"no training images in {folder / 'train' / 'good'}; put good images there")
    return AnomalyClass(name, train, _list_test(folder))


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and _visible(p))


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")  # .ipynb_checkpoints, ._000.png and their like are no data


def _list_test(folder: Path) -> list[TestImage]:
    test_folder, mask_folder = folder / "test", folder / "ground_truth"
    kinds = sorted(filter(_visible, test_folder.iterdir())) if test_folder.is_dir() else []
    images = [image for folder in kinds for image in _list_kind(folder, mask_folder / folder.name)]
    if not images:
        raise InputError(
            f"no test images in {test_folder}; it needs folders such as good/ and a defect's"
        )
    class_has_masks = mask_folder.is_dir() and any(map(list_images, mask_folder.iterdir()))
    for image in images:
        if class_has_masks and image.defective and image.mask is None:
            raise InputError(
                f"{image.path} has no mask {mask_folder / image.kind / image.path.stem}_mask.png; add it, "
                f"or remove {mask_folder} to evaluate without masks"
            )
    return images


def _list_kind(folder: Path, mask_folder: Path) -> list[TestImage]:
    """The test images of one kind, each with the mask `<name>_mask` or `<name>`."""
    kind = folder.name
    masks = {path.stem: path for path in list_images(mask_folder) if kind != "good"}
    return [
        TestImage(path, kind, masks.get(f"{path.stem}_mask", masks.get(path.stem)))
        for path in list_images(folder)
    ]
