"""Run records to keep or to share: ``ssl-bench export RUNS -o FOLDER`` copies them without weights and local paths."""

import hashlib
import json
import re
import shutil
from pathlib import Path, PurePath
from typing import Any

from ssl_bench.records.reader import METRICS, RESULTS, RUN, SESSIONS, RecordError, RunRecord, find_runs, read_head
from ssl_bench.records.storage import atomic_file, one_line
from ssl_bench.runtime.console import say

TEXTS = (RUN, METRICS, RESULTS, SESSIONS, "analysis.json")
TELEMETRY = "telemetry.parquet"


def export_records(runs: str | Path, output: str | Path, *, layers: bool = True) -> list[Path]:
    """Copies the records of all runs that have ended; `ssl-bench report` reads the copies like the runs.

    Weights, snapshots and checkpoints are left out. An absolute path, alone, as ``key=path`` or in a list, is cut to
    its last part: it means something on one machine only. Runs that have not ended, and damaged ones, are named and
    left out.

    Args:
        runs: a folder of runs, at any depth, or a run.
        output: the folder to copy to, with the same sub-folders (of a single run, with its name); an earlier copy of
            the same run is replaced.
        layers: whether with the layers' statistics, most of a long run's record.

    Returns:
        the folders written.

    Raises:
        ValueError, OSError: one line; no runs, an output inside the runs or around them, another run's record in the
            way, or a file that cannot be written.
    """
    source, target = Path(runs), Path(output)
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"export: output must be a folder neither inside {runs} nor around it, got {output}")
    records, skipped = find_runs(source)
    for one in skipped:
        say(f"left out: {one.reason}")
    written = []
    for record in records:
        relative = record.folder.relative_to(source)
        folder = target / (relative if relative.parts else inner.name)
        if record.results is None:
            say(f"left out: {record.folder}: the run is {record.status}")
        elif (texts := _texts(record)) is not None:
            _write(record, texts, folder, layers)
            written.append(folder)
    if not written:
        raise RecordError(f"{runs}: no run that has ended, nothing to export")
    return written


def _texts(record: RunRecord) -> dict[str, str] | None:
    """The record's text files as they are to be written; None, with a message, if one is damaged."""
    texts = {}
    for name in TEXTS:
        path = record.folder / name
        if path.is_file():
            try:
                texts[name] = _without_paths(path.read_text(), lines=name.endswith("l"))
            except ValueError as error:
                say(f"left out: {path}: damaged: {one_line(error)}")
                return None
    return texts


def _write(record: RunRecord, texts: dict[str, str], folder: Path, layers: bool) -> None:
    """One record's files; those of an earlier copy that the run no longer has are deleted."""
    if (folder / RUN).is_file() and (found := read_head(folder)["identity"]) != record.identity:
        raise RecordError(f"export: {folder}: it holds the record of another run ({found}); choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TEXTS, TELEMETRY):
        if name in texts:
            with atomic_file(folder / name, synced=False) as file:
                file.write(texts[name].encode())
        elif layers and name == TELEMETRY and (record.folder / name).is_file():
            with open(record.folder / name, "rb") as telemetry, atomic_file(folder / name, synced=False) as file:
                shutil.copyfileobj(telemetry, file)
        else:
            (folder / name).unlink(missing_ok=True)


def _without_paths(text: str, *, lines: bool) -> str:
    """The text of a JSON file, or of one of JSON lines, with the paths in its strings cut."""
    if lines:
        whole = text[: text.rfind("\n") + 1]  # without a last line that a killed writer cut short
        return "".join(json.dumps(_cut(json.loads(line))) + "\n" for line in whole.splitlines())
    value = json.loads(text)
    data = value.get("recipe", {}).get("data", {})
    # A data set that is what lies at its path is told apart by it, so a hash of the whole path is kept.
    if PurePath(data.get("path") or "").is_absolute():
        digest = hashlib.sha256(data["path"].encode()).hexdigest()[:8]
        data["path"] = f"{PurePath(data['path']).name}-{digest}"
    return json.dumps(_cut(value), indent=2) + "\n"


def _cut(value: Any) -> Any:
    """A value of JSON with the absolute paths in its strings cut to their last parts."""
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    if not isinstance(value, str):
        return value
    key, equals, argument = value.partition("=")
    if PurePath(value).is_absolute():
        return PurePath(value).name or value
    if PurePath(argument).is_absolute():
        return key + equals + PurePath(argument).name
    # In a list: whatever starts with a slash after a bracket, a comma, a quote, a colon or an equals sign.
    return re.sub(r"(?<=[\[{(,'\"=:])/[^\]}),'\"]+", lambda match: PurePath(match[0]).name, value)
