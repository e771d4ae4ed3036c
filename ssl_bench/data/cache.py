"""Decoded images on disk: written once, whole or not at all, by the first of several processes, with checksums.

A cached data set is a folder of raw uint8 files that are memory-mapped, so that opening it copies nothing and the
processes of a machine share one copy in the page cache. It is built as `<key>.partial` under a lock, then renamed; one
that was interrupted is continued. Every file has a digest per block of some megabytes: opening looks at some of them,
`ssl-bench data verify` at all.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from ssl_bench.runtime.interrupt import Stopped, stop_if_requested

log = logging.getLogger(__name__)

META, JOURNAL = "meta.json", "blocks.jsonl"
DOWNLOADS = "downloads"  # the folder of what torchvision downloads, in the cache's
# What opening a copy reads to check it: 0.05 s of processor time, and the disk's time for so much.
CHECKED_BYTES = 64 * 2**20

_Count = Annotated[int, Field(ge=0)]


class RawWriter(Protocol):
    """An unbuffered file: a write may take a part only."""

    def write(self, data: memoryview, /) -> int | None: ...


class CacheUnusable(Exception):
    """The cache folder cannot be written or is too full; the message says which, and what would help."""


class CacheDamaged(ValueError):
    """A cached file is not what was written; the message names it and says what to do."""


class FileMeta(BaseModel):
    """A file of a cached data set: blocks of one length, except for the last, each with its digest."""

    size: _Count
    block: _Count
    digests: list[str]


class Meta(BaseModel):
    """The description of a cached data set, which its folder holds as meta.json.

    Attributes:
        shape: (3, H, W) of every image.
        counts: the number of images of each split; without "test" there is no test split.
        classes: the class names in label order; none where there are no labels.
        mean, std: per channel over the train split, in [0, 1].
        notes: what a user should know of how the files were read.
        files: each file by its name.
    """

    shape: tuple[int, int, int]
    counts: dict[str, _Count]
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: list[str] = []
    files: dict[str, FileMeta] = {}

    def digest(self) -> str:
        """16 hex digits of the whole content: equal if and only if all images, labels and class names are."""
        plain = [self.shape, self.counts, self.classes, {name: file.digests for name, file in self.files.items()}]
        return digest_of(json.dumps(plain, sort_keys=True).encode())


def digest_of(data: bytes | memoryview) -> str:
    """16 hex digits. Of a gigabyte in one second, like the disks that hold such data."""
    return blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True)
class MappedImages:
    """Images in a raw file: (N, 3, H, W) uint8, row by row."""

    path: Path
    shape: tuple[int, int, int, int]

    def tensor(self) -> Tensor:
        """All images as a memory-mapped tensor; writing to it does not change the file."""
        count = int(np.prod(self.shape))
        if count == 0:  # an empty file cannot be mapped
            return torch.empty(self.shape, dtype=torch.uint8)
        return torch.from_file(str(self.path), shared=False, size=count, dtype=torch.uint8).view(self.shape)

    @cached_property
    def array(self) -> np.ndarray:
        """All images as a read-only memory-mapped array."""
        if 0 in self.shape:
            return np.empty(self.shape, dtype=np.uint8)
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=self.shape)


def read_meta(folder: Path) -> Meta | None:
    """The description of a cached data set; None if there is none or its files are not whole."""
    try:
        text = json.loads((folder / META).read_bytes())
        content, digest = text["content"], text["digest"]
        if digest_of(json.dumps(content).encode()) != digest:
            return None
        meta = Meta.model_validate(content)
        whole = all((folder / name).stat().st_size == file.size for name, file in meta.files.items())
    except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
        return None
    return meta if whole else None


def damaged_blocks(folder: Path, meta: Meta, limit: int | None = None) -> Iterator[tuple[str, int, int, bool]]:
    """Reads blocks of a cached data set and compares them with their digests.

    Args:
        folder: the data set's.
        meta: its description.
        limit: how many bytes to read at most, of blocks that chance picks, so that many openings see all of them, and
            at least one block of each file; None reads everything.

    Yields:
        for each block that was read, its file, its number, its length and whether it is damaged.
    """
    for name, file in meta.files.items():
        numbers = list(range(len(file.digests)))
        if limit is not None and file.size > limit // len(meta.files):
            # Not the generator of the run, which may be Python's global one.
            count = max(1, limit // len(meta.files) // max(1, file.block))
            numbers = sorted(random.SystemRandom().sample(numbers, min(count, len(numbers))))
        with open(folder / name, "rb") as opened:
            for number in numbers:
                opened.seek(number * file.block)
                data = opened.read(file.block)
                yield name, number, len(data), digest_of(data) != file.digests[number]


def check_some(folder: Path, meta: Meta) -> None:
    """Compares some blocks with their digests.

    Raises:
        CacheDamaged: one of them is not what was written.
    """
    for name, number, _, damaged in damaged_blocks(folder, meta, CHECKED_BYTES):
        if damaged:
            raise CacheDamaged(
                f"{folder / name}: block {number} of {len(meta.files[name].digests)} is not what was written (a fault "
                f"of the disk or memory?); ssl-bench data clear {folder.name} removes it, then it is decoded anew"
            )


def write_all(file: RawWriter, block: np.ndarray) -> None:
    """Writes an array's bytes, in as many writes as the system takes them."""
    data = np.ascontiguousarray(block).data.cast("B")
    while data:
        data = data[file.write(data) :]


@dataclass
class _Journal:
    """What an unfinished folder holds already: the length and digest of each block that was written, file by file.

    Its first line says what wrote the blocks; those of another writer (another Pillow may decode otherwise) are void.
    """

    path: Path
    writer: str
    blocks: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def read(self) -> None:
        """Takes what is there; a line that was cut off ends it."""
        with suppress(OSError, ValueError, TypeError):
            first, *lines = self.path.read_text().splitlines()
            for line in lines if json.loads(first) == self.writer else ():
                name, size, digest = json.loads(line)
                self.blocks.setdefault(str(name), []).append((int(size), str(digest)))

    def keep(self, name: str, blocks: list[tuple[int, str]]) -> None:
        """Leaves these blocks of a file as the only ones."""
        self.blocks[name] = list(blocks)
        lines = [json.dumps([name, *block]) for name, blocks in self.blocks.items() for block in blocks]
        self.path.write_text("\n".join([json.dumps(self.writer), *lines, ""]))

    def add(self, name: str, size: int, digest: str) -> None:
        """Adds a block that was written."""
        self.blocks[name].append((size, digest))
        with self.path.open("a") as file:
            file.write(json.dumps([name, size, digest]) + "\n")


class CacheWriter:
    """Writes the files of one data set into its unfinished folder, goes on where another stopped, and syncs to disk.

    Args:
        folder: the unfinished data set's.
        writer: what decodes; blocks of another one are not used.
    """

    def __init__(self, folder: Path, writer: str = "") -> None:
        self.folder = folder
        self.files: dict[str, FileMeta] = {}
        self._journal = _Journal(folder / JOURNAL, writer)
        with self._disk_errors():
            self._journal.read()

    def write_blocks(
        self,
        name: str,
        blocks: Callable[[int], Iterable[np.ndarray]],
        seen: Callable[[np.ndarray], object] = lambda _block: None,
    ) -> None:
        """Writes one file; the disk's errors become CacheUnusable, the blocks' own pass.

        Args:
            name: the file's.
            blocks: (number of the first) -> the blocks from there on; all but the last of one length.
            seen: gets every block's bytes, those too that are there already.
        """
        with self._disk_errors():
            file = open(self.folder / name, "ab+", buffering=0)  # noqa: SIM115
        with file:
            done: list[tuple[int, str]] = []
            with self._disk_errors():
                file.seek(0)
                for size, digest in self._journal.blocks.get(name, ()):
                    stop_if_requested("decoding")
                    data = file.read(size)
                    if len(data) != size or digest_of(data) != digest:
                        break
                    seen(np.frombuffer(data, dtype=np.uint8))
                    done.append((size, digest))
                file.truncate(sum(size for size, _ in done))
                file.seek(0, os.SEEK_END)
                self._journal.keep(name, done)
            for block in blocks(len(done)):
                digest = digest_of(np.ascontiguousarray(block).data.cast("B"))
                with self._disk_errors():
                    write_all(file, block)
                    self._journal.add(name, block.nbytes, digest)
                seen(block)
                done.append((block.nbytes, digest))
            with self._disk_errors():
                os.fsync(file.fileno())
        sizes = [size for size, _ in done]
        self.files[name] = FileMeta(size=sum(sizes), block=max(sizes, default=0), digests=[each for _, each in done])

    def finish(self, meta: Meta) -> None:
        """Writes the description, last: it lists every file with its size and digests."""
        content = meta.model_copy(update={"files": self.files}).model_dump(mode="json")
        with self._disk_errors():
            with open(self.folder / META, "w") as file:
                json.dump({"digest": digest_of(json.dumps(content).encode()), "content": content}, file)
                file.flush()
                os.fsync(file.fileno())
            self._journal.path.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheUnusable(f"{self.folder.parent}: {error.strerror}") from error


@contextmanager
def locked(cache_dir: Path, key: str) -> Iterator[None]:
    """Holds the lock of a cached data set, waiting for whoever has it.

    Raises:
        CacheUnusable: the folder cannot be made or written.
        Stopped: a signal asked this process to stop while it waited.
    """
    lock = FileLock(cache_dir / f"{key}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s: another process is at work on it, waiting", key)
            while not lock.is_locked:
                stop_if_requested("waiting for another process's decoding")
                with suppress(Timeout):
                    lock.acquire(timeout=0.5)
    except (OSError, NotImplementedError) as error:
        raise CacheUnusable(f"{cache_dir}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def ensure(
    cache_dir: Path, key: str, n_bytes: Callable[[], int], build: Callable[[CacheWriter], None], writer: str = ""
) -> Path:
    """The folder of a cached data set, built first if it is missing or cut off.

    Args:
        cache_dir: holds all cached data sets.
        key: the data set's folder name.
        n_bytes: the decoded images' size, called only if they have to be built.
        build: writes every file. Its exceptions pass, and leave nothing behind; but a stop (`Stopped`,
            KeyboardInterrupt, a killed process) leaves the blocks that are there, to go on with.
        writer: see `CacheWriter`.

    Raises:
        CacheUnusable: `cache_dir` cannot be created or written, or its disk is too full.
    """
    folder, partial = cache_dir / key, cache_dir / f"{key}.partial"
    if read_meta(folder):
        return folder
    with locked(cache_dir, key):
        if read_meta(folder):  # another process built it while this one waited
            return folder
        keep = False
        try:
            needed, free = n_bytes(), shutil.disk_usage(cache_dir).free
            there = sum(path.stat().st_size for path in partial.glob("*")) if partial.is_dir() else 0
            if needed - there > free:
                raise CacheUnusable(f"{cache_dir}: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free")
            try:
                partial.mkdir(exist_ok=True)
            except OSError as error:
                raise CacheUnusable(f"{cache_dir}: {error.strerror}") from error
            build(CacheWriter(partial, writer))
            if folder.exists():
                log.warning("%s: the cached copy is not whole and is replaced", folder)
                shutil.rmtree(folder)
            os.rename(partial, folder)
            with suppress(OSError):  # not every file system can sync a directory; without, only the rename comes later
                descriptor = os.open(cache_dir, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except (Stopped, KeyboardInterrupt):
            keep = True
            raise
        finally:
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)
    return folder
