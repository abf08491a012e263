"""Images, masks and batches come out as the layout says, whatever their spelling and mode."""

import numpy as np
import pytest
import torch
from conftest import make_class, save_image
from PIL import Image

from dataset import (
    flips_and_turns,
    load_images,
    load_masks,
    normalise,
    open_class,
    read_image,
    training_batches,
)
from util import InputError

CPU = torch.device("cpu")


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
        ("F", 100.0, (100, 100, 100)),
    ],
)
def test_image_modes(tmp_path, mode, value, expected):
    path = tmp_path / "a.tif"
    Image.new(mode, (20, 10), value).save(path)
    image = read_image(path, (4, 8))
    assert image.shape == (4, 8, 3)
    assert image.dtype == np.uint8
    assert tuple(image[2, 3]) == expected


def test_images_are_resized_with_pil_bilinear(tmp_path):
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", original)
    expected = np.asarray(Image.fromarray(original).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(read_image(tmp_path / "a.png", (16, 16)), expected)
    assert torch.equal(
        load_images([tmp_path / "a.png"], (16, 16), 1, "x")[0], torch.from_numpy(expected.copy())
    )


def test_normalisation_is_imagenets():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    normalised = normalise(images, CPU)
    assert normalised.shape == (2, 3, 4, 5)
    expected = (images[1, 2, 3].double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalised[1, :, 2, 3].double(), expected, rtol=1e-6, atol=1e-6)


def test_an_epoch_shows_every_image_once_and_drops_the_rest():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 2, 2, 3)
    torch.manual_seed(0)
    batches = list(training_batches(images, 3, None, CPU))
    assert [len(b) for b in batches] == [3, 3]
    shown = torch.cat(batches)[:, 0, 0, 0]
    assert len(shown.unique()) == 6
    torch.manual_seed(0)
    again = torch.cat(list(training_batches(images, 3, None, CPU)))
    assert torch.equal(again, torch.cat(batches))


def test_flips_and_turns_reach_all_eight_positions_with_the_official_frequencies():
    """Flips with probability 1/2 each; a turn with 1/2, by a uniform multiple of 90 degrees."""
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, axis=2)
    augment = flips_and_turns(square=True, seed=0)
    counts = {}
    for _ in range(4000):
        key = tuple(augment(image)[:, :, 0].ravel().tolist())
        counts[key] = counts.get(key, 0) + 1
    expected = {}
    for horizontal in (0, 1):
        for vertical in (0, 1):
            for turn, probability in ((0, 5 / 8), (1, 1 / 8), (2, 1 / 8), (3, 1 / 8)):
                x = image[:, :, 0]
                x = x[:, ::-1] if horizontal else x
                x = x[::-1] if vertical else x
                key = tuple(np.rot90(x, turn).ravel().tolist())
                expected[key] = expected.get(key, 0) + probability / 4
    assert counts.keys() == expected.keys()
    for key, probability in expected.items():
        assert counts[key] / 4000 == pytest.approx(probability, abs=0.03)


def test_augmentation_is_seeded_and_keeps_oblong_shapes():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    runs = []
    for seed in (1, 1, 2):
        augment = flips_and_turns(square=False, seed=seed)
        runs.append(np.stack([augment(image) for _ in range(20)]))
    assert runs[0].shape == (20, 4, 6, 3)
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


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


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(widget, damage):
    path = widget / "train" / "good" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[damage]
    )
    with pytest.raises(InputError, match=r"cannot read image .*003\.png"):
        load_images(open_class(widget.parent, "widget").train, (32, 32), 2, "x")


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
