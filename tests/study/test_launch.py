"""The local launcher: crashes, requeues, signals, several workers at once, dead ones, places for cells."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from waiting import wait_for

from ssl_bench.study import launch
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell, Study, load_study
from ssl_bench.study.launch import LocalLauncher, Slot, slots

FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_run.py"

CELLS = 6


def write_study(folder: Path, count: int = CELLS) -> Path:
    path = folder / "grid.yaml"
    axes = [{"optimizer.lr": list(range(1, count + 1))}]
    path.write_text(yaml.safe_dump({"base": {"data": "digits"}, "blocks": [{"track": "classify", "axes": axes}]}))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return load_study(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "runs")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "POLL", 0.01)
    monkeypatch.setattr(launch, "LOOK_EVERY", 0.05)


def fake(
    counter: Path, behaviours: dict[int, str] | None = None, otherwise: str = "ok"
) -> Callable[[Cell, Path], list[str]]:
    """A command that stands in for a cell's; behaviours by learning rate."""

    def command(cell: Cell, run_dir: Path) -> list[str]:
        behaviour = (behaviours or {}).get(int(cell.overrides["optimizer.lr"]), otherwise)
        return [sys.executable, "-S", "-E", str(FAKE), behaviour, str(run_dir), cell.identity, str(counter)]

    return command


def starts(counter: Path) -> list[str]:
    return counter.read_text().split() if counter.exists() else []


PLACES = [Slot(0, {}), Slot(1, {})]


def test_a_study_started_again_does_only_what_is_missing(study: Study, store: CellStore, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    assert LocalLauncher(store, PLACES, command=fake(counter)).run(study.cells[:4]) == 0
    assert sorted(starts(counter)) == sorted(cell.name for cell in study.cells[:4])
    assert LocalLauncher(store, PLACES, command=fake(counter)).run(study.cells) == 0
    assert sorted(starts(counter)) == sorted(cell.name for cell in study.cells)
    assert not list(store.notes.glob("*.claim-*"))


def test_a_crash_keeps_its_error_and_takes_nothing_with_it(
    study: Study, store: CellStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = tmp_path / "starts"
    command = fake(counter, {1: "crash", 2: "silent", 3: "diverged"})
    assert LocalLauncher(store, PLACES, command=command).run(study.cells) == 1
    crashed, silent, diverged, *others = study.cells
    assert store.state(crashed).status == "failed"
    assert store.state(crashed).detail == "RuntimeError: a crash"
    note = store.failure(crashed)
    assert note is not None
    assert note["exit_code"] == 1
    assert "fake_run.py crash" in note["command"]
    assert "Traceback" in "\n".join(note["log"])
    assert "left no results in" in store.state(silent).detail
    assert store.state(diverged).status == "diverged"
    assert {store.state(cell).status for cell in others} == {"finished"}
    line = re.escape(f"{crashed.label}: RuntimeError: a crash (log: {store.log(crashed)})")
    assert re.search(rf"failed in \d+ s: {line}", capsys.readouterr().err)

    # Again: a failed cell is left alone, a diverged one is done.
    counter.unlink()
    assert LocalLauncher(store, PLACES, command=command).run(study.cells) == 1
    assert starts(counter) == []

    # On demand a failed one is tried once more, whether it fails or not.
    command = fake(counter, {1: "crash"})
    assert LocalLauncher(store, PLACES, command=command, retry_failed=True).run(study.cells) == 1
    assert sorted(starts(counter)) == sorted([crashed.name, silent.name])
    assert store.state(silent).status == "finished"
    assert store.failure(silent) is None


def test_a_run_of_another_recipe_in_a_cells_folder_is_a_failure(study: Study, store: CellStore, tmp_path: Path) -> None:
    cell = study.cells[0]

    def command(_: Cell, run_dir: Path) -> list[str]:
        return [sys.executable, "-S", str(FAKE), "ok", str(run_dir), "f" * 16, str(tmp_path / "starts")]

    # Its record says finished, and is not believed.
    claim = store.claim(cell)
    assert claim is not None
    child = launch.CellProcess.start(cell, claim, store, {}, command)
    state = child.end(store, child.process.wait())
    assert state.status == "failed"
    assert "ffffffffffffffff" in state.detail
    assert store.state(cell) == state


def test_a_run_that_was_stopped_by_somebody_goes_on(study: Study, store: CellStore, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    assert LocalLauncher(store, PLACES, command=fake(counter, {2: "requeue"})).run(study.cells[:3]) == 0
    assert starts(counter).count(study.cells[1].name) == 2
    assert len(starts(counter)) == 4
    assert store.failure(study.cells[1]) is None


DRIVER = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import test_launch as t
from ssl_bench.study import launch
launch.POLL, launch.LOOK_EVERY = 0.01, 0.05
study = t.load_study(sys.argv[2])
command = t.fake(Path(sys.argv[4]), otherwise=sys.argv[5])
Path(sys.argv[2]).with_suffix(f".up-{os.getpid()}").touch()
t.wait_for(lambda: len(list(Path(sys.argv[2]).parent.glob("grid.up-*"))) == int(sys.argv[6]))
sys.exit(launch.LocalLauncher(t.CellStore(sys.argv[3]), t.PLACES, command=command).run(study.cells))
"""


def worker(tmp_path: Path, behaviour: str, together: int = 1) -> "subprocess.Popen[str]":
    """A process of its own that works on the study, once so many of them have come up."""
    here = os.pathsep.join((str(Path(__file__).parent), str(FAKE.parent)))
    places = [here, tmp_path / "grid.yaml", tmp_path / "runs", tmp_path / "starts"]
    arguments = [*map(str, places), behaviour, str(together)]
    return subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stderr=subprocess.PIPE, text=True)


def test_two_processes_share_a_study_and_do_no_cell_twice(tmp_path: Path) -> None:
    write_study(tmp_path)
    workers = [worker(tmp_path, "slow", together=2) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], errors
    done = starts(tmp_path / "starts")
    assert len(done) == len(set(done)) == CELLS
    shares = [error.count("finished in") for error in errors]
    assert sum(shares) == CELLS
    assert min(shares) > 0  # they did work side by side


def test_a_signal_stops_a_study_and_its_runs_politely(tmp_path: Path) -> None:
    write_study(tmp_path)
    process = worker(tmp_path, "wait")
    wait_for(lambda: len(starts(tmp_path / "starts")) == 2 and len(list((tmp_path / "runs").glob("*/*/run.json"))) == 2)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors
    store = CellStore(tmp_path / "runs")
    states = [store.state(cell).status for cell in load_study(tmp_path / "grid.yaml").cells]
    assert states == ["interrupted"] * 2 + ["missing"] * (CELLS - 2)
    assert not list(store.notes.glob("*.claim-*"))
    assert not list(store.notes.glob("*.failed.json"))


def test_a_killed_worker_gives_its_cells_back_at_once(tmp_path: Path) -> None:
    # Killed outright: nobody cleans up, and its runs, which are processes of their own, have to be ended here.
    write_study(tmp_path)
    process = worker(tmp_path, "wait")
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/*/run.json"))) == 2)
    cells, store = load_study(tmp_path / "grid.yaml").cells, CellStore(tmp_path / "runs")
    assert [store.state(cell).status for cell in cells[:2]] == ["running", "running"]
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate()
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: [store.state(cell).status for cell in cells[:2]] == ["interrupted", "interrupted"])
    counter = tmp_path / "again"
    assert LocalLauncher(store, PLACES, command=fake(counter)).run(cells) == 0
    assert len(starts(counter)) == CELLS


# Places --------------------------------------------------------------------------------------------------------------


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpus", list)
    monkeypatch.setattr(launch, "usable_cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "available_memory", lambda: 64 << 30)
    assert [slot.environment for slot in slots()] == [{"OMP_NUM_THREADS": "4"}] * 4
    assert [slot.environment for slot in slots(3)] == [{"OMP_NUM_THREADS": "5"}] * 3
    monkeypatch.setattr(launch, "available_memory", lambda: 9 << 30)
    assert len(slots()) == 2
    monkeypatch.setattr(launch, "usable_cores", lambda: 1)
    assert [slot.environment for slot in slots(4)] == [{"OMP_NUM_THREADS": "1"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's word
    assert slots(1)[0].environment == {"OMP_NUM_THREADS": "3"}
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        slots(0)


def test_cells_spread_over_gpus_before_they_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpus", lambda: ["0", "3"])
    monkeypatch.setattr(launch, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots()] == ["0", "3"]
    assert [slot.gpu for slot in slots(per_gpu=2)] == ["0", "3", "0", "3"]
    assert [slot.gpu for slot in slots(3, per_gpu=2)] == ["0", "3", "0"]
    assert slots(per_gpu=2)[0].environment["OMP_NUM_THREADS"] == "3"


@contextmanager
def running(launcher: LocalLauncher, cells: Sequence[Cell], starts: Path) -> Iterator[None]:
    """The cells as the launcher's processes, in its first places."""
    for number, cell in enumerate(cells):
        claim = launcher.store.claim(cell)
        assert claim is not None
        launcher.running[number] = launch.CellProcess.start(cell, claim, launcher.store, {}, fake(starts))
    yield
    for child in launcher.running.values():
        child.end(launcher.store, child.process.wait())


@pytest.mark.parametrize(("used", "room"), [(30_000.0, True), (40_000.0, False)])
def test_a_gpu_takes_another_cell_as_far_as_its_memory_allows(
    study: Study, store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: float, room: bool
) -> None:
    monkeypatch.setattr(launch, "SETTLE", 0.0)
    monkeypatch.setattr(launch, "gpu_memory", lambda _: (used, 80_000.0))
    first, second, other = Slot(0, {}, "0"), Slot(1, {}, "0"), Slot(2, {}, "1")
    launcher, cells = LocalLauncher(store, [first, second, other]), study.cells
    assert launcher._has_room(first, cells[0])
    with running(launcher, cells[:1], tmp_path / "starts"):
        assert launcher._has_room(second, cells[1]) == room
        assert launcher._has_room(other, cells[1])


def test_a_run_waits_until_the_one_before_it_shows_its_need_and_the_next_ones_do_not(
    study: Study, store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: set[Path] = set()
    monkeypatch.setattr(launch, "standing", lambda folder: folder if folder in logged else None)
    used = 20_000.0
    monkeypatch.setattr(launch, "gpu_memory", lambda _: (used, 80_000.0))
    places = [Slot(number, {}, "0") for number in range(4)]
    launcher, cells = LocalLauncher(store, places), study.cells
    with running(launcher, cells[:1], tmp_path / "starts"):
        assert not launcher._has_room(places[1], cells[1])  # nobody knows yet what a run needs
        logged.add(store.folder(cells[0]))
        assert launcher._has_room(places[1], cells[1])
        # Known now: a starting run does not hold up the next, and gets the room that it will need.
        logged.clear()
        assert launcher._has_room(places[1], cells[1])  # 60,000 free for two times 24,000
        used = 40_000.0
        assert not launcher._has_room(places[1], cells[1])
        other = replace(cells[1], recipe=replace(cells[1].recipe, batch_size=2 * cells[1].recipe.batch_size))
        used = 20_000.0
        assert not launcher._has_room(places[1], other)
    logged.add(store.folder(cells[0]))  # by an earlier process of the same run
    launcher = LocalLauncher(store, places)
    with running(launcher, cells[:1], tmp_path / "starts"):
        assert not launcher._has_room(places[1], cells[1])


def test_a_gpu_whose_memory_nvidia_smi_does_not_know_takes_one_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.gpu_memory("0") is None  # not installed
    for answer, memory in (("[N/A], [N/A]", None), ("1024, 81920", (1024.0, 81920.0))):
        tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
        tool.chmod(0o755)
        assert launch.gpu_memory("0") == memory
