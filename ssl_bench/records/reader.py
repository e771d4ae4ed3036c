"""Reads run directories, one or all below a folder, whatever state the runs are in."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ssl_bench.records.lock import is_claimed
from ssl_bench.records.storage import one_line, restored

FORMAT = 1  # of a run directory; another number is refused by name

Ending = Literal["finished", "diverged", "collapsed"]

RUN, METRICS, RESULTS, SESSIONS = "run.json", "metrics.jsonl", "results.json", "sessions.jsonl"


class RecordError(ValueError):
    """A run directory cannot be used or read; one line that names it and the reason."""


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        folder: the run directory.
        status: "running" (a live process holds it), "interrupted", "finished", "diverged" or "collapsed".
        identity: the hash of what in the recipe can change the result.
        recipe: the resolved recipe, nested.
        provenance: all of run.json.
        metrics: the rows of metrics.jsonl by ascending step, without a last line that was cut short.
        results: results.json, or None before the end.
    """

    folder: Path
    status: str
    identity: str
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None


@dataclass(frozen=True)
class Skipped:
    """A folder that looks like a run's and cannot be read, with the reason in one line."""

    folder: Path
    reason: str


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads a run directory, whatever state the run is in.

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
    return RunRecord(
        folder=folder,
        status=status if results is None else results["status"],
        identity=provenance["identity"],
        recipe=provenance["recipe"],
        provenance=provenance,
        metrics=[row for _, row in metric_rows(folder)],
        results=results,
    )


def find_runs(folder: str | Path) -> tuple[list[RunRecord], list[Skipped]]:
    """All runs below a folder, at any depth, and what had to be skipped; sorted by path.

    A folder counts as skipped if it has a run's files but cannot be read, or if it has files and no sub-folders and no
    run.json. Hidden folders and linked ones are passed over.

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
                found.append(read_run(here))
            except (RecordError, OSError) as error:
                skipped.append(Skipped(here, str(error)))
    return found, skipped


def read_head(folder: Path) -> dict[str, Any]:
    """run.json, with its format and the keys that every reader needs checked."""
    head = _read_json(folder / RUN)
    for key, kind in (("identity", str), ("recipe", dict)):
        if not isinstance(head.get(key), kind):
            raise RecordError(f"{folder / RUN}: damaged: no {key!r}")
    return head


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json, checked and with its numbers restored; None where the run has not ended."""
    path = folder / RESULTS
    if not path.exists():
        return None
    results = restored(_read_json(path))
    if results.get("status") not in get_args(Ending) or not isinstance(results.get("evaluations"), list):
        raise RecordError(f"{path}: damaged: status {results.get('status')!r} or the evaluations are not a run's")
    return results


def metric_rows(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl with their contents, without a last one that a killed writer cut short.

    Raises:
        RecordError: a line before the last is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    # Only the last line may be cut short, by a writer that was killed; damage before it is not a crash's.
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((line, restored(row)))
        elif number < len(lines):
            raise RecordError(f"{path}: damaged: line {number} of {len(lines)} is not a row with a step")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file of this format version."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: damaged: {one_line(error)}") from error
    if not isinstance(value, dict) or "format" not in value:
        raise RecordError(f"{path}: not written by ssl_bench: it has no 'format'")
    if value["format"] != FORMAT:
        raise RecordError(f"{path}: its format is {value['format']!r}, this version reads {FORMAT}")
    return value
