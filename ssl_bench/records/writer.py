"""The record of a run: what ran, what it measured, and what came out, in one directory that survives any crash.

    run.json            written before step 0 and never changed: recipe, code, packages, hardware, parameter groups
    sessions.jsonl      one line for each start: when, from which step, on how many processes
    metrics.jsonl       one line for each logging interval, by ascending step
    telemetry.parquet   layer statistics (``telemetry/part-*.parquet`` while the run goes on)
    backbone.safetensors    the trained backbone
    results.json        the end: status and evaluations
    requeue             while a run that a signal stopped waits to be started again
    checkpoints/        see ``ssl_bench.records.checkpoint``
    snapshots/          see ``ssl_bench.records.snapshots``

A ``step`` is the number of steps completed, in checkpoints, metrics and telemetry alike. NaN and infinity are the
strings "nan", "inf" and "-inf".
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ssl_bench.records.lock import Lock, claim
from ssl_bench.records.reader import (
    FORMAT,
    METRICS,
    RESULTS,
    RUN,
    SESSIONS,
    Ending,
    RecordError,
    read_head,
    read_results,
    sound_rows,
)
from ssl_bench.records.storage import atomic_file, atomic_json, jsonable, naming, one_line, remove_temporaries, sync
from ssl_bench.records.telemetry import TelemetryStore
from ssl_bench.runtime.console import say
from ssl_bench.runtime.interrupt import REQUEUE_NOTE

BACKBONE = "backbone.safetensors"

Resume = Literal["never", "auto"]
Differences = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]


class Run:
    """The writing side of a run directory; made by ``Run.open``, used as a context or closed by ``close``.

    On all but the main process every method does nothing.

    Attributes:
        folder: the run directory.
        resumed: whether the directory held this run already (always False on other than the main process).
        results: what ``results.json`` holds if the run has ended already, else None; known on every process.
    """

    def __init__(
        self, folder: Path, recipe: Mapping[str, Any], identity: str, lock: Lock | None, *, made: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._made = made  # the folders that this process has just made, the innermost first
        self.resumed = lock is not None and (folder / RUN).exists()
        self.results = read_results(folder)
        self._recipe, self._identity = recipe, identity
        self._lock = lock
        self._telemetry = TelemetryStore(folder)
        self._metrics: int | None = None  # file descriptor, opened with the first row
        self._last_step, self._rows = -1, 0
        self._positioned = not self.resumed

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        recipe: Mapping[str, Any],
        identity: str,
        *,
        resume: Resume,
        main_process: bool,
        differences: Differences | None = None,
    ) -> "Run":
        """Locks a run directory, made if need be, for a new run or to continue the one it holds.

        Args:
            run_dir: the directory.
            recipe: the resolved recipe, nested.
            identity: the hash of what in the recipe can change the result; equal identities are the same experiment.
            resume: "never" refuses a directory that holds a run; "auto" continues it if it has the same identity.
            main_process: whether this process writes; exactly one does.
            differences: (recorded recipe, given recipe) -> lines that say where they differ, for the refusal.

        Raises:
            InUseError: a live process holds the directory.
            RecordError: it holds a run that must not be continued, or files that are not a run's.
            OSError: it cannot be made or written.
        """
        if resume not in get_args(Resume):
            raise ValueError(f"resume must be {' or '.join(get_args(Resume))}, got {resume!r}")
        folder = Path(run_dir)
        if not main_process:
            return cls(folder, recipe, identity, None)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        with naming(f"run_dir {folder}: making the directory"):
            folder.mkdir(parents=True, exist_ok=True)
            visible = (path.name for path in folder.iterdir() if not path.name.startswith("."))
            names = sorted(name for name in visible if name != REQUEUE_NOTE)
        if names and RUN not in names:  # before anything is written: somebody's own files must stay as they are
            raise RecordError(
                f"run_dir {folder} must be a run's directory, empty or new, got {names[0]!r} and no {RUN} in it"
            )
        lock = claim(folder)
        try:
            with naming(f"run_dir {folder}: removing temporary files"):
                for part in (folder, *(folder / name for name in ("telemetry", "checkpoints", "snapshots"))):
                    remove_temporaries(part)
            if (folder / RUN).exists():
                if resume == "never":
                    advice = "continue it with resume=auto or choose another run_dir"
                    raise RecordError(f"run_dir {folder}: it holds a run; {advice}")
                head = read_head(folder)
                if head["identity"] != identity:
                    reason = "; ".join(differences(head["recipe"], recipe)) if differences else ""
                    reason = reason or f"identity: the run has {head['identity']}, asked for {identity}"
                    raise RecordError(f"run_dir {folder}: it holds a run of another recipe: {reason}")
            (folder / REQUEUE_NOTE).unlink(missing_ok=True)
            return cls(folder, recipe, identity, lock, made=made)
        except BaseException:
            lock.release()
            raise

    def write_provenance(self, provenance: Mapping[str, Any], *, step: int = 0) -> None:
        """Writes ``run.json``, unless the run has one, and adds this start to ``sessions.jsonl``.

        Args:
            provenance: see ``ssl_bench.records.provenance.collect_provenance``.
            step: the steps completed before this start.
        """
        if self._lock is None:
            return
        if not self.resumed:
            head = {"format": FORMAT, "identity": self._identity, "recipe": self._recipe}
            atomic_json(self.folder / RUN, {**head, **provenance})
        session = {key: provenance[key] for key in ("started", "world_size", "code", "hardware") if key in provenance}
        _cut_short_line(self.folder / SESSIONS)
        descriptor = self._open(SESSIONS)
        try:
            self._append(descriptor, SESSIONS, {"step": step, **session})
        finally:
            os.close(descriptor)

    def rows_until(self, step: int) -> dict[str, int]:
        """How many rows the metrics have up to a step, and the last one's step: what a checkpoint should remember.

        A damaged line ends the count: nothing after it can be relied on.
        """
        steps = [row["step"] for _, row in sound_rows(self.folder)[0] if row["step"] <= step]
        return {"metrics_rows": len(steps), "metrics_step": steps[-1] if steps else -1}

    @property
    def position(self) -> dict[str, int]:
        """`rows_until` now, by this writer's own count."""
        return {"metrics_rows": self._rows, "metrics_step": self._last_step}

    def truncate_to(self, step: int | None) -> None:
        """Drops what was recorded after a checkpoint, so that continuing leaves no gap and no double line.

        A resumed run must call it once before it logs. What is damaged before there is dropped too, or set aside, with
        a line: `rows_until` tells beforehand whether the metrics reach as far as a checkpoint knows.

        Args:
            step: the steps that the checkpoint has completed; None without a checkpoint: everything is dropped.
        """
        if self._lock is None:
            return
        step = -1 if step is None else step
        self._close_metrics()
        rows, damage = sound_rows(self.folder)
        if damage:
            say(f"{damage}; the lines from there on are dropped")
        kept = [(line, row) for line, row in rows if row["step"] <= step]
        if (self.folder / METRICS).exists():
            # The lines' own bytes, so that a resumed run's file is the same as an uninterrupted one's.
            with atomic_file(self.folder / METRICS) as file:
                file.writelines(line for line, _ in kept)
        self._last_step, self._rows = kept[-1][1]["step"] if kept else -1, len(kept)
        with naming(f"{self.folder}: dropping telemetry after step {step}"):
            self._telemetry.truncate_to(step)
        self._positioned = True

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row to ``metrics.jsonl``, whole, before it returns.

        Args:
            row: numbers and strings; "step" (the steps completed) is one of them and larger than in the row before.

        Raises:
            ValueError: the step does not grow, or JSON cannot hold a value.
            OSError: the disk is full or not writable. The file then ends with the row before.
        """
        if not self._may_log():
            return
        step = int(row["step"])
        if step <= self._last_step:
            raise ValueError(f"record: step must be > {self._last_step}, the last recorded, got {step}")
        if self._metrics is None:
            self._metrics = self._open(METRICS)
        self._append(self._metrics, METRICS, {**row, "step": step})
        self._last_step, self._rows = step, self._rows + 1

    def log_telemetry(self, columns: Mapping[str, Any]) -> None:
        """Takes one block of layer statistics (see ``TelemetryStore.append``)."""
        if self._may_log():
            self._telemetry.append(columns)

    def _may_log(self) -> bool:
        if self._lock is not None and not self._positioned:
            raise RuntimeError("record: a resumed run must call truncate_to before it logs")
        return self._lock is not None

    def sync(self) -> None:
        """Makes all rows so far survive a power failure; call it before saving a checkpoint, which relies on them."""
        if self._lock is None:
            return
        with naming(f"{self.folder}: waiting for the disk"):
            if self._metrics is not None:
                os.fsync(self._metrics)
            self._telemetry.sync()
            sync(self.folder)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json`` atomically; with it the run has ended.

        Args:
            results: "status" (see `Ending`), "evaluations" (a list of dicts that each name their
                "protocol") and whatever else came out.

        Raises:
            ValueError: another status, or an evaluation without a protocol.
        """
        if self._lock is None:
            return
        if results.get("status") not in get_args(Ending):
            raise ValueError(f"results: status must be {' or '.join(get_args(Ending))}, got {results.get('status')!r}")
        evaluations = list(results.get("evaluations", []))
        _check_evaluations(evaluations)
        atomic_json(self.folder / RESULTS, {"format": FORMAT, **results, "evaluations": evaluations})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Ends the run: writes the results, then joins the telemetry's parts, then closes.

        In this order, because no trouble with a side record may cost the results. Readers take the parts as well.
        """
        if self._lock is None:
            return
        self.sync()
        self.write_results(results)
        self.tidy()
        self.close()

    def tidy(self) -> None:
        """Joins the telemetry's parts of a run that has ended; where that fails, says so and leaves them."""
        if self._lock is None:
            return
        try:
            self._telemetry.consolidate()
        except (OSError, ValueError) as error:
            say(f"{self.folder}: the telemetry stays in parts: {one_line(error)}")

    def forget(self) -> None:
        """Before `close`, after a mistake that the first step found: a new run leaves no record of it."""
        if self._lock is None or not self._lock.held or self.resumed or self._rows:
            return
        for name in (RUN, SESSIONS):
            (self.folder / name).unlink(missing_ok=True)
        self._telemetry = TelemetryStore(self.folder)  # without its rows
        shutil.rmtree(self.folder / "telemetry", ignore_errors=True)

    def close(self) -> None:
        """Releases the directory, and removes it if nothing was recorded in it; a second call does nothing."""
        self._close_metrics()
        if self._lock is not None:
            if self._made and self._lock.held and all(path.name == ".lock" for path in self.folder.iterdir()):
                shutil.rmtree(self.folder, ignore_errors=True)  # a mistake was found before the first step
                with suppress(OSError):  # another run is in it by now
                    for folder in self._made[1:]:
                        folder.rmdir()
            else:
                with suppress(OSError):  # of use to whoever looks at a run that has failed, and no more
                    self._telemetry.write()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, name: str) -> int:
        with naming(f"{self.folder / name}: opening"):
            return os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _append(self, descriptor: int, name: str, row: Mapping[str, Any]) -> None:
        """Appends one line to a file; if the disk takes only a part of it, takes that back and raises."""
        data = (json.dumps(jsonable(row), allow_nan=False) + "\n").encode()
        # Unbuffered: a killed run loses no row that it has logged, and a reader sees every row at once.
        size = os.fstat(descriptor).st_size
        with naming(f"{self.folder / name}: writing"):
            try:
                written = os.write(descriptor, data)
                while written < len(data):
                    written += os.write(descriptor, data[written:])
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None


def _cut_short_line(path: Path) -> None:
    """Takes back a last line that a killed writer or a power failure cut short, onto which the next would be glued."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with naming(f"{path}: taking back a line that was cut short"):
            os.truncate(path, text.rfind(b"\n") + 1)


def add_evaluations(run_dir: str | Path, evaluations: Iterable[Mapping[str, Any]]) -> None:
    """Adds evaluations to the results of a run that has ended; one of the same protocol, model and seed is replaced.

    Args:
        run_dir: the run directory.
        evaluations: dicts that each name their "protocol" and, if there is one, "model" and "seed".

    Raises:
        InUseError: the run is going on.
        RecordError: it has not ended, or cannot be read.
        ValueError: an evaluation names no protocol.
    """
    folder = Path(run_dir)
    added = list(evaluations)
    _check_evaluations(added)
    read_head(folder)
    lock = claim(folder, patience=10.0)  # another evaluation may be writing just now
    try:
        results = read_results(folder)
        if results is None:
            raise RecordError(f"{folder}: the run has not ended, there is no {RESULTS} to add to")
        both = [*results["evaluations"], *added]
        merged = {(entry["protocol"], entry.get("model"), entry.get("seed")): entry for entry in both}
        atomic_json(folder / RESULTS, {**results, "evaluations": list(merged.values())})
    finally:
        lock.release()


def _check_evaluations(evaluations: Iterable[Mapping[str, Any]]) -> None:
    for entry in evaluations:
        if not isinstance(entry.get("protocol"), str):
            raise ValueError(f"results: an evaluation must name its protocol, got {', '.join(entry) or 'nothing'}")
