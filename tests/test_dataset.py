"""Images and masks are found and paired as the layout says; batches hold what the files hold, whoever prepares
them; an augmentation is what --augment says, drawn from seed, epoch and index alone."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_class, read_images, save_image
from PIL import Image

import dataset
from dataset import (
    Augmentation,
    Images,
    evaluation_order,
    list_classes,
    list_images,
    load_masks,
    look_ahead,
    normalize,
    open_class,
    read_image,
    recognize,
    training_order,
)
from util import InputError

CPU = torch.device("cpu")
ORIENTATION = 0x0112  # in EXIF
SQUARE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_a_class_in_mvtecs_layout(widget):
    data = open_class(widget.parent, "widget")
    assert [p.name for p in data.train] == [f"{i:03}.png" for i in range(6)]
    assert [(t.kind, t.path.name) for t in data.test[2:4]] == [("good", "002.png"), ("hole", "000.png")]
    assert data.defective.tolist() == [False] * 3 + [True] * 3
    assert all((t.mask is not None) == t.defective for t in data.test)
    masks = load_masks(data, num_workers=2)
    assert masks.shape == (6, 256, 256)
    exact = torch.zeros(256, 256, dtype=torch.bool)
    exact[4 * 8 : 12 * 8, 10 * 8 : 18 * 8] = True
    assert (masks[3] != exact).sum() <= 4 * 6  # bilinear resizing rounds the corners
    assert not masks[:3].any()


@pytest.mark.parametrize("name", ["a.PNG", "a.jpg", "a.JPEG", "a.bmp", "a.tif", "a.TIFF", "a.WebP"])
def test_suffixes_in_any_case(tmp_path, name):
    widget = make_class(tmp_path, num_train=2)
    save_image(widget / "train" / "good" / name, np.zeros((8, 8, 3), np.uint8))
    assert name in [p.name for p in open_class(tmp_path, "widget").train]


def test_other_files_are_passed_over(widget):
    (widget / "train" / "good" / "Thumbs.db").write_bytes(b"x")
    (widget / "test" / "notes.txt").write_text("x")
    (widget / "train" / "good" / "._000.png").write_bytes(b"x")
    save_image(widget / "test" / ".ipynb_checkpoints" / "000.png", np.zeros((8, 8), np.uint8))
    (widget / "train" / "good" / "folder.png").mkdir()
    os.mkfifo(widget / "train" / "good" / "pipe.png")
    data = open_class(widget.parent, "widget")
    assert (len(data.train), len(data.test)) == (6, 6)


def test_masks_are_paired_by_name_within_the_class(tmp_path):
    """A path that holds "test" or the kind's name elsewhere must not lead astray."""
    widget = make_class(tmp_path / "test" / "hole" / "good", "test")
    data = open_class(widget.parent, "test")
    for image in data.test:
        if image.defective:
            assert image.mask == widget / "ground_truth" / "hole" / f"{image.path.stem}_mask.png"


def test_a_class_without_any_mask_is_fine(tmp_path):
    make_class(tmp_path, masks=False)
    data = open_class(tmp_path, "widget")
    assert not data.has_masks
    assert load_masks(data, 1) is None


def test_a_missing_mask_is_named(widget):
    (widget / "ground_truth" / "hole" / "001_mask.png").unlink()
    with pytest.raises(InputError, match=r"hole/001\.png has no mask"):
        open_class(widget.parent, "widget")


def test_masks_with_other_names_are_not_taken_for_a_class_without_masks(widget):
    for path in (widget / "ground_truth" / "hole").iterdir():
        path.rename(path.with_name(path.name.replace("_mask", "_gt")))
    with pytest.raises(InputError, match=r"hole/000\.png has no mask .*hole/000_gt\.png fits no test image"):
        open_class(widget.parent, "widget")


@pytest.mark.parametrize("place", [".", "hole/deeper", "other"])
def test_masks_in_another_place_are_not_taken_for_a_class_without_masks(widget, place):
    masks = widget / "ground_truth"
    (masks / place).mkdir(parents=True, exist_ok=True)
    for path in list_images(masks / "hole"):
        path.rename(masks / place / path.name)
    with pytest.raises(InputError, match=r"hole/000\.png has no mask .*000_mask\.png fits no test image"):
        open_class(widget.parent, "widget")


def test_masks_may_be_named_like_their_image_in_any_case(widget):
    for path in (widget / "ground_truth" / "hole").iterdir():
        path.rename(path.with_name(path.name.replace("_mask.png", ".Png")))
    assert load_masks(open_class(widget.parent, "widget"), 1)[3:].flatten(1).any(1).all()


def test_a_mask_of_another_size_is_named(widget):
    save_image(widget / "ground_truth" / "hole" / "001_mask.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=r"001_mask\.png is 8x8, its image 32x32"):
        load_masks(open_class(widget.parent, "widget"), 2)


def test_gray_masks_are_cut_at_half_and_zero_masks_stay_empty(widget):
    folder = widget / "ground_truth" / "hole"
    save_image(folder / "000_mask.png", np.full((32, 32), 1, np.uint8))  # 0/1 instead of 0/255
    save_image(folder / "001_mask.png", np.zeros((32, 32), np.uint8))
    save_image(folder / "002_mask.png", np.repeat([[0, 100, 200, 255]], 32, 0).repeat(8, 1).astype(np.uint8))
    noise = np.zeros((32, 32), np.uint8)
    noise[0, 0] = 3
    save_image(folder / "001_mask.png", noise)
    masks = load_masks(open_class(widget.parent, "widget"), 1)
    assert masks[3].all()
    assert not masks[4].any()
    assert masks[5].float().mean() == pytest.approx(0.5, abs=0.02)


def test_masks_are_read_in_the_size_that_is_asked_for(widget):
    masks = load_masks(open_class(widget.parent, "widget"), 1, size=(32, 48))
    assert masks.shape == (6, 32, 48)
    exact = torch.zeros(32, 48, dtype=torch.bool)
    exact[4:12, 15:27] = True
    assert torch.equal(masks[3], exact)


def test_an_empty_mask_of_a_defect_is_a_warning(widget):
    data = open_class(widget.parent, "widget")
    load_masks(data, 1)
    assert data.warnings == []
    save_image(widget / "ground_truth" / "hole" / "001_mask.png", np.zeros((32, 32), np.uint8))
    assert not load_masks(data, 1)[4].any()
    assert len(data.warnings) == 1
    assert data.warnings[0].startswith(f"1 defective images have an empty mask, the first is {data.test[4].path}")


def test_a_mask_that_is_all_white_is_a_warning(widget):
    data = open_class(widget.parent, "widget")
    save_image(widget / "ground_truth" / "hole" / "002_mask.png", np.full((32, 32), 255, np.uint8))
    assert load_masks(data, 1)[5].all()
    (warning,) = data.warnings
    assert warning.startswith(
        f"1 defective images have a mask that is all white, the first is {data.test[5].path}"
    )


def test_masks_in_color_are_as_good_as_white_ones_and_masks_in_alpha_are_refused(widget):
    folder, square = widget / "ground_truth" / "hole", np.zeros((32, 32), np.uint8)
    square[4:12, 4:12] = 1
    indexed = Image.fromarray(square, "P")
    indexed.putpalette([0, 0, 0, 128, 0, 0])  # a dark red
    indexed.save(folder / "000_mask.png")
    save_image(folder / "001_mask.png", square[..., None] * np.array([0, 0, 255], np.uint8))
    masks = load_masks(open_class(widget.parent, "widget"), 1, size=(32, 32))
    assert torch.equal(masks[3], torch.from_numpy(square).bool())
    assert torch.equal(masks[4], masks[3])
    white = np.full((32, 32, 4), 255, np.uint8)
    white[..., 3] = square * 255
    save_image(folder / "002_mask.png", white)
    with pytest.raises(InputError, match=r"002_mask\.png has an alpha channel"):
        load_masks(open_class(widget.parent, "widget"), 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ground_truth", "Ground_truth", "Ground_truth is spelled ground_truth"),
        ("test", "Test", "Test is spelled test"),
        ("test/good", "test/Good", "Good is spelled good"),
    ],
)
def test_folders_in_another_case_are_named(widget, old, new, message):
    (widget / old).rename(widget / new)
    with pytest.raises(InputError, match=message):
        open_class(widget.parent, "widget", need_test=False)


def test_of_one_image_and_one_mask_there_are_no_two(widget):
    mask, image = widget / "ground_truth" / "hole" / "000_mask.png", widget / "test" / "hole" / "000.png"
    save_image(mask.with_name("000.png"), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match=r"000\.png has two masks, .*000_mask\.png and .*000\.png; remove one"):
        open_class(widget.parent, "widget")
    mask.with_name("000.png").unlink()
    save_image(image.with_suffix(".bmp"), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(InputError, match=r"000_mask\.png is the mask of .*000\.bmp and of .*000\.png"):
        open_class(widget.parent, "widget")


def test_copies_of_images_are_a_warning(widget):
    shutil.copy(widget / "train" / "good" / "002.png", widget / "test" / "good" / "x.png")
    (warning,) = open_class(widget.parent, "widget").warnings
    assert warning.startswith("1 images are the same in training and test, the first is ")
    assert warning.endswith(f"test/good/x.png, a copy of {widget / 'train' / 'good' / '002.png'}")
    for name in ("x", "y"):
        shutil.copy(widget / "train" / "good" / "001.png", widget / "train" / "good" / f"{name}.png")
    across, once_more = open_class(widget.parent, "widget").warnings
    assert across == warning
    assert once_more.startswith("2 images are the same once more, the first is ")


# ------------------------------------------------------------------------------- other layouts


def make_btad(root):
    """Class 03: 800x600; class 01 with bmp, gray and upper-case names; a defect whose mask is all zero."""
    rng = np.random.default_rng(0)
    for name, size, suffix in (("01", (20, 20), ".bmp"), ("03", (600, 800), ".BMP")):
        for i in range(3):
            save_image(
                root / name / "train" / "ok" / f"{i:04}{suffix}", rng.integers(0, 255, (*size, 3), np.uint8)
            )
        save_image(root / name / "test" / "ok" / f"0000{suffix}", rng.integers(0, 255, size, np.uint8))
        for i in range(2):
            save_image(root / name / "test" / "ko" / f"{i:04}.png", rng.integers(0, 255, (*size, 3), np.uint8))
            mask = np.zeros(size, np.uint8)
            mask[5:12, 4:9] = 255 * i
            save_image(root / name / "ground_truth" / "ko" / f"{i:04}{('.png', suffix)[i]}", mask)
    return root


def make_visa(root):
    """Two classes; photographs as .JPG, masks as .png whose defects have values 1, 2 and 3."""
    rng = np.random.default_rng(0)
    lines = ["object,split,label,image,mask"]
    for name in ("candle", "macaroni1"):
        for i, (split, label) in enumerate(
            (
                ("train", "normal"),
                ("train", "normal"),
                ("test", "normal"),
                ("test", "anomaly"),
                ("test", "anomaly"),
            )
        ):
            folder = "Normal" if label == "normal" else "Anomaly"
            image = f"{name}/Data/Images/{folder}/{i:04}.JPG"
            save_image(root / image, rng.integers(0, 255, (24, 30, 3), np.uint8))
            mask = f"{name}/Data/Masks/{folder}/{i:04}.png" if label == "anomaly" else ""
            if mask:
                values = np.zeros((24, 30), np.uint8)
                values[:12, :10], values[:12, 10:20], values[12:, :5] = 1, 2, 3
                save_image(root / mask, values)
            lines.append(f"{name},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_layouts_are_recognized(tmp_path):
    make_class(tmp_path / "mvtec")
    make_btad(tmp_path / "btad")
    make_visa(tmp_path / "visa")
    for name, classes in (("mvtec", ["widget"]), ("btad", ["01", "03"]), ("visa", ["candle", "macaroni1"])):
        assert recognize(tmp_path / name) == name
        assert list_classes(tmp_path / name, name) == classes


def test_btad(tmp_path):
    make_btad(tmp_path)
    data = open_class(tmp_path, "03")
    assert [len(data.train), len(data.test)] == [3, 3]
    assert [image.kind for image in data.test] == ["ko", "ko", "good"]
    assert data.defective.tolist() == [True, True, False]
    masks = load_masks(data, 1)
    assert not masks[0].any()  # all zero, and a defect all the same
    assert "ko/0000.png" in data.warnings[0]
    assert masks[1].any()
    assert not masks[2].any()
    assert read_images(data.train, (64, 64)).shape == (3, 64, 64, 3)
    assert load_masks(open_class(tmp_path, "01"), 1)[1].float().mean() == pytest.approx(35 / 400, abs=0.01)


def test_loco_masks_in_a_folder_for_each_image_are_united(tmp_path):
    """Each kind of defect has a mask with a value of its own."""
    widget = make_class(tmp_path)
    for path in list_images(widget / "ground_truth" / "hole"):
        folder = widget / "ground_truth" / "hole" / path.stem.removesuffix("_mask")
        path.unlink()
        for i, value in enumerate((255, 240, 3)):
            mask = np.zeros((32, 32), np.uint8)
            mask[8 * i : 8 * i + 8, :8] = value
            save_image(folder / f"{i:03}.png", mask)
    masks = load_masks(open_class(tmp_path, "widget"), 2, size=(32, 32))
    united = torch.zeros(32, 32, dtype=torch.bool)
    united[:24, :8] = True
    assert not masks[:3].any()
    assert all(torch.equal(mask, united) for mask in masks[3:])


def test_visa(tmp_path):
    make_visa(tmp_path)
    data = open_class(tmp_path, "macaroni1")
    assert len(data.train) == 2
    assert [image.kind for image in data.test] == ["anomaly", "anomaly", "good"]
    masks = load_masks(data, 1)
    assert masks[0].float().mean() == pytest.approx((12 * 20 + 12 * 5) / (24 * 30), abs=0.01)  # values 1 to 3
    assert not masks[2].any()


def test_what_is_wrong_with_a_visa_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no split_csv/1cls\.csv"):
        recognize(tmp_path, "visa")
    make_visa(tmp_path)
    split = tmp_path / "split_csv" / "1cls.csv"
    whole = split.read_text()
    (tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "0003.png").unlink()
    with pytest.raises(InputError, match=r"0003\.png, named in .*1cls\.csv, does not exist"):
        open_class(tmp_path, "candle")
    split.write_text(whole.replace("macaroni1/Data/Masks/Anomaly/0003.png", ""))
    with pytest.raises(InputError, match=r"0003\.JPG has no mask"):
        open_class(tmp_path, "macaroni1")
    for text in ("", "a,b\n1,2\n", whole.splitlines()[0] + "\ncandle,train\n"):
        split.write_text(text)
        with pytest.raises(InputError, match="lacks some of the columns"):
            open_class(tmp_path, "candle")
    split.write_text(whole.replace(",test,", ",Test,"))
    with pytest.raises(InputError, match="has the split 'Test', which is neither train nor test"):
        open_class(tmp_path, "candle")


def test_a_class_that_is_not_there_lists_those_that_are(tmp_path):
    make_btad(tmp_path)
    with pytest.raises(InputError, match=r"no class '02' in .* \(layout btad\); classes there: 01, 03"):
        open_class(tmp_path, "02")
    with pytest.raises(InputError, match=r"layout mvtec\); .*01 has no folder train/good"):
        open_class(tmp_path, "01", "mvtec")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"layout mvtec\); no class folders there"):
        open_class(tmp_path / "empty", "01", "mvtec")


def test_portraits_among_landscapes_are_a_warning(tmp_path):
    widget = make_class(tmp_path)
    assert open_class(tmp_path, "widget").warnings == []
    for name, shape in (("w", (40, 45)), ("x", (32, 35))):
        save_image(widget / "train" / "good" / f"{name}.png", np.full((*shape, 3), 90, np.uint8))
    assert open_class(tmp_path, "widget").warnings == []
    save_image(widget / "train" / "good" / "y.png", np.full((40, 30, 3), 90, np.uint8))
    (warning,) = open_class(tmp_path, "widget").warnings
    assert "y.png is 40x30" in warning
    assert "w.png 40x45: all images are stretched" in warning


def test_the_folder_of_a_class_is_told_from_that_of_the_data(tmp_path):
    make_class(tmp_path)
    with pytest.raises(InputError, match=rf"it is a class itself: give --datapath {tmp_path} --cls widget"):
        open_class(tmp_path / "widget", "widget")


# ------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("F", 0.4, (102, 102, 102)),
        ("F", 1.05, (255, 255, 255)),
        ("I", 257 * 100, (100, 100, 100)),
    ],
)
def test_image_modes(tmp_path, mode, value, expected):
    path = tmp_path / "a.tif"
    Image.new(mode, (20, 10), value).save(path)
    image = read_image(path, (4, 8))
    assert image.shape == (4, 8, 3)
    assert image.dtype == np.uint8
    assert tuple(image[2, 3]) == expected


@pytest.mark.parametrize(("mode", "white"), [("F", 1), ("I;16", 65535)])
def test_one_bright_pixel_does_not_change_the_scale(tmp_path, mode, white):
    """White is that of the type of the file, whatever the highest value of an image is."""
    dtype = np.float32 if mode == "F" else np.uint16
    for highest in (0.2, 0.5, 1.0):
        array = np.full((8, 8), 0.2 * white).astype(dtype)
        array[0, 0] = highest * white
        save_image(tmp_path / "a.tif", array)
        assert (read_image(tmp_path / "a.tif")[1:] == 0.2 * 255).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.7, 100.0, -0.5])
def test_floating_point_values_that_cannot_be_scaled_are_refused(tmp_path, value):
    array = np.full((8, 8), 0.5, np.float32)
    array[3, 3] = value
    save_image(tmp_path / "a.tif", array)
    with pytest.raises(InputError, match=r"image .*a\.tif has values "):
        read_image(tmp_path / "a.tif")


def test_nearly_black_images_are_a_warning(widget):
    assert open_class(widget.parent, "widget").warnings == []
    for i, path in enumerate((widget / "train" / "good").iterdir()):
        save_image(path, np.full((32, 32), 4000 + i, np.uint16))  # 12 bits in 16
    (warning,) = open_class(widget.parent, "widget").warnings
    assert "000.png and others are nearly black, their highest value is 16 of 255" in warning


def test_images_are_resized_with_pil_bilinear(tmp_path):
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", original)
    expected = np.asarray(Image.fromarray(original).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(read_image(tmp_path / "a.png", (16, 16)), expected)
    assert torch.equal(read_images([tmp_path / "a.png"], (16, 16))[0], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, suffix, orientation):
    bright = np.zeros((16, 32, 3), np.uint8)
    bright[:8, :8] = 255  # the first pixels of the file
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(bright).save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    shown = read_image(tmp_path / f"a.{suffix}")
    assert shown.shape == ((16, 32, 3) if orientation <= 4 else (32, 16, 3))
    top, left = orientation in (1, 2, 5, 6), orientation in (1, 4, 5, 8)
    corner = shown[:8] if top else shown[-8:]
    corner = corner[:, :8] if left else corner[:, -8:]
    assert corner.mean() > 250
    assert shown.mean() == pytest.approx(255 / 8, abs=2)


@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage, no TIFF", b"Exif\0\0MM"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path, suffix, damaged):
    Image.fromarray(SQUARE).save(tmp_path / f"a.{suffix}", exif=damaged)
    assert read_image(tmp_path / f"a.{suffix}").shape == (32, 32, 3)


@pytest.mark.parametrize("mask_is_turned", [False, True])
def test_masks_are_turned_as_their_exif_says(tmp_path, mask_is_turned):
    """A mask drawn on what is seen fits an image that its EXIF turns, and so does one that is turned likewise."""
    widget = make_class(tmp_path, num_test=1)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned clockwise to be seen
    Image.new("RGB", (32, 16)).save(widget / "test" / "hole" / "000.png", exif=exif.tobytes())
    mask = np.zeros((16, 32), np.uint8)
    mask[:8, :8] = 255
    seen = np.rot90(mask, -1)
    Image.fromarray(mask if mask_is_turned else np.ascontiguousarray(seen)).save(
        widget / "ground_truth" / "hole" / "000_mask.png", exif=exif.tobytes() if mask_is_turned else b""
    )
    masks = load_masks(open_class(tmp_path, "widget"), 1, size=(32, 16))
    assert np.array_equal(masks[1].numpy(), seen > 0)
    if not mask_is_turned:
        save_image(widget / "ground_truth" / "hole" / "000_mask.png", mask)
        with pytest.raises(InputError, match=r"000_mask\.png is 16x32, its image 32x16"):
            load_masks(open_class(tmp_path, "widget"), 1)


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA"])
def test_formats_other_than_pictures_are_not_opened(tmp_path, format):
    with (tmp_path / "a.png").open("wb") as file:
        Image.new("RGB", (8, 8)).save(file, format)
    with pytest.raises(InputError, match=r"cannot read image .*a\.png \(empty, or no image\)"):
        read_image(tmp_path / "a.png")


def test_normalization_is_imagenets():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    normalized = normalize(images)
    assert normalized.shape == (2, 3, 4, 5)
    expected = (images[1, 2, 3].double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalized[1, :, 2, 3].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(widget, damage):
    path = widget / "train" / "good" / "003.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[damage])
    with pytest.raises(InputError, match=r"cannot read image .*003\.png \([^']{5,}\); repair"):
        read_images(open_class(widget.parent, "widget").train, (32, 32))


def test_looking_ahead_is_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(dataset, "MOST_IN_FLIGHT", 100)
    started = []
    results = look_ahead(started.append, range(10), 8, 1, num_bytes=lambda i: 200 if i == 5 else 40)
    for done in range(9):
        next(results)
        ahead = range(done + 1, max(started) + 1) if started else ()
        assert sum(200 if i == 5 else 40 for i in ahead) <= 200
        assert len(ahead) <= 2


def test_large_images_are_decoded_a_few_at_a_time(paths, monkeypatch):
    """Of eight threads two have work where two images are all that may be in flight."""
    monkeypatch.setattr(dataset, "MOST_IN_FLIGHT", 2 * dataset.WORKING_COPIES * 32 * 32 * 3)
    at_once, most, lock = [], [], threading.Lock()

    def slow(path, size):
        with lock:
            at_once.append(path)
            most.append(len(at_once))
        time.sleep(0.02)
        with lock:
            at_once.remove(path)
        return read_image(path, size)

    monkeypatch.setattr(dataset, "read_image", slow)
    for cache in ("ram", "none"):
        images = Images(paths, (16, 16), cache, CPU, 8, "x")
        assert sum(len(batch) for batch in images.batches([[i] for i in range(6)])) == 6
    assert max(most) == 2
    assert dataset.decoded_bytes(paths[0]) == 32 * 32 * 3
    assert dataset.decoded_bytes(paths[0].parent) == 0


@pytest.fixture
def paths(tmp_path):
    return open_class(make_class(tmp_path).parent, "widget").train


@pytest.mark.parametrize("cache", ["auto", "ram", "none"])
def test_images_are_the_same_from_memory_and_from_files(paths, cache):
    images = Images(paths, (16, 24), cache, CPU, 2, "x")
    assert len(images) == 6
    batches = list(images.batches([torch.tensor([4, 1]), [0]]))
    expected = read_images(paths, (16, 24))
    assert torch.equal(batches[0], expected[[4, 1]])
    assert torch.equal(batches[1], expected[[0]])
    assert np.array_equal(images[3], expected[3].numpy())
    for path in paths:
        path.unlink()
    if cache == "none":
        with pytest.raises(InputError, match="no image"):
            images[3]
    else:
        assert np.array_equal(images[3], expected[3].numpy())


@pytest.mark.parametrize("processes", [1, 3])
def test_auto_keeps_images_only_where_memory_is_free(paths, monkeypatch, processes):
    reads = []
    monkeypatch.setattr(dataset, "world_size", lambda: processes)
    monkeypatch.setattr(dataset, "read_image", lambda path, size: reads.append(path) or read_image(path, size))
    needed = 6 * 32 * 32 * 3
    for free, kept in ((4 * processes * needed, True), (4 * processes * needed - 1, False)):
        reads.clear()
        monkeypatch.setattr(dataset, "free_memory", lambda device, free=free: free)
        assert len(Images(paths, (32, 32), "auto", CPU, 1, "x")) == 6
        assert (len(reads) == 6) == kept


def test_without_a_cache_a_damaged_image_is_named_when_its_turn_comes(paths):
    images = Images(paths, (16, 16), "none", CPU, 2, "x")
    paths[5].write_bytes(b"not an image")
    batches = images.batches([torch.tensor([0]), torch.tensor([5])])
    assert next(batches).shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=r"cannot read image .*005\.png"):
        next(batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free", [0, 2**40])
def test_batches_are_on_the_cuda_device_whether_it_keeps_the_images_or_not(paths, monkeypatch, free):
    device = torch.device("cuda")
    monkeypatch.setattr(dataset, "free_memory", lambda device: free)
    expected, flips = read_images(paths, (16, 16)), Augmentation.create("flips", "widget", (16, 16), 0)
    on_host = Images(paths, (16, 16), "ram", CPU, 2, "x")
    for cache in ("ram", "none"):
        images = Images(paths, (16, 16), cache, device, 2, "x")
        for batch, (first, second) in zip(images.batches([[4, 1], [0, 5]]), [[4, 1], [0, 5]], strict=True):
            assert batch.device.type == "cuda"
            assert torch.equal(batch.cpu(), expected[[first, second]])
        changed, same = (x.batches([range(6)], flips, 3) for x in (images, on_host))
        assert torch.equal(next(changed).cpu(), next(same))


def test_looking_ahead_keeps_the_order_and_stays_a_few_items_ahead():
    seen, may_go_on = [], threading.Semaphore(0)

    def work(i):
        seen.append(i)
        if i == 3:
            may_go_on.release()
        return i * i

    results = look_ahead(work, range(100), depth=3)
    assert next(results) == 0
    assert may_go_on.acquire(timeout=60)  # item 3 is computed although only item 0 was asked for
    assert seen == [0, 1, 2, 3]
    assert list(results) == [i * i for i in range(1, 100)]


def test_an_epoch_shows_every_image_once_and_drops_the_rest():
    torch.manual_seed(0)
    order = training_order(7, 3)
    assert [len(indices) for indices in order] == [3, 3]
    shown = torch.cat(order)
    assert len(shown.unique()) == 6
    torch.manual_seed(0)
    assert torch.equal(torch.cat(training_order(7, 3)), shown)
    torch.manual_seed(0)
    assert torch.equal(torch.randperm(7)[:6], shown)
    assert training_order(2, 3) == []


def test_an_evaluation_shows_all_images_in_order():
    order = evaluation_order(range(7), 3)
    assert torch.cat(order).tolist() == list(range(7))
    assert [len(indices) for indices in order] == [3, 3, 1]
    assert evaluation_order([], 3) == []


# -------------------------------------------------------------------------------- augmentation


def pipeline_file(path, *transforms, **more):
    """What albumentations.save writes, around these (name, parameters)."""
    inner = [{"__class_fullname__": name, **parameters} for name, parameters in transforms]
    content = {
        "__version__": "2.0.8",
        "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": inner},
    }
    path.write_text(json.dumps({**content, **more}))
    return str(path)


def positions_of(augmentation, count):
    """How often a 2x2 image comes in each of its eight positions."""
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, axis=2)
    drawn = (augmentation(image, epoch, index) for epoch in range(2) for index in range(count // 2))
    return Counter(tuple(changed[..., 0].ravel().tolist()) for changed in drawn)


@pytest.mark.parametrize(("choice", "turns"), [("auto", True), ("turns", True), ("flips", False)])
def test_flips_and_turns_have_the_official_frequencies(choice, turns):
    """Flips with probability 1/2 each; a turn with 1/2, by a uniform multiple of 90 degrees."""
    counts = positions_of(Augmentation.create(choice, "tile", (2, 2), 0), 4000)
    expected = Counter()
    x = np.arange(4).reshape(2, 2)
    for flipped in (x, x[:, ::-1], x[::-1], x[::-1, ::-1]):
        for turn, probability in enumerate((5 / 8, 1 / 8, 1 / 8, 1 / 8) if turns else (1,)):
            expected[tuple(np.rot90(flipped, turn).ravel().tolist())] += probability / 4
    assert counts.keys() == expected.keys()
    assert len(counts) == (8 if turns else 4)
    for key, probability in expected.items():
        assert counts[key] / 4000 == pytest.approx(probability, abs=0.03)


def test_auto_augments_mvtecs_textures_alone():
    for name in ("carpet", "grid", "leather", "tile", "wood"):
        assert "RandomRotate90(p=0.5)" in Augmentation.create("auto", name, (32, 32), 0).description
    assert Augmentation.create("auto", "screw", (32, 32), 0) is None
    assert Augmentation.create("none", "tile", (32, 32), 0) is None


def test_images_that_are_not_square_are_not_turned():
    oblong = Augmentation.create("auto", "tile", (4, 6), 0)
    assert oblong.description == "HorizontalFlip(p=0.5), VerticalFlip(p=0.5)"
    for index in range(20):
        assert oblong(SQUARE[:4, :6], 0, index).shape == (4, 6, 3)
    with pytest.raises(InputError, match="--augment turns: images of 4x6 are not square; use flips"):
        Augmentation.create("turns", "tile", (4, 6), 0)


NOISE = ("GaussNoise", {"p": 0.8}), ("Rotate", {"p": 0.5, "limit": [-20, 20]}), ("RGBShift", {"p": 0.5})


@pytest.fixture
def noise(tmp_path):
    return pipeline_file(tmp_path / "noise.json", *NOISE)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_any_number_of_workers_gives_the_same_augmented_images(paths, noise, cache):
    """They depend on seed, epoch and index, and nothing else."""

    def epoch_of(num_workers, epoch, seed=0, order=((0, 1), (2, 3), (4, 5))):
        augment = Augmentation.create(noise, "widget", (32, 32), seed)
        images = Images(paths, (32, 32), cache, CPU, num_workers, "x")
        return torch.cat(list(images.batches(order, augment, epoch)))

    one = epoch_of(1, 0)
    assert torch.equal(epoch_of(4, 0), one)
    assert torch.equal(epoch_of(4, 0, order=((5, 3), (1, 4), (2, 0))), one[[5, 3, 1, 4, 2, 0]])
    for other in (epoch_of(4, 1), epoch_of(4, 0, seed=1)):
        assert (other != one).flatten(1).any(1).sum() >= 5
    assert torch.equal(epoch_of(1, 1), epoch_of(4, 1))


def test_kept_images_stay_as_they_are(paths, noise):
    images = Images(paths, (32, 32), "ram", CPU, 2, "x")
    augment = Augmentation.create(noise, "widget", (32, 32), 0)
    assert not torch.equal(next(images.batches([range(6)], augment, 0)), read_images(paths, (32, 32)))
    assert torch.equal(next(images.batches([range(6)])), read_images(paths, (32, 32)))


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_pipeline_that_albumentations_saved(tmp_path, kind):
    """Also one with parameters that it saves but does not take, as of RandomRotate90's base classes."""
    import albumentations as A

    transforms = [
        A.OneOf([A.RandomRotate90(), A.SafeRotate(10)], p=0.9),
        A.RGBShift(),
        A.ColorJitter(p=0.2),
        A.PadIfNeeded(8, 8),
    ]
    path = tmp_path / f"pipeline.{kind}"
    A.save(A.Compose(transforms, p=0.9), path, kind)
    augment = Augmentation.create(str(path), "widget", (32, 32), 0)
    assert all(name in augment.description for name in ("RandomRotate90", "SafeRotate", "RGBShift"))
    assert len({augment(SQUARE, 0, index).tobytes() for index in range(20)}) > 10


@pytest.mark.parametrize(
    ("transforms", "reason"),
    [
        ([("HorizontalFlp", {})], "HorizontalFlp is no transform that albumentations"),
        ([("os.system", {"command": "true"})], "os.system is no transform"),
        ([("core.composition.Compose", {})], "core.composition.Compose is no transform"),
        ([("albumentations.os", {})], "albumentations.os is no transform"),
        ([("BboxParams", {"format": "coco"})], "BboxParams is no transform"),
        ([("Lambda", {"image": "print", "__name__": "x"})], "Lambda is no transform"),
        ([("albumentations.x.Lambda", {"image": "print"})], r"albumentations\.x\.Lambda is no transform"),
        ([("OneOf", {"transforms": [{"__class_fullname__": "Lambda"}]})], "Lambda is no transform"),
        ([("OneOf", {"transforms": 3})], "not iterable"),
        ([("OneOf", {"transforms": [3]})], "holds no pipeline"),
        ([("FDA", {"reference_images": ["a.png"], "p": 1.0})], "FDA cannot be reliably serialized"),
        ([("HorizontalFlip", {"probability": 1})], "HorizontalFlip has no parameter probability"),
        ([("HorizontalFlip", {"x" * 10**5: 1})], r"HorizontalFlip has no parameter x{400,500}\.\.\."),
        ([("HorizontalFlip", {"p": 2})], "HorizontalFlip has p = 2, which is not from 0 to 1"),
        ([("Rotate", {"limit": "much"})], "Rotate: .*limit.* Input should be a valid"),
        ([("Normalize", {"p": 0.01})], "makes float32 32x32x3 of uint8 32x32x3"),
        ([("Resize", {"height": 8, "width": 9, "p": 0.01})], "makes uint8 8x9x3 of uint8 32x32x3"),
        ([("OneOf", {"transforms": [{"__class_fullname__": "ToTensorV2"}], "p": 0.01})], "torch.uint8 3x32x32"),
        ([("ImageOnlyTransform", {})], "NotImplementedError"),
        ([("OverlayElements", {})], "overlay_metadata"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_be_used_is_an_error_of_one_line(tmp_path, transforms, reason):
    path = pipeline_file(tmp_path / "a.json", *transforms)
    with pytest.raises(InputError, match=rf"^--augment .*a\.json: .*{reason}.*; correct the file[^\n]*$"):
        Augmentation.create(path, "widget", (32, 32), 0)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.yaml", None, "No such file"),
        ("a.yaml", "", "holds no pipeline"),
        ("a.yml", "transform: [", "parsing"),
        ("a.json", "{", "Expecting"),
        ("a.json", "[]", "holds no pipeline"),
        ("a.json", '{"transform": {"transforms": []}}', "holds no pipeline"),
        ("a.yaml", b"\xff\xfe\x00", "decode"),
        ("a.yaml", "transform: &a {__class_fullname__: Compose, transforms: [*a]}", "10000 values"),
        (
            "a.yaml",
            "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 10))]),
            "10000",
        ),
    ],
)
def test_a_file_that_holds_no_pipeline_is_an_error_of_one_line(tmp_path, name, text, reason):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"^--augment .*{name}: .*{reason}.*; correct the file[^\n]*$"):
        Augmentation.create(str(path), "widget", (32, 32), 0)


def test_a_choice_that_is_no_file_lists_the_choices():
    with pytest.raises(InputError, match=r"augment flip is no \.yaml or \.json file; use one, or auto, none"):
        Augmentation.create("flip", "widget", (32, 32), 0)


@pytest.mark.parametrize(
    "line",
    [
        "transform: !!python/object/apply:os.system ['touch {}']",
        "transform: !!python/object/new:os.system ['touch {}']",
        "transform: {{__class_fullname__: Compose, transforms: [!!python/object/apply:os.system ['touch {}']]}}",
        "transform: {{__class_fullname__: os.system, command: 'touch {}'}}",
        "transform: {{__class_fullname__: !!python/name:os.system , command: 'touch {}'}}",
    ],
)
def test_nothing_in_a_pipeline_file_is_executed(tmp_path, line):
    (tmp_path / "a.yaml").write_text(line.format(tmp_path / "touched"))
    with pytest.raises(InputError, match=r"^--augment .*a\.yaml: [^\n]*; correct the file[^\n]*$"):
        Augmentation.create(str(tmp_path / "a.yaml"), "widget", (32, 32), 0)
    assert not (tmp_path / "touched").exists()


def test_a_pipeline_that_fails_on_one_image_is_named_then(paths, tmp_path):
    """A crop that does not fit an image of another size."""
    augment = Augmentation.create(
        pipeline_file(tmp_path / "a.json", ("RandomCrop", {"height": 32, "width": 32, "p": 1.0})),
        "widget", (32, 32), 0,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"--augment .*a\.json: .*Crop size.*; correct the file"):
        list(Images(paths, (16, 16), "ram", CPU, 2, "x").batches([[0], [1]], augment))


def test_albumentations_is_imported_only_for_augmentation_and_asks_no_server():
    code = (
        "import os, sys, urllib.request; from dataset import Augmentation\n"
        "urllib.request.OpenerDirector.open = lambda *_, **__: print('asked')\n"
        "Augmentation.create('auto', 'screw', (8, 8), 0); print('albumentations' in sys.modules)\n"
        "Augmentation.create('flips', 'screw', (8, 8), 0); print('albumentations' in sys.modules)\n"
        "print(os.environ.get('NO_ALBUMENTATIONS_UPDATE'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    root = os.path.dirname(dataset.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "None"]


def test_without_albumentations_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(InputError, match=r"run pip install -r requirements\.txt, or use none"):
        Augmentation.create("flips", "screw", (8, 8), 0)
