"""Data sets: one uint8 tensor per split, decoded once, cached on disk, resident on the device or streamed."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ssl_bench.data.bundled import TORCHVISION, locate_digits, locate_torchvision
from ssl_bench.data.cache import CacheUnusable, CacheWriter, MappedImages, default_cache_dir, ensure, read_meta
from ssl_bench.data.decode import Shape, decode_blocks, image_shape
from ssl_bench.data.folders import locate_folder, locate_tiny_imagenet
from ssl_bench.data.parquet import locate_hub, locate_parquet
from ssl_bench.data.raw import Located, RawDataset
from ssl_bench.data.sources import RESIDENT_FRACTION, Part, ResidentSource, Source, StreamingSource
from ssl_bench.runtime.memory import available_memory
from ssl_bench.runtime.suggestion import nearest

__all__ = ["DATASETS", "Dataset", "Source", "hold_out", "holdout_indices", "load_dataset"]

Locate = Callable[[Path | None], Located]  # finds a data set, given data.path

log = logging.getLogger(__name__)

# The built-in data sets and their number of classes; None where only the data can tell.
DATASETS: dict[str, int | None] = {
    "cifar10": 10,
    "cifar100": 100,
    "stl10": 10,
    "fashion_mnist": 10,
    "tiny_imagenet": None,
    "hf": None,
    "folder": None,
    "digits": 10,
}

CLASS_NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "stl10": "airplane bird car cat deer dog horse monkey ship truck",
    "fashion_mnist": "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot",
}

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_CACHE_FORMAT = 1  # part of every cache key: raise it when decoding, the images' order or the files' layout changes


@dataclass(frozen=True)
class Dataset:
    """A data set ready for use.

    Args:
        name: as given to `load_dataset`.
        train, test: the splits.
        classes: the class names, in label order.
        mean, std: per channel over all pixels of the train split, in [0, 1].
    """

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set, with both splits' images for use on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


class _Decoded(NamedTuple):
    splits: dict[str, StreamingSource]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_dataset(
    name: str,
    *,
    locate: Locate | None = None,
    path: str | Path | None = None,
    size: int | None = None,
    resident: bool | Literal["auto"] = "auto",
    workers: int = 2,
    cache_dir: str | Path | None = None,
    hf_config: str | None = None,
    download: bool = True,
) -> Dataset:
    """Loads a data set; the first time it is decoded and cached on disk, afterwards it opens in milliseconds.

    Args:
        name: one of DATASETS; any name with `locate`.
        locate: finds a foreign data set, see `ssl_bench.data.raw`; None for a built-in one.
        path: where the data is; a foreign data set decides what it means. For a named set a folder of Hugging Face
            parquet files (train-*.parquet and test-, val-, valid- or validation-*.parquet), or what torchvision keeps,
            or Tiny ImageNet's archive unpacked; None downloads what torchvision can download. For "folder" the folder
            with train/ and test/; for "hf" a hub id or a folder. "digits" takes none.
        size: pixels of the square images, > 0: the shorter side is resized to it (antialiased) and the centre kept.
            None keeps the images' own size, which must then be the same for all.
        resident: True keeps each split as one tensor, memory-mapped until `Source.to` moves it; False streams batches
            from disk with a DataLoader; "auto" streams a data set larger than half of the free memory.
        workers: reading processes of a streaming loader, >= 0.
        cache_dir: where decoded data sets (and downloads) are kept; None is $SSL_BENCH_CACHE, else ~/.cache/ssl_bench.
            Safe under several processes: one decodes, the others wait.
        hf_config: the hub data set's configuration, for "hf" only; None is its only one.
        download: False refuses to download.

    Raises:
        ValueError: an unknown name or a bad argument; a damaged or inconsistent file or image, by its name. Nothing
            half-decoded is left in the cache.
        FileNotFoundError: the path, a split or a file is missing.
        OSError: a download failed, or a set larger than memory cannot be cached.
    """
    _check_arguments(name, locate, path, size, resident, workers, hf_config)
    directory = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    if locate is None:
        located = _locate(name, path, directory, hf_config, download)
    else:
        located = locate(None if path is None else Path(path).expanduser().resolve())
        if not isinstance(located, Located):
            raise ValueError(f"data {name}: its function must return a Located, got {type(located).__name__}")
    if located.files:
        decoded = _open(name, size, directory, located)
    else:
        raw = _read(name, located)
        decoded = _decode_to_memory(name, raw, size, image_shape(raw.train, size))
    n_bytes = sum(math.prod(part.images.shape) for part in decoded.splits.values())
    keep = n_bytes <= RESIDENT_FRACTION * available_memory() if resident == "auto" else resident
    sources: dict[str, Source] = {}
    for split, part in decoded.splits.items():
        streaming = replace(part, workers=workers)
        images = part.images.tensor() if isinstance(part.images, MappedImages) else part.images
        otherwise = streaming if resident == "auto" else None
        sources[split] = ResidentSource(images, part.labels, otherwise) if keep else streaming
    return Dataset(name, sources["train"], sources["test"], decoded.classes, decoded.mean, decoded.std)


def _check_arguments(
    name: str,
    locate: Locate | None,
    path: str | Path | None,
    size: int | None,
    resident: Any,
    workers: int,
    hf_config: str | None,
) -> None:
    if locate is None and name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}{nearest(str(name), DATASETS)} (known: {', '.join(DATASETS)})")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"data {name}: size must be a whole number of pixels >= 1 or None, got {size!r}")
    if resident not in (True, False, "auto"):
        raise ValueError(f"data {name}: resident must be True, False or 'auto', got {resident!r}")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"data {name}: workers must be a whole number >= 0, got {workers!r}")
    if hf_config is not None and name != "hf":
        raise ValueError(f"data {name}: hf_config must be None (it is for data=hf), got {hf_config!r}")
    if locate is None and path is not None and name == "digits":
        raise ValueError(f"data digits: path must be None (scikit-learn holds the images), got {str(path)!r}")
    if locate is None and path is None and name in ("hf", "folder", "tiny_imagenet"):
        raise ValueError(f"data {name}: path must be given (data.path=...), got None")


def _locate(name: str, path: str | Path | None, directory: Path, hf_config: str | None, download: bool) -> Located:
    if name == "digits":
        return locate_digits()
    if path is None:
        return _download(name, directory / "downloads", download)
    folder = Path(path).expanduser().resolve()
    if name == "hf" and not folder.exists() and _HUB_ID.fullmatch(str(path)):
        return locate_hub(str(path), hf_config)
    if not folder.is_dir():
        raise FileNotFoundError(f"data {name}: path must be a directory, got {str(path)!r}")
    if name == "folder":
        return locate_folder(folder)
    if found := locate_parquet(folder):
        return found
    if name == "hf":
        return locate_hub(str(folder), hf_config)
    if name == "tiny_imagenet":
        return locate_tiny_imagenet(folder)
    if found := locate_torchvision(name, folder, download=False):
        return found
    expected = f"train-*.parquet or {TORCHVISION[name].folder}"
    raise FileNotFoundError(f"data {name}: path must hold {expected}, got {str(path)!r}")


def _download(name: str, root: Path, download: bool) -> Located:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            found = locate_torchvision(name, root, download)
    except OSError as error:
        if error.errno is None:  # from the download, whose message says what to do
            raise
        raise OSError(f"data {name}: {root} cannot be written ({error.strerror}); set SSL_BENCH_CACHE") from error
    if found is None:
        raise FileNotFoundError(f"data {name}: not in {root}, and download=False; give data.path=")
    return found


def _read(name: str, located: Located) -> RawDataset:
    """Reads and checks everything but the images."""
    raw = located.read()
    for split, part in raw.splits.items():
        if len(part) == 0:
            raise ValueError(f"data {name}: the {split} split is empty")
    n_classes, classes = DATASETS.get(name), raw.classes
    if n_classes is not None and classes is not None and len(classes) != n_classes:
        raise ValueError(f"data {name}: the files must name {n_classes} classes, got {len(classes)}")
    if classes is None:
        known = CLASS_NAMES.get(name, "").split()
        n_classes = n_classes or int(raw.train.labels.max()) + 1
        classes = tuple(known) if known else tuple(str(label) for label in range(n_classes))
    for split, part in raw.splits.items():
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
        if len(wrong):
            raise ValueError(
                f"data {name}: {part.describe(int(wrong[0]))}: labels of the {split} split must be 0 to "
                f"{len(classes) - 1}, got {part.labels[wrong[0]]}"
            )
    return RawDataset(raw.train, raw.test, classes)


class _PixelStatistics:
    """Exact mean and standard deviation per channel, from a histogram of the 256 pixel values."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, block: np.ndarray) -> np.ndarray:
        for channel in range(3):
            self.counts[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
        return block

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values, total = np.arange(256) / 255, self.counts.sum(axis=1)
        mean = self.counts @ values / total
        variance = (self.counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
        if not variance.all():
            raise ValueError(f"{self.where}: all pixels of the train split are equal in channel {variance.argmin()}")
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _decode_to_memory(name: str, raw: RawDataset, size: int | None, shape: Shape) -> _Decoded:
    statistics, splits = _PixelStatistics(f"data {name}"), {}
    for split, part in raw.splits.items():
        images, start = torch.empty((len(part), *shape), dtype=torch.uint8), 0
        for block in decode_blocks(part, size, shape):
            images[start : start + len(block)] = torch.from_numpy(statistics.add(block) if split == "train" else block)
            start += len(block)
        splits[split] = StreamingSource(images, torch.from_numpy(part.labels))
    return _Decoded(splits, raw.classes or (), *statistics.mean_std())


def _decode_to_disk(writer: CacheWriter, name: str, raw: RawDataset, size: int | None, shape: Shape) -> None:
    statistics = _PixelStatistics(f"data {name}")
    for split, part in raw.splits.items():
        blocks = decode_blocks(part, size, shape)
        writer.write_blocks(f"{split}.images", map(statistics.add, blocks) if split == "train" else blocks)
        writer.write_blocks(f"{split}.labels", [part.labels])
    mean, std = statistics.mean_std()
    counts = {split: len(part) for split, part in raw.splits.items()}
    writer.write_meta({"shape": shape, "counts": counts, "classes": raw.classes, "mean": mean, "std": std})


def _open_cached(folder: Path) -> _Decoded:
    meta = read_meta(folder)
    if meta is None:
        raise OSError(f"{folder}: the cached data set vanished while it was opened")
    splits = {}
    for split, count in meta["counts"].items():
        channels, height, width = meta["shape"]
        labels = torch.from_numpy(np.fromfile(folder / f"{split}.labels", dtype=np.int64))
        splits[split] = StreamingSource(
            MappedImages(folder / f"{split}.images", (count, channels, height, width)), labels
        )
    return _Decoded(splits, tuple(meta["classes"]), tuple(meta["mean"]), tuple(meta["std"]))


def _open(name: str, size: int | None, directory: Path, located: Located) -> _Decoded:
    """The data set from the cache, decoded into it first if needed; decoded into memory if the cache is unusable."""
    identity: Sequence[Any] = (_CACHE_FORMAT, size, located.files)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    key = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{digest}"

    @cache
    def prepare() -> tuple[RawDataset, Shape]:
        raw = _read(name, located)
        return raw, image_shape(raw.train, size)

    def n_bytes() -> int:
        raw, shape = prepare()
        return len(raw) * math.prod(shape)

    def build(writer: CacheWriter) -> None:
        raw, shape = prepare()
        log.info("data %s: decoding %d images into %s, once", name, len(raw), directory)
        _decode_to_disk(writer, name, raw, size, shape)

    try:
        return _open_cached(ensure(directory, key, n_bytes, build))
    except CacheUnusable as error:
        needed, free = n_bytes(), available_memory()
        if needed > RESIDENT_FRACTION * free:
            raise OSError(
                f"data {name}: {needed / 2**30:.2f} GiB decoded fit neither into memory ({free / 2**30:.2f} GiB free) "
                f"nor into the cache ({error}); set SSL_BENCH_CACHE to a disk with room, or a smaller size"
            ) from error
        log.warning("data %s: not cached on disk (%s), decoding it into memory each time", name, error)
        raw, shape = prepare()
        return _decode_to_memory(name, raw, size, shape)


def holdout_indices(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Splits a train set class by class; depends on nothing but the arguments.

    Args:
        labels: (N,) int64.
        fraction: the share of each class to hold out, in (0, 1), rounded; a class of one image is never held out.

    Returns:
        the (n,) sorted indices to train on and the (N - n,) sorted indices held out, int64, on the CPU.

    Raises:
        ValueError: the fraction is out of range.
    """
    from ssl_bench.eval.linear import holdout  # the split of linear-cached-v1, which never changes

    if not 0 < fraction < 1:
        raise ValueError(f"data.holdout must be between 0 and 1, got {fraction}")
    return holdout(labels, fraction)


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """Replaces the test split by a part of the train split, so that hyper-parameters are chosen without test images.

    Args:
        dataset: its test images are left unread.
        fraction: see `holdout_indices`.
    """
    kept, held = holdout_indices(dataset.train.labels, fraction)
    return replace(dataset, train=Part(dataset.train, kept), test=Part(dataset.train, held))
