"""Data: which files there are, what they hold, and batches of them on the device.

MVTec AD, and any data of the same layout, whatever the classes are called:

    <datapath>/<class>/train/good/*            good images to learn from
    <datapath>/<class>/test/<kind>/*           kind "good", or a kind of defect
    <datapath>/<class>/ground_truth/<kind>/<name>_mask.png

BTAD: the same with "ok" for "good", "ko" for the defects, and masks named like their image.

MVTec LOCO: the same as MVTec AD, with a folder `<name>` of masks, which are united, for each image.

MVTec AD 2: the same as MVTec AD, with test_public/<kind> for test/<kind>, and its ground truth in there.

VisA: <datapath>/split_csv/1cls.csv names class, split, label, image and mask of every image.

Real-IAD: <datapath>/<class>.json names them, below <datapath>/<class>/.

Good images alone: a folder of them, and perhaps one of bad ones (`open_folders`).

Images: the suffixes of `IMAGE_SUFFIXES` in any case; gray, RGB, RGBA, 16 bit (white is 65535), floating point
(white is 1); turned as their EXIF says.

    open_class -> AnomalyClass: paths -> Images: batches of uint8 (B,h,w,3) -> normalize: (B,3,h,w)
"""

from __future__ import annotations

import copy
import csv
import hashlib
import inspect
import json
import math
import os
import random
import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from util import InputError, free_memory, progress, shortened, size_text, world_size

DATASETS = ("auto", "mvtec", "btad", "visa", "realiad")
GOOD_FOLDERS = {"mvtec": "good", "btad": "ok"}
VISA_SPLIT = Path("split_csv") / "1cls.csv"
TEST_FOLDERS = ("test", "test_public")  # the second is MVTec AD 2's
ENOUGH_TO_HOLD_OUT, AUTO_HOLDOUT, MOST_HOLDOUT = 50, 0.1, 0.9
MVTEC_HOME = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# What a file may hold, whatever its suffix: pictures, and nothing that an interpreter runs, such as EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
MASK_SIZE = (256, 256)  # the official program's, whatever the images' is
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CACHES = ("auto", "ram", "none")
MEMORY_SHARE = 1 / 4  # of the free memory that images take without being told to
MOST_NODES = 10_000  # values in a file of --augment
MOST_IN_FLIGHT = 2**30  # bytes of decoded images that wait to be used, or one image if that is larger
WORKING_COPIES = 2  # of an image, while it is decoded, converted and resized

AUGMENTATIONS = ("auto", "none", "flips", "turns")
PIPELINE_SUFFIXES = (".yaml", ".yml", ".json")
NUM_PROBES = 4  # images that a pipeline from a file is tried on before the training

FLOAT_MARGIN = 0.1  # by which resampled floating-point images leave 0 to 1
NEARLY_BLACK, NUM_LOOKS = 24, 4  # of 255, in all of these many training images
NUM_GLANCES, MOST_MIXED = 32, 1.2  # images whose size is looked at; how much wider than others they may be
CHUNK = 2**16  # bytes that tell files of one size apart


# -------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class TestImage:
    """One test image.

    Attributes:
        path: of the image.
        kind: "good", or a kind of defect.
        mask: path of its mask, or of a folder whose masks are united; None for good images and in
            classes without masks.
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
        warnings: what reading the files found odd but usable, a line each.
        held_out: good images that are neither trained on nor templates, sorted; see `hold_out`.
    """

    name: str
    train: list[Path]
    test: list[TestImage]
    warnings: list[str] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        return any(image.mask for image in self.test)

    @property
    def defective(self) -> Tensor:
        """(N,) bool."""
        return torch.tensor([image.defective for image in self.test], dtype=torch.bool)


def open_class(
    datapath: Path, name: str, dataset: str = "auto", need_train: bool = True, need_test: bool = True
) -> AnomalyClass:
    """Find the files of one class.

    Args:
        dataset: the layout, one of `DATASETS`.
        need_train, need_test: whether these images have to be there.

    Raises:
        InputError: path, class, training images, test images or a mask missing.
    """
    dataset = recognize(datapath, dataset)
    present = list_classes(datapath, dataset, "train" if need_train else "test")
    if need_test and is_flat(datapath, dataset):
        raise InputError(
            f"{datapath} holds good images and no test images; metrics need folders such as "
            f"<class>/test/good and <class>/test/<defect> in --datapath"
        )
    if name not in {*present, *list_classes(datapath, dataset)}:
        have = f"classes there: {', '.join(present)}" if present else "no class folders there"
        if any((datapath / part).is_dir() for part in ("train", *TEST_FOLDERS)):
            parent, itself = datapath.resolve().parent, datapath.resolve().name
            have = f"it is a class itself: give --datapath {parent} --cls {itself}"
        elif not present and (datapath / name).is_dir():
            good = GOOD_FOLDERS.get(dataset, "good")
            have = f"{datapath / name} has no folder {f'train/{good}' if need_train else 'test'}"
        raise InputError(f"no class {name!r} in {datapath} (layout {dataset}); {have}")
    if dataset == "visa":
        data = _open_visa_class(datapath, name)
    elif dataset == "realiad":
        data = _open_realiad_class(datapath, name)
    else:
        data = _open_folder(datapath / name, GOOD_FOLDERS[dataset])
    for part, images, needed in (("training", data.train, need_train), ("test", data.test, need_test)):
        if needed and not images:
            raise InputError(
                f"no {part} images of class {name} in {datapath} (layout {dataset}); put some there, and not into "
                "folders of their own"
            )
    data.warnings.extend(oddities(data))
    return data


def _open_folder(folder: Path, good: str) -> AnomalyClass:
    """A class in MVTec's layout, or one of its kin."""
    _check_case(folder, ("train", *TEST_FOLDERS, "ground_truth"))
    train = folder / "train" / good
    test_folder = next((folder / t for t in TEST_FOLDERS if (folder / t).is_dir()), folder / "test")
    public = test_folder.name != "test"
    _check_case(test_folder, (good, "ground_truth"))
    masks = (test_folder if public else folder) / "ground_truth"
    kinds = sorted(filter(_visible, test_folder.iterdir())) if test_folder.is_dir() else []
    kinds = [path for path in kinds if path.is_dir() and path != masks]
    test = [image for kind in kinds for image in _list_kind(kind, masks / kind.name, good)]
    _check_masks(test, masks)
    data = AnomalyClass(folder.name, list_images(train), test, skipped_files([train, *kinds]))
    if public:
        data.warnings.append("MVTec AD 2 takes PRO up to a rate of 0.05; --proLimit 0.05 does so, too")
    return data


def open_folders(name: str, good: Path, bad: Path | None, masks: Path | None) -> AnomalyClass:
    """A class whose images lie in folders of any name.

    Args:
        good: holds images to learn from.
        bad: holds defective test images.
        masks: holds their masks, `<name>_mask` or `<name>`.

    Raises:
        InputError: there is no such folder, it holds no images, or one of the bad images has no mask in `masks`.
    """
    given = {"--good": good, "--bad": bad, "--masks": masks}
    given = {flag: folder for flag, folder in given.items() if folder is not None}
    for flag, folder in given.items():
        if not list_images(folder) and not (flag == "--masks" and folder.is_dir()):
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            what = "holds no images" if folder.is_dir() else "is not a folder"
            raise InputError(f"{flag} {folder} {what}; choose one that holds some ({suffixes})")
    if bad is not None and bad.resolve() == good.resolve():
        raise InputError(f"--bad {bad} is the folder of --good, too; choose another")
    test = []
    if bad is not None:
        test = _list_kind(bad, masks, "", "bad")
    unmasked = [image.path for image in test if image.mask is None]
    if masks is not None and unmasked:
        raise InputError(
            f"{unmasked[0]} has no mask {masks / unmasked[0].stem}_mask.png; add it, or leave --masks out"
        )
    folders = [folder for flag, folder in given.items() if flag != "--masks"]
    data = AnomalyClass(name, list_images(good), test)
    data.warnings.extend(oddities(data, folders))
    return data


def hold_out(data: AnomalyClass, share: float | str, seed: int) -> AnomalyClass:
    """Keep a random share of the good images from training; the same images for the same seed.

    They are the good test images where there are defective ones alone.

    Args:
        share: 0 to 0.9, or "auto": a tenth where there are no good test images and at least 50 to learn from.
    """
    has_good = any(not image.defective for image in data.test)
    if not isinstance(share, (int, float)) or not 0 <= share <= MOST_HOLDOUT:
        share = AUTO_HOLDOUT if not has_good and len(data.train) >= ENOUGH_TO_HOLD_OUT else 0
    count = math.ceil(share * len(data.train))
    if not count:
        return data
    chosen = set(random.Random(str(seed)).sample(data.train, count))
    held_out = sorted(chosen)
    test = data.test
    if test and not has_good:
        test = [*test, *(TestImage(path, "good", None) for path in held_out)]
    return replace(data, train=[p for p in data.train if p not in chosen], test=test, held_out=held_out)


def is_flat(datapath: Path, dataset: str = "auto") -> bool:
    """Whether a folder holds images itself, and no classes."""
    if dataset not in ("auto", "mvtec") or not list_images(datapath):
        return False
    return recognize(datapath) == "mvtec" and not any(
        list_classes(datapath, "mvtec", part) for part in ("train", "test")
    )


def oddities(data: AnomalyClass, folders: Iterable[Path] = ()) -> list[str]:
    """Lines about copies, images that are nearly black, mixed proportions, and what is no image in the folders."""
    return [*skipped_files(folders), *copies(data), *nearly_black(data.train), *mixed_proportions(data.train)]


def skipped_files(folders: Iterable[Path]) -> list[str]:
    """A line about what lies in folders of images and is none, or no line."""
    inside = sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if _visible(p))
    skipped = [path for path in inside if not _is_image(path)]
    if not skipped:
        return []
    return [
        f"{len(skipped)} of {len(inside)} files and folders are skipped, the first is {skipped[0]}; images are "
        f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
    ]


def _check_case(folder: Path, names: Iterable[str]) -> None:
    """Raise an InputError for a folder such as Ground_truth, which would be passed over, or taken for a defect."""
    names, inside = set(names), list(folder.iterdir()) if folder.is_dir() else []
    for path in sorted(inside):
        if path.name.lower() in names and path.name not in names and path.is_dir():
            raise InputError(f"{path} is spelled {path.name.lower()} in a data set; rename it")


def copies(data: AnomalyClass) -> list[str]:
    """A line about images with the same content in training and test, and one about those in one part, if any."""
    train = set(data.train)
    groups = _equal_files([*data.train, *(image.path for image in data.test)])
    across = [group for group in groups if train & set(group) and set(group) - train]
    lines = []
    for found, where in ((across, "in training and test"), ([g for g in groups if g not in across], "once more")):
        if found:
            first, second, count = found[0][0], found[0][-1], sum(len(group) - 1 for group in found)
            lines.append(f"{count} images are the same {where}, the first is {second}, a copy of {first}")
    return lines


def _equal_files(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files of the same content; of most files only the size is looked at."""
    groups = [list(paths)]
    for key in (lambda path: path.stat().st_size, partial(_digest, length=CHUNK), _digest):
        split = []
        for group in groups:
            by_key = defaultdict(list)
            for path in group:
                by_key[key(path)].append(path)
            split += [same for same in by_key.values() if len(same) > 1]
        groups = split
    return groups


def _digest(path: Path, length: int = -1) -> bytes:
    """Of a file's first bytes, or of all; of one that cannot be read, which is said later, one of its own."""
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(length)).digest()
    except OSError:
        return os.fsencode(path)


def nearly_black(paths: Sequence[Path]) -> list[str]:
    """A line if some images, looked at in place of all, are too dark to show anything, or no line."""
    looks = [paths[i * len(paths) // NUM_LOOKS] for i in range(NUM_LOOKS)] if paths else []
    highest = 0
    for path in dict.fromkeys(looks):
        try:
            highest = max(highest, int(read_image(path).max()))
        except InputError:  # is said when it is used
            return []
    if not looks or highest >= NEARLY_BLACK:
        return []
    return [
        f"{looks[0]} and others are nearly black, their highest value is {highest} of 255; white is 65535 in "
        "16-bit files and 1 in floating-point ones: scale images of 10 or 12 bits up"
    ]


def mixed_proportions(paths: Sequence[Path]) -> list[str]:
    """A line if some images, looked at in place of all, are much wider than others, or no line."""
    looks = dict.fromkeys(paths[i * len(paths) // NUM_GLANCES] for i in range(NUM_GLANCES) if paths)
    shapes = {path: shape for path in looks if (shape := image_shape(path, (0, 0))) != (0, 0)}
    by_width = sorted(shapes, key=lambda path: shapes[path][1] / shapes[path][0])
    if not by_width:
        return []
    (h, w), (height, width) = (shapes[path] for path in (by_width[0], by_width[-1]))
    if width * h <= MOST_MIXED * w * height:
        return []
    return [
        f"{by_width[0]} is {size_text((h, w))} and {by_width[-1]} {size_text((height, width))}: all images are "
        "stretched to one size; turn or cut them alike"
    ]


def recognize(datapath: Path, dataset: str = "auto") -> str:
    """The layout of a data set: as asked, or what the folders look like.

    Raises:
        InputError: no such folder, or not in the layout that was asked for.
    """
    if not datapath.is_dir():
        raise InputError(
            f"--datapath {datapath} is not a folder; give one that holds class folders, or get MVTec AD from "
            f"{MVTEC_HOME} and unpack it there; `make demo` needs no download"
        )
    if dataset == "visa" and not (datapath / VISA_SPLIT).is_file():
        raise InputError(f"--dataset visa: no {VISA_SPLIT} in {datapath}; pass VisA's own folder")
    if dataset != "auto":
        return dataset
    if (datapath / VISA_SPLIT).is_file():
        return "visa"
    if list_classes(datapath, "realiad") and not _folders_with(datapath, "train/good"):
        return "realiad"
    of_btad = _folders_with(datapath, "train/ok") or (
        _folders_with(datapath, "test/ok") and not _folders_with(datapath, "train/good")
    )
    return "btad" if of_btad else "mvtec"


def list_classes(datapath: Path, dataset: str, part: str = "train") -> list[str]:
    """Names of all classes that have a part, "train" or "test", in a data set of a known layout; sorted."""
    if dataset == "visa":
        return sorted({row["object"] for row in _read_visa_split(datapath)})
    if dataset == "realiad":
        return sorted(p.stem for p in datapath.glob("*.json") if (datapath / p.stem).is_dir())
    inside = (f"train/{GOOD_FOLDERS[dataset]}",) if part == "train" else TEST_FOLDERS
    return _folders_with(datapath, *inside)


def _folders_with(datapath: Path, *inside: str) -> list[str]:
    """Folders in which one of these is."""
    folders = filter(_visible, datapath.iterdir())
    return sorted(p.name for p in folders if any((p / name).is_dir() for name in inside))


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted; none if there is no such folder."""
    return sorted(filter(_is_image, folder.iterdir())) if folder.is_dir() else []


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and _visible(path) and path.is_file()


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")  # .ipynb_checkpoints, ._000.png and their like are no data


def _list_kind(folder: Path, mask_folder: Path | None, good: str, kind: str | None = None) -> list[TestImage]:
    """The test images of one kind, each with the mask `<name>_mask` or `<name>`, or the folder `<name>`."""
    kind = kind or ("good" if folder.name == good else folder.name)
    masks = defaultdict(list)
    if kind != "good" and mask_folder is not None and mask_folder.is_dir():
        for path in sorted(mask_folder.iterdir()):
            if list_images(path):
                masks[path.name].append(path)
        for path in list_images(mask_folder):
            masks[path.stem].append(path)
    images = []
    for path in list_images(folder):
        mask = _only_mask(path, [*masks[f"{path.stem}_mask"], *masks[path.stem]])
        # LOCO's masks have a value of its own for each kind of defect.
        images.append(TestImage(path, kind, mask, mask_is_binary=mask is None or mask.is_file()))
    _check_stems(images)
    return images


def _only_mask(image: Path, masks: list[Path]) -> Path | None:
    if len(masks) > 1:
        raise InputError(f"{image} has two masks, {masks[0]} and {masks[1]}; remove one")
    return masks[0] if masks else None


def _check_stems(images: list[TestImage]) -> None:
    """Raise an InputError for two images that one mask would belong to."""
    owner = {}
    for image in images:
        if image.mask is not None and (other := owner.setdefault(image.mask, image)) is not image:
            raise InputError(
                f"{image.mask} is the mask of {other.path} and of {image.path}; rename one of these, and give it "
                "a mask of its own"
            )


def _check_masks(images: list[TestImage], mask_folder: Path) -> None:
    """Raise an InputError for a defect without a mask, unless the class has no masks at all."""
    defective = [image for image in images if image.defective]
    unmasked = [image for image in defective if image.mask is None]
    masks = [p for p in mask_folder.rglob("*") if _is_image(p) and _visible(p.parent)] if unmasked else []
    if masks:
        image, none_fits = unmasked[0], len(unmasked) == len(defective)
        raise InputError(
            f"{image.path} has no mask {mask_folder / image.kind / image.path.stem}_mask.png"
            + (f", and {min(masks)} fits no test image, nor does any other mask" if none_fits else "")
            + f"; add or rename it, or remove {mask_folder} to evaluate without masks"
        )


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
    for path in [*train, *(p for image in test for p in (image.path, image.mask) if p)]:
        if not path.is_file():
            raise InputError(f"{path}, named in {datapath / VISA_SPLIT}, does not exist; unpack VisA again")
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
        raise InputError(f"{path} lacks some of the columns {', '.join(sorted(columns))}; unpack VisA again")
    for row in rows:
        if row["split"] not in ("train", "test"):
            raise InputError(
                f"{path} has the split {row['split']!r}, which is neither train nor test; unpack VisA again"
            )
        names, paths = (row["object"], row["label"]), (row["image"], row["mask"])
        if not all(map(_is_name, names)) or any(Path(p).is_absolute() or ".." in Path(p).parts for p in paths):
            raise InputError(f"{path} names files outside of {datapath}: {row}; unpack VisA again")
        if row["split"] == "train" and row["label"] != "normal":
            raise InputError(f"{path} has a defective training image, {row['image']}; unpack VisA again")
    return rows


def _is_name(given: object) -> bool:
    """Whether it can be the name of a folder, inside of another."""
    return isinstance(given, str) and not set(given) & set("/\\\0") and given not in ("", ".", "..")


def _open_realiad_class(datapath: Path, name: str) -> AnomalyClass:
    path, parts = datapath / f"{name}.json", {"train": [], "test": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for part, images in parts.items():
            for row in content[part]:
                kind = "good" if row["anomaly_class"] == "OK" else row["anomaly_class"]
                if not _is_name(kind):
                    raise ValueError(f"{kind!r:.100} is no name of a defect")
                mask = row["mask_path"] if kind != "good" else None
                for given in filter(None, (row["image_path"], mask)):
                    if Path(given).is_absolute() or ".." in Path(given).parts:
                        raise ValueError(f"{given} lies outside of {datapath / name}")
                    if not (datapath / name / given).is_file():
                        raise ValueError(f"{given} is not in {datapath / name}")
                mask = datapath / name / mask if mask else None
                images.append(TestImage(datapath / name / row["image_path"], kind, mask, False))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"cannot read {path} ({reason}); unpack Real-IAD again") from None
    if any(image.defective for image in parts["train"]):
        raise InputError(f"{path} has a defective training image; unpack Real-IAD again")
    test = sorted(parts["test"], key=lambda image: (image.kind, image.path))
    return AnomalyClass(name, sorted(image.path for image in parts["train"]), test)


# ----------------------------------------------------------------------------- images and masks


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (h,w,3), resized with PIL bilinear; without `size`, as large as it is.

    Raises:
        InputError: not a readable image.
    """
    image = open_image(path)
    if image.mode[0] in "IF":  # PIL's own conversion of 16 and 32 bit gray would clip, not scale
        image = Image.fromarray(_to_8_bits(image, path))
    image = image.convert("RGB")
    return np.array(image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image)


def _to_8_bits(image: Image.Image, path: Path) -> np.ndarray:
    """uint8 (h,w) of 16 and 32 bit gray, whose white depends on the type of the file and on no pixel.

    Raises:
        InputError: floating-point values that are not finite, or not 0 to 1.
    """
    array, is_float = np.array(image, dtype=np.float32), image.mode[0] == "F"
    if is_float:
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        if not np.isfinite(array).all():
            raise InputError(f"image {path} has values that are not finite; repair or remove it")
        if low < -FLOAT_MARGIN or high > 1 + FLOAT_MARGIN:
            raise InputError(
                f"image {path} has values from {low:.4g} to {high:.4g}, but floating-point images are 0 to 1; "
                "scale all images alike, or save them with 8 or 16 bits"
            )
    array *= 255 / (1 if is_float else 65535)
    return array.clip(0, 255, out=array).round(out=array).astype(np.uint8)


def read_mask(image: TestImage, size: tuple[int, int] = MASK_SIZE) -> np.ndarray:
    """bool (h,w): made binary, resized with PIL bilinear and thresholded at one half; all False without mask.

    Raises:
        InputError: not readable, or of another size than the image.
    """
    if image.mask is None:
        return np.zeros(size, dtype=bool)
    paths = list_images(image.mask) if image.mask.is_dir() else [image.mask]
    binary = np.logical_or.reduce([_read_binary(path, image) for path in paths])
    mask = Image.fromarray(binary.astype(np.uint8) * 255)
    return np.asarray(mask.resize(size[::-1], Image.Resampling.BILINEAR)) > 127


def _read_binary(path: Path, image: TestImage) -> np.ndarray:
    """One mask of an image: bool, as large as the image."""
    mask, size = open_image(path), open_image(image.path, decode=False).size
    if mask.size != size:
        raise InputError(
            f"mask {path} is {size_text(mask.size[::-1])}, its image {size_text(size[::-1])}; they must agree"
        )
    if alpha_varies(mask):
        raise InputError(f"mask {path} has an alpha channel; save it in black and white, without one")
    # Of a color the brightest channel: pure blue, and the dark red of a palette, are no black.
    array = np.asarray(mask if mask.mode[0] in "IF1" else mask.convert("RGB"), dtype=np.float32)
    array = array if array.ndim == 2 else array.max(2)
    return array > (_full_scale(array) / 2 if image.mask_is_binary else 0)


def alpha_varies(image: Image.Image) -> bool:
    """Whether some pixels are more transparent than others."""
    return image.has_transparency_data and bool(np.ptp(np.asarray(image.convert("RGBA").getchannel("A"))))


def _full_scale(array: np.ndarray) -> int:
    """What white is in a mask: 1, 255 or 65535, which single pixels may exceed a little."""
    highest = array.max(initial=0)
    return 1 if highest < 1.5 else 255 if highest < 300 else 65535


def open_image(path: Path, decode: bool = True) -> Image.Image:
    """The image as its EXIF turns it; without `decode`, pixels are read only to turn them."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if decode:
                image.load()
            if _orientation(image) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except FileNotFoundError:
        raise InputError(f"no image {path}; choose a file that is there") from None
    except UnidentifiedImageError:
        raise InputError(f"cannot read image {path} (empty, or no image); repair or remove it") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise InputError(f"cannot read image {path} ({reason}); repair or remove it") from None


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright."""
    try:  # a PNG's own getexif would decode it to look for EXIF behind the pixels
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except SyntaxError:  # the EXIF is damaged, the image need not be
        return 1


def load_masks(
    data: AnomalyClass, num_workers: int, size: tuple[int, int] = MASK_SIZE, roi: Tensor | None = None
) -> Tensor | None:
    """bool (N,h,w) of the test images; None in a class without masks.

    Defective images whose mask is empty, outside of `roi`, or all white, are counted in a line that is added to
    `data.warnings`.

    Raises:
        InputError: a mask cannot be read, or has another size than its image.
    """
    if not data.has_masks:
        return None
    masks = torch.empty(len(data.test), *size, dtype=torch.bool)
    paths = [image.path for image in data.test]
    _read_all(lambda i: read_mask(data.test[i], size), masks, num_workers, "masks", paths)
    flat = masks.flatten(1)
    outside = torch.zeros(len(flat), dtype=torch.bool) if roi is None else ~(masks & roi.cpu()).flatten(1).any(1)
    for odd, what, count_as in (
        (~flat.any(1), "an empty mask", "good"),
        (flat.any(1) & outside, "no defect inside of --roi and stay defective", "good"),
        (flat.all(1), "a mask that is all white", "bad"),
    ):
        found = (data.defective & odd).nonzero().flatten().tolist()
        if found:
            data.warnings.append(
                f"{len(found)} defective images have {what}, the first is {data.test[found[0]].path}; "
                f"all of their pixels count as {count_as}"
            )
    return masks


def _read_all(
    read: Callable[[int], np.ndarray], out: Tensor, num_workers: int, description: str, paths: Sequence[Path]
) -> None:
    """out[i] = read(i), of paths[i], for all i, in threads."""
    arrays = look_ahead(
        read, range(len(out)), num_workers, num_workers, lambda i: WORKING_COPIES * decoded_bytes(paths[i])
    )
    for i, array in enumerate(progress(arrays, description, len(out))):
        out[i] = torch.from_numpy(array)


def image_shape(path: Path, otherwise: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of an image, as its EXIF turns it; `otherwise` if it cannot be read any more."""
    try:
        return open_image(path, decode=False).size[::-1]
    except InputError:
        return otherwise


def decoded_bytes(path: Path) -> int:
    """What an image takes as uint8 (h,w,3); 0 if it cannot be read."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return 3 * image.width * image.height
    except Exception:  # PIL raises nearly anything on damaged files; it is said when the image is read
        return 0


def normalize(images: Tensor) -> Tensor:
    """uint8 (B,h,w,3) -> float32 (B,3,h,w), channels_last, by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v).to(images.device, non_blocking=True) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------- batches


class Images:
    """Images of one size as uint8, from memory or from their files.

    Args:
        paths: of the images.
        size: (h, w).
        cache: "ram" decodes all of them now; "none" each time they are asked for; "auto" is "ram" if they
            take no more than a quarter of the free memory.
        device: where batches go; kept images are copied to CUDA, too, if they take no more than a quarter
            of its free memory.
        num_workers: threads that prepare images.
        description: of the progress bar.

    Raises:
        InputError: an image cannot be read; it is named.  With "none", when it is asked for.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], cache: str, device: torch.device,
        num_workers: int, description: str,
    ):  # fmt: skip
        self.paths, self.size, self.device = list(paths), size, device
        self._num_workers = max(1, num_workers)
        self._kept: Tensor | None = None  # on the host
        self._on_device: Tensor | None = None  # the same images
        num_bytes = len(paths) * size[0] * size[1] * 3
        share = MEMORY_SHARE / world_size()  # each process keeps its own
        if cache == "ram" or (cache == "auto" and num_bytes <= share * free_memory(torch.device("cpu"))):
            self._kept = torch.empty(len(paths), *size, 3, dtype=torch.uint8)
            _read_all(self._read, self._kept, self._num_workers, description, self.paths)
            if device.type == "cpu" or num_bytes <= MEMORY_SHARE * free_memory(device):
                self._on_device = self._kept.to(device)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image, uint8 (h,w,3), to be read only."""
        return self._read(index) if self._kept is None else self._kept[index].numpy()

    def batches(
        self, batches: Iterable[Sequence[int] | Tensor], augment: Augmentation | None = None, epoch: int = 0
    ) -> Iterator[Tensor]:
        """uint8 (B,h,w,3) on the device for the indices (B,) of each batch.

        What takes time, such as decoding and augmenting, is done ahead in threads.
        """
        batches = map(torch.as_tensor, batches)
        if augment is None and (images := self._on_device) is not None:
            return (images[batch.to(self.device, non_blocking=True)] for batch in batches)
        return look_ahead(
            lambda batch: self._prepare(batch.tolist(), augment, epoch),
            batches, self._num_workers, self._num_workers, self._bytes_of,
        )  # fmt: skip

    def _read(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], self.size)

    def _bytes_of(self, batch: Tensor) -> int:
        """What preparing a batch takes: one image at a time is decoded."""
        if self._kept is not None:
            return 0
        return WORKING_COPIES * max(decoded_bytes(self.paths[i]) for i in batch.tolist())

    def _prepare(self, indices: list[int], augment: Augmentation | None, epoch: int) -> Tensor:
        on_cuda = self.device.type == "cuda"  # from pinned memory the copy does not make the host wait
        batch = torch.empty(len(indices), *self.size, 3, dtype=torch.uint8, pin_memory=on_cuda)
        for i, index in enumerate(indices):
            image = self[index]
            batch[i] = torch.from_numpy(image if augment is None else augment(image, epoch, index))
        return batch.to(self.device, non_blocking=True)


def training_order(num_images: int, batch_size: int) -> list[Tensor]:
    """One epoch in random order, drawn from torch's random state: indices (B,) for each full batch."""
    count = num_images // batch_size * batch_size
    return list(torch.randperm(num_images)[:count].view(-1, batch_size))


def evaluation_order(indices: Iterable[int], batch_size: int) -> list[Tensor]:
    """These images in order: indices (B,) for each batch, the last as large as it comes."""
    batches = torch.tensor(list(indices), dtype=torch.long).split(batch_size)
    return [batch for batch in batches if len(batch)]


def look_ahead(
    function: Callable, items: Iterable, depth: int, num_workers: int = 1,
    num_bytes: Callable[[object], int] = lambda item: 0,
) -> Iterator:  # fmt: skip
    """function(item) for every item in order, computed in threads up to `depth` items before asked for.

    Args:
        num_bytes: what an item takes from then until it is asked for; all together take `MOST_IN_FLIGHT`.
    """
    pool, pending, taken = ThreadPoolExecutor(max(1, num_workers)), deque(), 0
    try:
        for item in items:
            size = num_bytes(item)
            while pending and (len(pending) > depth or taken + size > MOST_IN_FLIGHT):
                result, freed = pending.popleft()
                taken -= freed
                yield result.result()
            pending.append((pool.submit(function, item), size))
            taken += size
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------- augmentation


class Augmentation:
    """Random changes of training images by a pipeline of albumentations.

    What an image becomes depends on seed, epoch and its index alone, for any number of threads and processes.

    Args:
        pipeline: an `albumentations.Compose`.
        seed: of all that is drawn.
        source: the choice of --augment, for messages.

    Attributes:
        description: the transforms in one line.
    """

    def __init__(self, pipeline, seed: int, source: str):
        self._pipeline, self._seed, self._source = pipeline, seed, source
        self._of_thread = threading.local()
        self.description = ", ".join(" ".join(repr(t).split()) for t in pipeline.transforms)

    @classmethod
    def create(cls, choice: str, class_name: str, size: tuple[int, int], seed: int) -> Augmentation | None:
        """What --augment chose; None if nothing is to be changed.

        Args:
            choice: "auto" is the official one, "turns" for MVTec's textures and "none" for other classes;
                "flips" flips in both directions, with probability 0.5 each; "turns" also turns by a random
                multiple of 90 degrees with probability 0.5; else a file that `albumentations.save` wrote.
            size: (h, w) of the images; "auto" leaves out the turns if they are not square.

        Raises:
            InputError: a file cannot be used, or "turns" with images that are not square.
        """
        square = size[0] == size[1]
        if choice == "auto":
            choice = ("turns" if square else "flips") if class_name in MVTEC_TEXTURES else "none"
        if choice == "none":
            return None
        if choice == "turns" and not square:
            raise InputError(f"--augment turns: images of {size_text(size)} are not square; use flips")
        if choice not in AUGMENTATIONS:
            pipeline = _load_pipeline(Path(choice))
            probe = cls(_applied_always(pipeline), seed, choice)
            image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
            for index in range(NUM_PROBES):
                probe(image, 0, index)
            return cls(pipeline, seed, choice)
        library = _import_albumentations()
        transforms = [library.HorizontalFlip(p=0.5), library.VerticalFlip(p=0.5)]
        if choice == "turns":
            transforms.append(library.RandomRotate90(p=0.5))
        return cls(library.Compose(transforms), seed, choice)

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """uint8 (h,w,3), changed; the given one stays as it is.

        Raises:
            InputError: the pipeline fails, or gives another shape or type.
        """
        if not hasattr(self._of_thread, "pipeline"):  # its random state is its own
            self._of_thread.pipeline = copy.deepcopy(self._pipeline)
        pipeline, key = self._of_thread.pipeline, (self._seed, int(epoch), int(index))
        # Not set_random_seed: each transform would start from it, and all flips would come together.
        pipeline.set_random_state(np.random.default_rng(key), random.Random(str(key)))
        try:
            changed = pipeline(image=image.copy())["image"]  # a transform may work in place
        except Exception as error:  # they raise nearly anything
            raise _augment_error(self._source, error) from None
        made, given = (f"{x.dtype} {size_text(x.shape)}" for x in (changed, image))
        if made != given:
            raise _augment_error(self._source, f"makes {made} of {given}, which must stay the same")
        return changed


def _load_pipeline(path: Path):
    """The `albumentations.Compose` in a file; only the library's own transforms are called.

    Raises:
        InputError: not readable, not a pipeline, an unknown transform or parameter.
    """
    if path.suffix.lower() not in PIPELINE_SUFFIXES:
        choices = ", ".join(AUGMENTATIONS)
        raise InputError(f"--augment {path} is no .yaml or .json file; use one, or {choices}")
    library = _import_albumentations()
    import yaml  # albumentations needs it, too

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        _check_size(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice, and parameters, which are checked
            _check_transform(content.get("transform") if isinstance(content, dict) else None, library)
            pipeline = library.Compose([library.from_dict(content)])
        library.to_dict(pipeline)  # refuses transforms that need more than a file can hold
    except Exception as error:  # the parsers and the library raise nearly anything
        raise _augment_error(path, error) from None
    return pipeline


def _check_size(content: object) -> None:
    """Raise a ValueError if it is endless, as references from a yaml file to itself can make it."""
    pending, count = [content], 0
    while pending:
        node, count = pending.pop(), count + 1
        if count > MOST_NODES:
            raise ValueError(f"holds more than {MOST_NODES} values")
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()


def _check_transform(node: object, library: ModuleType) -> None:
    """Raise a ValueError unless a part of a file names transforms of the library, and parameters of theirs."""
    if not isinstance(node, dict) or not isinstance(node.get("__class_fullname__"), str):
        raise ValueError("holds no pipeline as albumentations.save writes it")
    name = node["__class_fullname__"]
    short = name.rpartition(".")[2] if name.startswith("albumentations.") else name
    kind = getattr(library, short, None)
    bases = (library.BasicTransform, library.BaseCompose)
    if not (inspect.isclass(kind) and issubclass(kind, bases) and kind.is_serializable()):
        raise ValueError(f"{name} is no transform that albumentations {library.__version__} loads")
    # Of all bases, because albumentations.save writes some parameters that only those have.
    known = {p for base in kind.__mro__ for p in inspect.signature(base.__init__).parameters}
    if unknown := node.keys() - known - {"__class_fullname__"}:
        raise ValueError(f"{name} has no parameter {min(map(str, unknown))}")
    if not 0 <= node.get("p", 1) <= 1:
        raise ValueError(f"{name} has p = {node['p']}, which is not from 0 to 1")
    if "transforms" in node:
        for inner in node["transforms"]:
            _check_transform(inner, library)
        return
    try:
        library.from_dict({"transform": node})
    except Exception as error:
        raise ValueError(f"{name}: {error}") from None


def _applied_always(pipeline):
    """A copy whose probabilities, but for zero, are one, so that what can happen does."""
    library, pending = _import_albumentations(), [copy.deepcopy(pipeline)]
    for composition in pending:
        for transform in composition.transforms:
            transform.p = 1.0 if transform.p else 0.0
            pending += [transform] if isinstance(transform, library.BaseCompose) else []
    return pending[0]


def _augment_error(source: str | Path, error: Exception | str) -> InputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    reason = shortened(reason.partition("For further information")[0])  # pydantic's link
    return InputError(f"--augment {source}: {reason}; correct the file, or use --augment none")


def _import_albumentations() -> ModuleType:
    """The library, imported without its question to PyPI whether there is a newer release."""
    variable = "NO_ALBUMENTATIONS_UPDATE"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import albumentations
    except ImportError as error:
        raise InputError(f"--augment: {error}; run pip install -r requirements.txt, or use none") from None
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
    return albumentations
