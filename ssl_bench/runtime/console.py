"""A run's messages and progress: a bar on a terminal, a line every so often in a log file."""

import sys
import time
from typing import Any, Self

LINE_EVERY = 30.0  # seconds between lines where no terminal can show a bar (a batch job's log file)


def say(message: str) -> None:
    """Prints one line on standard error; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


class Ticker:
    """Prints the progress of something long every so often; call it with (what, done, total)."""

    def __init__(self, *, enabled: bool = True):
        self.enabled, self._said = enabled, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.enabled and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            say(f"  {what}: {done}/{total}")


class Tally:
    """Shows how much of something long is done, with nothing else to say: ``with Tally(...) as done: done(3)``.

    Args:
        title: what is being done.
        total: all of it; None where nobody knows.
        unit: what is counted; "bytes" are shown as MiB.
    """

    def __init__(self, title: str, total: int | None, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, amount="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, done: int) -> None:
        """Takes how much is done by now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, amount=self._amount(done))
        elif time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            say(f"{self.title}: {self._amount(done)}")

    def _amount(self, done: int) -> str:
        counts = [count for count in (done, self.total) if count is not None]
        if self.unit == "bytes":
            return "/".join(f"{count / 2**20:.1f}" for count in counts) + " MiB"
        return "/".join(map(str, counts)) + f" {self.unit}"


class Progress:
    """Shows a run's progress; call it after every step.

    Args:
        total: the run's length in steps.
        title: the run's name.
        enabled: False on all processes but the first.
    """

    def __init__(self, total: int, title: str, *, enabled: bool = True):
        self.total, self.title, self.enabled = total, title, enabled
        self._bar: Any = None
        self._row: dict[str, float] = {}
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"), console=Console(stderr=True), refresh_per_second=4,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, status="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, step: int, row: dict[str, float] | None) -> None:
        if not self.enabled:
            return
        self._row = row or self._row
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=self._status())
        elif time.monotonic() - self._said > LINE_EVERY or step == self.total:
            self._said = time.monotonic()
            say(f"{self.title}: step {step}/{self.total} {self._status()}")

    def _status(self) -> str:
        if not self._row:
            return ""
        return f"loss {self._row['loss']:.4g}, {self._row['images_per_second']:.0f} images/s"
