"""Data sets: which files there are in a known layout, and what they are.

MVTec AD, and any data of the same layout, whatever the classes are called:

    <datapath>/<class>/train/good/*            good images to learn from
    <datapath>/<class>/test/<kind>/*           kind "good", or a kind of defect
    <datapath>/<class>/ground_truth/<kind>/<name>_mask.png

BTAD: the same with "ok" for "good", "ko" for the defects, and masks named like their image.

VisA: <datapath>/split_csv/1cls.csv names class, split, label, image and mask of every image.

Images: png, jpg, jpeg, bmp, tif, tiff in any case; gray, RGB, RGBA, 16 bit.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from util import InputError

DATASETS = ("auto", "mvtec", "btad", "visa")
GOOD_FOLDERS = {"mvtec": "good", "btad": "ok"}
VISA_SPLIT = Path("split_csv") / "1cls.csv"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
MASK_SIZE = (256, 256)  # the official program evaluates at this size whatever the input's
MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
MVTEC_HOME = "https://www.mvtec.com/company/research/datasets/mvtec-ad"


@dataclass(frozen=True)
class TestImage:
    """One test image.

    Attributes:
        path: of the image.
        kind: "good", or a kind of defect.
        mask: path of its mask; None for good images and in classes without masks.
        mask_is_binary: white in the mask is half of the scale or more; else any value but zero is a defect.
    """

    path: Path
    kind: str
    mask: Path | None
    mask_is_binary: bool = True

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


def open_class(
    datapath: Path, name: str, dataset: str = "auto", need_train: bool = True
) -> AnomalyClass:
    """Find the files of one class.

    Args:
        dataset: the layout, one of `DATASETS`.

    Raises:
        InputError: path, class, training images, test images or a mask missing.
    """
    dataset = recognise(datapath, dataset)
    present = list_classes(datapath, dataset, "train" if need_train else "test")
    if name not in present:
        have = f"classes there: {', '.join(present)}" if present else "no class folders there"
        raise InputError(f"no class {name!r} in {datapath} (layout {dataset}); {have}")
    if dataset == "visa":
        data = _open_visa_class(datapath, name)
    else:
        folder, good = datapath / name, GOOD_FOLDERS[dataset]
        data = AnomalyClass(name, list_images(folder / "train" / good), _list_test(folder, good))
    if not data.train and need_train:
        raise InputError(
            f"no training images of class {name} in {datapath} (layout {dataset}); put good images there"
        )
    return data


def recognise(datapath: Path, dataset: str = "auto") -> str:
    """The layout of a data set: as asked, or what the folders look like.

    Raises:
        InputError: no such folder, or not in the layout that was asked for.
    """
    if not datapath.is_dir():
        raise InputError(
            f"--datapath {datapath} is not a folder; get MVTec AD from {MVTEC_HOME} and unpack it there, "
            "or try `make demo`, which needs no download"
        )
    if dataset == "visa" and not (datapath / VISA_SPLIT).is_file():
        raise InputError(f"--dataset visa: no {VISA_SPLIT} in {datapath}; name VisA's own folder")
    if dataset != "auto":
        return dataset
    if (datapath / VISA_SPLIT).is_file():
        return "visa"
    of_btad = _folders_with(datapath, "train/ok") or (
        _folders_with(datapath, "test/ok") and not _folders_with(datapath, "train/good")
    )
    return "btad" if of_btad else "mvtec"


def list_classes(datapath: Path, dataset: str, part: str = "train") -> list[str]:
    """Names of all classes that have a part, "train" or "test", in a data set of a known layout; sorted."""
    if dataset == "visa":
        return sorted({row["object"] for row in _read_visa_split(datapath)})
    return _folders_with(datapath, f"train/{GOOD_FOLDERS[dataset]}" if part == "train" else part)


def _folders_with(datapath: Path, inside: str) -> list[str]:
    return sorted(p.name for p in datapath.iterdir() if (p / inside).is_dir() and _visible(p))


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and _visible(p))


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")  # .ipynb_checkpoints, ._000.png and their like are no data


def _list_test(folder: Path, good: str) -> list[TestImage]:
    test_folder, mask_folder = folder / "test", folder / "ground_truth"
    kinds = sorted(filter(_visible, test_folder.iterdir())) if test_folder.is_dir() else []
    images = [image for kind in kinds for image in _list_kind(kind, mask_folder / kind.name, good)]
    if not images:
        raise InputError(
            f"no test images in {test_folder}; it needs folders such as {good}/ and a defect's"
        )
    class_has_masks = mask_folder.is_dir() and any(map(list_images, mask_folder.iterdir()))
    for image in images:
        if class_has_masks and image.defective and image.mask is None:
            raise InputError(
                f"{image.path} has no mask {mask_folder / image.kind / image.path.stem}_mask.png; add it, "
                f"or remove {mask_folder} to evaluate without masks"
            )
    return images


def _list_kind(folder: Path, mask_folder: Path, good: str) -> list[TestImage]:
    """The test images of one kind, each with the mask `<name>_mask` or `<name>`."""
    kind = "good" if folder.name == good else folder.name
    masks = {path.stem: path for path in list_images(mask_folder) if kind != "good"}
    return [
        TestImage(path, kind, masks.get(f"{path.stem}_mask", masks.get(path.stem)))
        for path in list_images(folder)
    ]


def _open_visa_class(datapath: Path, name: str) -> AnomalyClass:
    rows = [row for row in _read_visa_split(datapath) if row["object"] == name]
    train = sorted(datapath / row["image"] for row in rows if row["split"] == "train")
    test = []
    for row in rows:
        if row["split"] == "test":
            kind = "good" if row["label"] == "normal" else row["label"]
            mask = datapath / row["mask"] if row["mask"] and kind != "good" else None
            test.append(TestImage(datapath / row["image"], kind, mask, mask_is_binary=False))
    test.sort(key=lambda image: (image.kind, image.path))
    if not test:
        raise InputError(f"no test images of class {name} in {datapath / VISA_SPLIT}")
    for path in [*train, *(p for image in test for p in (image.path, image.mask) if p)]:
        if not path.is_file():
            raise InputError(
                f"{path}, named in {datapath / VISA_SPLIT}, does not exist; unpack VisA again"
            )
    has_masks = any(image.mask for image in test)
    for image in test:
        if has_masks and image.defective and image.mask is None:
            raise InputError(f"{image.path} has no mask in {datapath / VISA_SPLIT}; add it")
    return AnomalyClass(name, train, test)


def _read_visa_split(datapath: Path) -> list[dict[str, str]]:
    path = datapath / VISA_SPLIT
    columns = {"object", "split", "label", "image", "mask"}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({error}); unpack VisA again") from None
    if not rows or not columns <= rows[0].keys() or any(row[c] is None for row in rows for c in columns):
        raise InputError(f"{path} has not the columns {', '.join(sorted(columns))}; unpack VisA again")
    for row in rows:
        names, paths = (row["object"], row["label"]), (row["image"], row["mask"])
        if any(set(name) & set("/\\") or name in ("", ".", "..") for name in names) or any(
            Path(p).is_absolute() or ".." in Path(p).parts for p in paths
        ):
            raise InputError(f"{path} names files outside of {datapath}: {row}; unpack VisA again")
        if row["split"] == "train" and row["label"] != "normal":
            raise InputError(f"{path} has a defective training image, {row['image']}; unpack VisA again")
    return rows
