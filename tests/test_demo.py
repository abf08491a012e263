"""The demo's data: seeded, with exact masks, and never written over somebody's own."""

import hashlib

import numpy as np
import pytest
from PIL import Image

import demo
from dataset import load_masks, open_class
from util import InputError

# Of the pixels of the few images with seed 1.
DIGEST = "011379f94e6346b360460a1be9866f302c5629189a79c490be042861f9b71ca9"


@pytest.fixture
def few_images(monkeypatch):
    for name, count in (("NUM_TRAIN", 3), ("NUM_TEST_GOOD", 2), ("NUM_PER_DEFECT", 2)):
        monkeypatch.setattr(demo, name, count)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("few_images")
def test_the_data_set_is_in_mvtecs_layout_and_seeded(tmp_path):
    demo.write_data_set(tmp_path / "a", seed=1)
    demo.write_data_set(tmp_path / "b", seed=1)
    demo.write_data_set(tmp_path / "c", seed=2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")
    data = open_class(tmp_path / "a", "gravel")
    assert len(data.train) == 3
    assert {t.kind for t in data.test} == {"good", *demo.DEFECTS}
    assert load_masks(data, 1)[data.defective].flatten(1).any(1).all()


@pytest.mark.usefixtures("few_images")
def test_the_images_are_those_of_earlier_versions(tmp_path):
    """So that numbers stay comparable."""
    demo.write_data_set(tmp_path, seed=1)
    digest = hashlib.sha256()
    for path in sorted(tmp_path.rglob("*.png")):
        with Image.open(path) as image:
            digest.update(np.asarray(image).tobytes())
    assert digest.hexdigest() == DIGEST


@pytest.mark.usefixtures("few_images")
def test_two_demos_in_one_folder_read_whole_images(tmp_path):
    """What is there and right is not touched; what is not is replaced in one step."""
    demo.write_data_set(tmp_path, seed=1)
    before = {path: path.stat() for path in tmp_path.rglob("*.png")}
    damaged = min(before)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    with damaged.open("rb") as reader:
        demo.write_data_set(tmp_path, seed=1)
        assert reader.read() == content[:100]  # a reader keeps what it has opened
    assert damaged.read_bytes() == content
    changed = {path for path, old in before.items() if path.stat().st_mtime_ns != old.st_mtime_ns}
    assert changed == {damaged}
    assert before.keys() == set(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("kind", sorted(demo.DEFECTS))
def test_a_defect_changes_the_image_within_its_mask_only(kind):
    good = demo.good_image(demo.skimage.data.gravel() / 255, np.random.default_rng(0))
    for seed in range(5):
        picture, mask = demo.DEFECTS[kind](good, np.random.default_rng(seed))
        changed = np.abs(picture - good).max(axis=2) > 1e-9
        assert 30 < mask.sum() < 0.2 * mask.size
        assert not (changed & ~mask).any()
        assert (changed & mask).sum() > 0.9 * mask.sum()


def test_somebody_elses_folder_is_left_alone(tmp_path, run_main):
    path = tmp_path / "gravel" / "train" / "good" / "000.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (8, 8)).save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="not the demo's data"):
        demo.write_data_set(tmp_path)
    code, _, err = run_main(demo.main, ["--out", tmp_path])
    assert code == 2
    assert "choose another folder by --out" in err
    assert path.read_bytes() == before
