"""What bad data and bad arguments get: one line that names the thing, and nothing half-decoded in the cache."""

import re

import numpy as np
import pytest
from made_data import encode, one_parquet, pixels, tiny_archive, write_images, write_parquet

from ssl_bench.data.dataset import DATASETS, load_dataset


def refused(error: type[Exception], message: str, name: str = "hf", **arguments: object) -> None:
    """Asserts an error of one line."""
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar", {}, r"unknown data set 'cifar'; did you mean 'cifar10'\? \(known: cifar10, "),
        ("cifar10", {"size": 0}, "size must be a whole number of pixels >= 1 or None, got 0"),
        ("cifar10", {"resident": "yes"}, "resident must be True, False or 'auto', got 'yes'"),
        ("cifar10", {"workers": -1}, "workers must be a whole number >= 0, got -1"),
        ("cifar10", {"hf_config": "x"}, r"hf_config must be None \(it is for data=hf\), got 'x'"),
        ("digits", {"path": "x"}, "digits: path must be None .*got 'x'"),
        ("tiny_imagenet", {}, "tiny_imagenet: path must be given"),
        ("folder", {}, "folder: path must be given"),
    ],
)
def test_bad_arguments_are_refused_before_any_data_is_read(name, arguments, message):
    refused(ValueError, message, name, **arguments)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits"}))
def test_a_missing_or_empty_path_is_named(tmp_path, name):
    refused(FileNotFoundError, "nowhere/at/all", name, path="nowhere/at/all")
    if name != "hf":
        (tmp_path / "empty").mkdir()
        refused(FileNotFoundError, "empty", name, path=tmp_path / "empty")


def test_a_missing_split_or_shard_is_named(tmp_path):
    images = [encode(image) for image in pixels(2)]
    write_parquet(tmp_path / "test.parquet", images, [0, 1])
    refused(FileNotFoundError, r"no train-\*\.parquet, only test", path=tmp_path)
    (tmp_path / "test.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    refused(FileNotFoundError, r"train-00001-of-00002\.parquet: missing", path=tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "train.parquet")
    refused(
        FileNotFoundError,
        r"no test split beside train, which must be named test or val or .* give eval=none",
        path=tmp_path,
    )


def test_a_truncated_or_damaged_parquet_file_is_named(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(40, 32)])
    whole = (tmp_path / "test.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(whole[: len(whole) // 2])
    refused(ValueError, r"test\.parquet: not a whole parquet file", path=tmp_path)
    middle = len(whole) // 2
    (tmp_path / "test.parquet").write_bytes(whole[: middle - 20000] + bytes(40000) + whole[middle + 20000 :])
    refused(ValueError, r"test\.parquet.*(damaged|cannot be)", path=tmp_path)


def test_an_undecodable_image_is_named_and_nothing_stays_cached(tmp_path, cache):
    images = [encode(image) for image in pixels(12)]
    images[9] = images[9][:40]
    one_parquet(tmp_path, images)
    refused(ValueError, r"train\.parquet row 9: the image cannot be decoded", path=tmp_path)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_the_row_is_counted_within_its_shard(tmp_path):
    images = [encode(image) for image in pixels(6)]
    write_parquet(tmp_path / "train-0-of-2.parquet", images[:4], [0, 1, 0, 1])
    write_parquet(tmp_path / "train-1-of-2.parquet", [images[4], b"no image"], [0, 1])
    write_parquet(tmp_path / "test.parquet", images[:1], [0])
    refused(ValueError, r"train-1-of-2\.parquet row 1: the image cannot be decoded", path=tmp_path)


def test_an_undecodable_image_file_is_named(tmp_path):
    tiny_archive(tmp_path)
    path = tmp_path / "train" / "n01" / "images" / "n01_2.JPEG"
    path.write_bytes(path.read_bytes()[:50])
    refused(ValueError, re.escape(str(path)), "tiny_imagenet", path=tmp_path)


def test_images_of_several_sizes_need_a_size(tmp_path):
    one_parquet(tmp_path, [encode(pixels(1, 8)[0]), encode(pixels(1, 9)[0])])
    refused(ValueError, r"row 1: the image is 9x9 but the first one is 8x8; give a size", path=tmp_path)


@pytest.mark.parametrize(("labels", "got"), [([0, 10], "10"), ([-1, 3], "-1")])
def test_a_label_out_of_range_is_named(tmp_path, labels, got):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], labels)
    refused(
        ValueError,
        rf"train\.parquet row \d: labels of the train split must be 0 to 9, got {got}",
        "cifar10",
        path=tmp_path,
    )


@pytest.mark.parametrize(("labels", "got"), [([0.5, 1.0], "double, 0 rows"), ([1, None], "int64, 1 rows")])
def test_labels_that_are_neither_integers_nor_names_are_refused(tmp_path, labels, got):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], labels)
    refused(ValueError, f"column label must hold an integer or a name in every row, got {got} empty", path=tmp_path)


def test_missing_columns_are_listed(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], columns=("picture", "label"))
    refused(
        ValueError, "the image column must be image or img or .* or webp, got columns picture, label", path=tmp_path
    )


def test_a_shard_with_other_columns_is_named(tmp_path):
    images = [encode(image) for image in pixels(2)]
    one_parquet(tmp_path, images)
    write_parquet(tmp_path / "train-2.parquet", images, [0, 1], columns=("image", "labels"))
    message = r"train\.parquet: the label column must be labels, got columns image, label$"
    refused(ValueError, message, path=tmp_path)


def test_an_image_without_bytes_is_named(tmp_path):
    one_parquet(tmp_path, [encode(pixels(1)[0]), None])
    refused(ValueError, r"train\.parquet row 1: the image has no bytes", path=tmp_path)


def test_an_empty_split_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encode(pixels(1)[0])], [0])
    write_parquet(tmp_path / "test.parquet", [], np.empty(0, dtype=np.int64))
    refused(ValueError, "the test split is empty", path=tmp_path)


def test_another_data_set_at_the_path_is_refused(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], names=("a", "b"))
    refused(ValueError, "the files must name 10 classes, got 2", "cifar10", path=tmp_path)


def test_constant_images_are_refused(tmp_path):
    one_parquet(tmp_path, [encode(np.zeros((8, 8, 3), dtype=np.uint8))] * 2)
    refused(ValueError, "all pixels of the train split are equal in channel 0", path=tmp_path)


def test_a_broken_archive_names_what_is_missing(tmp_path):
    tiny_archive(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.unlink()
    refused(FileNotFoundError, r"val_annotations\.txt: missing", "tiny_imagenet", path=tmp_path)
    annotations.write_text(lines.replace("n03", "n77"))
    refused(
        ValueError,
        r"val_annotations\.txt line 3: class must be one of the 3 in wnids\.txt, got 'n77'",
        "tiny_imagenet",
        path=tmp_path,
    )
    annotations.write_text(lines)
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    refused(FileNotFoundError, r"val_1\.JPEG: missing, though val_annotations", "tiny_imagenet", path=tmp_path)


def test_a_class_folder_without_images_or_only_in_test_is_named(tmp_path):
    write_images(tmp_path / "train" / "cat", pixels(1))
    (tmp_path / "train" / "dog").mkdir()
    write_images(tmp_path / "test" / "cow", pixels(1))
    refused(ValueError, "dog: a class without images", "folder", path=tmp_path)
    write_images(tmp_path / "train" / "dog", pixels(1))
    refused(ValueError, "cow: the train split has no such class", "folder", path=tmp_path)
