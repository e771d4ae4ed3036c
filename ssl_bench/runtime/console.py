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


class _Bar:
    """A bar on a terminal; elsewhere a line every so often."""

    def __init__(self, title: str, total: int | None, *, enabled: bool = True):
        self.title, self.total, self.enabled = title, total, enabled
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            text = TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, text, console=Console(stderr=True), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, done: int, text: str, *, now: bool = False) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif self.enabled and (now or time.monotonic() - self._said > LINE_EVERY):
            self._said = time.monotonic()
            say(f"{self.title}: {text}")


class Tally(_Bar):
    """Shows how much of something long is done, with nothing else to say: ``with Tally(...) as done: done(3)``.

    Args:
        title: what is being done.
        total: all of it; None where nobody knows.
        unit: what is counted; "bytes" are shown as MiB.
    """

    def __init__(self, title: str, total: int | None, unit: str):
        super().__init__(title, total)
        self.unit = unit

    def __call__(self, done: int) -> None:
        """Takes how much is done by now."""
        counts = [count for count in (done, self.total) if count is not None]
        if self.unit == "bytes":
            self._show(done, "/".join(f"{count / 2**20:.1f}" for count in counts) + " MiB")
        else:
            self._show(done, "/".join(map(str, counts)) + f" {self.unit}")


class Progress(_Bar):
    """Shows a run's progress; call it after every step.

    Args:
        total: the run's length in steps.
        title: the run's name.
        enabled: False on all processes but the first.
    """

    def __init__(self, total: int, title: str, *, enabled: bool = True):
        super().__init__(title, total, enabled=enabled)
        self._status = ""

    def __call__(self, step: int, row: dict[str, float] | None) -> None:
        if row:
            self._status = f"loss {row['loss']:.4g}, {row['images_per_second']:.0f} images/s"
        self._show(step, f"step {step}/{self.total} {self._status}", now=step == self.total)
