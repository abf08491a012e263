"""Batches hold what the files hold: decoded, resized, oriented, normalised, each feature computed once."""

import threading

import numpy as np
import pytest
import torch
from conftest import make_class, read_images, save_image
from PIL import Image

import loading
from dataset import open_class
from loading import (
    FeatureSource,
    ImageStore,
    evaluation_plan,
    look_ahead,
    normalise,
    oriented,
    random_orientations,
    read_image,
    training_plan,
)
from util import InputError

CPU = torch.device("cpu")


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
    assert torch.equal(read_images([tmp_path / "a.png"], (16, 16))[0], torch.from_numpy(expected.copy()))


def test_normalisation_is_imagenets():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    normalised = normalise(images)
    assert normalised.shape == (2, 3, 4, 5)
    expected = (images[1, 2, 3].double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalised[1, :, 2, 3].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(widget, damage):
    path = widget / "train" / "good" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[damage]
    )
    with pytest.raises(InputError, match=r"cannot read image .*003\.png \([^']{5,}\); repair"):
        read_images(open_class(widget.parent, "widget").train, (32, 32))


@pytest.fixture
def paths(tmp_path):
    return open_class(make_class(tmp_path).parent, "widget").train


@pytest.mark.parametrize("cache", ["auto", "ram", "none"])
def test_a_store_gives_the_same_images_from_memory_and_from_files(paths, cache):
    store = ImageStore(paths, (16, 24), cache, CPU, 2, "x")
    assert len(store) == 6
    assert (store.images is None) == (cache == "none")
    batches = list(store.batches([torch.tensor([4, 1]), torch.tensor([0])]))
    expected = read_images(paths, (16, 24))
    assert torch.equal(batches[0], expected[[4, 1]])
    assert torch.equal(batches[1], expected[[0]])
    assert np.array_equal(store[3], expected[3].numpy())


def test_auto_keeps_images_only_where_memory_is_free(paths, monkeypatch):
    needed = 6 * 32 * 32 * 3
    for free, kept in ((4 * needed, True), (4 * needed - 1, False)):
        monkeypatch.setattr(loading, "free_memory", lambda device, free=free: free)
        assert (ImageStore(paths, (32, 32), "auto", CPU, 1, "x").images is not None) == kept


def test_without_a_cache_a_damaged_image_is_named_when_its_turn_comes(paths):
    store = ImageStore(paths, (16, 16), "none", CPU, 2, "x")
    paths[5].write_bytes(b"not an image")
    batches = store.batches([torch.tensor([0]), torch.tensor([5])])
    assert next(batches).shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=r"cannot read image .*005\.png"):
        next(batches)


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
    plan = training_plan(7, 3, "none")
    assert [len(indices) for indices, _ in plan] == [3, 3]
    shown = torch.cat([indices for indices, _ in plan])
    assert len(shown.unique()) == 6
    assert not torch.cat([orientations for _, orientations in plan]).any()
    torch.manual_seed(0)
    assert torch.equal(torch.cat([indices for indices, _ in training_plan(7, 3, "none")]), shown)


def test_an_evaluation_shows_all_images_in_order_and_upright():
    plan = evaluation_plan(range(7), 3)
    assert torch.cat([indices for indices, _ in plan]).tolist() == list(range(7))
    assert [len(indices) for indices, _ in plan] == [3, 3, 1]
    assert not torch.cat([orientations for _, orientations in plan]).any()


@pytest.mark.parametrize("augment", ["flips and turns", "flips"])
def test_orientations_have_the_official_frequencies(augment):
    """Flips with probability 1/2 each; a turn with 1/2, by a uniform multiple of 90 degrees."""
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, axis=2)
    torch.manual_seed(0)
    orientations = random_orientations(4000, augment)
    images = oriented(torch.from_numpy(image).expand(4000, -1, -1, -1), orientations)
    counts = {}
    for row in images[..., 0].flatten(1).tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    expected = {}
    turns = ((0, 5 / 8), (1, 1 / 8), (2, 1 / 8), (3, 1 / 8)) if "turns" in augment else ((0, 1),)
    for horizontal in (0, 1):
        for vertical in (0, 1):
            for turn, probability in turns:
                x = image[:, :, 0]
                x = x[:, ::-1] if horizontal else x
                x = x[::-1] if vertical else x
                key = tuple(np.rot90(x, turn).ravel().tolist())
                expected[key] = expected.get(key, 0) + probability / 4
    assert counts.keys() == expected.keys()
    for key, probability in expected.items():
        assert counts[key] / 4000 == pytest.approx(probability, abs=0.03)


def test_flips_keep_oblong_shapes():
    images = torch.randint(0, 256, (20, 4, 6, 3), dtype=torch.uint8)
    assert oriented(images, random_orientations(20, "flips")).shape == images.shape


class CountingEncoder:
    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return images[:, :, ::2, ::2]


def epochs(source, count=3):
    torch.manual_seed(0)
    return [torch.cat(list(source.batches(training_plan(6, 2, "flips")))) for _ in range(count)]


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_constant_features_are_computed_once_for_each_orientation(paths, cache):
    store = ImageStore(paths, (16, 16), cache, CPU, 2, "x")
    encoders = CountingEncoder(), CountingEncoder()
    plain, keeping = (
        FeatureSource(store, encoder, constant)
        for encoder, constant in zip(encoders, (False, True), strict=True)
    )
    for x, y in zip(epochs(plain, 8), epochs(keeping, 8), strict=True):
        assert torch.equal(x, y)
    assert encoders[0].images == 8 * 6
    assert encoders[1].images < 8 * 6
    upright = evaluation_plan(range(6), 4)
    before = torch.cat(list(keeping.batches(upright)))
    encoders[1].images = 0
    assert torch.equal(torch.cat(list(keeping.batches(upright))), before)
    assert encoders[1].images == 0


def test_features_are_kept_within_their_memory(paths):
    store = ImageStore(paths, (16, 16), "ram", CPU, 2, "x")
    encoder = CountingEncoder()
    source = FeatureSource(store, encoder, constant=True, memory=2 * 3 * 8 * 8 * 4)  # of two images
    plan = evaluation_plan(range(6), 2)
    for _ in range(2):
        assert torch.cat(list(source.batches(plan))).shape == (6, 3, 8, 8)
    assert encoder.images == 6 + 4


def test_kept_features_stay_channels_last(paths):
    store = ImageStore(paths, (16, 16), "ram", CPU, 2, "x")
    source = FeatureSource(store, lambda x: x, constant=True)
    for _ in range(2):
        for batch in source.batches(evaluation_plan(range(6), 3)):
            assert batch.is_contiguous(memory_format=torch.channels_last)
