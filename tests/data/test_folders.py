"""Trees of image files: what is data, what is litter, and what becomes of images without labels."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import pixels, write_images
from torchvision.datasets import ImageFolder

from ssl_bench.data.dataset import Dataset, load_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three train and one test image."""
    for number, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "set" / "train" / name, pixels(3, seed=number))
        write_images(tmp_path / "set" / "test" / name, pixels(1, seed=10 + number))
    return tmp_path / "set"


def load(folder: Path, **options: bool) -> Dataset:
    return load_dataset("folder", path=folder, **options)


def test_hidden_folders_and_litter_are_no_data(folder):
    before = load(folder)
    write_images(folder / "train" / ".ipynb_checkpoints", pixels(2, seed=5))
    write_images(folder / "train" / "cat" / ".ipynb_checkpoints", pixels(2, seed=5))
    write_images(folder / "train" / "cat" / "@eaDir", pixels(2, seed=6))
    write_images(folder / "train" / "__MACOSX" / "cat", pixels(2, seed=7))
    write_images(folder / "train" / "dog", pixels(2, seed=8), "._{}.png")
    write_images(folder / "test" / "$RECYCLE.BIN", pixels(2, seed=9))
    (folder / "train" / "dog" / "Thumbs.db").write_bytes(b"x")
    after = load(folder)
    assert after.classes == ("cat", "dog")
    assert (after.train.labels.tolist(), len(after.test)) == ([0, 0, 0, 1, 1, 1], 2)
    assert after.digest == before.digest


def test_image_files_of_endings_that_are_not_read_are_counted_and_said(folder, caplog):
    for name in ("a.heic", "b.HEIC", "c.jp2", "notes.txt"):
        (folder / "train" / "cat" / name).write_bytes(b"x")
    for _ in range(2):
        caplog.clear()
        assert len(load(folder).train) == 6
        assert "3 image files have an ending that is not read (.heic: 2, .jp2: 1; read: .jpg" in caplog.text


def test_images_outside_the_class_folders_are_said(folder, caplog):
    write_images(folder / "train", pixels(2))
    assert len(load(folder).train) == 6
    assert "2 images of train lie outside its class folders and are left out" in caplog.text


def test_a_link_to_a_folder_above_ends(folder):
    os.symlink(folder / "train", folder / "train" / "cat" / "loop")
    assert len(load(folder).train) == 6


def test_the_order_is_that_of_torchvisions_image_folder(tmp_path):
    for number, name in enumerate(("b", "a", "a/deep", "Z")):
        write_images(tmp_path / "set" / "train" / name, pixels(2, seed=number))
    write_images(tmp_path / "set" / "test" / "a", pixels(1))
    theirs = ImageFolder(tmp_path / "set" / "train")
    data = load(tmp_path / "set")
    assert data.classes == tuple(theirs.classes)
    assert data.train.labels.tolist() == theirs.targets
    (batch,) = data.train.batches([torch.arange(len(theirs))])
    for ours, (image, _) in zip(batch, sorted(theirs, key=lambda pair: pair[1]), strict=True):
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image))


def test_beside_an_unlabelled_test_folder_the_validation_images_count(folder, caplog):
    (folder / "test").rename(folder / "val")
    write_images(folder / "test", pixels(4, seed=3))
    data = load(folder)
    assert data.test.labels.tolist() == [0, 1]
    assert "test/ has no class folders: val/ is the test split" in caplog.text


@pytest.mark.parametrize("place", ["", "train", "deep/er"])
def test_images_without_labels_are_for_pretraining_only(tmp_path, place):
    images = pixels(4)
    write_images(tmp_path / "set" / place, images)
    data = load(tmp_path / "set", labels=False, test=False)
    (batch,) = data.train.batches([torch.arange(4)])
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), images)
    assert (data.classes, len(data.test), data.test.image_shape) == ((), 0, (3, 8, 8))
    for _ in range(2):  # neither before decoding nor from the cache
        with pytest.raises(
            ValueError, match=r"folder: the train images must have labels \(.*no .*give eval=none, or eval\.data="
        ):
            load(tmp_path / "set")


def test_a_labelled_folder_without_a_test_folder_can_be_held_out_of(folder):
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "test").rmdir()
    data = load(folder, test=False)
    assert (len(data.train), len(data.test), data.classes) == (6, 0, ("cat", "dog"))
    with pytest.raises(FileNotFoundError, match=r"no test split beside train.*or data\.holdout"):
        load(folder)
