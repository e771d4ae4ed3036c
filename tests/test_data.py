"""Loading data sets: every layout, every kind of image, and what bad input gets."""

import pickle
import re
import struct
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from made_data import encode, parquet_set, pixels, tiny_archive, write_images, write_parquet
from PIL import Image
from torchvision.transforms.v2.functional import resize

from ssl_bench.data import DATASETS, Dataset, load_dataset
from ssl_bench.sources import Source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSL_BENCH_CACHE", str(folder))
    return folder


def all_images(source: Source) -> np.ndarray:
    """(N, H, W, 3) of a whole split."""
    (batch,) = source.batches([torch.arange(len(source))])
    assert batch.dtype == torch.uint8
    assert batch.shape[1:] == source.image_shape
    return batch.permute(0, 2, 3, 1).numpy()


def one_parquet(folder: Path, images: list[bytes], labels: list[int] | None = None, **options: object) -> Path:
    labels = list(range(len(images))) if labels is None else labels
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", images, labels, **options)
    return folder


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
    assert len(data.classes) == 100


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
    assert data.train.labels.tolist() == [3, 1, 2, 9]
    assert data.classes[3] == "class 3"


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
    assert data.train.labels.tolist() == [9, 1, 0]
    assert data.classes[9] == "name 9"


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
    assert data.train.labels.tolist() == [7, 0, 9]
    assert len(data.classes) == 10


def test_without_a_path_torchvision_downloads_into_the_cache_folder(cache, monkeypatch):
    cls = torchvision.datasets.FashionMNIST
    downloads = []

    def download(self) -> None:
        if not self._check_exists():
            downloads.append(self.root)
            make_fashion_mnist(Path(self.root))

    monkeypatch.setattr(cls, "download", download)
    with pytest.raises(FileNotFoundError, match=r"fashion_mnist: not in .*download=False"):
        load_dataset("fashion_mnist", download=False)
    assert len(load_dataset("fashion_mnist").train) == 3
    assert downloads == [str(cache / "downloads")]


def test_a_failed_download_says_what_to_do(monkeypatch):
    def download(_self) -> None:
        raise RuntimeError("Error downloading\nname resolution failed")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    with pytest.raises(OSError, match=r"fashion_mnist: .*name resolution failed.*give data\.path=") as caught:
        load_dataset("fashion_mnist")
    assert "\n" not in str(caught.value)


# ---- images


@pytest.mark.parametrize("kind", ["grey jpeg", "cmyk jpeg", "rgba png", "palette png", "grey-alpha png", "jpeg"])
def test_every_kind_of_image_becomes_rgb(tmp_path, kind):
    """An image of one orange (or its grey), in each mode; a palette with transparency is what Pillow warns of."""
    orange = Image.new("RGB", (8, 8), (240, 120, 30))
    grey = 120
    palette = orange.quantize(4)
    data, expected = {
        "jpeg": (encode(orange, "JPEG", quality=95), (240, 120, 30)),
        "grey jpeg": (encode(Image.new("L", (8, 8), grey), "JPEG"), (grey,) * 3),
        "cmyk jpeg": (encode(orange.convert("CMYK"), "JPEG", quality=95), (240, 120, 30)),
        "rgba png": (encode(orange.convert("RGBA")), (240, 120, 30)),
        "palette png": (encode(palette, transparency=b"\x80\xff\xff\xff"), (240, 120, 30)),
        "grey-alpha png": (encode(Image.new("LA", (8, 8), (grey, 9))), (grey,) * 3),
    }[kind]
    one_parquet(tmp_path, [encode(pixels(1)[0]), data])
    image = all_images(load_dataset("hf", path=tmp_path).train)[1]
    np.testing.assert_allclose(image.astype(int), [[expected] * 8] * 8, atol=3)


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = pixels(1, 30)[0][:10]  # 10 high, 30 wide; its transpose is the other way round
    one_parquet(tmp_path, [encode(wide), encode(wide.transpose(1, 0, 2)), encode(pixels(1, 12)[0])])
    images = all_images(load_dataset("hf", path=tmp_path, size=5).train)
    assert images.shape == (3, 5, 5, 3)
    np.testing.assert_array_equal(images[0], images[1].transpose(1, 0, 2))
    whole = resize(torch.from_numpy(wide).permute(2, 0, 1), [5, 15], antialias=True).permute(1, 2, 0)
    np.testing.assert_allclose(images[0].astype(int), whole[:, 5:10].numpy().astype(int), atol=1)


def test_resizing_is_antialiased_as_torchvision_does_it(tmp_path):
    images = pixels(2, 40)
    one_parquet(tmp_path, [encode(image) for image in images])
    ours = all_images(load_dataset("hf", path=tmp_path, size=16).train)
    theirs = resize(torch.from_numpy(images).permute(0, 3, 1, 2), [16, 16], antialias=True).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.astype(int), theirs.numpy().astype(int), atol=1)


def test_mean_and_std_are_those_of_all_train_pixels(tmp_path):
    train, _ = parquet_set(tmp_path)
    data = load_dataset("cifar10", path=tmp_path)
    np.testing.assert_allclose(data.mean, (train / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (train / 255).std(axis=(0, 1, 2)), rtol=1e-12)


# ---- bad input


def refused(error: type[Exception], message: str, name: str = "hf", **arguments: object) -> None:
    """Asserts a one-line error and that the cache holds nothing of the data set."""
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar", {}, "unknown name 'cifar'; known: cifar10, .*did you mean cifar10?"),
        ("cifar10", {"size": 0}, "size must be a whole number of pixels >= 1 or None, got 0"),
        ("cifar10", {"resident": "yes"}, "resident must be True, False or 'auto', got 'yes'"),
        ("cifar10", {"workers": -1}, "workers must be a whole number >= 0, got -1"),
        ("cifar10", {"hf_config": "x"}, "hf_config is for data=hf only, got 'x'"),
        ("digits", {"path": "x"}, "digits: takes no path.*got 'x'"),
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
    refused(FileNotFoundError, r"no test split beside train.*allowed test-\*\.parquet, val-", path=tmp_path)


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
        ValueError, rf"train\.parquet row \d: label {got} is out of range.*allowed 0 to 9", "cifar10", path=tmp_path
    )


def test_labels_that_are_no_integers_are_refused(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], ["cat", "dog"])
    refused(ValueError, r"column label must hold integers in every row, got string", path=tmp_path)


def test_missing_columns_are_listed(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], columns=("picture", "label"))
    refused(ValueError, "no image column; got columns picture, label, allowed image, img", path=tmp_path)


def test_an_image_without_bytes_is_named(tmp_path):
    one_parquet(tmp_path, [encode(pixels(1)[0]), None])
    refused(ValueError, r"train\.parquet row 1: the image has no bytes", path=tmp_path)


def test_an_empty_split_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encode(pixels(1)[0])], [0])
    write_parquet(tmp_path / "test.parquet", [], np.empty(0, dtype=np.int64))
    refused(ValueError, "the test split is empty", path=tmp_path)


def test_another_data_set_at_the_path_is_refused(tmp_path):
    one_parquet(tmp_path, [encode(image) for image in pixels(2)], names=("a", "b"))
    refused(ValueError, "the files name 2 classes, cifar10 has 10", "cifar10", path=tmp_path)


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
    refused(ValueError, r"val_annotations\.txt line 3: class 'n77' is not among the 3", "tiny_imagenet", path=tmp_path)
    annotations.write_text(lines)
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    refused(FileNotFoundError, r"val_1\.JPEG: missing, though val_annotations", "tiny_imagenet", path=tmp_path)


def test_a_class_folder_without_images_or_only_in_test_is_named(tmp_path):
    write_images(tmp_path / "train" / "cat", pixels(1))
    (tmp_path / "train" / "dog").mkdir()
    write_images(tmp_path / "test" / "cow", pixels(1))
    refused(ValueError, "dog: a class without images", "folder", path=tmp_path)
    write_images(tmp_path / "train" / "dog", pixels(1))
    refused(ValueError, "cow: a class that the train split lacks", "folder", path=tmp_path)


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
