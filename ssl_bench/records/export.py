"""Run records to keep or to share: ``ssl-bench export RUNS -o FOLDER`` copies them without weights and local paths."""

import hashlib
import json
import re
import shutil
from pathlib import Path, PurePath
from typing import Any

from ssl_bench.records.reader import METRICS, RESULTS, RUN, SESSIONS, RecordError, RunRecord, find_runs, read_head
from ssl_bench.records.storage import atomic_file
from ssl_bench.runtime.console import say

TEXTS = (RUN, METRICS, RESULTS, SESSIONS, "analysis.json")
TELEMETRY = "telemetry.parquet"

# Data sets that are the folder they lie in: there the path tells two experiments apart.
BY_PATH = ("folder", "hf")


def export_records(runs: str | Path, output: str | Path) -> list[Path]:
    """Copies the records of all runs that have ended; `ssl-bench report` reads the copies like the runs.

    Weights, snapshots and checkpoints stay behind. An absolute path, alone, as a ``key=path`` word or in a list, is cut
    to its last part: it means something on one machine only. Runs that have not ended, and damaged ones, are named and
    left out.

    Args:
        runs: a folder of runs, at any depth, or a run.
        output: the folder to copy to, with the same sub-folders (of a single run, with its name); a copy of the same
            run that is there already is replaced.

    Returns:
        the folders written.

    Raises:
        ValueError, OSError: one line; no runs, an output inside the runs or around them, another run's record in the
            way, or a file that cannot be written.
    """
    source, target = Path(runs), Path(output)
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"export: output {output}: allowed: a folder neither inside {runs} nor around it")
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
            _write(record, texts, folder)
            written.append(folder)
    if not written:
        raise RecordError(f"{runs}: no run that has ended, nothing to export")
    return written


def _texts(record: RunRecord) -> dict[str, str] | None:
    """The record's text files as they are to be written; None, and a line said, if one is damaged."""
    texts = {}
    for name in TEXTS:
        path = record.folder / name
        if path.is_file():
            try:
                texts[name] = _without_paths(path.read_text(), lines=name.endswith("l"))
            except ValueError as error:
                say(f"left out: {path}: damaged: {' '.join(str(error).split())}")
                return None
    return texts


def _write(record: RunRecord, texts: dict[str, str], folder: Path) -> None:
    """One record's files; what the run no longer has goes."""
    if (folder / RUN).is_file() and (found := read_head(folder)["identity"]) != record.identity:
        raise RecordError(f"export: {folder}: it holds the record of another run ({found}); choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEXTS:
        if name in texts:
            with atomic_file(folder / name, sync=False) as file:
                file.write(texts[name].encode())
        else:
            (folder / name).unlink(missing_ok=True)
    if (record.folder / TELEMETRY).is_file():
        shutil.copyfile(record.folder / TELEMETRY, folder / TELEMETRY)
    else:
        (folder / TELEMETRY).unlink(missing_ok=True)


def _without_paths(text: str, *, lines: bool) -> str:
    """A JSON file's text, or one of JSON lines, with the paths in its strings cut short."""
    if lines:
        return "".join(json.dumps(_shortened(json.loads(line))) + "\n" for line in text.splitlines())
    value = json.loads(text)
    data = value.get("recipe", {}).get("data", {})
    if data.get("name") in BY_PATH and PurePath(data.get("path") or "").is_absolute():
        digest = hashlib.sha256(data["path"].encode()).hexdigest()[:8]
        data["path"] = f"{PurePath(data['path']).name}-{digest}"
    return json.dumps(_shortened(value), indent=2) + "\n"


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    """A string with its absolute paths cut to their last parts."""
    key, equals, word = text.partition("=")
    if PurePath(text).is_absolute():
        return PurePath(text).name or text
    if PurePath(word).is_absolute():
        return key + equals + PurePath(word).name
    # In a list: whatever starts with a slash after a bracket, a comma, a quote or an equals sign.
    return re.sub(r"(?<=[\[{(,'\"=:])/[^\]}),'\"]+", lambda match: PurePath(match[0]).name, text)
