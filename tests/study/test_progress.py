"""What a study shows while its cells run: on a terminal of 80 columns, in a log, and in its status."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from ssl_bench.study import launch, progress
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell, load_study
from ssl_bench.study.launch import LocalLauncher, Slot
from ssl_bench.study.progress import StudyProgress, standing
from ssl_bench.study.run import status_main

FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_run.py"


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    axes = [{"optimizer.lr": [1, 2, 3, 4]}]
    path.write_text(yaml.safe_dump({"base": {"data": "digits"}, "blocks": [{"track": "classify", "axes": axes}]}))
    return path


@pytest.fixture
def cells(grid: Path) -> tuple[Cell, ...]:
    return load_study(grid).cells


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "runs")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def trained(folder: Path, identity: str, step: int, total: int = 1000, speed: object = 500.0) -> None:
    """A run of batches of 100 that has come so far."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": 1, "identity": identity, "recipe": {"batch_size": 100}, "plan": {"total_steps": total}}
    (folder / "run.json").write_text(json.dumps(head))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "images_per_second": speed}) + "\n")


def test_a_run_stands_where_its_last_line_of_metrics_says(tmp_path: Path) -> None:
    trained(tmp_path / "run", "a", 250)
    assert str(standing(tmp_path / "run")) == "step 250/1000 (25%), 500 images/s, 2 min left"  # 750 * 100 / 500 s
    trained(tmp_path / "run", "a", 250, speed="nan")
    assert str(standing(tmp_path / "run")) == "step 250/1000 (25%)"
    trained(tmp_path / "run", "a", 1000)
    assert str(standing(tmp_path / "run")) == "step 1000/1000 (100%), evaluating"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert standing(tmp_path / "run") is None
    (tmp_path / "run" / "run.json").write_text("{")
    assert standing(tmp_path / "run") is None
    assert standing(tmp_path / "nowhere") is None


def test_a_log_gets_a_line_a_minute_at_most_and_each_tenth_of_a_run(
    cells: tuple[Cell, ...], store: CellStore, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    first = cells[0]
    with StudyProgress(store, 4, places=1) as show:
        for step in range(0, 1000, 10):  # a step a second: a tenth is 100 s
            trained(store.folder(first), first.identity, step, speed=100.0)
            show({first: 1000.0}, cells[1:], 0)
            clock[0] += 10.0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == [f"  step {step}" for step in range(100, 1000, 100)]
    # Its own estimate, 1,000 s, for each of the three that wait, while none has ended.
    pattern = r"  step 500/1000 \(50%\), 100 images/s, 8 min left: (.*) \(0/4 done, end \w+ \d\d:\d\d, in 58 min\)"
    assert re.fullmatch(pattern, lines[4]).group(1) == first.label


def test_a_slow_run_gets_a_line_every_ten_minutes_if_it_moves(
    cells: tuple[Cell, ...], store: CellStore, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    first = cells[0]
    with StudyProgress(store, 4, places=1) as show:
        for step in [0] * 100 + [1] * 100:
            trained(store.folder(first), first.identity, step)
            show({first: 1000.0}, cells[1:], 0)
            clock[0] += 10.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("  step 1/1000 (0%)")


def test_the_end_is_expected_from_what_cells_have_taken(
    cells: tuple[Cell, ...], store: CellStore, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, *waiting = cells
    trained(store.folder(two), two.identity, 500)
    with StudyProgress(store, 4, places=2) as show:
        show.ended(one, 6000.0)
        clock[0] += 1200.0
        show({two: 1000.0}, waiting, 1)
    (line,) = capsys.readouterr().err.splitlines()
    # 4,800 s are left of the running one, and 12,000 s of two more: on two places 8,400 s.
    assert line.endswith("in 2.3 h)")
    assert "(1/4 done, end " in line


def test_a_terminal_shows_one_line_of_80_columns_for_each_running_cell_in_turn(
    cells: tuple[Cell, ...], store: CellStore, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    one, two, *waiting = cells
    trained(store.folder(one), one.identity, 250)
    with StudyProgress(store, 4, places=2) as show:
        for _ in range(8):
            clock[0] += 1.0
            show({one: 1000.0, two: 1000.0}, waiting, 0)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", terminal.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert max(map(len, lines)) <= 80
    (one_line, other) = dict.fromkeys(re.sub(r"\w+ \d\d:\d\d", "DAY", line) for line in lines)
    if one_line.endswith("lr=2"):
        one_line, other = other, one_line
    assert one_line == "0/4 done, end DAY | step 250/1000, 500 images/s, 2 min left: …timizer.lr=1"
    assert other == "0/4 done, end DAY | starting: classify data=digits optimizer.lr=2"


def test_a_study_shows_its_cells_while_they_run_and_counts_those_done_before(
    cells: tuple[Cell, ...],
    store: CellStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(cell: Cell, run_dir: Path) -> list[str]:
        return [sys.executable, "-S", "-E", str(FAKE), "slow", str(run_dir), cell.identity, str(tmp_path / "starts")]

    for module, name in ((launch, "POLL"), (progress, "LOOK_EVERY"), (progress, "SOONEST")):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(launch, "LOOK_EVERY", 0.05)
    assert LocalLauncher(store, [Slot(0, {})], command=command).run(cells[2:3]) == 0
    capsys.readouterr()
    assert LocalLauncher(store, [Slot(0, {})], command=command).run(cells) == 0
    lines = capsys.readouterr().err.splitlines()
    ends = [line.split("]")[0] for line in lines if "finished in" in line]
    assert ends == ["[2/4", "[3/4", "[4/4"]
    steps = [line for line in lines if line.startswith("  step 5/10 (50%)")]
    assert len(steps) == 3
    assert f": {cells[0].label} (1/4 done, end " in steps[0]


def test_status_says_where_a_running_cell_is(
    grid: Path, cells: tuple[Cell, ...], store: CellStore, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(store.folder(cells[1]), cells[1].identity, 250)
    claim = store.claim(cells[1])
    assert claim is not None
    assert status_main(grid, runs=store.runs) == 1
    claim.release()
    at = "step 250/1000 (25%), 500 images/s, 2 min left"
    assert f"running     {cells[1].label}: {at}, process {os.getpid()} on" in capsys.readouterr().out
    assert status_main(grid, runs=store.runs) == 1
    assert "step" not in capsys.readouterr().out
