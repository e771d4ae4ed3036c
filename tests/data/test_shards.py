"""WebDataset shards: what a sample is, labels of every kind, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import encode, pixels

from ssl_bench.data.dataset import Dataset, load_dataset


def write_shard(
    path: Path, images: np.ndarray, labels: list[bytes] | None, ending: str = "cls", first: int = 0
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            parts = {"png": encode(image)} | ({} if labels is None else {ending: labels[number]})
            for name, data in parts.items():
                member = tarfile.TarInfo(f"./{first + number:06d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def load(folder: Path, **options: object) -> Dataset:
    return load_dataset("webdataset", path=folder, **options)


def images(source: object) -> torch.Tensor:
    (batch,) = source.batches([torch.arange(len(source))])
    return batch


@pytest.mark.parametrize("layout", ["imagenet1k-{}-{:04d}.tar", "{}/{:06d}.tar"])
def test_splits_images_and_numbers(tmp_path, layout):
    train, test = pixels(5), pixels(2, seed=1)
    write_shard(tmp_path / layout.format("train", 0), train[:3], [b"1", b"0\n", b"2"])
    write_shard(tmp_path / layout.format("train", 1), train[3:], [b"1", b"2"], first=3)
    write_shard(tmp_path / layout.format("val", 0), test, [b"0", b"1"])
    data = load(tmp_path)
    assert data.train.labels.tolist() == [1, 0, 2, 1, 2]
    assert data.test.labels.tolist() == [0, 1]
    assert torch.equal(images(data.train), torch.from_numpy(train).permute(0, 3, 1, 2))
    assert torch.equal(images(data.test), torch.from_numpy(test).permute(0, 3, 1, 2))
    assert torch.equal(images(load(tmp_path).train), images(data.train))  # from the cache
    assert data.digest == load(tmp_path).digest


def test_names_json_and_no_labels(tmp_path):
    write_shard(tmp_path / "names/train-0.tar", pixels(3), [b"dog", b"cat", b"dog"])
    write_shard(tmp_path / "names/test-0.tar", pixels(1), [b"cat"])
    data = load(tmp_path / "names")
    assert (data.classes, data.train.labels.tolist(), data.test.labels.tolist()) == (("cat", "dog"), [1, 0, 1], [0])
    write_shard(tmp_path / "json/a.tar", pixels(2), [json.dumps({"label": i, "w": 8}).encode() for i in (1, 0)], "json")
    assert load(tmp_path / "json", test=False).train.labels.tolist() == [1, 0]
    write_shard(tmp_path / "bare/a.tar", pixels(2), None)
    assert load(tmp_path / "bare", test=False, labels=None).train.labels.tolist() == [-1, -1]


def test_images_of_several_sizes_are_resized_at_decode(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, shape in enumerate(((20, 30), (64, 12), (16, 16))):
            data = encode(np.full((*shape, 3), 40 * number, dtype=np.uint8))
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = images(load(tmp_path, size=16, test=False, labels=None).train)
    assert found.shape == (3, 3, 16, 16)
    assert [int(image.float().mean()) for image in found] == [0, 40, 80]


def test_what_is_refused(tmp_path):
    def refused(name: str, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            load(tmp_path / name, test=False, labels=None)

    write_shard(tmp_path / "gap/train-0000.tar", pixels(1), None)
    write_shard(tmp_path / "gap/train-0002.tar", pixels(1), None)
    refused("gap", r"train-\*\.tar: shards must be numbered without a gap, got none of number 1")
    write_shard(tmp_path / "cut/train.tar", pixels(2, size=64), None)
    whole = (tmp_path / "cut/train.tar").read_bytes()
    (tmp_path / "cut/train.tar").write_bytes(whole[:9000])
    refused("cut", r"train\.tar: (cut off in|damaged)")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip/train.tar").write_bytes(b"PK" * 600)
    refused("zip", r"train\.tar: damaged or no uncompressed tar file")
    write_shard(tmp_path / "mixed/a-train.tar", pixels(1), [b"3"])
    write_shard(tmp_path / "mixed/b-train.tar", pixels(1), [b"cat"])
    refused("mixed", "labels must be numbers or names in all shards")
    write_shard(tmp_path / "some/a-train.tar", pixels(1), [b"3"])
    write_shard(tmp_path / "some/b-train.tar", pixels(1), None)
    refused("some", r"b-train\.tar: every sample must have a label, or none")
    write_shard(tmp_path / "vals/val-0.tar", pixels(1), None)
    refused("vals", "must hold .tar files of a train split, got 1 others", FileNotFoundError)
    with tarfile.open(tmp_path / "text.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.txt"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text.tar").rename(tmp_path / "text/train.tar")
    refused("text", r"sample 0 must have one image \(\.jpg .*, got txt")


def test_a_damaged_image_is_named_by_its_member(tmp_path):
    data = b"no image"
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        member = tarfile.TarInfo("dir/0007.jpg")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"train\.tar: dir/0007\.jpg"):
        load(tmp_path, test=False, labels=None)
