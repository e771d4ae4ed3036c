"""Data sets: one uint8 tensor per split, decoded once, cached on disk, resident on the device or streamed."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_bench.data.bundled import TORCHVISION, locate_digits, locate_torchvision
from ssl_bench.data.cache import DOWNLOADS, CacheUnusable, MappedImages, locked
from ssl_bench.data.content import content_digest
from ssl_bench.data.decoded import cached_labels, decode_to_memory, open_decoded
from ssl_bench.data.folders import TEST_NAMES, locate_folder, locate_tiny_imagenet
from ssl_bench.data.parquet import is_saved, locate_hub, locate_parquet, locate_saved
from ssl_bench.data.raw import Located, RawDataset
from ssl_bench.data.shards import locate_shards
from ssl_bench.data.sources import RESIDENT_FRACTION, Part, ResidentSource, Source, StreamingSource
from ssl_bench.runtime.distributed import rank
from ssl_bench.runtime.memory import available_memory
from ssl_bench.runtime.paths import cache_folder
from ssl_bench.runtime.suggestion import nearest

__all__ = ["DATASETS", "Dataset", "Source", "data_content", "hold_out", "holdout_indices", "load_dataset"]

Locate = Callable[[Path | None], Located]  # finds a data set, given data.path

log = logging.getLogger(__name__)

# The built-in data sets and their number of classes; None where only the data can tell.
DATASETS: dict[str, int | None] = {
    "cifar10": 10,
    "cifar100": 100,
    "stl10": 10,
    "stl10_unlabeled": None,
    "fashion_mnist": 10,
    "tiny_imagenet": None,
    "hf": None,
    "folder": None,
    "webdataset": None,
    "digits": 10,
}

# Where each comes from, for `ssl-bench data list`.
SOURCES = {
    "cifar10": "50,000 and 10,000 images of 32 pixels, 10 classes; downloaded, or data.path",
    "cifar100": "50,000 and 10,000 images of 32 pixels, 100 classes; downloaded, or data.path",
    "stl10": "5,000 and 8,000 images of 96 pixels, 10 classes; downloaded, or data.path",
    "stl10_unlabeled": "100,000 images of 96 pixels without labels; as stl10",
    "fashion_mnist": "60,000 and 10,000 grey images of 28 pixels, 10 classes; downloaded, or data.path",
    "tiny_imagenet": "100,000 and 10,000 images of 64 pixels, 200 classes; data.path",
    "hf": "a Hugging Face hub id, or a folder of parquet files: data.path",
    "folder": "class folders, or images without labels: data.path",
    "webdataset": "WebDataset shards, train-*.tar and val-*.tar: data.path",
    "digits": "1,442 and 355 handwritten digits of 32 pixels, 10 classes; embedded",
}

CLASS_NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "stl10": "airplane bird car cat deer dog horse monkey ship truck",
    "fashion_mnist": "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot",
}

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
NO_LABELS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Dataset:
    """A data set ready for use.

    Args:
        name: as given to `load_dataset`.
        train, test: the splits; test is empty where there is none.
        classes: the names of the classes that the train split has, in label order; none without labels.
        mean, std: per channel over all pixels of the train split, in [0, 1].
        digest: 16 hex digits, equal if and only if all images and labels are.
        content: 16 hex digits of the files, see `ssl_bench.data.content`; "" for a data set without files.
    """

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str = ""
    content: str = ""

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set, with both splits' images for use on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


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
    content: str | None = None,
    labels: bool | str = True,
    test: bool = True,
    download: bool = True,
) -> Dataset:
    """Loads a data set; the first time it is decoded and cached on disk, afterwards it opens in milliseconds.

    Args:
        name: one of DATASETS; any name with `locate`.
        locate: finds a foreign data set, see `ssl_bench.data.raw`; None for a built-in one.
        path: where the data is; a foreign data set decides what it means. For a named set a folder of Hugging Face
            parquet files (train-*.parquet and test-, val-, valid- or validation-*.parquet), or what torchvision keeps,
            or Tiny ImageNet's archive unpacked; None downloads what torchvision can download. For "folder" the folder
            with train/ and test/, or of images; for "webdataset" one of .tar files; for "hf" a hub id or a folder.
            "digits" takes none.
        size: pixels of the square images, > 0: the shorter side is resized to it (antialiased) and the centre kept.
            None keeps the images' own size, which must then be the same for all.
        resident: True keeps each split as one tensor, memory-mapped until `Source.to` moves it; False streams batches
            from disk; "auto" streams a data set larger than half of the free memory.
        workers: reading threads of a streamed split, >= 0.
        cache_dir: where decoded data sets (and downloads) are kept; None is $SSL_BENCH_CACHE, else ~/.cache/ssl_bench.
            Safe under several processes: one decodes, the others wait.
        hf_config: the data set's configuration, for "hf" only; None is its only one.
        content: what `data_content` gave for this data set; None accepts any.
        labels: whether the train images must have labels; what needs them, for the error.
        test: whether there must be a test split.
        download: False refuses to download.

    Raises:
        ValueError: an unknown name or a bad argument; a damaged or inconsistent file or image, by its name. Nothing
            half-decoded is left in the cache.
        FileNotFoundError: the path, a split or a file is missing.
        OSError: a download failed, or a set larger than memory cannot be cached.
        Stopped: a signal asked this process to stop; what is decoded already stays.
    """
    _check_arguments(name, locate, path, size, resident, workers, hf_config)
    directory, located = _found(name, locate, path, cache_dir, hf_config, download)
    read = partial(_read, name, located, labels, test)
    if located.files:
        decoded = open_decoded(name, size, directory, located.files, read)
    else:
        decoded = decode_to_memory(name, read(), size)
    meta = decoded.meta
    _check_needs(name, bool(meta.classes), "test" in meta.counts, labels, test, meta.notes)
    found = content_digest(located.files, [each.numpy() for each in decoded.labels.values()]) if located.files else ""
    if content is not None and content != found:
        raise ValueError(f"data.content must be {content}, as in the run's recipe, got {found} at {path or 'no path'}")
    if rank() == 0:
        for note in meta.notes:
            log.warning("data %s: %s", name, note)
    keep = decoded.n_bytes <= RESIDENT_FRACTION * available_memory() if resident == "auto" else resident
    sources: dict[str, Source] = {"test": ResidentSource(torch.empty((0, *meta.shape), dtype=torch.uint8), NO_LABELS)}
    for split, images in decoded.images.items():
        streaming = StreamingSource(images, decoded.labels[split], workers=workers)
        tensor = images.tensor() if isinstance(images, MappedImages) else images
        otherwise = streaming if resident == "auto" else None
        sources[split] = ResidentSource(tensor, decoded.labels[split], otherwise) if keep else streaming
    return Dataset(
        name, sources["train"], sources["test"], tuple(meta.classes), meta.mean, meta.std, meta.digest(), found
    )


def data_content(
    name: str,
    *,
    locate: Locate | None = None,
    path: str | Path | None = None,
    size: int | None = None,
    cache_dir: str | Path | None = None,
    hf_config: str | None = None,
) -> str | None:
    """16 hex digits that say which data lies at a path, wherever that is; None for a data set without files.

    Args:
        name, locate, path, size, cache_dir, hf_config: as for `load_dataset`.

    Raises:
        ValueError, FileNotFoundError: as `load_dataset`, before any image is read.
    """
    _check_arguments(name, locate, path, size, "auto", 0, hf_config)
    directory, located = _found(name, locate, path, cache_dir, hf_config, download=True)
    if not located.files:
        return None
    labels = cached_labels(name, size, directory, located.files)
    if labels is None:
        labels = [part.labels for part in _read(name, located, labels=False, test=False).splits.values()]
    return content_digest(located.files, labels)


def _found(
    name: str, locate: Locate | None, path: Any, cache_dir: Any, hf_config: str | None, download: bool
) -> tuple[Path, Located]:
    """The cache's folder, and the data set's files."""
    directory = cache_folder(cache_dir)
    if locate is None:
        located = _locate(name, path, directory, hf_config, download)
    else:
        located = locate(None if path is None else Path(path).expanduser().resolve())
        if not isinstance(located, Located):
            raise ValueError(f"data {name}: its function must return a Located, got {type(located).__name__}")
    return directory, located


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
    if locate is None and path is None and name in ("hf", "folder", "webdataset", "tiny_imagenet"):
        raise ValueError(f"data {name}: path must be given (data.path=...), got None")


def _locate(name: str, path: str | Path | None, directory: Path, hf_config: str | None, download: bool) -> Located:
    if name == "digits":
        return locate_digits()
    if path is None:
        return _download(name, directory / DOWNLOADS, download)
    folder = Path(path).expanduser().resolve()
    if name == "hf" and not folder.exists() and _HUB_ID.fullmatch(str(path)):
        return locate_hub(str(path), hf_config)
    if not folder.is_dir():
        raise FileNotFoundError(f"data {name}: path must be a directory, got {str(path)!r}")
    if name == "folder":
        return locate_folder(folder)
    if name == "webdataset":
        return locate_shards(folder)
    if is_saved(folder):
        return locate_saved(folder)
    if found := locate_parquet(folder, hf_config):
        return found
    if name == "hf":
        return locate_hub(str(folder), hf_config)
    if name == "tiny_imagenet":
        return locate_tiny_imagenet(folder)
    if found := locate_torchvision(name, folder, download_missing=False):
        return found
    expected = f"train-*.parquet or {TORCHVISION[name].folder}"
    raise FileNotFoundError(f"data {name}: path must hold {expected}, got {str(path)!r}")


def _download(name: str, root: Path, download: bool) -> Located:
    try:
        with locked(root, TORCHVISION[name].class_name):
            found = locate_torchvision(name, root, download)
    except CacheUnusable as error:
        raise OSError(f"data {name}: {root} cannot be written ({error}); set SSL_BENCH_CACHE") from error
    except OSError as error:
        if error.errno is None:  # from the download, whose message says what to do
            raise
        raise OSError(f"data {name}: {root} cannot be written ({error.strerror}); set SSL_BENCH_CACHE") from error
    if found is None:
        raise FileNotFoundError(f"data {name}: not in {root}, and download=False; give data.path=")
    return found


def _read(name: str, located: Located, labels: bool | str, test: bool) -> RawDataset:
    """Reads and checks everything but the images; `labels` and `test` say what must be there."""
    raw = located.read()
    for split, part in raw.splits.items():
        if len(part) == 0:
            raise ValueError(f"data {name}: the {split} split is empty")
    if not raw.train.labelled:
        raw = RawDataset(raw.train, None, (), raw.notes)
    _check_needs(name, raw.train.labelled, raw.test is not None, labels, test, raw.notes)
    return _present(name, raw) if raw.train.labelled else raw


def _check_needs(
    name: str, has_labels: bool, has_test: bool, labels: bool | str, test: bool, notes: Sequence[str]
) -> None:
    """Refuses a data set without what the run needs, before any image is read."""
    instead = "give eval=none, or eval.data= a data set to evaluate on"
    if labels and not has_labels:
        reason = f" ({'; '.join(notes)})" if notes else ""
        needed = f" for {labels}" if isinstance(labels, str) else ""
        raise ValueError(f"data {name}: the train images must have labels{needed}{reason}; {instead}")
    if test and not has_test:
        raise FileNotFoundError(
            f"data {name}: no test split beside train, which must be named {' or '.join(TEST_NAMES)} and have labels; "
            f"{instead}, or data.holdout=0.1"
        )


def _present(name: str, raw: RawDataset) -> RawDataset:
    """Numbers the classes that the train split has from 0 on, so that chance is counted over them.

    Raises:
        ValueError: a label out of range, or a test image of a class that the train split lacks.
    """
    n_classes, classes, train = DATASETS.get(name), raw.classes, raw.train.labels
    if n_classes is not None and classes is not None and len(classes) != n_classes:
        raise ValueError(f"data {name}: the files must name {n_classes} classes, got {len(classes)}")
    if classes is None and n_classes is not None:
        known = CLASS_NAMES.get(name, "").split()
        classes = tuple(known) if known else tuple(str(label) for label in range(n_classes))
    highest = len(classes) - 1 if classes is not None else max(int(part.labels.max()) for part in raw.splits.values())
    for split, part in raw.splits.items():
        wrong = np.flatnonzero((part.labels < 0) | (part.labels > highest))
        if len(wrong):
            raise ValueError(
                f"data {name}: {part.describe(int(wrong[0]))}: labels of the {split} split must be 0 to {highest}, "
                f"got {part.labels[wrong[0]]}"
            )
    present = np.unique(train)
    names = tuple(str(label) if classes is None else classes[label] for label in present.tolist())
    if len(present) == highest + 1:
        return replace(raw, classes=names)
    splits = {}
    for split, part in raw.splits.items():
        places = np.searchsorted(present, part.labels).clip(max=len(present) - 1)
        wrong = np.flatnonzero(present[places] != part.labels)
        if len(wrong):
            label = int(part.labels[wrong[0]])
            raise ValueError(
                f"data {name}: {part.describe(int(wrong[0]))}: class must be one that the train split has, got "
                f"{label if classes is None else classes[label]!r}"
            )
        splits[split] = replace(part, labels=places)
    first = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    note = f"{len(names)} of {highest + 1} classes have images, which are numbered 0 to {len(names) - 1} ({first})"
    return RawDataset(splits["train"], splits.get("test"), names, (*raw.notes, note))


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
