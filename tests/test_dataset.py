"""Images and masks are found and paired as the layout says, whatever their spelling."""

import numpy as np
import pytest
import torch
from conftest import make_class, save_image

from dataset import open_class
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
