"""What a data set is before it is decoded: the interface that every data set offers, built-in or foreign.

A foreign data set is a function of `data.path`; decoding, caching and everything after is the same as for the others:

    def locate(path: Path | None) -> Located:                       # data.name=my_package.my_module:locate
        files = sorted((path or Path("scans")).glob("*/*.png"))     # cheap: it runs at every start
        stats = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return Located(stats, lambda: read(files))

    def read(files: list[Path]) -> RawDataset:                      # runs when nothing is cached, and opens no image
        labels = np.array([file.parent.name == "sick" for file in files], dtype=np.int64)
        def split(part: slice) -> RawSplit:
            return RawSplit(labels[part], lambda: iter(files[part]), lambda index: str(files[part][index]))
        return RawDataset(split(slice(0, -100)), split(slice(-100, None)), ("healthy", "sick"))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RawImage = bytes | Path | np.ndarray  # an encoded image, its file, or pixels (H, W) or (H, W, 3) uint8
Files = tuple[tuple[str, int, int], ...]  # (path, bytes, modification time in ns) of each

UNLABELLED = -1  # the label of every image of a split that has none


@dataclass(frozen=True)
class RawSplit:
    """One split of a data set.

    Args:
        labels: (N,) int64 class indices; all -1 in a split without labels.
        images: starts a new pass over the N images in order.
        describe: names image i for an error message (its file and row, or its path).
    """

    labels: np.ndarray
    images: Callable[[], Iterator[RawImage]]
    describe: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return len(self) == 0 or bool((self.labels != UNLABELLED).any())


@dataclass(frozen=True)
class RawDataset:
    """The splits.

    Args:
        train: what is trained on.
        test: what is measured on; None where there is none.
        classes: the class names in label order; None where the files do not name them.
        notes: what a user should know of how the files were read, a line each.
    """

    train: RawSplit
    test: RawSplit | None
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, RawSplit]:
        """The splits there are, by name."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


@dataclass(frozen=True)
class Located:
    """A data set that was found but not read yet.

    Args:
        files: every file its contents depend on: a cached copy is found again by them. Without files it is small
            enough to be decoded into memory at every start.
        read: reads and checks the labels, but no image.
    """

    files: Files
    read: Callable[[], RawDataset]
