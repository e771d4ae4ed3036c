"""Labels: which class each number means, in every file of every split, and how many classes there are."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_data import encode, pixels, write_images, write_parquet

from ssl_bench.data.dataset import Dataset, load_dataset
from ssl_bench.data.raw import Located, RawDataset, RawSplit


def images(n: int) -> list[bytes]:
    return [encode(image) for image in pixels(n)]


def named(data: Dataset, split: str = "train") -> list[str]:
    return [data.classes[label] for label in getattr(data, split).labels]


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("hf", path=folder)
    assert "\n" not in str(caught.value)


# ---- by name


def test_test_labels_are_those_of_the_same_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(4), [0, 1, 2, 3], names="abcd")
    write_parquet(tmp_path / "test.parquet", images(4), [0, 1, 3, 0], names="dcba")
    data = load_dataset("hf", path=tmp_path)
    assert named(data) == ["a", "b", "c", "d"]
    assert named(data, "test") == ["d", "c", "a", "d"]
    assert data.test.labels.tolist() == [3, 2, 0, 3]


def test_later_files_of_a_split_are_looked_at_too(tmp_path):
    write_parquet(tmp_path / "train-0-of-2.parquet", images(3), [0, 1, 2], names="abc")
    write_parquet(tmp_path / "train-1-of-2.parquet", images(3), [0, 1, 2], names="cab")
    write_parquet(tmp_path / "test.parquet", images(1), [0], names="abc")
    assert named(load_dataset("hf", path=tmp_path)) == ["a", "b", "c", "c", "a", "b"]


def test_a_class_that_train_does_not_name_is_refused_where_it_is_used(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(2), [0, 1], names="ab")
    write_parquet(tmp_path / "test.parquet", images(1), [0], names="xa")
    refused(tmp_path, r"test\.parquet: class must be one of the train split's \(a, b\), got 'x'")
    write_parquet(tmp_path / "test.parquet", images(1), [1], names="xa")
    assert named(load_dataset("hf", path=tmp_path), "test") == ["a"]


def test_numbers_beside_names_are_taken_for_their_numbers_and_said(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", images(2), [0, 1], names="ab")
    write_parquet(tmp_path / "test.parquet", images(2), [1, 0])
    assert named(load_dataset("hf", path=tmp_path), "test") == ["b", "a"]
    assert "the test split does not name its classes: its labels are taken for numbers of train's" in caplog.text


def test_labels_that_are_text_are_classes_in_their_order(tmp_path):
    write_parquet(tmp_path / "train-0-of-2.parquet", images(2), ["dog", "cat"])
    write_parquet(tmp_path / "train-1-of-2.parquet", images(2), ["emu", "cat"])
    write_parquet(tmp_path / "test.parquet", images(2), ["emu", "dog"])
    data = load_dataset("hf", path=tmp_path)
    assert data.classes == ("cat", "dog", "emu")
    assert named(data) == ["dog", "cat", "emu", "cat"]
    assert named(data, "test") == ["emu", "dog"]
    write_parquet(tmp_path / "test.parquet", images(2), ["emu", "yak"])
    refused(tmp_path, "got 'yak'")
    write_parquet(tmp_path / "test.parquet", images(2), [2, 1])
    refused(tmp_path, "labels must be names or numbers in both splits, got names in one only")


# ---- the classes that there are


def test_chance_is_counted_over_the_classes_that_have_images(tmp_path, caplog):
    names = [f"n{i}" for i in range(1000)]
    for split, labels in (("train", [7, 300, 7, 999, 12]), ("test", [999, 12])):
        write_parquet(tmp_path / f"{split}.parquet", images(len(labels)), labels, names=names)
    for _ in range(2):  # decoded, and from the cache
        caplog.clear()
        data = load_dataset("hf", path=tmp_path)
        assert data.classes == ("n7", "n12", "n300", "n999")
        assert data.train.labels.tolist() == [0, 2, 0, 3, 1]
        assert data.test.labels.tolist() == [3, 1]
        assert "4 of 1000 classes have images, which are numbered 0 to 3 (n7, n12, n300, n999)" in caplog.text


def test_labels_from_1_on_are_as_many_classes_as_there_are(tmp_path, caplog):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", images(3), [1, 2, 3])
    data = load_dataset("hf", path=tmp_path)
    assert (data.classes, data.train.labels.tolist()) == (("1", "2", "3"), [0, 1, 2])
    assert "3 of 4 classes have images" in caplog.text


def test_a_test_image_of_a_class_without_train_images_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(2), [0, 2], names="abc")
    write_parquet(tmp_path / "test.parquet", images(2), [0, 1], names="abc")
    refused(tmp_path, r"test\.parquet row 1: class must be one that the train split has, got 'b'")


# ---- columns and types


@pytest.mark.parametrize("columns", [("pixel_values", "labels"), ("jpg", "cls"), ("png", "cls"), ("webp", "label")])
def test_other_names_of_columns(tmp_path, columns):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", images(2), [0, 1], columns=columns)
    assert load_dataset("hf", path=tmp_path).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]),
        "fixed",
    ],
    ids=str,
)
def test_every_binary_type_of_arrow(tmp_path, kind):
    cells = [encode(image, "BMP") for image in pixels(3)]  # all of one length
    kind = pa.binary(len(cells[0])) if kind == "fixed" else kind
    for split in ("train", "test"):
        rows = [{"bytes": cell, "path": None} for cell in cells] if pa.types.is_struct(kind) else cells
        if pa.types.is_dictionary(kind):
            column = pa.array(rows, pa.binary()).dictionary_encode()
        else:
            column = pa.array(rows, kind)
        table = pa.table({"image": column, "label": pa.array([0, 1, 1], pa.uint8())})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = load_dataset("hf", path=tmp_path)
    (batch,) = data.train.batches([torch.arange(3)])
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), pixels(3))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.string(), ["b", "a"]),
        (pa.large_string(), ["b", "a"]),
        (pa.string_view(), ["b", "a"]),
        (pa.dictionary(pa.int32(), pa.string()), ["b", "a"]),
        (pa.bool_(), [True, False]),
        (pa.int8(), [1, 0]),
    ],
    ids=str,
)
def test_every_type_of_label(tmp_path, kind, values):
    for split in ("train", "test"):
        column = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
        pq.write_table(pa.table({"image": pa.array(images(2)), "label": column}), tmp_path / f"{split}.parquet")
    assert load_dataset("hf", path=tmp_path).train.labels.tolist() == [1, 0]


def test_images_in_files_of_their_own_lie_beside_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    write_images(tmp_path / "images", pixels(2))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "test"):
        cells = pa.array([{"bytes": None, "path": f"images/{i}.png"} for i in range(2)], kind)
        pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / f"{split}.parquet")
    (batch,) = load_dataset("hf", path=tmp_path).train.batches([torch.arange(2)])
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), pixels(2))


@pytest.mark.parametrize(("count", "message"), [(2, "row 2: has a label but no image"), (4, "row 2: the last one")])
def test_as_many_images_as_labels(count, message):
    """A data set of somebody else's may give another number: every label after that would be of another image."""

    def split(n: int) -> RawSplit:
        return RawSplit(np.arange(3) % 2, lambda: iter(images(n)), lambda index: f"row {index}")

    with pytest.raises(ValueError, match=message):
        load_dataset("mine", locate=lambda _path: Located((), lambda: RawDataset(split(count), split(3), None)))


# ---- what the datasets library saves, and configurations


def test_what_save_to_disk_wrote(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [{"bytes": image, "path": None} for image in images(4)], "label": [1, 0, 1, 0]}
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "both"))
    one.save_to_disk(str(tmp_path / "single"))
    data = load_dataset("hf", path=tmp_path / "both")
    assert (data.classes, named(data), named(data, "test")) == (("x", "y"), ["y", "x", "y", "x"], ["y"])
    single = load_dataset("hf", path=tmp_path / "single", test=False)
    assert (named(single), len(single.test)) == (["y", "x", "y", "x"], 0)
    with pytest.raises(FileNotFoundError, match="no test split beside train"):
        load_dataset("hf", path=tmp_path / "single")


def test_of_several_configurations_one_must_be_named(tmp_path):
    for config, labels in (("small", [0, 1]), ("large", [1, 1, 0])):
        for split in ("train", "test"):
            write_parquet(tmp_path / config / f"{split}.parquet", images(len(labels)), labels)
    refused(tmp_path, r"data\.hf_config must be large or small .*, got null")
    assert len(load_dataset("hf", path=tmp_path, hf_config="large").train) == 3
    assert len(load_dataset("hf", path=tmp_path, hf_config="small").train) == 2
    with pytest.raises(ValueError, match=r"data\.hf_config must be large or small, got 'medium'"):
        load_dataset("hf", path=tmp_path, hf_config="medium")


def test_of_a_hub_sets_configurations_too(tmp_path, monkeypatch):
    """A folder with the README of a hub data set; the library would take the first or a default."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    for config, labels in (("beta", [0, 1]), ("alpha", [1, 1, 0])):
        for split in ("train", "test"):
            path = folder / config / split / "0000.parquet"
            write_parquet(path, images(len(labels)), labels)
            table = pq.read_table(path).replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
            pq.write_table(table, path)
    lines = ["configs:"]
    for config in ("beta", "alpha"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}/*.parquet"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    refused(folder, r"data\.hf_config must be .*alpha.*got null")
    assert len(load_dataset("hf", path=folder, hf_config="alpha").train) == 3
    assert len(load_dataset("hf", path=folder, hf_config="beta").train) == 2


# ---- none at all


def test_images_without_labels_are_for_pretraining_only(tmp_path, caplog):
    table = pa.table({"image": pa.array(images(3)), "caption": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "train.parquet")
    with caplog.at_level(logging.WARNING):
        data = load_dataset("hf", path=tmp_path, labels=False, test=False)
    assert (len(data.train), len(data.test), data.classes) == (3, 0, ())
    assert "has no label column (label or labels or fine_label or cls), only image, caption" in caplog.text
    refused(tmp_path, r"the train images must have labels \(.*no label column.*give eval=none")


def test_a_train_split_whose_labels_are_all_missing_is_unlabelled(tmp_path):
    for labels in ([-1, -1], [None, None]):
        write_parquet(tmp_path / "train.parquet", images(2), pa.array(labels, pa.int64()))
        write_parquet(tmp_path / "test.parquet", images(2), [0, 1])
        refused(tmp_path, "the train images must have labels")
        assert len(load_dataset("hf", path=tmp_path, labels=False, test=False).train) == 2


def test_a_damaged_image_is_still_named(tmp_path):
    bad = io.BytesIO(b"no image").getvalue()
    write_parquet(tmp_path / "train.parquet", [*images(1), bad], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", images(1), ["a"])
    refused(tmp_path, r"train\.parquet row 1: the image cannot be decoded")
