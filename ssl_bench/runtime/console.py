"""A run's messages and progress: a bar on a terminal, a line every so often in a log file."""

import sys
import time
from typing import Any, Self

SOON = 60.0  # seconds; the expected end of a run that ends sooner is not worth a line
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

    width = 40  # of the bar, in columns

    def __init__(self, title: str, total: int | None, *, enabled: bool = True):
        self.title, self.total, self.enabled = title, total, enabled
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            title = [TextColumn("{task.description}")] if self.title else []
            text = TextColumn("{task.fields[text]}", markup=False)
            bar = BarColumn(bar_width=self.width)
            left = TimeRemainingColumn(compact=True)
            self._bar = Progress(*title, bar, left, text, console=Console(stderr=True), refresh_per_second=4)
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
            say(f"{self.title}: {text}" if self.title else text)


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
    """Shows a run's progress on 80 columns; call it after every step.

    Once the speed is known, by the second line of the metrics, a line says when the run is expected to end.

    Args:
        total: the run's length in steps.
        enabled: False on all processes but the first.
    """

    width = 12

    def __init__(self, total: int, *, enabled: bool = True):
        super().__init__("", total, enabled=enabled)
        self.total: int = total
        self._status, self._expected = "", False
        self._marks: list[tuple[float, int]] = []  # time and step of the first line and of the last

    def __call__(self, step: int, row: dict[str, float] | None) -> None:
        if row:
            online = f", online {row['online_top1']:.1f}%" if "online_top1" in row else ""
            self._status = f"loss {row['loss']:.4g}{online}, {row['images_per_second']:.0f} images/s"
            self._marks[1:] = []
            self._marks += [(time.monotonic(), step)]
            if len(self._marks) == 2 and not self._expected:
                self._expected = True
                self._expect(self._left(step))
        left = self._left(step)
        text = f"{self._status}, {duration(left)} left" if left and self._bar is None else self._status
        self._show(step, f"step {step}/{self.total} {text}", now=step == self.total)

    def _left(self, step: int) -> float | None:
        """Seconds to the end, by the speed since the first line, before which much is done once."""
        if len(self._marks) < 2 or step == self.total:
            return None
        (at, first), (now, last) = self._marks
        return (now - at) / (last - first) * (self.total - step)

    def _expect(self, left: float | None) -> None:
        if self.enabled and left and left > SOON:
            line = f"expected end: {time.strftime('%a %H:%M', time.localtime(time.time() + left))}"
            line += f", in {duration(left)}"
            say(line) if self._bar is None else self._bar.console.print(line)


def duration(seconds: float) -> str:
    """Seconds in a readable unit: 40 s, 12 min, 3.5 h, 12 days."""
    for limit, size, unit in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
