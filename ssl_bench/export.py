"""Run records to keep or to share: ``ssl-bench export RUNS -o FOLDER`` copies them without weights and local paths."""

import json
import shutil
from pathlib import Path, PurePath
from typing import Any

from ssl_bench.console import say
from ssl_bench.reading import METRICS, RESULTS, RUN, SESSIONS, RecordError, find_runs
from ssl_bench.storage import atomic_file

TEXTS = (RUN, METRICS, RESULTS, SESSIONS, "analysis.json")
TELEMETRY = "telemetry.parquet"


def export_records(runs: str | Path, output: str | Path) -> list[Path]:
    """Copies the records of all runs that have ended; `ssl-bench report` reads the copies like the runs.

    Weights, snapshots and checkpoints stay behind. An absolute path, alone or as a ``key=path`` word, is cut to its
    last part: it means something on one machine only. Runs that have not ended, and damaged ones, are named and left
    out.

    Args:
        runs: a folder of runs, at any depth.
        output: the folder to copy to, with the same sub-folders; a record that is there already is replaced.

    Returns:
        the folders written.

    Raises:
        ValueError, OSError: one line; no runs, an output inside the runs or around them, or a file that cannot be
            written.
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
        if record.results is None:
            say(f"left out: {record.folder}: the run is {record.status}")
            continue
        folder = target / record.folder.relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TEXTS:
            if (record.folder / name).is_file():
                with atomic_file(folder / name, sync=False) as file:
                    file.write(_without_paths((record.folder / name).read_text(), lines=name.endswith("l")).encode())
        if (record.folder / TELEMETRY).is_file():
            shutil.copyfile(record.folder / TELEMETRY, folder / TELEMETRY)
        written.append(folder)
    if not written:
        raise RecordError(f"{runs}: no run that has ended, nothing to export")
    return written


def _without_paths(text: str, *, lines: bool) -> str:
    """A JSON file's text, or one of JSON lines, with the paths in its strings cut short."""
    if lines:
        return "".join(json.dumps(_shortened(json.loads(line))) + "\n" for line in text.splitlines())
    return json.dumps(_shortened(json.loads(text)), indent=2) + "\n"


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str):
        key, equals, path = value.rpartition("=")
        return key + equals + PurePath(path).name if PurePath(path).is_absolute() else value
    return value
