"""How far a study is while its cells run: each one's step, speed and time left, and the study's expected end.

Read from the cells' own records, because a cell is a process (of anybody's launcher, on any machine) that prints into a
log of its own. On a terminal one line is redrawn; in a log each cell gets a line now and then.
"""

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ssl_bench.records.reader import RecordError, read_run
from ssl_bench.runtime.console import duration, say
from ssl_bench.study.cells import CellStore
from ssl_bench.study.estimate import workload
from ssl_bench.study.grid import Cell

REDRAW_EVERY = 1.0  # seconds, on a terminal
LOOK_EVERY = 10.0  # seconds between looks at the records, in a log
NEXT_CELL_EVERY = 4.0  # seconds until a terminal's line shows the next of several running cells
SOONEST, LATEST = 60.0, 600.0  # seconds between a cell's lines in a log: at least, and at most if it trains on
PARTS = 10  # of a run, after each of which its cell gets a line before LATEST


@dataclass(frozen=True)
class Standing:
    """How far a run is, by the last line of its metrics.

    Attributes:
        step, total: steps completed, and the run's length.
        images_per_second: 0 where the run has not said.
        left: seconds of training, None where nobody knows; evaluations come on top.
    """

    step: int
    total: int
    images_per_second: float
    left: float | None

    def __str__(self) -> str:
        return self.text(f" ({100 * self.step // self.total}%)")

    def text(self, share: str = "") -> str:
        """The same in words, with or without the share that is done."""
        text = f"step {self.step}/{self.total}{share}"
        if self.step >= self.total:
            return f"{text}, evaluating"
        text += f", {self.images_per_second:.0f} images/s" if self.images_per_second else ""
        return text + (f", {duration(self.left)} left" if self.left is not None else "")


def standing(folder: Path) -> Standing | None:
    """How far the run in a folder is; None before its first line of metrics, and where nothing can be read."""
    try:
        record = read_run(folder, metrics=False)
    except (RecordError, OSError):
        return None
    row, total = record.last_metrics, record.provenance.get("plan", {}).get("total_steps")
    if "step" not in row or not total:
        return None
    speed, batch_size = row.get("images_per_second"), record.recipe.get("batch_size")
    known = all(isinstance(one, int | float) and 0 < one < math.inf for one in (speed, batch_size))
    left = max(0.0, total - row["step"]) * batch_size / speed if known else None
    return Standing(row["step"], int(total), speed if known else 0.0, left)  # type: ignore[arg-type]


class StudyProgress:
    """Shows the cells that run and the study's own progress; call it as often as you like.

    Args:
        store: the runs.
        total: the number of cells.
        places: how many run at a time.
    """

    def __init__(self, store: CellStore, total: int, places: int) -> None:
        self.store, self.total, self.places = store, total, places
        self._took: dict[tuple[Any, ...], list[float]] = {}  # seconds of the cells that have ended here
        self._said: dict[str, tuple[float, int]] = {}  # by cell: when it had its last line, and at which step
        self._live: Any = None
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # Redrawn by our own calls and not by rich's thread; what others print meanwhile appears above the line.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def ended(self, cell: Cell, seconds: float) -> None:
        """Takes how long a cell took from its start to its end."""
        self._took.setdefault(_kind(cell), []).append(seconds)

    def __call__(self, running: Mapping[Cell, float], waiting: Sequence[Cell], done: int) -> None:
        """Shows what is new.

        Args:
            running: the cells that run here, with the time of the monotonic clock at which each began.
            waiting: those that have not begun.
            done: the number of those that have ended.
        """
        now = time.monotonic()
        if now - self._looked < (REDRAW_EVERY if self._live else LOOK_EVERY) or not running:
            return
        self._looked = now
        known = {cell: standing(self.store.folder(cell)) for cell in running}
        study = f"{done}/{self.total} done"
        left = self._left(running, known, waiting, now)
        if left is not None:
            study += f", end {time.strftime('%a %H:%M', time.localtime(time.time() + left))}"
        if self._live is not None:
            from rich.text import Text

            cell = list(running)[int(now / NEXT_CELL_EVERY) % len(running)]
            at = known[cell]
            text = f"{study} | {at.text() if at else 'starting'}: "
            room = max(8, self._live.console.width - len(text))
            # Cells differ in the end of their labels.
            label = cell.label if len(cell.label) <= room else "…" + cell.label[1 - room :]
            self._live.update(Text(text + label, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        if left is not None:
            study += f", in {duration(left)}"
        for cell, began in running.items():
            at = known[cell]
            if at is None:
                continue
            said, step = self._said.get(cell.name, (began, 0))
            another_part = at.step * PARTS // at.total > step * PARTS // at.total
            if now - said >= SOONEST and (another_part or (at.step > step and now - said >= LATEST)):
                self._said[cell.name] = (now, at.step)
                say(f"  {at}: {cell.label} ({study})")

    def _left(
        self, running: Mapping[Cell, float], known: Mapping[Cell, Standing | None], waiting: Sequence[Cell], now: float
    ) -> float | None:
        """Seconds to the study's end: by what cells have taken here so far, or the running ones' own estimates."""
        guesses = {
            cell: now - began + at.left
            for cell, began in running.items()
            if (at := known[cell]) is not None and at.left is not None
        }
        every = [took for times in self._took.values() for took in times] or list(guesses.values())
        if not every:
            return None

        def usual(cell: Cell) -> float:
            return statistics.mean(self._took.get(_kind(cell)) or every)

        # What cells of its kind have taken, starting and evaluating with it, says more than a cell's own speed.
        whole = {cell: usual(cell) if _kind(cell) in self._took else guesses.get(cell, usual(cell)) for cell in running}
        seconds = [max(0.0, whole[cell] - (now - began)) for cell, began in running.items()]
        return max(max(seconds), (sum(seconds) + sum(map(usual, waiting))) / self.places)


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What cells that take about as long have in common."""
    return (*workload(cell.recipe), cell.recipe.epochs, cell.recipe.steps)
