"""A data set after decoding: in the cache, where it is decoded once, or in memory where there is no room for it."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from ssl_bench.data.cache import (
    CacheUnusable,
    CacheWriter,
    MappedImages,
    Meta,
    check_some,
    digest_of,
    ensure,
    read_meta,
)
from ssl_bench.data.decode import Shape, decode_blocks, image_shape
from ssl_bench.data.raw import Files, RawDataset
from ssl_bench.data.sources import RESIDENT_FRACTION
from ssl_bench.runtime.console import Tally, say
from ssl_bench.runtime.memory import available_memory
from ssl_bench.runtime.paths import file_name

log = logging.getLogger(__name__)

# Part of every cache key: raise it when decoding, the images' order or the files' layout changes.
_CACHE_FORMAT = 2
_WRITER = f"pillow {PIL.__version__}"


@dataclass(frozen=True)
class Decoded:
    """Images and labels of the splits there are.

    Args:
        images: by split, (N, 3, H, W) uint8.
        labels: by split, (N,) int64.
        meta: what is known of them.
    """

    images: dict[str, MappedImages | Tensor]
    labels: dict[str, Tensor]
    meta: Meta

    @property
    def n_bytes(self) -> int:
        """The size of all images."""
        return sum(math.prod(images.shape) for images in self.images.values())


class _PixelStatistics:
    """Exact mean and standard deviation per channel, from a histogram of the 256 pixel values."""

    def __init__(self, where: str, shape: Shape) -> None:
        self.where, self.shape = where, shape
        self.counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, block: np.ndarray) -> None:
        block = block.reshape(-1, *self.shape)
        for channel in range(3):
            values = block[:, channel].ravel()
            even = len(values) // 2 * 2
            # Two values at a time, because numpy turns each number that it counts into 8 bytes: half the time.
            pairs = np.bincount(values[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
            self.counts[channel] += pairs.sum(axis=0) + pairs.sum(axis=1) + np.bincount(values[even:], minlength=256)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values, total = np.arange(256) / 255, self.counts.sum(axis=1)
        mean = self.counts @ values / total
        variance = (self.counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
        if not variance.all():
            raise ValueError(f"{self.where}: all pixels of the train split are equal in channel {variance.argmin()}")
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _meta(raw: RawDataset, shape: Shape, statistics: _PixelStatistics, **more: Any) -> Meta:
    mean, std = statistics.mean_std()
    counts = {split: len(part) for split, part in raw.splits.items()}
    content = {"shape": shape, "counts": counts, "classes": raw.classes or (), "notes": raw.notes}
    return Meta.model_validate({**content, "mean": mean, "std": std, **more})


def decode_to_memory(name: str, raw: RawDataset, size: int | None) -> Decoded:
    """Decodes all images into memory.

    Raises:
        ValueError: an image that cannot be decoded, by its name.
    """
    shape = image_shape(raw.train, size)
    statistics = _PixelStatistics(f"data {name}", shape)
    images: dict[str, MappedImages | Tensor] = {}
    files = {}
    done = 0
    with Tally(f"data {name}: decoding", len(raw), "images") as tally:
        for split, part in raw.splits.items():
            tensor, start = torch.empty((len(part), *shape), dtype=torch.uint8), 0
            for block in decode_blocks(part, size, shape):
                if split == "train":
                    statistics.add(block)
                tensor[start : start + len(block)] = torch.from_numpy(block)
                start += len(block)
                done += len(block)
                tally(done)
            images[split] = tensor
            for kind, array in (("images", tensor.numpy()), ("labels", part.labels)):
                data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
                files[f"{split}.{kind}"] = {"size": len(data), "block": len(data), "digests": [digest_of(data)]}
    labels = {split: torch.from_numpy(np.asarray(part.labels, dtype=np.int64)) for split, part in raw.splits.items()}
    return Decoded(images, labels, _meta(raw, shape, statistics, files=files))


def _decode_to_disk(writer: CacheWriter, name: str, raw: RawDataset, size: int | None) -> None:
    shape = image_shape(raw.train, size)
    statistics = _PixelStatistics(f"data {name}", shape)
    images = 0
    with Tally(f"data {name}: decoding", len(raw), "images") as tally:

        def seen(block: np.ndarray) -> None:
            nonlocal images
            images += block.size // math.prod(shape)
            tally(images)

        def seen_in_train(block: np.ndarray) -> None:
            statistics.add(block)
            seen(block)

        for split, part in raw.splits.items():

            def blocks(first: int, part: Any = part) -> Iterator[np.ndarray]:
                return decode_blocks(part, size, shape, first)

            writer.write_blocks(f"{split}.images", blocks, seen_in_train if split == "train" else seen)
            labels = np.asarray(part.labels, dtype=np.int64)
            writer.write_blocks(f"{split}.labels", partial(_from, [labels]))
    writer.finish(_meta(raw, shape, statistics))


def _from(blocks: list[np.ndarray], first: int) -> list[np.ndarray]:
    return blocks[first:]


def _open_cached(folder: Path) -> Decoded:
    meta = read_meta(folder)
    if meta is None:
        raise OSError(f"{folder}: the cached data set vanished while it was opened")
    check_some(folder, meta)
    images: dict[str, MappedImages | Tensor] = {
        split: MappedImages(folder / f"{split}.images", (count, *meta.shape)) for split, count in meta.counts.items()
    }
    labels = {split: torch.from_numpy(np.fromfile(folder / f"{split}.labels", dtype=np.int64)) for split in images}
    return Decoded(images, labels, meta)


def cache_key(name: str, size: int | None, files: Files) -> str:
    """The folder's name of a decoded data set."""
    identity: Sequence[Any] = (_CACHE_FORMAT, size, files)
    return f"{file_name(name)}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"


def cached_labels(name: str, size: int | None, directory: Path, files: Files) -> list[np.ndarray] | None:
    """The labels of each split of a data set that is decoded already; None where it is not."""
    folder = directory / cache_key(name, size, files)
    meta = read_meta(folder)
    return None if meta is None else [np.fromfile(folder / f"{split}.labels", dtype=np.int64) for split in meta.counts]


def open_decoded(name: str, size: int | None, directory: Path, files: Files, read: Callable[[], RawDataset]) -> Decoded:
    """The data set from the cache, decoded into it first if needed; decoded into memory if the cache is unusable.

    Args:
        name: the data set's.
        size: see `ssl_bench.data.decode.decode`.
        directory: of the cache.
        files: what the images depend on.
        read: reads and checks everything but the images, in case they must be decoded.

    Raises:
        ValueError: an image that cannot be decoded, or a damaged copy.
        OSError: the images fit neither into the cache nor into memory.
    """
    key = cache_key(name, size, files)

    @cache
    def prepared() -> tuple[RawDataset, Shape]:
        raw = read()
        return raw, image_shape(raw.train, size)

    def n_bytes() -> int:
        raw, shape = prepared()
        return len(raw) * math.prod(shape)

    def build(writer: CacheWriter) -> None:
        raw, _ = prepared()
        say(f"data {name}: decoding {len(raw)} images into {directory}, once")
        _decode_to_disk(writer, name, raw, size)

    try:
        return _open_cached(ensure(directory, key, n_bytes, build, _WRITER))
    except CacheUnusable as error:
        needed, free = n_bytes(), available_memory()
        if needed > RESIDENT_FRACTION * free:
            raise OSError(
                f"data {name}: {needed / 2**30:.2f} GiB decoded fit neither into memory ({free / 2**30:.2f} GiB free) "
                f"nor into the cache ({error}); set SSL_BENCH_CACHE to a disk with room, or a smaller size"
            ) from error
        log.warning("data %s: not cached on disk (%s), decoding it into memory each time", name, error)
        return decode_to_memory(name, prepared()[0], size)
