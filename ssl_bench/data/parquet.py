"""Data sets as Hugging Face lays them out: folders of parquet files, and anything the `datasets` library can load.

Folders of parquet files are read with pyarrow, which `datasets` uses too. Through `datasets` the first decode of
CIFAR-10 (8.5 s) takes 1.2 s more, and either a second copy of all encoded images (47 MB; ImageNet: 150 GB) or, when
streaming, a folder named `a[1]` is not found; and a missing shard goes unnoticed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_bench.data.folders import TEST_NAMES, stat_files
from ssl_bench.data.raw import Located, RawDataset, RawSplit

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Part:
    """A piece of a split: a parquet file, or a whole split that the `datasets` library loaded.

    Args:
        name: for error messages.
        schema: its columns.
        batches: one column, some thousand rows at a time.
    """

    name: str
    schema: pa.Schema
    batches: Callable[[str], Iterator[pa.Array]]

    def choose(self, wanted: Sequence[str], what: str) -> str:
        """The first of the wanted columns that there is."""
        for column in wanted:
            if column in self.schema.names:
                return column
        got = ", ".join(self.schema.names)
        raise ValueError(f"{self.name}: the {what} column must be {' or '.join(wanted)}, got columns {got}")

    def read(self, column: str) -> Iterator[pa.Array]:
        """As `batches`, with errors that name the part."""
        row = 0
        try:
            for batch in self.batches(column):
                yield batch
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.name}: damaged after row {row} of column {column} ({_one_line(error)})") from error

    def labels(self, column: str) -> np.ndarray:
        """(n,) int64."""
        kind = self.schema.field(column).type
        batches = list(self.read(column))
        empty = sum(batch.null_count for batch in batches)
        if not pa.types.is_integer(kind) or empty:
            got = f"{kind}, {empty} rows empty"
            raise ValueError(f"{self.name}: column {column} must hold an integer in every row, got {got}")
        return np.concatenate([np.empty(0, np.int64), *(batch.to_numpy() for batch in batches)]).astype(np.int64)

    def images(self, column: str) -> Iterator[bytes | Path]:
        """The encoded images, or the files that hold them."""
        for row, cell in enumerate(cell for batch in self.read(column) for cell in batch.to_pylist()):
            encoded = cell["bytes"] if isinstance(cell, dict) else cell
            if encoded is None and cell and cell.get("path"):
                encoded = Path(cell["path"])
            if encoded is None:
                raise ValueError(f"{self.name} row {row}: the image has no bytes")
            yield encoded


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """The ClassLabel names that the `datasets` library leaves in a schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _read_split(parts: Sequence[_Part]) -> tuple[RawSplit, tuple[str, ...] | None]:
    first = parts[0]
    image_column, label_column = first.choose(IMAGE_COLUMNS, "image"), first.choose(LABEL_COLUMNS, "label")
    for part in parts[1:]:
        part.choose((image_column,), "image")
        part.choose((label_column,), "label")
    kind = first.schema.field(image_column).type
    if not (pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise ValueError(f"{first.name}: column {image_column} must hold encoded images, got {kind}")
    labels = [part.labels(label_column) for part in parts]
    ends = np.cumsum([len(part) for part in labels])

    def images() -> Iterator[bytes | Path]:
        for part in parts:
            yield from part.images(image_column)

    def describe(index: int) -> str:
        part = int(np.searchsorted(ends, index, side="right"))
        return f"{parts[part].name} row {index - ends[part] + len(labels[part])}"

    return RawSplit(np.concatenate(labels), images, describe), _class_names(first.schema, label_column)


def _read(splits: Mapping[str, Sequence[Any]], part: Callable[[str, Any], _Part]) -> RawDataset:
    """The train split and the first test split with labels: ImageNet's has none (all -1), but its validation split."""
    read = {name: _read_split([part(name, file) for file in files]) for name, files in splits.items()}
    train, classes = read["train"]
    tests = [read[name][0] for name in TEST_NAMES if name in read]
    labelled = (split for split in tests if len(split) == 0 or (split.labels >= 0).any())
    return RawDataset(train, next(labelled, tests[0]), classes)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, in the folder itself or in the one sub-folder that has them."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        splits: dict[str, list[Path]] = {}
        for name in ("train", *TEST_NAMES):
            pattern = re.compile(rf"{name}([-_.].*)?\.parquet$")
            if found := sorted(path for path in place.glob("*.parquet") if pattern.match(path.name)):
                splits[name] = found
        if splits:
            return splits
    return {}


def _check_shards(path: Path) -> None:
    if match := _SHARD.search(path.name):
        total = match.group(2)
        for number in range(int(total)):
            other = path.with_name(f"{path.name[: match.start()]}-{number:0{len(match.group(1))}d}-of-{total}.parquet")
            if not other.is_file():
                raise FileNotFoundError(f"{other}: missing, though {path.name} says {int(total)} files")


def _file_part(_split: str, path: Path) -> _Part:
    def batches(column: str) -> Iterator[pa.Array]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield batch.column(0)

    try:
        return _Part(str(path), pq.read_schema(path), batches)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file, cut off or damaged ({_one_line(error)})") from error


def locate_parquet(folder: Path) -> Located | None:
    """Finds a data set of parquet files; None if the folder holds none.

    Args:
        folder: holds train-*.parquet and test-, val-, valid- or validation-*.parquet, each with a column of encoded
            images and one of integer labels.

    Raises:
        FileNotFoundError: the train split, the test split or a shard (`-00001-of-00004`) is missing.
    """
    splits = _split_files(folder)
    if not splits:
        return None
    paths = [path for files in splits.values() for path in files]
    for path in paths:
        _check_shards(path)
    if "train" not in splits:
        raise FileNotFoundError(f"{folder}: no train-*.parquet, only {', '.join(splits)}")
    if len(splits) == 1:
        allowed = " or ".join(f"{name}-*.parquet" for name in TEST_NAMES)
        raise FileNotFoundError(f"{folder}: no test split beside train-*.parquet; must be {allowed}")
    return Located(stat_files(paths), partial(_read, splits, _file_part))


def locate_hub(path: str, config: str | None) -> Located:
    """Loads a data set with the `datasets` library.

    Args:
        path: the id of a data set on the Hugging Face hub (owner/name), or a folder that the library can read.
        config: the hub data set's configuration; None for its only one.

    Raises:
        ValueError: the library cannot load it, or it has no image or label column or no train or test split.
    """
    import datasets  # takes a second to import, and only this kind of data needs it

    try:
        loaded = datasets.load_dataset(path, config)
    except Exception as error:  # the library raises its builders' and the hub's errors as they come
        raise ValueError(f"data hf: path {path!r}: the datasets library cannot load it ({_one_line(error)})") from error
    splits = {name: [loaded[name]] for name in ("train", *TEST_NAMES) if name in loaded}
    if "train" not in splits or len(splits) == 1:
        got = ", ".join(loaded)
        raise ValueError(f"data hf: path {path!r} must have a train split and {' or '.join(TEST_NAMES)}, got {got}")
    files = stat_files(Path(file["filename"]) for split in loaded.values() for file in split.cache_files)

    def part(name: str, split: Any) -> _Part:
        def batches(column: str) -> Iterator[pa.Array]:
            for table in split.select_columns([column]).with_format("arrow").iter(1024):
                yield table[column].combine_chunks()

        return _Part(f"{path} {name}", split.features.arrow_schema, batches)

    return Located(files, partial(_read, splits, part))
