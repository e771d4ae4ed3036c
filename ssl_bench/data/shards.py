"""WebDataset shards: tar files in which the parts of a sample differ in their endings alone (0001.jpg, 0001.cls).

Only the members' headers and labels are read to find out what there is, by seeking; then the images once, in the order
in which they lie, to be decoded into the cache.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ssl_bench.data.folders import READ, TEST_NAMES, scan
from ssl_bench.data.raw import UNLABELLED, Located, RawDataset, RawSplit

LABELS = ("cls", "cls.txt", "label", "json")  # endings; of JSON the value under "label" or "cls"
_NUMBER = re.compile(r"(\d+)\.tar$")


@dataclass(frozen=True)
class _Shard:
    """What one tar file holds, in its order.

    Args:
        path: the file.
        places: (n, 2) int64, where each image's bytes start, and how many they are.
        labels: of each image: a number, a name, or None.
    """

    path: Path
    places: np.ndarray
    labels: list[int | str | None]


def locate_shards(folder: Path) -> Located:
    """Finds the shards under a folder, by split.

    A shard belongs to the split whose name stands last in its path, between separators (``train/0001.tar``,
    ``imagenet1k-train-0001.tar``, ``val_0001.tar``); without any it is a train shard.

    Raises:
        FileNotFoundError: there is no shard of a train split.
        ValueError: a shard is missing in a numbered row.
    """
    files = tuple(sorted(file for file in scan(folder) if file[0].endswith(".tar")))
    splits: dict[str, list[Path]] = {}
    for name, _, _ in files:
        words = re.split(r"[^a-z]+", Path(name).relative_to(folder).as_posix().lower())
        found = [word for word in words if word in ("train", *TEST_NAMES)]
        splits.setdefault(found[-1] if found else "train", []).append(Path(name))
    if "train" not in splits:
        raise FileNotFoundError(f"{folder}: data.path must hold .tar files of a train split, got {len(files)} others")
    for paths in splits.values():
        _check_numbers(paths)
    return Located(files, partial(_read, splits))


def _check_numbers(paths: Sequence[Path]) -> None:
    """Refuses a gap in shards that are numbered: -000000.tar, -000002.tar."""
    rows: dict[str, list[int]] = {}
    for path in paths:
        if number := _NUMBER.search(path.name):
            rows.setdefault(str(path)[: -len(number[0])], []).append(int(number[1]))
    for stem, numbers in rows.items():
        if missing := sorted(set(range(min(numbers), max(numbers))) - set(numbers)):
            raise ValueError(f"{stem}*.tar: shards must be numbered without a gap, got none of number {missing[0]}")


def _read(splits: dict[str, list[Path]]) -> RawDataset:
    train = [_index(path) for path in splits["train"]]
    test = next(([_index(path) for path in splits[name]] for name in TEST_NAMES if name in splits), None)
    names = _names(train, test or [])
    notes = () if any(label is not None for shard in train for label in shard.labels) else ("train has no labels",)
    return RawDataset(_split(train, names), None if test is None else _split(test, names), names, notes)


def _names(train: Sequence[_Shard], test: Sequence[_Shard]) -> tuple[str, ...] | None:
    """The class names in order, of labels that are names; None of numbers."""
    kinds = {type(label): shard.path for shard in (*train, *test) for label in shard.labels if label is not None}
    if len(kinds) > 1:
        raise ValueError(f"{kinds[str]}: labels must be numbers or names in all shards, got names here alone")
    if str not in kinds:
        return None
    names = tuple(sorted({str(label) for shard in train for label in shard.labels if label is not None}))
    for shard in test:
        if unknown := {str(label) for label in shard.labels if label is not None} - set(names):
            raise ValueError(f"{shard.path}: class must be one of train's, got {min(unknown)!r}")
    return names


def _split(shards: Sequence[_Shard], names: tuple[str, ...] | None) -> RawSplit:
    index = {name: number for number, name in enumerate(names or ())}
    given = [index.get(label, label) if isinstance(label, str) else label for one in shards for label in one.labels]
    labels = np.array([UNLABELLED if label is None else label for label in given], dtype=np.int64)
    if len(labels) and (labels != UNLABELLED).any() and (labels == UNLABELLED).any():
        bare = next(one for one in shards if None in one.labels)
        raise ValueError(f"{bare.path}: every sample must have a label, or none, got one without")

    def images() -> Iterator[bytes]:
        for shard in shards:
            with open(shard.path, "rb") as file:
                for start, size in shard.places.tolist():
                    file.seek(start)
                    yield file.read(size)

    ends = np.cumsum([len(shard.labels) for shard in shards])

    def describe(image: int) -> str:
        number = int(np.searchsorted(ends, image, side="right"))
        shard = shards[number]
        start = int(shard.places[image - (int(ends[number]) - len(shard.labels)), 0])
        with tarfile.open(shard.path, "r:") as archive:
            return f"{shard.path}: {next(member.name for member in archive if member.offset_data == start)}"

    return RawSplit(labels, images, describe)


def _index(path: Path) -> _Shard:
    """The images and labels of one shard.

    Raises:
        ValueError: in one line; the file is cut off or no tar file, or a sample has no image or two.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:  # "r:" = not compressed, so that places can be looked up
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")  # WebDataset's rule: up to the first dot
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path}: cut off in {member.name}")
                samples.setdefault(f"{folder}/{key}", {})[ending.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged or no uncompressed tar file ({' '.join(str(error).split())})") from error
    places: list[tuple[int, int]] = []
    labels: list[int | str | None] = []
    with open(path, "rb") as file:
        for key, parts in samples.items():
            images = [place for ending, place in parts.items() if f".{ending.rpartition('.')[2]}" in READ]
            if len(images) != 1:
                got = ", ".join(parts)
                raise ValueError(f"{path}: sample {key.strip('/')} must have one image ({' '.join(READ)}), got {got}")
            places += images
            given = next((ending for ending in LABELS if ending in parts), None)
            labels.append(None if given is None else _label(file, parts[given], given, path))
    return _Shard(path, np.array(places, dtype=np.int64).reshape(-1, 2), labels)


def _label(file: IO[bytes], place: tuple[int, int], ending: str, path: Path) -> int | str | None:
    file.seek(place[0])
    text = file.read(place[1]).decode(errors="replace").strip()
    if ending == "json":
        try:
            about = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: a .json of a sample is damaged ({error})") from error
        value = about.get("label", about.get("cls")) if isinstance(about, dict) else None
        return value if isinstance(value, int | str) else None
    return int(text) if re.fullmatch(r"\d+", text) else text
