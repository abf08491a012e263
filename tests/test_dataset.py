"""Images and masks are found and paired as the layout says, whatever their spelling."""

import numpy as np
import pytest
import torch
from conftest import make_class, read_images, save_image

from dataset import list_classes, open_class, recognise
from loading import load_masks
from util import InputError


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


@pytest.mark.parametrize("name", ["a.PNG", "a.jpg", "a.JPEG", "a.bmp", "a.tif", "a.TIFF"])
def test_suffixes_in_any_case(tmp_path, name):
    widget = make_class(tmp_path, num_train=2)
    save_image(widget / "train" / "good" / name, np.zeros((8, 8, 3), np.uint8))
    assert name in [p.name for p in open_class(tmp_path, "widget").train]


def test_other_files_are_passed_over(widget):
    (widget / "train" / "good" / "Thumbs.db").write_bytes(b"x")
    (widget / "test" / "notes.txt").write_text("x")
    (widget / "train" / "good" / "._000.png").write_bytes(b"x")
    save_image(widget / "test" / ".ipynb_checkpoints" / "000.png", np.zeros((8, 8), np.uint8))
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
    with pytest.raises(InputError, match=r"hole/000\.png has no mask"):
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
    save_image(
        folder / "002_mask.png", np.repeat([[0, 100, 200, 255]], 32, 0).repeat(8, 1).astype(np.uint8)
    )
    noise = np.zeros((32, 32), np.uint8)
    noise[0, 0] = 3
    save_image(folder / "001_mask.png", noise)
    masks = load_masks(open_class(widget.parent, "widget"), 1)
    assert masks[3].all()
    assert not masks[4].any()
    assert masks[5].float().mean() == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------- other layouts


def make_btad(root):
    """Class 03: 800x600; class 01 with bmp, gray and upper-case names; a defect whose mask is all zero."""
    rng = np.random.default_rng(0)
    for name, size, suffix in (("01", (20, 20), ".bmp"), ("03", (600, 800), ".BMP")):
        for i in range(3):
            save_image(
                root / name / "train" / "ok" / f"{i:04}{suffix}",
                rng.integers(0, 255, (*size, 3), np.uint8),
            )
        save_image(root / name / "test" / "ok" / f"0000{suffix}", rng.integers(0, 255, size, np.uint8))
        for i in range(2):
            save_image(
                root / name / "test" / "ko" / f"{i:04}.png", rng.integers(0, 255, (*size, 3), np.uint8)
            )
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


def test_layouts_are_recognised(tmp_path):
    make_class(tmp_path / "mvtec")
    make_btad(tmp_path / "btad")
    make_visa(tmp_path / "visa")
    for name, classes in (
        ("mvtec", ["widget"]),
        ("btad", ["01", "03"]),
        ("visa", ["candle", "macaroni1"]),
    ):
        assert recognise(tmp_path / name) == name
        assert list_classes(tmp_path / name, name) == classes


def test_btad(tmp_path):
    make_btad(tmp_path)
    data = open_class(tmp_path, "03")
    assert [len(data.train), len(data.test)] == [3, 3]
    assert [image.kind for image in data.test] == ["ko", "ko", "good"]
    assert data.defective.tolist() == [True, True, False]
    masks = load_masks(data, 1)
    assert not masks[0].any()  # all zero, and a defect all the same
    assert masks[1].any()
    assert not masks[2].any()
    assert read_images(data.train, (64, 64)).shape == (3, 64, 64, 3)
    assert load_masks(open_class(tmp_path, "01"), 1)[1].float().mean() == pytest.approx(
        35 / 400, abs=0.01
    )


def test_visa(tmp_path):
    make_visa(tmp_path)
    data = open_class(tmp_path, "macaroni1")
    assert len(data.train) == 2
    assert [image.kind for image in data.test] == ["anomaly", "anomaly", "good"]
    masks = load_masks(data, 1)
    assert masks[0].float().mean() == pytest.approx(
        (12 * 20 + 12 * 5) / (24 * 30), abs=0.01
    )  # values 1 to 3
    assert not masks[2].any()


def test_what_is_wrong_with_a_visa_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no split_csv/1cls\.csv"):
        recognise(tmp_path, "visa")
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
        with pytest.raises(InputError, match="has not the columns"):
            open_class(tmp_path, "candle")


def test_a_class_that_is_not_there_lists_those_that_are(tmp_path):
    make_btad(tmp_path)
    with pytest.raises(InputError, match=r"no class '02' in .* \(layout btad\); classes there: 01, 03"):
        open_class(tmp_path, "02")
    with pytest.raises(InputError, match=r"layout mvtec\); no class folders there"):
        open_class(tmp_path, "01", "mvtec")
