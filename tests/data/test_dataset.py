"""Loading data sets: every layout and every kind of image."""

import gzip
import pickle
import struct
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from made_data import all_images, encode, one_parquet, parquet_set, pixels, tiny_archive, write_images, write_parquet

from ssl_bench.data import download as download_module
from ssl_bench.data.dataset import Dataset, load_dataset
from ssl_bench.data.raw import Located, RawDataset, RawSplit

# ---- layouts


def test_parquet_gives_every_pixel_and_label(tmp_path):
    train, test = parquet_set(tmp_path / "set", n_train=23)
    data = load_dataset("cifar10", path=tmp_path / "set")
    np.testing.assert_array_equal(all_images(data.train), train)
    np.testing.assert_array_equal(all_images(data.test), test)
    assert data.train.labels.tolist() == [i % 10 for i in range(23)]
    assert data.train.labels.dtype == torch.int64
    assert data.train.image_shape == (3, 8, 8)
    assert data.classes[:2] == ("airplane", "automobile")
    assert data.name == "cifar10"


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "label"), ("img", "fine_label"), ("image", "labels")])
@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_names_of_columns_and_splits(tmp_path, columns, test_name):
    images = [encode(image) for image in pixels(2)]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", images, [0, 1], columns=columns)
    write_parquet(tmp_path / f"{test_name}-00000-of-00001.parquet", images[:1], [1], columns=columns)
    data = load_dataset("cifar100", path=tmp_path)
    assert (len(data.train), len(data.test), data.test.labels.tolist()) == (2, 1, [1])
    assert data.classes == ("0", "1")  # those of the hundred that have images


def test_binary_column_several_shards_and_a_sub_folder(tmp_path):
    train = pixels(5)
    for shard, rows in enumerate((slice(0, 2), slice(2, 5))):
        path = tmp_path / "data" / f"train-{shard:05d}-of-00002.parquet"
        write_parquet(path, [encode(image) for image in train[rows]], [0, 1, 2][: len(train[rows])], struct=False)
    write_parquet(tmp_path / "data" / "test.parquet", [encode(train[0])], [0], struct=False)
    data = load_dataset("hf", path=tmp_path)
    np.testing.assert_array_equal(all_images(data.train), train)
    assert data.train.labels.tolist() == [0, 1, 0, 1, 2]
    assert data.classes == ("0", "1", "2")


def test_class_names_come_from_the_parquet_files(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], names=("n01", "n02"))
    assert load_dataset("tiny_imagenet", path=tmp_path).classes == ("n01", "n02")


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    images = [encode(image) for image in pixels(3)]
    for split, labels in (("train", [0, 1, 2]), ("test", [-1, -1, -1]), ("validation", [2, 1, 0])):
        write_parquet(tmp_path / f"{split}.parquet", images, labels)
    assert load_dataset("hf", path=tmp_path).test.labels.tolist() == [2, 1, 0]


def test_tiny_imagenets_archive(tmp_path):
    images = tiny_archive(tmp_path)
    data = load_dataset("tiny_imagenet", path=tmp_path)
    assert data.classes == ("n01", "n02", "n03")
    np.testing.assert_array_equal(all_images(data.train), np.concatenate([images[name][:-1] for name in data.classes]))
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(all_images(data.test), [images[name][-1] for name in ("n02", "n01", "n03")])
    assert data.test.labels.tolist() == [1, 0, 2]


def test_class_folders(tmp_path):
    images = pixels(5)
    write_images(tmp_path / "train" / "dog", images[:2], "{}.PNG")
    write_images(tmp_path / "train" / "cat" / "nested", images[2:4])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    write_images(tmp_path / "val" / "dog", images[4:])
    data = load_dataset("folder", path=tmp_path)
    assert data.classes == ("cat", "dog")
    np.testing.assert_array_equal(all_images(data.train), images[[2, 3, 0, 1]])
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.test.labels.tolist() == [1]


def test_a_folder_of_another_layout_through_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    images = pixels(3)
    for split in ("train", "test"):
        write_images(tmp_path / "set" / split / "ant", images[:2])
        write_images(tmp_path / "set" / split / "bee", images[2:])
    data = load_dataset("hf", path=tmp_path / "set")
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(all_images(data.train), images)


def test_a_foreign_data_set_is_decoded_and_cached_like_the_others(tmp_path, cache):
    images = pixels(6)
    files = write_images(tmp_path / "scans", images)
    reads = []

    def split(part: slice) -> RawSplit:
        labels = np.arange(len(files))[part] % 2
        return RawSplit(labels, lambda: iter(files[part]), lambda index: str(files[part][index]))

    def read() -> RawDataset:
        reads.append(1)
        return RawDataset(split(slice(0, 4)), split(slice(4, 6)), ("healthy", "sick"))

    def locate(path: Path | None) -> Located:
        assert path == tmp_path / "scans"
        return Located(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files), read)

    for _ in range(2):
        data = load_dataset("scans.loader:locate", locate=locate, path=tmp_path / "scans")
        np.testing.assert_array_equal(all_images(data.train), images[:4])
        assert (data.classes, data.test.labels.tolist()) == (("healthy", "sick"), [0, 1])
    assert len(reads) == 1
    assert [path.name[:19] for path in cache.iterdir() if path.is_dir()] == ["scans.loader-locate"]
    files[5].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"5\.png: the image cannot be decoded"):
        load_dataset("scans.loader:locate", locate=locate, path=tmp_path / "scans")


def test_a_foreign_function_must_return_a_located_data_set():
    with pytest.raises(ValueError, match="data mine: its function must return a Located, got NoneType"):
        load_dataset("mine", locate=lambda _path: None)


def test_digits_split_is_fixed_and_stratified():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1442, 355)
    assert data.train.image_shape == (3, 32, 32)
    counts = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert torch.equal(torch.bincount(data.test.labels), counts // 5)
    train = all_images(data.train)
    assert (train[..., 0] == train[..., 1]).all()
    assert (train[..., 0] == train[..., 2]).all()
    assert train.min() == 0
    assert train.max() == 255
    # The first image of all is a zero; the fifth zero of scikit-learn's order is the first test image of its class.
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    first, fifth = raw[labels == 0][0], raw[labels == 0][4]
    np.testing.assert_allclose(train[0, 2::4, 2::4, 0] / 255 * 16, first.reshape(8, 8), atol=3)
    zero = all_images(data.test)[data.test.labels == 0][0]
    assert np.corrcoef(zero[2::4, 2::4, 0].ravel(), fifth)[0, 1] > 0.97


# ---- torchvision's files


def checked(path: Path, content: bytes) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, md5(content).hexdigest()]


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, cls: type, label_key: str) -> np.ndarray:
    """CIFAR's pickles, with torchvision's table of checksums made to fit."""
    images = pixels(6, 32)
    folder = root / cls.base_folder
    lists = {}
    for split, rows in (("train_list", slice(0, 4)), ("test_list", slice(4, 6))):
        data = images[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        content = pickle.dumps({"data": data, label_key: [3, 1, 2, 9][: len(data)]})
        lists[split] = [checked(folder / split, content)]
        monkeypatch.setattr(cls, split, lists[split])
    key = cls.meta["key"]
    name, digest = checked(folder / cls.meta["filename"], pickle.dumps({key: [f"class {i}" for i in range(100)]}))
    assert name == cls.meta["filename"]
    monkeypatch.setattr(cls, "meta", {"filename": name, "key": key, "md5": digest})
    return images


@pytest.mark.parametrize(("name", "label_key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_as_torchvision_keeps_it(tmp_path, monkeypatch, name, label_key):
    cls = getattr(torchvision.datasets, name.upper())
    images = make_cifar(tmp_path, monkeypatch, cls, label_key)
    if name == "cifar10":
        ten = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
        _, digest = checked(tmp_path / cls.base_folder / cls.meta["filename"], ten)
        monkeypatch.setitem(cls.meta, "md5", digest)
    data = load_dataset(name, path=tmp_path)
    np.testing.assert_array_equal(all_images(data.train), images[:4])
    np.testing.assert_array_equal(all_images(data.test), images[4:])
    assert [data.classes[label] for label in data.train.labels] == ["class 3", "class 1", "class 2", "class 9"]
    assert data.classes == ("class 1", "class 2", "class 3", "class 9")


def test_stl10_as_torchvision_keeps_it(tmp_path, monkeypatch):
    cls, images = torchvision.datasets.STL10, pixels(5, 96)
    folder = tmp_path / cls.base_folder
    for split, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        # STL-10 stores columns first, and counts its labels from 1.
        content = images[rows].transpose(0, 3, 2, 1).tobytes()
        labels = np.asarray([10, 2, 1][: len(images[rows])], dtype=np.uint8).tobytes()
        files = [checked(folder / f"{split}_X.bin", content), checked(folder / f"{split}_y.bin", labels)]
        monkeypatch.setattr(cls, f"{split}_list", files)
    (folder / cls.class_names_file).write_text("\n".join(f"name {i}" for i in range(10)))
    data = load_dataset("stl10", path=tmp_path)
    assert data.train.image_shape == (3, 96, 96)
    np.testing.assert_array_equal(all_images(data.train), images[:3])
    assert [data.classes[label] for label in data.train.labels] == ["name 9", "name 1", "name 0"]


def test_stl10s_unlabeled_images_are_a_data_set_of_their_own(tmp_path, monkeypatch):
    cls, images = torchvision.datasets.STL10, pixels(3, 96)
    folder = tmp_path / cls.base_folder
    unlabelled = checked(folder / "unlabeled_X.bin", images.transpose(0, 3, 2, 1).tobytes())
    monkeypatch.setattr(cls, "train_list", [unlabelled] * 3)
    monkeypatch.setattr(cls, "test_list", [])
    data = load_dataset("stl10_unlabeled", path=tmp_path, labels=False, test=False)
    np.testing.assert_array_equal(all_images(data.train), images)
    assert (len(data.test), data.classes) == (0, ())
    with pytest.raises(ValueError, match=r"stl10_unlabeled: the train images must have labels; .*eval\.data="):
        load_dataset("stl10_unlabeled", path=tmp_path)


def make_fashion_mnist(root: Path) -> np.ndarray:
    images = pixels(5, 28)[..., 0]
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        n = len(images[rows])
        labels = bytes([7, 0, 9][:n])
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images[rows].tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)
    return images


def test_fashion_mnist_becomes_three_equal_channels(tmp_path):
    images = make_fashion_mnist(tmp_path)
    data = load_dataset("fashion_mnist", path=tmp_path)
    np.testing.assert_array_equal(all_images(data.train), np.repeat(images[:3, :, :, None], 3, axis=3))
    assert [data.classes[label] for label in data.train.labels] == ["Sneaker", "T-shirt/top", "Ankle boot"]


def test_without_a_path_the_files_are_downloaded_into_the_cache_folder(cache, tmp_path, monkeypatch):
    made = tmp_path / "made"
    make_fashion_mnist(made)
    resources = []
    for path in sorted((made / "FashionMNIST" / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (made / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{made.as_uri()}/"])
    with pytest.raises(FileNotFoundError, match=r"fashion_mnist: not in .*download=False"):
        load_dataset("fashion_mnist", download=False)
    assert len(load_dataset("fashion_mnist").train) == 3
    assert sorted(path.name for path in (cache / "downloads").iterdir()) == ["FashionMNIST", "FashionMNIST.lock"]


def test_a_failed_download_says_what_to_do(monkeypatch):
    monkeypatch.setattr(download_module, "WAIT", 0.0)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(OSError, match=r"fashion_mnist: the download failed .*refused.*give data\.path=") as caught:
        load_dataset("fashion_mnist")
    assert "\n" not in str(caught.value)


def test_a_download_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"cifar10: .*file/cache/downloads cannot be written.*set SSL_BENCH_CACHE"):
        load_dataset("cifar10", cache_dir=tmp_path / "file" / "cache")


# ---- the real data


def balanced(data: Dataset, per_class: tuple[int, int]) -> bool:
    counts = (torch.bincount(split.labels, minlength=len(data.classes)) for split in (data.train, data.test))
    return all(bool((count == n).all()) for count, n in zip(counts, per_class, strict=True))


@pytest.mark.slow
def test_all_of_cifar10(shared_data):
    first = load_dataset("cifar10", path=shared_data / "cifar10")
    assert (len(first.train), len(first.test), first.train.image_shape) == (50_000, 10_000, (3, 32, 32))
    assert balanced(first, (5_000, 1_000))
    # The published statistics of the original; a JPEG re-encoding moves them a little.
    np.testing.assert_allclose(first.mean, (0.4914, 0.4822, 0.4465), atol=0.001)
    np.testing.assert_allclose(first.std, (0.2470, 0.2435, 0.2616), atol=0.003)

    again = load_dataset("cifar10", path=shared_data / "cifar10", resident=False)
    assert (again.mean, again.std, again.classes) == (first.mean, first.std, first.classes)
    assert torch.equal(again.train.labels, first.train.labels)
    batches = torch.randperm(50_000).split(10_000)
    for streamed, resident in zip(again.train.batches(batches), first.train.batches(batches), strict=True):
        assert torch.equal(streamed, resident)


@pytest.mark.slow
def test_all_of_tiny_imagenet(shared_data):
    data = load_dataset("tiny_imagenet", path=shared_data / "tiny-imagenet")
    assert (len(data.train), len(data.test), data.train.image_shape) == (100_000, 10_000, (3, 64, 64))
    assert balanced(data, (500, 50))
    assert data.classes[0] == "n01443537"
    again = load_dataset("tiny_imagenet", path=shared_data / "tiny-imagenet")
    indices = torch.randperm(100_000)[:2_000]
    (one,), (other,) = data.train.batches([indices]), again.train.batches([indices])
    assert torch.equal(one, other)
