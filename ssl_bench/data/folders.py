"""Data sets as trees of image files: class folders, and Tiny ImageNet's original archive."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ssl_bench.data.raw import Files, Located, RawDataset, RawSplit

TEST_NAMES = ("test", "val", "valid", "validation")  # the names of a test split, in the order they are looked for


def stat_files(paths: Iterable[Path]) -> Files:
    """The files' sizes and modification times, sorted by path."""
    stats = ((str(path), path.stat()) for path in paths)
    return tuple(sorted((path, status.st_size, status.st_mtime_ns) for path, status in stats))


def scan(folder: str | Path) -> Iterator[tuple[str, int, int]]:
    """Every file under a folder with its size and modification time: one pass of scandir, for 10^5 files and more."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from scan(entry.path)
            else:
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns


def _split_of_files(paths: Sequence[str], labels: Sequence[int]) -> RawSplit:
    return RawSplit(np.asarray(labels, dtype=np.int64), lambda: map(Path, paths), lambda index: paths[index])


def _class_split(folder: Path, classes: Sequence[str], *, complete: bool) -> RawSplit:
    """The images under folder/<class>/..., by class and then by path, as torchvision's `ImageFolder` finds them.

    Args:
        folder: holds the class folders.
        classes: their names, in label order; a folder of another name must hold no image.
        complete: whether every class must have an image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset  # slow; see bundled.py

    # make_dataset skips classes that it is not given, which would silently drop test images.
    names = [*classes, *(name for name in find_classes(folder)[0] if name not in classes)]
    index = {name: label for label, name in enumerate(names)}
    samples = make_dataset(str(folder), index, (*IMG_EXTENSIONS, ".gif"), allow_empty=True)
    samples.sort(key=lambda sample: (sample[1], sample[0]))  # os.walk lists a folder's files before its sub-folders'
    labels = [label for _, label in samples]
    if labels and labels[-1] >= len(classes):
        raise ValueError(f"{folder / names[labels[-1]]}: the train split has no such class")
    if complete and (empty := sorted(set(range(len(classes))) - set(labels))):
        raise ValueError(f"{folder / classes[empty[0]]}: a class without images ({' '.join(IMG_EXTENSIONS)} .gif)")
    return _split_of_files([path for path, _ in samples], labels)


def _read_folder(train: Path, test: Path) -> RawDataset:
    from torchvision.datasets.folder import find_classes

    classes = tuple(find_classes(train)[0])
    train_split, test_split = _class_split(train, classes, complete=True), _class_split(test, classes, complete=False)
    return RawDataset(train_split, test_split, classes)


def locate_folder(folder: Path) -> Located:
    """Finds a data set of class folders.

    Args:
        folder: holds train/<class>/**/<image> and test|val|valid|validation/<class>/**/<image>.

    Raises:
        FileNotFoundError: the train or the test folder is missing.
    """
    train = folder / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"{train}: missing; data=folder needs train/<class>/ and test/<class>/ folders")
    test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test is None:
        raise FileNotFoundError(f"{folder}: no test folder beside train; must be {' or '.join(TEST_NAMES)}")
    files = (*sorted(scan(train)), *sorted(scan(test)))
    return Located(files, partial(_read_folder, train, test))


def _read_tiny_imagenet(folder: Path) -> RawDataset:
    classes = tuple(sorted((folder / "wnids.txt").read_text().split()))
    train = _class_split(folder / "train", classes, complete=True)
    # The validation split: each line of val_annotations.txt is an image, its class and its box.
    index = {name: label for label, name in enumerate(classes)}
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        image, wnid = (*line.split("\t"), "")[:2]
        if wnid not in index:
            raise ValueError(
                f"{annotations} line {number}: class must be one of the {len(index)} in wnids.txt, got {wnid!r}"
            )
        paths.append(str(images / image))
        labels.append(index[wnid])
    present = set(os.listdir(images))
    if missing := [path for path in paths if os.path.basename(path) not in present]:
        raise FileNotFoundError(f"{missing[0]}: missing, though val_annotations.txt names it")
    return RawDataset(train, _split_of_files(paths, labels), classes)


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
    rest = stat_files([folder / "wnids.txt"]) + tuple(sorted(scan(folder / "val")))
    return Located((*sorted(scan(folder / "train")), *rest), partial(_read_tiny_imagenet, folder))
