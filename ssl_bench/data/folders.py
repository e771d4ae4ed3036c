"""Data sets as trees of image files: class folders, images without labels, and Tiny ImageNet's original archive."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ssl_bench.data.raw import UNLABELLED, Files, Located, RawDataset, RawSplit

TEST_NAMES = ("test", "val", "valid", "validation")  # the names of a test split, in the order they are looked for

# The endings that torchvision's ImageFolder reads, and .gif.
READ = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Images all the same: their number is said, so that nobody takes a part of the data for all of it.
_OTHER_ENDINGS = """.apng .arw .avif .cr2 .cr3 .czi .dcm .dds .dicom .dng .eps .exr .hdr .heic .heif .ico .j2k .jfif 
    .jif .jp2 .jpe .jxl .mha .nd2 .ndpi .nef .nii .npy .npz .nrrd .orf .pbm .pnm .psd .raf .raw .svg .svs .tga"""
NOT_READ = frozenset(_OTHER_ENDINGS.split())
# What archives, operating systems and NAS boxes leave beside data; names that start with a dot are hidden anyway.
LITTER = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "desktop.ini",
        "@eadir",
        "#recycle",
        "@recycle",
        "$recycle.bin",
        "lost+found",
        "#snapshot",
    }
    | {"@snapshot", "system volume information", "__pycache__"}
)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden, or left by a system."""
    return name.startswith(".") or name.lower() in LITTER


def stat_files(paths: Iterable[Path]) -> Files:
    """The files' sizes and modification times, sorted by path."""
    stats = ((str(path), path.stat()) for path in paths)
    return tuple(sorted((path, status.st_size, status.st_mtime_ns) for path, status in stats))


def scan(folder: str | Path, _above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int, int]]:
    """Every file under a folder but litter, with its size and modification time.

    One pass of scandir, for 10^5 files and more. A link to a folder that it lies in is not followed.
    """
    status = os.stat(folder)
    inside = (*_above, (status.st_dev, status.st_ino))
    if inside[-1] in _above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_litter(entry.name):
                continue
            if entry.is_dir():
                yield from scan(entry.path, inside)
            else:
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_image(path: str) -> bool:
    return _ending(path) in READ


def _split_of_files(paths: Sequence[str], labels: Sequence[int]) -> RawSplit:
    return RawSplit(np.asarray(labels, dtype=np.int64), lambda: map(Path, paths), lambda index: paths[index])


def _unread(paths: Iterable[str]) -> tuple[str, ...]:
    """A note that counts the image files of endings that are not read."""
    counts = Counter(ending for path in paths if (ending := _ending(path)) in NOT_READ)
    if not counts:
        return ()
    each = ", ".join(f"{ending}: {count}" for ending, count in sorted(counts.items()))
    return (f"{sum(counts.values())} image files have an ending that is not read ({each}; read: {' '.join(READ)})",)


def _by_class(root: Path, paths: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each class folder in a split's folder, sorted by path, and those that lie in none."""
    found: dict[str, list[str]] = {}
    loose: list[str] = []
    start = len(str(root)) + 1  # os.path.relpath takes 10 s for a million files
    for path in sorted(filter(_is_image, paths)):
        name, inside, _ = path[start:].partition(os.sep)
        (found.setdefault(name, []) if inside else loose).append(path)
    return found, loose


def _class_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not is_litter(path.name))


def _class_split(root: Path, classes: Sequence[str], paths: Iterable[str], *, complete: bool) -> RawSplit:
    """The images under root/<class>/..., by class and then by path, as torchvision's `ImageFolder` finds them.

    Args:
        root: holds the class folders.
        classes: their names, in label order; a folder of another name must hold no image.
        paths: the files under it.
        complete: whether every class must have an image.
    """
    found, _ = _by_class(root, paths)
    if unknown := sorted(found.keys() - set(classes)):
        raise ValueError(f"{root / unknown[0]}: the train split has no such class")
    if complete and (empty := [name for name in classes if name not in found]):
        raise ValueError(f"{root / empty[0]}: a class without images ({' '.join(READ)})")
    pairs = [(path, label) for label, name in enumerate(classes) for path in found.get(name, ())]
    return _split_of_files([path for path, _ in pairs], [label for _, label in pairs])


def _unlabelled(paths: Iterable[str]) -> RawSplit:
    images = sorted(filter(_is_image, paths))
    return _split_of_files(images, [UNLABELLED] * len(images))


def _read_folder(root: Path, splits: Mapping[str, Sequence[str]]) -> RawDataset:
    train, notes = splits["train"], list(_unread(path for paths in splits.values() for path in paths))
    found, loose = _by_class(root / "train", train)
    if found and loose:
        notes.append(f"{len(loose)} images of train lie outside its class folders and are left out ({loose[0]}, ...)")
    classes = tuple(_class_folders(root / "train")) if found else ()
    tests = {name: splits[name] for name in TEST_NAMES if name in splits}
    # ImageNet's test images, for one, have no labels and lie in no class folder: then it is the validation split.
    labelled = next((name for name in tests if _by_class(root / name, tests[name])[0]), None)
    if labelled is not None and (first := next(iter(tests))) != labelled:
        notes.append(f"{first}/ has no class folders: {labelled}/ is the test split")
    if not found:
        notes.append("train/ has no class folders: its images have no labels")
        return RawDataset(_unlabelled(train), None, (), tuple(notes))
    split = _class_split(root / "train", classes, train, complete=True)
    test = None if labelled is None else _class_split(root / labelled, classes, tests[labelled], complete=False)
    return RawDataset(split, test, classes, tuple(notes))


def _read_flat(paths: Sequence[str]) -> RawDataset:
    split = _unlabelled(paths)
    note = f"no train/ folder: all {len(split)} images below it are the train split, without labels"
    return RawDataset(split, None, (), (note, *_unread(paths)))


def locate_folder(folder: Path) -> Located:
    """Finds a data set of class folders, or images without labels.

    Args:
        folder: holds train/<class>/**/<image> and test|val|valid|validation/<class>/**/<image>; the test folder may be
            missing. Or, without labels, train/<image>, or no train folder but images at any depth.

    Raises:
        FileNotFoundError: there is no image.
    """
    names = [name for name in ("train", *TEST_NAMES) if (folder / name).is_dir()]
    if "train" in names:
        splits = {name: sorted(scan(folder / name)) for name in names}
    else:
        splits = {"train": sorted(scan(folder))}
    if not any(_is_image(path) for path, _, _ in splits["train"]):
        where = folder / "train" if "train" in names else folder
        raise FileNotFoundError(f"{where}: no images ({' '.join(READ)}); data=folder needs train/<class>/ folders")
    paths = {name: [path for path, _, _ in files] for name, files in splits.items()}
    read = partial(_read_folder, folder, paths) if "train" in names else partial(_read_flat, paths["train"])
    # Other files (notes, lists) change no image: neither a cached copy nor the run's identity depends on them.
    files = (file for each in splits.values() for file in each)
    return Located(tuple(file for file in files if _is_image(file[0]) or _ending(file[0]) in NOT_READ), read)


def _read_tiny_imagenet(folder: Path, train_paths: Sequence[str]) -> RawDataset:
    classes = tuple(sorted((folder / "wnids.txt").read_text().split()))
    train = _class_split(folder / "train", classes, train_paths, complete=True)
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
    train = tuple(sorted(scan(folder / "train")))
    rest = stat_files([folder / "wnids.txt"]) + tuple(sorted(scan(folder / "val")))
    return Located((*train, *rest), partial(_read_tiny_imagenet, folder, [path for path, _, _ in train]))
