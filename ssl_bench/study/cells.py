"""Where a study's cells live, and the state of each.

    RUNS/STUDY/NAME/            the cell's run directory; NAME ends in the recipe's identity
    RUNS/.cells/NAME.log        what its processes printed
    RUNS/.cells/NAME.failed.json    why the last attempt failed
    RUNS/.cells/NAME.claim-N    who is working on it

A run that another study below RUNS made of the same recipe is the same experiment, and is not done twice. It is found
by the identity at the end of its folder's name, whatever stands before it: earlier versions named their runs otherwise.
"""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ssl_bench.records.lock import is_claimed
from ssl_bench.records.reader import RUN, Ending, RecordError, read_head, read_results
from ssl_bench.records.storage import atomic_json
from ssl_bench.runtime.paths import file_name
from ssl_bench.study.claims import CellClaim, holder
from ssl_bench.study.grid import Cell

Status = Literal[Ending, "failed", "running", "interrupted", "missing"]
STATUSES: tuple[Status, ...] = get_args(Status)
ENDED: frozenset[Status] = frozenset(get_args(Ending))
LOG_LINES = 30  # of a failed run's output, kept with the error
_COARSEST_CLOCK = 3_000_000_000  # nanoseconds; some file systems note a change to two seconds


@dataclass(frozen=True)
class State:
    """The state of a cell.

    Attributes:
        status: see `STATUSES`. An interrupted run has a record and no end; one that failed to learn is done.
        detail: the error of a failed one, the holder of a running one; else empty.
    """

    status: Status
    detail: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class _Listing(NamedTuple):
    changed: int  # the directory's time of change, in ns, when it was read
    runs: dict[str, list[Path]]


class CellStore:
    """The folder of all runs, seen by one study's worker.

    Args:
        runs: the folder, shared by all workers; need not exist.
        owner: of the claims, if it outlives a process (a batch job's name).
    """

    def __init__(self, runs: str | Path, *, owner: str = "") -> None:
        self.runs, self.owner = Path(runs), owner
        self.notes = self.runs / ".cells"
        self._listed: dict[Path, _Listing] = {}

    def folder(self, cell: Cell) -> Path:
        """The run directory: the study's own, unless the run is already in another study's."""
        own = self.runs / file_name(cell.study) / cell.name
        if own.is_dir() or not self.runs.is_dir():
            return own
        studies = [own.parent, *sorted(path for path in self.runs.iterdir() if not path.name.startswith("."))]
        found = (path for study in studies for path in self._by_identity(study).get(cell.identity, ()))
        return next((path for path in found if (path / RUN).is_file()), own)

    def _by_identity(self, study: Path) -> dict[str, list[Path]]:
        """The run directories in a study's, by the identity in their names."""
        try:
            changed = study.stat().st_mtime_ns
            known = self._listed.get(study)
            if known is None or known.changed != changed:
                runs: dict[str, list[Path]] = {}
                for name in sorted(os.listdir(study)):
                    runs.setdefault(name.rpartition("-")[2], []).append(study / name)
                known = _Listing(changed, runs)
                if time.time_ns() - changed > _COARSEST_CLOCK:  # else a later change may leave the same time
                    self._listed[study] = known
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return known.runs

    def log(self, cell: Cell) -> Path:
        """The file that takes what its processes print."""
        return self.notes / f"{cell.name}.log"

    def state(self, cell: Cell) -> State:
        """The state of the cell; a damaged record is a failure and no exception."""
        folder = self.folder(cell)
        claimed = is_claimed(folder)  # asked first: a run that ends meanwhile then shows its results
        status, damage = self._ending(cell, folder)
        if status is not None:
            return State(status)
        if damage:
            return State("failed", damage)
        if claimed:
            return State("running")
        if who := holder(self.notes, cell.name):
            return State("running", who)
        failure = self.failure(cell)
        if failure is not None:
            return State("failed", str(failure.get("error", "")))
        return State("interrupted" if (folder / RUN).exists() else "missing")

    def ending(self, cell: Cell) -> tuple[Status | None, str]:
        """How the cell's run ended.

        Returns:
            its status, or None where it has not ended; then also what is wrong with its record, or "".
        """
        return self._ending(cell, self.folder(cell))

    def _ending(self, cell: Cell, folder: Path) -> tuple[Status | None, str]:
        try:
            results = read_results(folder)
            if results is None:
                return None, ""
            identity = read_head(folder)["identity"]
        except (RecordError, OSError) as error:
            return None, str(error)
        if identity != cell.identity:
            return None, f"{folder}: the identity of its run must be {cell.identity}, got {identity}"
        return results["status"], ""

    def claim(self, cell: Cell) -> CellClaim | None:
        """Claims the cell for this worker; None if another has it."""
        return CellClaim.acquire(self.notes, cell.name, owner=self.owner)

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Why the last attempt failed, as `fail` wrote it."""
        path = self._failure_path(cell)
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            return {"error": f"{path}: damaged: {error}"}

    def failed_at(self, cell: Cell) -> float:
        """When it failed, by the file system's clock; 0 if it has not."""
        try:
            return self._failure_path(cell).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def fail(self, cell: Cell, *, code: int, command: Sequence[str], reason: str = "") -> str:
        """Keeps why an attempt failed.

        Args:
            cell: the cell.
            code: the process's exit code; negative for a signal.
            command: what was started.
            reason: if it is known from elsewhere than the output.

        Returns:
            the error in one line.
        """
        try:
            with open(self.log(cell), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
                lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        except FileNotFoundError:
            lines = []
        # The line that says what went wrong: ours begin with "error:", a traceback ends with the exception.
        ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = [line for line in lines if line.strip() and not line.startswith(" ")]
        if code < 0:
            found = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        else:
            found = (ours or last or [f"exit code {code}"])[-1]
        error = reason or found
        note = {
            "error": error,
            "exit_code": code,
            "command": shlex.join(command),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "log": lines,
        }
        self.notes.mkdir(parents=True, exist_ok=True)
        atomic_json(self._failure_path(cell), note)
        return error

    def forget_failure(self, cell: Cell) -> None:
        """Before another attempt, and after one that succeeded."""
        self._failure_path(cell).unlink(missing_ok=True)

    def _failure_path(self, cell: Cell) -> Path:
        return self.notes / f"{cell.name}.failed.json"
