"""Damaged and crafted files, odd images and odd data for tests/attack.py."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import reprlib
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_convert import official_names

import export

# ------------------------------------------------------------------------------ damaged files


class Code:
    """Pickled, it is a command that makes the canary."""

    canary = ""

    def __init__(self, way: int):
        self.way = way

    def __reduce__(self):
        makes = f"__import__('os').mkdir({self.canary!r})"
        ways = ((os.mkdir, (self.canary,)), (eval, (makes,)), (os.system, (f"mkdir {self.canary}",)),
                (Path.mkdir, (Path(self.canary),)), (exec, (makes,)))  # fmt: skip
        return ways[self.way % len(ways)]


def write_official(path: Path, model: torch.nn.Module) -> None:
    """As the official program writes its weights: a pickle in an .npz."""
    entries = {name: x.detach() for name, x in official_names(model).items()}
    array = np.empty((), dtype=object)
    array[()] = entries
    np.savez(path, state_dict_pixel=array, state_dict_pro=array)


def pipeline_content() -> dict:
    flip = {"__class_fullname__": "HorizontalFlip", "p": 0.5}
    return {"__version__": "2.0.8", "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": [flip]}}


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, overwritten, left out, swapped, repeated."""
    data, way = bytearray(data), rng.randrange(7)
    start = rng.randrange(len(data))
    length = rng.randint(1, 300)
    if way == 0:
        data[start] ^= 1 << rng.randrange(8)
    elif way == 1:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == 2:
        del data[start:]
    elif way == 3:
        data[start : start + length] = rng.randbytes(length)
    elif way == 4:
        del data[start : start + length]
    elif way == 5:
        data = data[start:] + data[:start]
    else:  # a number becomes a huge one
        data[start : start + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 4, b"\x00" * 4))
    return bytes(data)


def spoil_tensors(whole: Path, rng: random.Random, place: Path) -> Path:
    """A .pt or .npz: its bytes, its zip archive, its pickle, or the values in it."""
    path = place / whole.name
    way = rng.random() if whole.suffix != ".npz" else rng.uniform(0, 0.6)
    if way < 0.25:
        path.write_bytes(spoil_bytes(whole.read_bytes(), rng))
    elif way < 0.6:
        path.write_bytes(spoil_zip(whole, rng))
    else:
        content = torch.load(whole, weights_only=True)
        for _ in range(rng.choice((1, 1, 2))):
            content = spoil_value(content, rng)
        try:
            torch.save(content, path)
        except Exception:  # torch cannot write all that it can hold
            path.write_bytes(pickle.dumps(Code(rng.randrange(5))))
    return path


def spoil_zip(whole: Path, rng: random.Random) -> bytes:
    """Entries changed with their checksums right, missing, doubled, renamed, of huge size, with code or a bomb."""
    with zipfile.ZipFile(whole) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at, way = rng.randrange(len(entries)), rng.randrange(8)
    at = 0 if rng.random() < 0.4 else at  # the pickle
    name, data = entries[at]
    if way < 2 and data:
        entries[at] = name, spoil_bytes(data, rng)
    elif way == 2:
        del entries[at]
    elif way == 3:
        entries.append((f"../../{name}", data))
    elif way == 4:
        entries[at] = name, pickle.dumps(Code(rng.randrange(5)), protocol=rng.choice((0, 2, 4)))
    elif way == 5:
        entries[at] = name, bytes(2**28)
    else:
        entries[at] = f"{name}x", data
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if way == 5 or rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    made = bytearray(file.getvalue())
    if way == 7:  # sizes in the directory at the end
        place = made.find(b"PK\x01\x02")
        made[place + 20 : place + 28] = struct.pack("<II", *(rng.choice((2**31, 2**32 - 2, 0)) for _ in "ab"))
    return bytes(made)


def spoil_value(x: object, rng: random.Random, deepest: int = 40) -> object:
    """Nested content of which one part is wrong, missing or too much.

    Args:
        deepest: of lists in lists that share their parts, which only a pickle writes as such.
    """
    if isinstance(x, dict) and x and rng.random() < 0.95:
        x, key, way = dict(x), rng.choice(list(x)), rng.random()
        if way < 0.08:
            del x[key]
        elif way < 0.12:
            x[rng.choice(("more", 0, None, "x" * 10**4))] = 1
        else:
            x[key] = spoil_value(x[key], rng, deepest)
        return x
    if isinstance(x, (list, tuple)) and len(x) and rng.random() < 0.85:
        parts, at = list(x), rng.randrange(len(x))
        parts[at] = spoil_value(parts[at], rng, deepest)
        return type(x)(parts) if rng.random() < 0.9 else parts[:at]
    if isinstance(x, torch.Tensor) and rng.random() < 0.9:
        return spoil_tensor(x, rng)
    # not str: of lists that share their parts it has no end
    return rng.choice((*wrong_values(rng.choice((3, deepest))), (x, x), reprlib.repr(x)))


def wrong_values(depth: int) -> tuple:
    """What is hardly ever right.

    Args:
        depth: of lists in lists that share their parts.
    """
    deep: list = []
    for _ in range(depth):
        deep = [deep, deep]
    return (-1, 0, 1, 2, 10**9, 10**30, -0.5, 1e300, float("nan"), float("inf"), "", "1", "x" * 10**5, "a\nb",
             "\0", None, True, False, [], {}, [1], {"a": 1}, deep, b"x", torch.zeros(1),
             torch.zeros(2**28).expand(1, -1)[:, :1], torch.zeros(1).expand(2**34))  # fmt: skip


def spoil_tensor(x: torch.Tensor, rng: random.Random) -> object:
    """A tensor with other numbers, shape, type or layout."""
    if x.numel() > 2**22:  # spoiled before: a huge shape over one number, which a list would write out
        return x[None]
    number = rng.choice((float("nan"), float("inf"), 1e38, -1e38, 0.0, -1.0))
    ways = (
        lambda: torch.where(torch.rand(x.shape) < 0.1, torch.tensor(number), x.float()).to(x.dtype),
        lambda: torch.full_like(x, number), lambda: x.double(), lambda: x.int(), lambda: x.to(torch.complex64),
        lambda: x.half(), lambda: x.flatten(), lambda: x[None], lambda: x[:0], lambda: x.bool(),
        lambda: x.new_zeros(1).expand(2**14, 2**14), lambda: x.new_zeros(1).expand(x.shape),
        lambda: x.float().to_sparse(), lambda: x.to("meta"), lambda: torch.nn.Parameter(x.float()),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), lambda: x.transpose(0, -1),
        lambda: x.tolist(), lambda: torch.zeros(1000), lambda: x.float() * 1e20,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors will go one day
            return rng.choice(ways)()
    except (RuntimeError, IndexError):
        return x.new_zeros(3, 0, 3)


def spoil_onnx(whole: Path, rng: random.Random, place: Path) -> Path:
    """Bytes, or the graph, with a digest that is right again in most cases."""
    path, data = place / whole.name, whole.read_bytes()
    length = len(export.digest_entry(b""))
    if rng.random() < 0.7:
        data = data[:-length]
        data = spoil_bytes(data, rng) if rng.random() < 0.5 else _spoil_graph(data, rng)
        path.write_bytes(data + export.digest_entry(data))
    else:
        path.write_bytes(spoil_bytes(data, rng))
    return path


def _spoil_graph(data: bytes, rng: random.Random) -> bytes:
    import onnx

    model = onnx.load_from_string(data)
    tensor, way = rng.choice(model.graph.initializer), rng.randrange(6)
    if way == 0:  # weights in a file outside of its folder
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(("../../../etc/passwd", "/etc/passwd", "x")))
    elif way == 1 and tensor.raw_data:
        numbers = np.frombuffer(tensor.raw_data, np.uint8).copy()
        numbers[:4] = (0, 0, 192, 127)  # NaN
        tensor.raw_data = numbers.tobytes()
    elif way == 2:
        tensor.dims[:] = [rng.choice((0, -1, 2**40)), *tensor.dims]
    elif way == 3:
        node = rng.choice(model.graph.node)
        node.op_type = rng.choice(("Add", "NoSuch", "Loop", "Identity"))
    elif way == 4:
        entry = rng.choice(model.metadata_props)
        entry.value = spoil_bytes(entry.value.encode() or b"x", rng).decode(errors="replace")
    else:
        entry = next(e for e in model.metadata_props if e.key == export.METADATA_KEY)
        entry.value = json.dumps(spoil_value(json.loads(entry.value), rng, 3), default=str)
    return model.SerializeToString()


def spoil_text(whole: Path, rng: random.Random, place: Path) -> Path:
    """JSON with other values, or as text with bytes changed, or YAML that asks for code."""
    path, way = place / f"{whole.stem}{rng.choice(('.json', '.yaml'))}", rng.random()
    if way < 0.6:
        path.write_text(json.dumps(spoil_value(json.loads(whole.read_text()), rng, 3), default=str))
    elif way < 0.85:
        path.write_bytes(spoil_bytes(whole.read_bytes(), rng))
    else:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
        code = f"epochs: !!python/object/apply:os.mkdir [{Code.canary}]\n"
        path.write_text(rng.choice((code, bomb, "[" * 10**5, "epochs: " + "9" * 10**5, "\0", "")))
    return path


def spoil_image(whole: Path, rng: random.Random, place: Path) -> Path:
    """A file of any format and mode, its bytes changed, or its header's size."""
    with Image.open(whole) as image:
        image = image.convert(rng.choice(("RGB", "L", "P", "RGBA", "1")))
    if rng.random() < 0.2:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(rng.choice((np.uint16, np.float32))))
    modes = {"I": (".png", ".tif"), "F": (".tif",)}.get(image.mode[0], (".png", ".bmp", ".tif", ".webp", ".gif"))
    suffix = ".jpg" if image.mode in ("RGB", "L") and rng.random() < 0.2 else rng.choice(modes)
    path, file = place / f"{whole.stem}{'.png' if suffix == '.gif' else suffix}", io.BytesIO()
    image.save(file, format=Image.registered_extensions()[suffix])
    data, size = bytearray(file.getvalue()), struct.pack(">I", rng.choice((10**5, 13000, 2**31 - 1, 0)))
    at = {".png": 16, ".bmp": 18}.get(suffix)
    if at and rng.random() < 0.2:  # declares another size than it has
        data[at : at + 4] = data[at + 4 : at + 8] = size if suffix == ".png" else size[::-1]
        path.write_bytes(data)
    else:
        path.write_bytes(spoil_bytes(bytes(data), rng))
    return path


# ------------------------------------------------------------------------- odd images and data


def odd_images(picture: Image.Image, canary: Path) -> dict[str | bytes, tuple[Callable[[Path], object], bool]]:
    """By file name: what makes the file, and whether it is to be read."""
    pixels = np.asarray(picture)
    gray = pixels[..., 0]
    palette = picture.convert("P")
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%mkdir {canary}) (w) file\n"
    bad = gray.astype(np.float32)
    bad[3, 3] = np.nan

    def whole(array: np.ndarray) -> Callable[[Path], None]:
        return lambda path: Image.fromarray(array).save(path)

    def loop(path: Path) -> None:
        path.symlink_to(path.name)

    return {
        "bomb.png": (_bomb, False), "1x1.png": (whole(pixels[:1, :1]), True),
        "wide.png": (whole(np.resize(pixels, (10, 20000, 3))), True),
        "tall.png": (whole(np.resize(pixels, (20000, 10, 3))), True),
        "cmyk.jpg": (picture.convert("CMYK").save, True),
        "palette.png": (lambda path: palette.save(path, transparency=bytes(range(256))), True),
        "onebit.png": (picture.convert("1").save, True),
        "alpha.png": (picture.convert("LA").save, True), "lab.tif": (picture.convert("LAB").save, True),
        "16bit.png": (whole(gray.astype(np.uint16) * 257), True),
        "12bit.tif": (whole(gray.astype(np.uint16) * 16), True),
        "32bit.tif": (whole(gray.astype(np.int32) * 257), True),
        "float.tif": (whole(gray.astype(np.float32) / 255), True), "nan.tif": (whole(bad), False),
        "turned.jpg": (lambda path: picture.save(path, exif=turned), True),
        "animated.webp": (lambda path: picture.save(path, **frames), True),
        "animated.png": (lambda path: picture.save(path, **frames), True),
        "loop.png": (loop, True), "folder.png": (Path.mkdir, True), "fifo.png": (os.mkfifo, True),
        "device.png": (lambda path: path.symlink_to("/dev/zero"), True),
        "script.png": (lambda path: path.write_text(script), False),
        "empty.png": (Path.touch, False), "text.png": (lambda path: path.write_text("text"), False),
        b"not\xffutf8.png": (lambda path: picture.save(str(path), format="png"), True),
        "x" * 247 + ".png": (lambda path: picture.save(path), True),
        "a\nb.png": (picture.save, True), "*?$(x).png": (picture.save, True),
    }  # fmt: skip


def _bomb(path: Path) -> None:
    """A PNG of 40000x40000 white pixels in 200 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * 5000) * 40000, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def odd_data() -> dict[str, tuple[Callable[[Path], list | None], tuple[str, ...]]]:
    """By name: what changes a class's folder (and gives flags), and words of which one is to be said."""

    def each(part: str, change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
        def change_all(folder: Path) -> None:
            for path in folder.glob(part):
                with Image.open(path) as image:
                    changed = change(image.copy())
                changed.save(path)

        return change_all

    def rename(old: str, new: str, flags: list | None = None) -> Callable[[Path], list | None]:
        return lambda folder: (folder / old).rename(folder / new) and flags

    def copy(old: str, new: str) -> Callable[[Path], None]:
        return lambda folder: shutil.copy(folder / old, folder / new) and None

    carpet = ["--cls", "carpet", "--volumeNorm", "auto"]
    hole, masks, train_images = "ground_truth/hole", "ground_truth/*/*.png", "train/good/*.png"
    of_two = Image.new("RGB", (32, 32), (200, 10, 10))

    def in_alpha(mask: Image.Image) -> Image.Image:
        white = Image.new("RGBA", mask.size, "white")
        white.putalpha(mask.convert("L"))
        return white

    return {
        "masks that match nothing": (rename(f"{hole}/000_mask.png", f"{hole}/x.png"), ("mask",)),
        "skipped files": (lambda folder: (folder / "train/good/a.heic").write_text("x") and None, ("skipped",)),
        "a class called carpet": (rename("", "../carpet", carpet), ("SVN for",)),
        "equal stems": (copy("test/hole/000.png", "test/hole/000.bmp"), ("is the mask of",)),
        "two masks of an image": (copy(f"{hole}/000_mask.png", f"{hole}/000.png"), ("two masks",)),
        "masks of another size": (each(masks, lambda mask: mask.resize((16, 16))), ("agree",)),
        "masks of 0 and 2": (each(masks, lambda mask: mask.point(lambda v: v // 100)), ("mask",)),
        "masks of 0 and 100": (each(masks, lambda mask: mask.point(lambda v: v // 255 * 100)), ("mask",)),
        "masks in an alpha channel": (each(masks, in_alpha), ("alpha",)),
        "masks that are all white": (each(masks, lambda mask: mask.point(lambda v: 255)), ("mask",)),
        "Ground_truth": (rename("ground_truth", "Ground_truth"), ("Ground_truth",)),
        "test/Good": (rename("test/good", "test/Good"), ("Good",)),
        "images in both parts": (copy("train/good/000.png", "test/good/x.png"), ("x.png",)),
        "duplicates": (copy("train/good/000.png", "train/good/x.png"), ("x.png",)),
        "equal images": (each(train_images, lambda _: of_two), ("equal", "same")),
        "black images": (each("t*/*/*.png", lambda _: Image.new("RGB", (32, 32))), ("black",)),
        "divergence": (lambda folder: ["--lr", "1e30", "--clipNorm", "1e30", "--epochs", 3], ("--lr",)),
    }  # fmt: skip
