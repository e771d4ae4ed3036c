"""Data sets as Hugging Face lays them out: folders of parquet files, and anything the `datasets` library can load."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_bench.data.decode import RawSplit
from ssl_bench.data.folders import TEST_NAMES, Files, Located, RawDataset, labelled_split, stat_files

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, in the folder itself or in the one sub-folder that has them.

    Raises:
        FileNotFoundError: a shard (`-00001-of-00004`) is missing.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        splits: dict[str, list[Path]] = {}
        for name in ("train", *TEST_NAMES):
            pattern = re.compile(rf"{name}([-_.].*)?\.parquet$")
            if found := sorted(path for path in place.glob("*.parquet") if pattern.match(path.name)):
                splits[name] = found
        if splits:
            for paths in splits.values():
                _check_shards(paths)
            return splits
    return {}


def _check_shards(paths: Sequence[Path]) -> None:
    for path in paths:
        if match := _SHARD.search(path.name):
            total = match.group(2)
            for number in range(int(total)):
                name = path.name[: match.start()] + f"-{number:0{len(match.group(1))}d}-of-{total}.parquet"
                if not (path.parent / name).is_file():
                    raise FileNotFoundError(
                        f"{path.parent / name}: missing, though {path.name} says {int(total)} files"
                    )


def _choose(columns: Sequence[str], wanted: Sequence[str], what: str, where: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ValueError(f"{where}: no {what} column; got columns {', '.join(columns)}, allowed {', '.join(wanted)}")


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file, cut off or damaged ({_one_line(error)})") from error


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """The ClassLabel names that the `datasets` library leaves in a parquet file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _read_labels(path: Path, column: str) -> np.ndarray:
    try:
        labels = _open(path).read(columns=[column])[column]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: column {column} cannot be read ({_one_line(error)})") from error
    if not pa.types.is_integer(labels.type) or labels.null_count:
        got = f"{labels.type}, {labels.null_count} rows empty"
        raise ValueError(f"{path}: column {column} must hold an integer in every row, got {got}")
    return labels.to_numpy().astype(np.int64)


def _read_images(paths: Sequence[Path], column: str) -> Iterator[bytes]:
    for path in paths:
        row = 0
        try:
            for batch in _open(path).iter_batches(batch_size=1024, columns=[column]):
                cells = batch.column(0)
                if pa.types.is_struct(cells.type):
                    cells = cells.field("bytes")
                for cell in cells.to_pylist():
                    if cell is None:
                        raise ValueError(f"{path} row {row}: the image has no bytes")
                    yield cell
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged after row {row} ({_one_line(error)})") from error


def _describe(paths: Sequence[Path], starts: np.ndarray, index: int) -> str:
    shard = int(np.searchsorted(starts, index, side="right")) - 1
    return f"{paths[shard]} row {index - starts[shard]}"


def _read_split(paths: Sequence[Path]) -> tuple[RawSplit, tuple[str, ...] | None]:
    schemas = [_open(path).schema_arrow for path in paths]
    image_column = _choose(schemas[0].names, IMAGE_COLUMNS, "image", str(paths[0]))
    label_column = _choose(schemas[0].names, LABEL_COLUMNS, "label", str(paths[0]))
    for path, schema in zip(paths[1:], schemas[1:], strict=True):
        _choose(schema.names, (image_column,), "image", str(path))
        _choose(schema.names, (label_column,), "label", str(path))
    kind = schemas[0].field(image_column).type
    if not (pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise ValueError(f"{paths[0]}: column {image_column} must hold encoded images (binary, or a struct with bytes)")
    labels = [_read_labels(path, label_column) for path in paths]
    starts = np.cumsum([0, *(len(part) for part in labels)])[:-1]
    split = RawSplit(
        labels=np.concatenate(labels),
        images=partial(_read_images, paths, image_column),
        describe=partial(_describe, paths, starts),
    )
    return split, _class_names(schemas[0], label_column)


def _read_parquet(splits: Mapping[str, Sequence[Path]]) -> RawDataset:
    train, classes = _read_split(splits["train"])
    tests = [_read_split(splits[name])[0] for name in TEST_NAMES if name in splits]
    return RawDataset(train, labelled_split(tests), classes)


def locate_parquet(folder: Path) -> Located | None:
    """Finds a data set of parquet files; None if the folder holds none.

    Args:
        folder: holds train-*.parquet and test-, val-, valid- or validation-*.parquet, each with a column of encoded
            images and one of integer labels.

    Raises:
        FileNotFoundError: the train split, the test split or a shard is missing.
    """
    splits = split_files(folder)
    if not splits:
        return None
    if "train" not in splits:
        raise FileNotFoundError(f"{folder}: no train-*.parquet, only {', '.join(splits)}")
    if len(splits) == 1:
        allowed = ", ".join(f"{name}-*.parquet" for name in TEST_NAMES)
        raise FileNotFoundError(f"{folder}: no test split beside train-*.parquet; allowed {allowed}")
    files: Files = stat_files(path for paths in splits.values() for path in paths)
    return Located(files, partial(_read_parquet, splits))


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
    names = [name for name in TEST_NAMES if name in loaded]
    if "train" not in loaded or not names:
        raise ValueError(
            f"data hf: path {path!r} must have a train split and {' or '.join(TEST_NAMES)}, got {', '.join(loaded)}"
        )
    files = stat_files(Path(file["filename"]) for split in loaded.values() for file in split.cache_files)
    return Located(files, partial(_read_hub, loaded, names, path))


def _read_hub(loaded: Mapping[str, Any], test_names: Sequence[str], where: str) -> RawDataset:
    train, classes = _read_hub_split(loaded["train"], f"{where} train")
    tests = [_read_hub_split(loaded[name], f"{where} {name}")[0] for name in test_names]
    return RawDataset(train, labelled_split(tests), classes)


def _read_hub_split(split: Any, where: str) -> tuple[RawSplit, tuple[str, ...] | None]:
    import datasets

    image_column = _choose(split.column_names, IMAGE_COLUMNS, "image", where)
    label_column = _choose(split.column_names, LABEL_COLUMNS, "label", where)
    encoded = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    labels = np.asarray(split.with_format("numpy", columns=[label_column])[label_column][:])
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: column {label_column} must hold integers or a ClassLabel, got {labels.dtype}")

    def images() -> Iterator[bytes | Path]:
        for row in encoded:
            cell = row[image_column]
            yield cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])

    names = getattr(split.features[label_column], "names", None)
    return RawSplit(labels.astype(np.int64), images, lambda i: f"{where} row {i}"), tuple(names) if names else None
