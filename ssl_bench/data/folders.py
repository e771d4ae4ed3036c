"""Data sets as trees of image files: class sub-folders, and Tiny ImageNet's original archive."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ssl_bench.data.decode import RawImage, RawSplit

TEST_NAMES = ("test", "val", "valid", "validation")  # the names of a test split, in the order they are looked for
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

Files = tuple[tuple[str, int, int], ...]  # (path, bytes, modification time in ns) of each


@dataclass(frozen=True)
class RawDataset:
    """A data set before decoding; `classes` is None where the files do not name them."""

    train: RawSplit
    test: RawSplit
    classes: tuple[str, ...] | None

    @property
    def splits(self) -> dict[str, RawSplit]:
        """Both splits by name."""
        return {"train": self.train, "test": self.test}


@dataclass(frozen=True)
class Located:
    """A data set that was found but not read yet.

    Args:
        files: every file its contents depend on; a cached copy is known by them.
        read: reads the labels and checks them, no image.
    """

    files: Files
    read: Callable[[], RawDataset]


def labelled_split(tests: Sequence[RawSplit]) -> RawSplit:
    """The first test split with labels: ImageNet's own has none (all -1), so there it is the validation split."""
    return next((split for split in tests if len(split) == 0 or (split.labels >= 0).any()), tests[0])


def stat_files(paths: Iterable[Path]) -> Files:
    """The files' sizes and modification times, sorted by path."""
    found = []
    for path in paths:
        status = path.stat()
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def scan(folder: str | Path) -> Iterator[tuple[str, int, int]]:
    """Every file under a folder with its size and modification time: one pass of scandir, for 10^5 files and more."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from scan(entry.path)
            else:
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns


def split_of_files(paths: Sequence[str], labels: Sequence[int]) -> RawSplit:
    """A split whose images are files, in the order given."""

    def images() -> Iterator[RawImage]:
        return (Path(path) for path in paths)

    return RawSplit(np.asarray(labels, dtype=np.int64), images, lambda index: paths[index])


def _class_split(folder: Path, files: Files, classes: Sequence[str]) -> RawSplit:
    """The images under folder/<class>/..., by class and then by path."""
    start = len(str(folder)) + 1
    found = []
    for path, _, _ in files:
        name, separator, _ = path[start:].partition(os.sep)
        if separator and path.lower().endswith(SUFFIXES):
            found.append((name, path))
    found.sort()
    index = {name: label for label, name in enumerate(classes)}
    unknown = sorted({name for name, _ in found} - set(classes))
    if unknown:
        raise ValueError(f"{folder / unknown[0]}: a class that the train split lacks")
    return split_of_files([path for _, path in found], [index[name] for name, _ in found])


def _read_folder(train: Path, test: Path, train_files: Files, test_files: Files) -> RawDataset:
    classes = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
    if not classes:
        raise ValueError(f"{train}: no class sub-folders")
    train_split = _class_split(train, train_files, classes)
    empty = sorted(set(range(len(classes))) - set(train_split.labels.tolist()))
    if empty:
        raise ValueError(f"{train / classes[empty[0]]}: a class without images; allowed {' '.join(SUFFIXES)}")
    return RawDataset(train_split, _class_split(test, test_files, classes), classes)


def locate_folder(folder: Path) -> Located:
    """Finds a data set of class sub-folders.

    Args:
        folder: holds train/<class>/**/<image> and test|val|valid|validation/<class>/**/<image>.

    Raises:
        FileNotFoundError: the train or the test folder is missing.
    """
    train = folder / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"{train}: missing; data=folder needs train/<class>/ and test/<class>/ sub-folders")
    test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test is None:
        raise FileNotFoundError(f"{folder}: no test folder beside train; allowed {', '.join(TEST_NAMES)}")
    train_files, test_files = tuple(sorted(scan(train))), tuple(sorted(scan(test)))
    return Located(train_files + test_files, partial(_read_folder, train, test, train_files, test_files))


def _read_tiny_imagenet(folder: Path, files: Files) -> RawDataset:
    classes = tuple(sorted((folder / "wnids.txt").read_text().split()))
    train = _class_split(folder / "train", tuple(file for file in files if "images" in file[0].split(os.sep)), classes)
    empty = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if empty:
        raise ValueError(f"{folder / 'train' / classes[empty[0]] / 'images'}: a class of wnids.txt without images")
    return RawDataset(train, _read_annotations(folder / "val", classes), classes)


def _read_annotations(val: Path, classes: Sequence[str]) -> RawSplit:
    """Tiny ImageNet's validation split: each line of val_annotations.txt is an image, its class and its box."""
    index = {name: label for label, name in enumerate(classes)}
    annotations = val / "val_annotations.txt"
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise ValueError(f"{annotations} line {number}: class {wnid!r} is not among the {len(index)} of wnids.txt")
        paths.append(str(val / "images" / image))
        labels.append(index[wnid])
    present = {path for path, _, _ in scan(val / "images")}
    if missing := [path for path in paths if path not in present]:
        raise FileNotFoundError(f"{missing[0]}: missing, though val_annotations.txt names it")
    return split_of_files(paths, labels)


def locate_tiny_imagenet(folder: Path) -> Located:
    """Finds Tiny ImageNet as its archive (tiny-imagenet-200.zip) unpacks.

    The classes are numbered in the order of their sorted WordNet ids, as the Hugging Face copies number them.

    Args:
        folder: holds wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt.

    Raises:
        FileNotFoundError: names what is missing.
    """
    needed = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
    for name in needed:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: missing; Tiny ImageNet's archive holds {', '.join(needed)}")
    train_files = tuple(sorted(scan(folder / "train")))
    rest = stat_files([folder / "wnids.txt"]) + tuple(sorted(scan(folder / "val")))
    return Located(train_files + rest, partial(_read_tiny_imagenet, folder, train_files))
