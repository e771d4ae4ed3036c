"""Data sets that come with a library: torchvision's downloads, and scikit-learn's handwritten digits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.data.download import DownloadError, RemoteFile, download
from ssl_bench.data.folders import scan
from ssl_bench.data.raw import Located, RawDataset, RawSplit

_OFFLINE = (
    "without a network, give data.path= a folder of Hugging Face parquet files or torchvision's own files; "
    "ssl-bench data clear NAME --downloads removes what is damaged"
)
DIGITS_SIZE = 32
DIGITS_TEST_EVERY = 5


@dataclass(frozen=True)
class TorchvisionSet:
    """Where torchvision keeps a data set, and how its class selects a split.

    Args:
        class_name: the class in torchvision.datasets.
        folder: what it creates below its root.
        labels: the attribute that holds the labels.
        archive_has_folder: whether the archives hold that folder, or only what lies in it.
        train, test: the keywords that select a split; None where there is no test split.
    """

    class_name: str
    folder: str
    labels: str
    train: Mapping[str, Any]
    test: Mapping[str, Any] | None
    archive_has_folder: bool = True


_BY_FLAG: dict[str, Any] = {"train": {"train": True}, "test": {"train": False}}

TORCHVISION = {
    "cifar10": TorchvisionSet("CIFAR10", "cifar-10-batches-py", "targets", **_BY_FLAG),
    "cifar100": TorchvisionSet("CIFAR100", "cifar-100-python", "targets", **_BY_FLAG),
    "fashion_mnist": TorchvisionSet(
        "FashionMNIST", "FashionMNIST/raw", "targets", **_BY_FLAG, archive_has_folder=False
    ),
    "stl10": TorchvisionSet("STL10", "stl10_binary", "labels", {"split": "train"}, {"split": "test"}),
    # The 100,000 images without labels; `eval.data=stl10` evaluates on the labelled ones.
    "stl10_unlabeled": TorchvisionSet("STL10", "stl10_binary", "labels", {"split": "unlabeled"}, None),
}


def locate_torchvision(name: str, root: Path, download_missing: bool) -> Located | None:
    """Finds a data set in the folder where torchvision's class of that name keeps it.

    Args:
        name: a key of TORCHVISION.
        root: torchvision's root folder.
        download_missing: whether to download what is missing; False returns None then.

    Raises:
        OSError: the download failed, or `root` cannot be written.
    """
    source = TORCHVISION[name]
    folder = root / source.folder
    if not folder.is_dir():
        if not download_missing:
            return None
        try:
            download(_remote_files(name), root, source.folder, inside=source.archive_has_folder)
        except DownloadError as error:
            raise OSError(f"data {name}: the download failed ({error}); {_OFFLINE}") from error
    return Located(tuple(sorted(scan(folder))), partial(_read_torchvision, name, root))


def _remote_files(name: str) -> list[RemoteFile]:
    """Where torchvision's class gets a data set from."""
    import torchvision.datasets

    found: Any = getattr(torchvision.datasets, TORCHVISION[name].class_name)
    if hasattr(found, "resources"):
        return [RemoteFile([mirror + file for mirror in found.mirrors], file, md5) for file, md5 in found.resources]
    return [RemoteFile([found.url], found.filename, found.tgz_md5)]


def _read_torchvision(name: str, root: Path) -> RawDataset:
    import torchvision.datasets  # takes a second, and is not needed once a decoded copy is cached

    source = TORCHVISION[name]
    create: Callable[..., Any] = getattr(torchvision.datasets, source.class_name)
    try:
        splits = [split for split in (source.train, source.test) if split is not None]
        train, *tests = (create(str(root), **split) for split in splits)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"data {name}: {root / source.folder} is not whole or damaged ({reason}); {_OFFLINE}") from error
    classes = getattr(train, "classes", None)
    read, *rest = (
        _array_split(part.data, getattr(part, source.labels), f"{name} {split}")
        for split, part in zip(("train", "test"), (train, *tests), strict=False)
    )
    return RawDataset(read, rest[0] if rest else None, tuple(classes) if classes else None)


def _array_split(images: Any, labels: Any, where: str) -> RawSplit:
    """A split of pixels (N, H, W), (N, H, W, 3) or (N, 3, H, W)."""
    pixels = np.asarray(images)
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = np.asarray(labels, dtype=np.int64)
    return RawSplit(labels, lambda: map(np.ascontiguousarray, pixels), lambda index: f"{where} row {index}")


def _read_digits() -> RawDataset:
    import torch
    from sklearn.datasets import load_digits
    from torch.nn.functional import interpolate

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8).float() * (255 / 16)
    pixels = interpolate(pixels, (DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    rows = pixels[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[DIGITS_TEST_EVERY - 1 :: DIGITS_TEST_EVERY]] = True
    return RawDataset(
        _array_split(rows[~is_test], labels[~is_test], "digits train"),
        _array_split(rows[is_test], labels[is_test], "digits test"),
        tuple(str(label) for label in range(10)),
    )


def locate_digits() -> Located:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), upscaled bilinearly to 32x32, as three channels.

    The split is fixed and stratified: of each class, in the data set's order, every fifth image is a test image (1,442
    train, 355 test).
    """
    return Located((), _read_digits)
