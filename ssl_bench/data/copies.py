"""The cache's upkeep: which decoded copies and downloads there are, whether they are whole, and their removal."""

import re
import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ssl_bench.data.bundled import TORCHVISION
from ssl_bench.data.cache import DOWNLOADS, JOURNAL, META, Meta, damaged_blocks, read_meta
from ssl_bench.data.download import unfinished_name
from ssl_bench.runtime.console import Tally
from ssl_bench.runtime.interrupt import stop_if_requested

_KEY = re.compile(r"(?P<name>.+)-[0-9a-f]{16}(\.partial)?")


@dataclass(frozen=True)
class Copy:
    """A decoded data set in the cache.

    Attributes:
        folder: where it is.
        name: the data set's, as in its folder's name.
        meta: its description; None for one that is unfinished, damaged, or of an earlier version.
        size: bytes on disk.
    """

    folder: Path
    name: str
    meta: Meta | None
    size: int

    @property
    def state(self) -> str:
        """In words."""
        if self.meta is not None:
            return "whole"
        return "unfinished" if self.folder.suffix == ".partial" else "not whole, or of an earlier version"


def copies(directory: Path) -> list[Copy]:
    """Every decoded copy in a cache's folder, by name; anything else there is left alone."""
    found = []
    for folder in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _KEY.fullmatch(folder.name)
        if match and folder.is_dir() and ((folder / META).exists() or (folder / JOURNAL).exists()):
            meta = None if folder.suffix == ".partial" else read_meta(folder)
            found.append(Copy(folder, match["name"], meta, size_of(folder)))
    return found


def chosen(directory: Path, names: Sequence[str], without: Container[str] = ()) -> list[Copy]:
    """The copies of these data sets, or those of these folders' names; without names all.

    Args:
        directory: the cache's folder.
        names: data sets or folders.
        without: names that need not have a copy.

    Raises:
        ValueError: there is none of another name.
    """
    there = copies(directory)
    for name in names:
        if name not in without and not any(name in (copy.name, copy.folder.name) for copy in there):
            known = ", ".join(dict.fromkeys(copy.name for copy in there)) or "none"
            raise ValueError(f"no decoded copy of {name!r} in {directory} (there: {known})")
    return [copy for copy in there if not names or copy.name in names or copy.folder.name in names]


def downloaded(directory: Path, names: Sequence[str]) -> dict[str, list[tuple[Path, Path]]]:
    """What was downloaded of these data sets, or of all without names: each one's folders, with their locks."""
    root, found = directory / DOWNLOADS, dict[str, list[tuple[Path, Path]]]()
    for name, source in TORCHVISION.items():
        places = [root / source.folder.split("/")[0], root / unfinished_name(source.folder)]
        there = [(place, root / f"{source.class_name}.lock") for place in places if place.is_dir()]
        # Two names may share a folder, which is removed once.
        if there and (name in names or not names) and there not in found.values():
            found[name] = there
    return found


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verify(copy: Copy) -> list[str]:
    """Compares every block of a copy with its digest; returns a line for each that is not what was written."""
    if copy.meta is None:
        return [f"{copy.folder}: {copy.state}"]
    lines, done = [], 0
    with Tally(f"verifying {copy.folder.name}", copy.size, "bytes") as tally:
        for name, number, size, damaged in damaged_blocks(copy.folder, copy.meta):
            stop_if_requested("verifying")
            done += size
            tally(done)
            if damaged:
                total = len(copy.meta.files[name].digests)
                lines.append(f"{copy.folder / name}: block {number} of {total} is not what was written")
    return lines


def remove(folder: Path, lock: Path) -> None:
    """Removes a copy or a download.

    Raises:
        OSError: a process is at work on it.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise OSError(f"{folder}: a process is at work on it") from None
    try:
        shutil.rmtree(folder)
    finally:
        held.release()
        lock.unlink(missing_ok=True)
