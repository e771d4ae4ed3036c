"""Reads run directories, one or all below a folder, whatever state the runs are in."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from ssl_bench.records.lock import is_claimed
from ssl_bench.records.storage import one_line, restored

FORMAT = 1  # of a run directory; another number is refused by name

Ending = Literal["finished", "diverged", "collapsed", "at chance"]

# How a run can fail, in the order of its printed words. Records of before there was "at chance" say "collapsed".
FAILURES: tuple[Ending, ...] = get_args(Ending)[1:]

RUN, METRICS, RESULTS, SESSIONS = "run.json", "metrics.jsonl", "results.json", "sessions.jsonl"


# A record of ours nests eight levels; a deeper one is no record, and would end in Python's recursion limit.
DEPTH = 64
LARGEST = 2**63  # of integers: above it no file format and no plot has a place for them
_UNUSUAL = re.compile(rb"\d{19}|\\u|\0")  # a large integer, half a character or (as UTF-16) either in disguise
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read for its last row


class RecordError(ValueError):
    """A run directory cannot be used or read; one line that names it and the reason."""


Number = float | Literal["nan", "inf", "-inf"] | None  # as `storage.jsonable` writes it


class _Part(BaseModel):
    """A part of a record of which the readers need some keys; the others are kept as they are."""

    model_config = ConfigDict(extra="allow")


class _Plan(_Part):
    total_steps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    steps_per_epoch: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    optimizer: dict[str, Any] = {}
    schedule: dict[str, Any] = {}


class _Head(_Part):
    """run.json."""

    identity: StrictStr
    recipe: dict[str, Any]
    plan: _Plan = _Plan()
    param_groups: list[dict[str, Any]] = []


class _Evaluation(_Part):
    protocol: StrictStr
    model: StrictStr = "trained"
    metrics: dict[str, Any] = {}
    chance: Number = None
    n_test: StrictInt | None = Field(default=None, gt=0)


class _Results(_Part):
    """results.json."""

    status: Ending
    step: StrictInt | None = None
    layer: StrictStr | None = None
    evaluations: list[_Evaluation]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        folder: the run directory.
        status: "running" (a live process holds it), "interrupted", "finished", "diverged", "collapsed" (its
            embeddings) or "at chance" (its accuracies).
        identity: the hash of what in the recipe can change the result.
        recipe: the resolved recipe, nested.
        provenance: all of run.json.
        results: results.json, or None before the end.
    """

    folder: Path
    status: str
    identity: str
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    results: dict[str, Any] | None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl by ascending step, without a last line that was cut short.

        Raises:
            RecordError: a line before the last is damaged.
        """
        return [row for _, row in metric_rows(self.folder)]

    @cached_property
    def last_metrics(self) -> dict[str, Any]:
        """The last row of metrics.jsonl, read from the file's end alone; empty where there is none."""
        return _last_row(self.folder / METRICS)


@dataclass(frozen=True)
class Skipped:
    """A folder that looks like a run's and cannot be read, with the reason in one line."""

    folder: Path
    reason: str


def read_run(run_dir: str | Path, *, metrics: bool = True) -> RunRecord:
    """Reads a run directory, whatever state the run is in.

    Args:
        run_dir: the folder.
        metrics: whether to read the metrics at once; False = when they are asked for.

    Raises:
        RecordError: no run, a damaged file, or another format version; one line that names it.
    """
    folder = Path(run_dir)
    if not (folder / RUN).is_file():
        raise RecordError(f"{folder}: not a run directory, it has no {RUN}")
    provenance = read_head(folder)
    claimed = is_claimed(folder)  # asked first: a run that ends meanwhile then shows its results
    results = read_results(folder)
    status = "running" if claimed else "interrupted"
    record = RunRecord(
        folder=folder,
        status=status if results is None else results["status"],
        identity=provenance["identity"],
        recipe=provenance["recipe"],
        provenance=provenance,
        results=results,
    )
    _ = record.metrics if metrics else record.last_metrics
    return record


def find_runs(folder: str | Path) -> tuple[list[RunRecord], list[Skipped]]:
    """All runs below a folder, at any depth, and what had to be skipped; sorted by path.

    A folder counts as skipped if it has a run's files but cannot be read, or if it has files and no sub-folders and no
    run.json. Hidden folders and linked ones are passed over. Of the metrics only the last row is read here.

    Raises:
        RecordError: the folder does not exist.
    """
    if not Path(folder).is_dir():
        raise RecordError(f"{folder}: no such folder of runs")
    found, skipped = [], []
    for name, folders, files in os.walk(folder):
        here = Path(name)
        folders[:] = sorted(child for child in folders if not child.startswith("."))
        visible = [file for file in files if not file.startswith(".")]
        if RUN in files or METRICS in files or RESULTS in files or (visible and not folders):
            folders.clear()
            try:
                found.append(read_run(here, metrics=False))
            except (RecordError, OSError) as error:
                skipped.append(Skipped(here, str(error)))
    return found, skipped


def read_head(folder: Path) -> dict[str, Any]:
    """run.json, with its format and the keys that every reader needs checked."""
    return _checked(folder / RUN, _read_json(folder / RUN), _Head)


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json, checked and with its numbers restored; None where the run has not ended."""
    path = folder / RESULTS
    if not path.exists():
        return None
    restored_: dict[str, Any] = restored(_checked(path, _read_json(path), _Results))
    return restored_


def metric_rows(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl with their contents, without a last one that a killed writer cut short.

    Raises:
        RecordError: a line before the last is damaged.
    """
    rows, damage = sound_rows(folder)
    if damage:
        raise RecordError(damage)
    return rows


def sound_rows(folder: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], str]:
    """The lines of metrics.jsonl up to the first damaged one, and what is wrong with that one.

    Returns:
        the lines with their contents; and "" where all are sound, but for a last one that was cut short.
    """
    path = folder / METRICS
    if not path.exists():
        return [], ""
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    # Only the last line may be cut short, by a writer that was killed; damage before it is not a crash's.
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append((line, dict(restored(row))))
        elif number < len(lines):
            return rows, f"{path}: damaged: line {number} of {len(lines)} is not a row with a step"
    return rows, ""


def iterate_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl one after another, for a reader that keeps only part of each.

    Their numbers that are not finite are the strings of the file.

    Raises:
        RecordError: a line before the last is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return
    damaged = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if damaged:
                raise RecordError(f"{path}: damaged: line {damaged} is not a row with a step")
            row = _row(line)
            if row is None:
                damaged = number  # unless it is the last one
            else:
                yield row


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is cut short or not a row with a step."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < LARGEST:
        return None
    return row


def _last_row(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        lines = file.read().splitlines(keepends=True)
    return next((dict(restored(row)) for line in reversed(lines[-3:]) if (row := _row(line)) is not None), {})


def plain_json(path: Path) -> Any:
    """A JSON file's contents, if any reader can hold them: not too deep, no huge integers, no half characters.

    Raises:
        RecordError: damaged, in one line.
        OSError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
        return value if _is_plain(raw) else _plain(value, path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: damaged: {one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file of this format version."""
    try:
        value = plain_json(path)
    except OSError as error:
        raise RecordError(f"{path}: damaged: {one_line(error)}") from error
    if not isinstance(value, dict) or "format" not in value:
        raise RecordError(f"{path}: not written by ssl_bench: it has no 'format'")
    if value["format"] != FORMAT:
        raise RecordError(f"{path}: its format is {repr(value['format'])[:40]}, this version reads {FORMAT}")
    return value


def _is_plain(raw: bytes) -> bool:
    """Whether a text has nothing that `_plain` could refuse or change; most have not, and a study reads thousands."""
    return raw.count(b"{") + raw.count(b"[") <= DEPTH and raw.isascii() and _UNUSUAL.search(raw) is None


def _plain(value: Any, path: Path, depth: int = 0) -> Any:
    """The value, if any reader can hold it: not too deep, no huge integers, and text that UTF-8 can write."""
    if isinstance(value, str):  # JSON can escape half a surrogate pair, which no file can hold
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float) or value is None:
        return value
    if isinstance(value, int):
        if not -LARGEST < value < LARGEST:
            raise RecordError(f"{path}: damaged: an integer of more than 63 bits")
        return value
    if depth > DEPTH:
        raise RecordError(f"{path}: damaged: it nests more than {DEPTH} levels")
    if isinstance(value, dict):
        return {_plain(key, path): _plain(item, path, depth + 1) for key, item in value.items()}
    return [_plain(item, path, depth + 1) for item in value]


def _checked(path: Path, value: dict[str, Any], schema: type[_Part]) -> dict[str, Any]:
    """The value, if it has what every reader needs."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {repr(first['input'])[:40]}"
        raise RecordError(f"{path}: damaged: {where!r}: {first['msg'].lower()}{got}") from None
    return value
