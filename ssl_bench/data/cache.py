"""Decoded images on disk: written once, whole or not at all, by the first of several processes.

A cached data set is a folder of raw uint8 files that are memory-mapped, so that opening it copies nothing and the
processes of a machine share one copy in the page cache. It is built as `<key>.partial` under a lock, then renamed.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

log = logging.getLogger(__name__)

META = "meta.json"


class RawWriter(Protocol):
    """An unbuffered file: a write may take a part only."""

    def write(self, data: memoryview, /) -> int | None: ...


class CacheUnusable(Exception):
    """The cache folder cannot be written or is too full; the message says which, and what would help."""


def default_cache_dir() -> Path:
    """$SSL_BENCH_CACHE, or ~/.cache/ssl_bench."""
    return Path(os.environ.get("SSL_BENCH_CACHE") or Path.home() / ".cache" / "ssl_bench")


@lru_cache(maxsize=8)
def _open_rows(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


@dataclass(frozen=True)
class MappedImages:
    """Images in a raw file: (N, 3, H, W) uint8, row by row. Cheap to pickle, so data loader workers open their own."""

    path: Path
    shape: tuple[int, int, int, int]

    def tensor(self) -> Tensor:
        """All images as a memory-mapped tensor; writing to it does not change the file."""
        count = int(np.prod(self.shape))
        return torch.from_file(str(self.path), shared=False, size=count, dtype=torch.uint8).view(self.shape)

    def rows(self, indices: np.ndarray) -> Tensor:
        """Copies of the images at (n,) indices, read from the file."""
        return torch.from_numpy(_open_rows(self.path, self.shape)[indices])


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The description of a cached data set; None if there is none or its files are not whole."""
    try:
        meta = json.loads((folder / META).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return meta if whole else None


def write_all(file: RawWriter, block: np.ndarray) -> None:
    """Writes an array's bytes, in as many writes as the system takes them."""
    data = np.ascontiguousarray(block).data.cast("B")
    while data:
        data = data[file.write(data) :]


class CacheWriter:
    """Writes the files of one data set into its unfinished folder and syncs them to disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}

    def write_blocks(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Appends each block's bytes to one file; the disk's errors become CacheUnusable, the blocks' own pass."""
        size = 0
        with self._disk_errors():
            file = open(self.folder / name, "wb", buffering=0)  # noqa: SIM115
        with file:
            for block in blocks:
                size += block.nbytes
                with self._disk_errors():
                    write_all(file, block)
            with self._disk_errors():
                os.fsync(file.fileno())
        self.sizes[name] = size

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Writes the description, last: it lists every file with its size."""
        text = json.dumps(meta | {"files": self.sizes}, indent=1)
        self.write_blocks(META, [np.frombuffer(text.encode(), dtype=np.uint8)])

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheUnusable(f"{self.folder.parent}: {error.strerror}") from error


def ensure(cache_dir: Path, key: str, n_bytes: Callable[[], int], build: Callable[[CacheWriter], None]) -> Path:
    """The folder of a cached data set, built first if it is missing or damaged.

    Args:
        cache_dir: holds all cached data sets.
        key: the data set's folder name.
        n_bytes: the decoded images' size, called only if they have to be built.
        build: writes every file; its exceptions pass, and leave nothing behind.

    Raises:
        CacheUnusable: `cache_dir` cannot be created or written, or its disk is too full.
    """
    folder, partial = cache_dir / key, cache_dir / f"{key}.partial"
    if read_meta(folder):
        return folder
    lock = FileLock(cache_dir / f"{key}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another process is decoding it, waiting", key)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise CacheUnusable(f"{cache_dir}: {error}") from error
    try:
        if read_meta(folder):  # another process built it while this one waited
            return folder
        needed, free = n_bytes(), shutil.disk_usage(cache_dir).free
        if needed > free:
            raise CacheUnusable(f"{cache_dir}: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
        except OSError as error:
            raise CacheUnusable(f"{cache_dir}: {error.strerror}") from error
        build(CacheWriter(partial))
        if folder.exists():
            log.warning("%s: the cached copy is damaged and is replaced", folder)
            shutil.rmtree(folder)
        os.rename(partial, folder)
        with suppress(OSError):  # not every file system can sync a directory; without, the rename is only later on disk
            descriptor = os.open(cache_dir, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    return folder
