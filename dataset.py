"""Data sets in the layout of MVTec AD, read once into memory.

    <datapath>/<class>/train/good/*            good images to learn from
    <datapath>/<class>/test/<kind>/*           kind "good", or a kind of defect
    <datapath>/<class>/ground_truth/<kind>/<name>_mask.png

Any class name works.  Images: png, jpg, jpeg, bmp, tif, tiff in any case; gray, RGB, RGBA, 16 bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util import InputError, progress, size_text

Augmentation = Callable[[np.ndarray], np.ndarray]  # uint8 (h,w,3) -> (h,w,3)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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


def open_class(datapath: Path, name: str) -> AnomalyClass:
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
        present = [p.name for p in sorted(datapath.iterdir()) if (p / "train").is_dir()]
        have = f"classes there: {', '.join(present)}" if present else "no class folders there"
        raise InputError(f"no class {name!r} in {datapath}; {have}")
    train = _list_images(folder / "train" / "good")
    if not train:
        raise InputError(f"no training images in {folder / 'train' / 'good'}; put good images there")
    return AnomalyClass(name, train, _list_test(folder))


def _list_images(folder: Path) -> list[Path]:
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
    class_has_masks = mask_folder.is_dir() and any(map(_list_images, mask_folder.iterdir()))
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
    masks = {path.stem: path for path in _list_images(mask_folder) if kind != "good"}
    return [
        TestImage(path, kind, masks.get(f"{path.stem}_mask", masks.get(path.stem)))
        for path in _list_images(folder)
    ]


# ----------------------------------------------------------------------------- reading images


def load_images(
    paths: Sequence[Path], size: tuple[int, int], num_workers: int, description: str
) -> Tensor:
    """Decode and resize once: uint8 (N,h,w,3).

    Args:
        size: (h, w).
        num_workers: decoding threads.

    Raises:
        InputError: an image cannot be read; it is named.
    """
    images = torch.empty(len(paths), *size, 3, dtype=torch.uint8)
    _read_all(lambda i: read_image(paths[i], size), images, num_workers, description)
    return images


def load_masks(data: AnomalyClass, num_workers: int) -> Tensor | None:
    """bool (N,256,256) of the test images; None in a class without masks.

    Raises:
        InputError: a mask cannot be read, or has another size than its image.
    """
    if not data.has_masks:
        return None
    masks = torch.zeros(len(data.test), *MASK_SIZE, dtype=torch.bool)
    with_mask = [i for i, image in enumerate(data.test) if image.mask]
    found = torch.zeros(len(with_mask), *MASK_SIZE, dtype=torch.bool)
    _read_all(lambda i: read_mask(data.test[with_mask[i]]), found, num_workers, "masks")
    masks[with_mask] = found
    return masks


def _read_all(
    read: Callable[[int], np.ndarray], out: Tensor, num_workers: int, description: str
) -> None:
    def read_into(i: int) -> None:
        out[i] = torch.from_numpy(read(i))

    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        for _ in progress(pool.map(read_into, range(len(out))), description, len(out)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h,w,3), resized with PIL bilinear.

    Raises:
        InputError: not a readable image.
    """
    image = _open(path)
    if image.mode[0] in "IF":  # PIL's own conversion of 16 and 32 bit gray would clip, not scale
        array = np.asarray(image, dtype=np.float64)
        full_scale = 65535 if image.mode[0] == "I" else _full_scale(array)
        image = Image.fromarray((array / full_scale * 255).clip(0, 255).round().astype(np.uint8))
    return np.array(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))


def read_mask(image: TestImage) -> np.ndarray:
    """bool (256,256): resized with PIL bilinear and thresholded at one half.

    Raises:
        InputError: not readable, or of another size than the image.
    """
    mask = _open(image.mask)
    with Image.open(image.path) as original:
        if mask.size != original.size:
            raise InputError(
                f"mask {image.mask} is {size_text(mask.size[::-1])}, its image "
                f"{size_text(original.size[::-1])}; they must agree"
            )
    array = np.asarray(mask.convert("L") if mask.mode[0] not in "IF1" else mask, dtype=np.float32)
    binary = array > _full_scale(array) / 2
    resized = Image.fromarray(binary.astype(np.uint8) * 255).resize(
        MASK_SIZE[::-1], Image.Resampling.BILINEAR
    )
    return np.asarray(resized) > 127


def _full_scale(array: np.ndarray) -> int:
    """What white is in pixels of unknown scale: 1, 255 or 65535."""
    highest = array.max(initial=0)
    return 1 if highest <= 1 else 255 if highest <= 255 else 65535


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise InputError(f"cannot read image {path} ({reason}); repair or remove it") from None


# ------------------------------------------------------------------------------------ batches


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B,h,w,3) -> float32 (B,3,h,w) on the device, by ImageNet's mean and deviation."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def evaluation_batches(images: Tensor, batch_size: int, device, description: str) -> Iterator[Tensor]:
    """All images in order, normalised: (B,3,h,w), the last batch as large as it comes."""
    for batch in progress(images.split(batch_size), description):
        yield normalise(batch, device)


def training_batches(
    images: Tensor, batch_size: int, augment: Augmentation | None, device
) -> Iterator[Tensor]:
    """One epoch in random order, normalised: (B,3,h,w), the last incomplete batch dropped.

    The order comes from torch's global random state.
    """
    order = torch.randperm(len(images))
    for indices in order[: len(order) // batch_size * batch_size].split(batch_size):
        batch = images[indices]
        if augment is not None:
            batch = torch.stack([torch.from_numpy(augment(image)) for image in batch.numpy()])
        yield normalise(batch, device)


def flips_and_turns(square: bool, seed: int) -> Augmentation:
    """The official augmentation of textures: flips and, on square images, a random multiple of 90
    degrees, each with probability 0.5."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks the network at import
    import albumentations

    transforms = [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
    if square:
        transforms.append(albumentations.RandomRotate90(p=0.5))
    augment = albumentations.Compose(transforms)
    # Compose(seed=...) would give every transform the same seed, and both flips always together.
    seeds = np.random.SeedSequence(seed).generate_state(len(transforms))
    for transform, own_seed in zip(transforms, seeds, strict=True):
        transform.set_random_seed(int(own_seed))
    return lambda image: np.ascontiguousarray(augment(image=image)["image"])
