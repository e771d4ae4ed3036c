"""Data sets as tables: folders of parquet files, and anything that the `datasets` library can load or has saved.

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

from ssl_bench.data.folders import TEST_NAMES, is_litter, scan, stat_files
from ssl_bench.data.raw import UNLABELLED, Files, Located, RawDataset, RawSplit

IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, in any of Arrow's ways."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds encoded images: bytes, or the struct of bytes and path that `datasets` writes."""
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    index = kind.get_field_index("bytes")
    by_path = index < 0 and kind.get_field_index("path") >= 0
    return by_path or (index >= 0 and (_is_bytes(kind.field(index).type) or pa.types.is_null(kind.field(index).type)))


@dataclass(frozen=True)
class _Labels:
    """The labels of a part or a split.

    Args:
        values: (n,) int64; -1 = none.
        names: the class names in the order of the values; None where the labels are bare numbers.
        text: whether the column holds the names themselves, so that their order is ours.
    """

    values: np.ndarray
    names: tuple[str, ...] | None
    text: bool = False

    def under(self, names: Sequence[str], where: str, whose: str) -> np.ndarray:
        """The values as indices of other names.

        Raises:
            ValueError: a label is used whose name is not among them.
        """
        assert self.names is not None
        index = {name: label for label, name in enumerate(names)}
        table = np.array([index.get(name, UNLABELLED) for name in self.names] + [UNLABELLED], dtype=np.int64)
        used = np.unique(self.values[self.values != UNLABELLED])
        if len(wrong := used[(used < 0) | (used >= len(self.names))]):
            raise ValueError(f"{where}: labels must be 0 to {len(self.names) - 1}, got {wrong[0]}")
        if unknown := [self.names[label] for label in used if table[label] == UNLABELLED]:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"{where}: class must be one of {whose} ({known}), got {unknown[0]!r}")
        return table[self.values]


@dataclass(frozen=True)
class _Part:
    """A piece of a split: a parquet file, or a whole split that the `datasets` library loaded.

    Args:
        name: for error messages.
        schema: its columns.
        rows: how many it has.
        batches: one column, some thousand rows at a time.
        folder: what the paths of images that lie in files of their own are relative to.
    """

    name: str
    schema: pa.Schema
    rows: int
    batches: Callable[[str], Iterator[pa.Array]]
    folder: Path = Path()

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

    def labels(self, column: str) -> _Labels:
        """The labels of a column of integers, of integers with names (`ClassLabel`), or of names."""
        kind = self.schema.field(column).type
        batches = [_plain(batch) for batch in self.read(column)]
        rows, empty = sum(map(len, batches)), sum(batch.null_count for batch in batches)
        if rows and empty == rows and (pa.types.is_null(kind) or _is_text(kind) or _is_number(kind)):
            return _Labels(np.full(rows, UNLABELLED, dtype=np.int64), None)
        if not (_is_number(kind) or _is_text(kind)) or empty:
            got = f"{kind}, {empty} rows empty"
            raise ValueError(f"{self.name}: column {column} must hold an integer or a name in every row, got {got}")
        if _is_text(kind):
            cells = np.array([cell for batch in batches for cell in batch.to_pylist()], dtype=object)
            names, values = np.unique(cells.astype(str), return_inverse=True) if rows else ((), np.empty(0, np.int64))
            return _Labels(np.asarray(values, dtype=np.int64), tuple(map(str, names)), text=True)
        arrays = (batch.cast(pa.int64()).to_numpy(zero_copy_only=False) for batch in batches)
        return _Labels(np.concatenate([np.empty(0, np.int64), *arrays]), _class_names(self.schema, column))

    def images(self, column: str) -> Iterator[bytes | Path]:
        """The encoded images, or the files that hold them."""
        for row, cell in enumerate(cell for batch in self.read(column) for cell in batch.to_pylist()):
            encoded = cell.get("bytes") if isinstance(cell, dict) else cell
            if encoded is None and cell and cell.get("path"):
                encoded = Path(self.folder, cell["path"])
            if encoded is None:
                raise ValueError(f"{self.name} row {row}: the image has no bytes")
            yield encoded


def _plain(batch: pa.Array) -> pa.Array:
    return batch.dictionary_decode() if pa.types.is_dictionary(batch.type) else batch


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """The ClassLabel names that the `datasets` library leaves in a schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label_column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _joined(parts: Sequence[_Part], labels: Sequence[_Labels]) -> tuple[_Labels, list[str]]:
    """The labels of all parts of a split under one numbering, and what a user should know of it.

    Each part may number its classes in another order: by name, where there are names.
    """
    labelled = [each for each in labels if len(each.values) and (each.values != UNLABELLED).any()]
    named = [each for each in labelled if each.names is not None]
    if not named:
        names = next((each.names for each in labels if each.names is not None), None)
        return _Labels(np.concatenate([each.values for each in labels]), names), []
    fixed = next((each.names for each in named if not each.text), None)
    names = fixed or tuple(sorted({name for each in named for name in each.names or ()}))
    values, notes, whose = [], [], f"those that {parts[0].name} names"
    for part, each in zip(parts, labels, strict=True):
        if each.names is not None:
            values.append(each.under(names, part.name, whose))
        elif (each.values == UNLABELLED).all():
            values.append(each.values)
        elif fixed is None:
            raise ValueError(f"{part.name}: labels must be names as in the other files, got numbers")
        else:
            notes.append(f"{part.name} does not name its classes: its labels are taken for numbers of {whose}")
            values.append(each.values)
    return _Labels(np.concatenate(values), names, text=fixed is None), notes


def _read_split(parts: Sequence[_Part]) -> tuple[RawSplit, _Labels, list[str]]:
    image_column = parts[0].choose(IMAGE_COLUMNS, "image")
    label_column = next((column for column in LABEL_COLUMNS if column in parts[0].schema.names), None)
    for part in parts:
        part.choose((image_column,), "image")
        kind = part.schema.field(image_column).type
        if not _holds_images(kind):
            raise ValueError(f"{part.name}: column {image_column} must hold encoded images, got {kind}")
    if label_column is not None:
        each = [part.labels(part.choose((label_column,), "label")) for part in parts]
        labels, notes = _joined(parts, each)
        lengths = [len(part.values) for part in each]
    else:
        lengths = [part.rows for part in parts]
        labels = _Labels(np.full(sum(lengths), UNLABELLED, dtype=np.int64), None)
        got = ", ".join(parts[0].schema.names)
        notes = [f"{parts[0].name} has no label column ({' or '.join(LABEL_COLUMNS)}), only {got}"]
    ends = np.cumsum(lengths)

    def images() -> Iterator[bytes | Path]:
        for part in parts:
            yield from part.images(image_column)

    def describe(index: int) -> str:
        part = int(np.searchsorted(ends, index, side="right"))
        return f"{parts[part].name} row {index - ends[part] + lengths[part]}"

    return RawSplit(labels.values, images, describe), labels, notes


def _read(
    splits: Mapping[str, Sequence[Any]], part: Callable[[str, Any], _Part], known: tuple[str, ...] = ()
) -> RawDataset:
    """The train split and the first test split with labels: ImageNet's has none (all -1), but its validation split."""
    parts = {name: [part(name, file) for file in files] for name, files in splits.items()}
    train, named, notes = _read_split(parts["train"])
    notes = [*known, *notes]
    tests = {name: _read_split(parts[name]) for name in TEST_NAMES if name in parts}
    chosen = next((name for name, (split, _, _) in tests.items() if split.labelled), None)
    if chosen is None or not train.labelled:
        return RawDataset(train, None, named.names, tuple(notes))
    test, test_named, more = tests[chosen]
    notes += more
    if (first := next(iter(tests))) != chosen:
        notes.append(f"the {first} split has no labels: {chosen} is the test split")
    where = parts[chosen][0].name
    if named.names is not None and test_named.names is not None:
        values = test_named.under(named.names, where, "the train split's")
        test = RawSplit(values, test.images, test.describe)
    elif len(test) and (named.text or test_named.text):
        raise ValueError(f"{where}: labels must be names or numbers in both splits, got names in one only")
    elif named.names != test_named.names and len(test):
        one, other = ("test", "train") if named.names is not None else ("train", "test")
        notes.append(f"the {one} split does not name its classes: its labels are taken for numbers of {other}'s")
    return RawDataset(train, test, named.names or test_named.names, tuple(notes))


def _splits_in(place: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for name in ("train", *TEST_NAMES):
        pattern = re.compile(rf"{name}([-_.].*)?\.parquet$")
        if found := sorted(path for path in place.glob("*.parquet") if pattern.match(path.name)):
            splits[name] = found
    return splits


def _split_files(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The parquet files of each split, in the folder itself or in the one sub-folder that has them."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not is_litter(path.name))
    configs = {path.name: splits for path in below if (splits := _splits_in(path))}
    if config is not None:
        if configs and config not in configs:
            raise ValueError(f"{folder}: data.hf_config must be {' or '.join(configs)}, got {config!r}")
        return configs.get(config, {})
    if here := _splits_in(folder):
        return here
    if len(configs) > 1:
        raise ValueError(
            f"{folder}: holds several configurations: data.hf_config must be {' or '.join(configs)} (for data=hf; or "
            "give that sub-folder as the path), got null"
        )
    return next(iter(configs.values()), {})


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
        with pq.ParquetFile(path) as file:
            return _Part(str(path), file.schema_arrow, file.metadata.num_rows, batches, path.parent)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file, cut off or damaged ({_one_line(error)})") from error


def locate_parquet(folder: Path, config: str | None = None) -> Located | None:
    """Finds a data set of parquet files; None if the folder holds none.

    Args:
        folder: holds train-*.parquet and test-, val-, valid- or validation-*.parquet, each with a column of encoded
            images and one of labels: integers, integers with the names of a `ClassLabel`, or names. The test split and
            the labels may be missing.
        config: which sub-folder, where several hold such files.

    Raises:
        FileNotFoundError: the train split or a shard (`-00001-of-00004`) is missing.
        ValueError: several sub-folders hold such files, and none is chosen.
    """
    splits = _split_files(folder, config)
    if not splits:
        return None
    paths = [path for files in splits.values() for path in files]
    for path in paths:
        _check_shards(path)
    if "train" not in splits:
        raise FileNotFoundError(f"{folder}: no train-*.parquet, only {', '.join(splits)}")
    return Located(stat_files(paths), partial(_read, splits, _file_part))


def is_saved(folder: Path) -> bool:
    """Whether the `datasets` library saved a set there, by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def locate_saved(folder: Path) -> Located:
    """Opens what `save_to_disk` of the `datasets` library saved: splits, or one set, which is the train split.

    Raises:
        ValueError: the library cannot open it, or there is no train split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder}: the datasets library cannot open it ({_one_line(error)})") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return _of_library(str(folder), splits, tuple(sorted(scan(folder))))


def locate_hub(path: str, config: str | None) -> Located:
    """Loads a data set with the `datasets` library.

    Args:
        path: the id of a data set on the Hugging Face hub (owner/name), or a folder that the library can read.
        config: the hub data set's configuration; None for its only one, or its default.

    Raises:
        ValueError: the library cannot load it, it has no image column or no train split, or it has several
            configurations and none is chosen.
    """
    import datasets  # takes a second to import, and only this kind of data needs it

    notes: tuple[str, ...] = ()
    try:
        if config is None:
            configs = datasets.get_dataset_config_names(path)
            default = datasets.get_dataset_default_config_name(path) if len(configs) > 1 else None
            if len(configs) > 1 and default is None:
                raise ValueError(f"it has several: data.hf_config must be {' or '.join(configs)}, got null")
            config = default
            if default is not None:
                notes = (f"of the configurations {', '.join(configs)} the default, {default}, is taken",)
        loaded = datasets.load_dataset(path, config)
    except Exception as error:  # the library raises its builders' and the hub's errors as they come
        raise ValueError(f"data hf: path {path!r}: the datasets library cannot load it ({_one_line(error)})") from error
    files = stat_files(Path(file["filename"]) for split in loaded.values() for file in split.cache_files)
    return _of_library(path, dict(loaded), files, notes)


def _of_library(path: str, loaded: Mapping[str, Any], files: Files, notes: tuple[str, ...] = ()) -> Located:
    splits = {name: [loaded[name]] for name in ("train", *TEST_NAMES) if name in loaded}
    if "train" not in splits:
        raise ValueError(f"data hf: path {path!r} must have a train split, got {', '.join(loaded)}")

    def part(name: str, split: Any) -> _Part:
        def batches(column: str) -> Iterator[pa.Array]:
            for table in split.select_columns([column]).with_format("arrow").iter(1024):
                yield table[column].combine_chunks()

        return _Part(f"{path} {name}", split.features.arrow_schema, len(split), batches)

    return Located(files, partial(_read, splits, part, notes))
