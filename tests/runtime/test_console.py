"""Progress as lines of a log and as a bar on a terminal of 80 columns."""

import io
import sys

import pytest

from ssl_bench.runtime import console
from ssl_bench.runtime.console import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def trained(progress: Progress, clock: list[float], steps: int, seconds: float) -> None:
    with progress:
        for step in range(1, steps + 1):
            clock[0] += 100.0 if step == 1 else seconds  # what is done once is no measure of the rest
            row = {"loss": 1234.5678, "images_per_second": 98765.4, "online_top1": 45.67}
            progress(step, row if step % 10 == 0 else None)


def test_a_log_gets_a_line_every_so_often_and_the_expected_end_once(clock, capsys):
    trained(Progress(1_000_000), clock, 200, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("expected end: ") for line in lines) == 1
    assert lines[1].startswith("expected end: ")
    assert lines[1].endswith(", in 11.6 days")  # 999,980 s
    assert lines[-1] == "step 187/1000000 loss 1235, online 45.7%, 98765 images/s, 11.6 days left"
    assert 5 <= len(lines) <= 9
    assert max(map(len, lines)) <= 80


def test_a_short_run_says_no_end_and_its_last_step(clock, capsys):
    trained(Progress(30), clock, 30, 0.1)
    assert capsys.readouterr().err.splitlines()[-1] == "step 30/30 loss 1235, online 45.7%, 98765 images/s"


def test_a_terminal_of_80_columns_shows_all_of_it_on_one_line(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    trained(Progress(100_000), clock, 40, 1.0)
    last = terminal.getvalue().replace("\r", "\n").splitlines()
    shown = [line for line in last if "step 40/100000" in line]
    assert shown, last
    assert "loss 1235, online 45.7%, 98765 images/s" in shown[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (720, "12 min"), (3.5 * 3600, "3.5 h"), (12 * 86400, "12.0 days")]
)
def test_a_duration_is_readable(seconds, text):
    assert duration(seconds) == text
