"""From files to batches on the device: decoded and resized once, kept as uint8, normalised where they are used.

paths -> ImageStore: uint8 (n,h,w,3) -> FeatureSource: batches of features (B,C,H,W)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dataset import MASK_SIZE, AnomalyClass, TestImage
from hardware import free_memory
from parallel import World
from util import InputError, progress, size_text

CACHES = ("auto", "ram", "none")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Shares of the free memory that caches take without being told to: images, features.
IMAGE_SHARE, FEATURE_SHARE = 1 / 4, 1 / 8

Batch = tuple[Tensor, Tensor]  # indices (B,) and orientations (B,) of images


# ------------------------------------------------------------------------------------- images


class ImageStore:
    """Images of one size as uint8, from memory or from their files.

    Args:
        paths: of the images.
        size: (h, w).
        cache: "ram" decodes all of them now; "none" each time they are asked for, a few batches ahead;
            "auto" is "ram" if they take no more than a quarter of the free memory.
        device: where batches go; CUDA keeps the whole store if it takes no more than a quarter there.
        num_workers: decoding threads.
        description: of the progress bar.
        world: processes of this machine keep the images once for all.

    Raises:
        InputError: an image cannot be read; it is named.  With "none", when it is asked for.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], cache: str, device: torch.device,
        num_workers: int, description: str, world: World | None = None,
    ):  # fmt: skip
        self.world = world = world or World()
        self.paths, self.size, self.device = list(paths), size, device
        self._pool = ThreadPoolExecutor(max(1, num_workers))
        self.images: Tensor | None = None
        num_bytes = len(paths) * size[0] * size[1] * 3
        if cache == "auto":
            fits = num_bytes <= IMAGE_SHARE * free_memory(torch.device("cpu"))
            cache = "ram" if fits else "none"
        if world.any(cache == "ram"):  # all do alike
            self.images, fills = world.shared_bytes((len(paths), *size, 3))
            if fills:
                load_images(self.paths, self.images, num_workers, description)
            world.wait()
            if device.type == "cuda" and num_bytes <= IMAGE_SHARE * free_memory(device):
                self.images = self.images.to(device)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image, uint8 (h,w,3)."""
        return self._read(torch.tensor([index]))[0].cpu().numpy()

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """uint8 (B,h,w,3) on the device for each (B,); read ahead where reading takes time."""
        if self.images is not None and self.images.device == self.device:
            return map(self._read, indices)
        return look_ahead(lambda batch: self._to_device(self._read(batch)), indices, 4, num_workers=4)

    def _read(self, indices: Tensor) -> Tensor:
        if self.images is not None:
            return self.images[indices.to(self.images.device, non_blocking=True)]
        paths = [self.paths[i] for i in indices.tolist()]
        return torch.from_numpy(
            np.stack(list(self._pool.map(lambda p: read_image(p, self.size), paths)))
        )

    def _to_device(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True)


def look_ahead(function: Callable, items: Iterable, depth: int = 2, num_workers: int = 1) -> Iterator:
    """function(item) for every item in order, computed in threads up to `depth` items before asked for."""
    pool, pending = ThreadPoolExecutor(num_workers), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def load_images(paths: Sequence[Path], out: Tensor, num_workers: int, description: str) -> Tensor:
    """Decode and resize into `out`, uint8 (N,h,w,3), which is returned.

    Raises:
        InputError: an image cannot be read; it is named.
    """
    size = tuple(out.shape[1:3])
    _read_all(lambda i: read_image(paths[i], size), out, num_workers, description)
    return out


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


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (h,w,3), resized with PIL bilinear; without `size`, as large as it is.

    Raises:
        InputError: not a readable image.
    """
    image = _open(path)
    if image.mode[0] in "IF":  # PIL's own conversion of 16 and 32 bit gray would clip, not scale
        array = np.asarray(image, dtype=np.float64)
        full_scale = 65535 if image.mode[0] == "I" else _full_scale(array)
        image = Image.fromarray((array / full_scale * 255).clip(0, 255).round().astype(np.uint8))
    image = image.convert("RGB")
    return np.array(image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image)


def read_mask(image: TestImage) -> np.ndarray:
    """bool (256,256): made binary, resized with PIL bilinear and thresholded at one half.

    Raises:
        InputError: not readable, or of another size than the image.
    """
    mask = _open(image.mask)
    size = _open(image.path, decode=False).size
    if mask.size != size:
        raise InputError(
            f"mask {image.mask} is {size_text(mask.size[::-1])}, its image {size_text(size[::-1])}; "
            "they must agree"
        )
    array = np.asarray(mask.convert("L") if mask.mode[0] not in "IF1" else mask, dtype=np.float32)
    binary = array > (_full_scale(array) / 2 if image.mask_is_binary else 0)
    resized = Image.fromarray(binary.astype(np.uint8) * 255).resize(
        MASK_SIZE[::-1], Image.Resampling.BILINEAR
    )
    return np.asarray(resized) > 127


def _full_scale(array: np.ndarray) -> int:
    """What white is in pixels of unknown scale: 1, 255 or 65535, which single ones may exceed a little."""
    highest = array.max(initial=0)
    return 1 if highest < 1.5 else 255 if highest < 300 else 65535


def _open(path: Path, decode: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except UnidentifiedImageError:
        raise InputError(f"cannot read image {path} (empty, or no image); repair or remove it") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise InputError(f"cannot read image {path} ({reason}); repair or remove it") from None


# ---------------------------------------------------------------------------- order, orientation
#
# An orientation 0..7 is 4 * mirrored + turns: mirrored left to right, then turned by 90 degrees
# counterclockwise that many times.


def training_plan(num_images: int, batch_size: int, augment: str) -> list[Batch]:
    """One epoch in random order, the last incomplete batch dropped; drawn from torch's random state.

    Args:
        augment: "none", "flips", or "flips and turns".
    """
    order = torch.randperm(num_images)
    orientations = random_orientations(num_images, augment)
    count = num_images // batch_size * batch_size
    return list(
        zip(order[:count].split(batch_size), orientations[:count].split(batch_size), strict=True)
    )


def evaluation_plan(images: Sequence[int], batch_size: int) -> list[Batch]:
    """These images in order and upright, the last batch as large as it comes."""
    batches = torch.tensor(list(images), dtype=torch.long).split(batch_size)
    return [(batch, torch.zeros_like(batch)) for batch in batches if len(batch)]


def random_orientations(count: int, augment: str) -> Tensor:
    """(count,) as the official augmentation of textures draws them: horizontal flip, vertical flip and a
    turn by a random multiple of 90 degrees, each with probability 0.5."""
    if augment == "none":
        return torch.zeros(count, dtype=torch.long)
    horizontal, vertical, turned = torch.randint(2, (3, count))
    turns = turned * torch.randint(4, (count,)) * (augment == "flips and turns")
    # A vertical flip is a horizontal one and a half turn.
    return 4 * (horizontal ^ vertical) + (2 * vertical + turns) % 4


def oriented(images: Tensor, orientations: Tensor) -> Tensor:
    """(B,h,w,3), each image mirrored and turned as its orientation says."""
    if not orientations.any():
        return images
    turned = [
        torch.rot90(image.flip(1) if number >= 4 else image, number % 4)
        for image, number in zip(images, orientations.tolist(), strict=True)
    ]
    return torch.stack(turned)


def normalise(images: Tensor) -> Tensor:
    """uint8 (B,h,w,3) -> float32 (B,3,h,w), channels_last, by ImageNet's mean and deviation."""
    mean, std = (
        torch.tensor(v).to(images.device, non_blocking=True) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------- features


class FeatureSource:
    """Batches of encoded images; features that nothing can change are computed once.

    Args:
        store: the images.
        encode: normalised images (B,3,h,w) -> features (B,C,H,W).
        constant: `encode` always gives an image the same feature, and takes time worth saving.
        memory: bytes that kept features may take; None: an eighth of what is free on the device.
    """

    def __init__(
        self, store: ImageStore, encode: Callable[[Tensor], Tensor], constant: bool, memory: int | None = None
    ):  # fmt: skip
        self.store, self._encode, self._constant = store, encode, constant
        if memory is None:
            sharing = (
                store.world.size if store.device.type == "cpu" else 1
            )  # a GPU belongs to one process
            memory = int(FEATURE_SHARE * free_memory(store.device) / sharing)
        self._memory = memory
        self._kept: dict[tuple[int, int], Tensor] = {}

    def batches(self, plan: Sequence[Batch]) -> Iterator[Tensor]:
        """(B,C,H,W) for each batch of the plan."""
        known = [all(key in self._kept for key in _keys(batch)) for batch in plan]
        images = self.store.batches(
            [batch[0] for batch, is_known in zip(plan, known, strict=True) if not is_known]
        )
        for batch, is_known in zip(plan, known, strict=True):
            if is_known:
                yield torch.cat([self._kept[key] for key in _keys(batch)])
            else:
                features = self._encode(normalise(oriented(next(images), batch[1])))
                self._keep(batch, features)
                yield features

    def _keep(self, batch: Batch, features: Tensor) -> None:
        if not self._constant or features.nbytes > self._memory:
            return
        self._memory -= features.nbytes
        self._kept.update(zip(_keys(batch), features.clone().split(1), strict=True))


def _keys(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch[0].tolist(), batch[1].tolist(), strict=True))
