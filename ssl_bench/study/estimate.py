"""How long a study will take, from the speed of its own runs where there are any, else of a few steps run now."""

import importlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssl_bench.recipe import registry
from ssl_bench.recipe.command import leave
from ssl_bench.recipe.compose import merge
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.reader import RecordError, RunRecord, read_run
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell

STEPS = 5  # of a measurement; the first warms up and is not counted
ENOUGH = 20  # runs whose speed is read
BATCH = 256  # images in each of its steps, at most
TIMEOUT = 900.0  # seconds

# A short run of the same network on the same images, without what happens before, between and after the steps.
SHORT = {
    "steps": str(STEPS),
    "seed": "0",
    "chunk_size": "null",
    "log_every": "1",
    "telemetry.every": "0",
    "eval.protocols": "[]",
    "eval.baseline": "false",
    "eval.test_every_epochs": "0",
    "eval.online_every_epochs": "0",
    "checkpoint.every_epochs": "0",
    "tracker": "null",
}

Workload = tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """The measured speed of a workload.

    Attributes:
        images_per_second: of training alone.
        train_size: the number of train images.
        peak: bytes that the process needed at its largest, on the GPU or else of main memory; 0 where it is not known.
        device: what it ran on.
    """

    images_per_second: float
    train_size: float
    peak: int = 0
    device: str = ""

    def seconds(self, recipe: Recipe) -> float:
        """The training time of a recipe at this speed."""
        epochs = recipe.epochs or 0.0
        images = recipe.steps * recipe.batch_size if recipe.steps else epochs * self.train_size
        return images / self.images_per_second


def workload(recipe: Recipe) -> Workload:
    """What mostly decides the time per image; the effect of the batch size and the optimizer is neglected."""
    data, model = recipe.data, recipe.model
    parts = (recipe.track, data.name, data.size, model.name, model.stem, recipe.method.target, recipe.precision)
    sizes = (size for size in (model.img_size, model.patch_size) if size)
    return tuple(map(str, (*parts, *sizes)))


def speeds(cells: Sequence[Cell], store: CellStore, *, measure: bool = True) -> dict[Workload, Speed | str]:
    """The speed of every workload in a study, or why it is not known.

    Args:
        cells: the study's.
        store: its runs.
        measure: whether a workload without runs is measured now, by a short run of its own.
    """
    groups: dict[Workload, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(workload(cell.recipe), []).append(cell)
    return {
        kind: _recorded(members, store) or (_measured(members[0]) if measure else "no run of it yet")
        for kind, members in groups.items()
    }


def total_seconds(cells: Iterable[Cell], known: Mapping[Workload, Speed | str]) -> tuple[float, int]:
    """The training time of the cells one after another, and how many of them have no known speed."""
    seconds, unknown = 0.0, 0
    for cell in cells:
        speed = known[workload(cell.recipe)]
        if isinstance(speed, str):
            unknown += 1
        else:
            seconds += speed.seconds(cell.recipe)
    return seconds, unknown


def _recorded(cells: Sequence[Cell], store: CellStore) -> Speed | None:
    """The median of the first runs that these cells have left so far."""
    found = []
    for cell in cells:
        try:
            speed = _speed(read_run(store.folder(cell)))
        except (RecordError, OSError):
            continue
        found += [speed] if speed else []
        if len(found) == ENOUGH:
            break
    if not found:
        return None
    return Speed(statistics.median(speed.images_per_second for speed in found), found[0].train_size)


def _speed(record: RunRecord) -> Speed | None:
    rates = [row["images_per_second"] for row in record.metrics[1:] if "images_per_second" in row]
    per_epoch = record.provenance.get("plan", {}).get("steps_per_epoch")
    if not rates or not per_epoch:
        return None
    return Speed(statistics.median(rates), per_epoch * record.recipe["batch_size"])


def _measured(cell: Cell) -> Speed | str:
    return measured(cell.track, cell.overrides, cell.recipe, min(cell.recipe.batch_size, BATCH))


def measured(track: str, overrides: Mapping[str, str], recipe: Recipe, batch_size: int) -> Speed | str:
    """Runs a few steps in a process of its own.

    Args:
        track: "pretrain" or "classify".
        overrides: of the command line.
        recipe: what they compose to.
        batch_size: of the steps.

    Returns:
        what was measured, or why nothing was.
    """
    with tempfile.TemporaryDirectory(prefix="ssl-bench-estimate-") as folder:
        run = Path(folder) / "run"
        short = {**SHORT, "batch_size": str(batch_size), "run_dir": str(run)}
        given = dict(overrides)
        if recipe.schedule.target in registry.builtin("schedule"):
            # A warm-up of many epochs does not fit into these steps, and no schedule of ours changes a step's time.
            short["schedule"] = "constant"
            given = {key: value for key, value in given.items() if not key.startswith("schedule.")}
        words = merge(given, short)
        try:
            done = _run_bound([track, *(f"{key}={value}" for key, value in words.items())])
        except subprocess.TimeoutExpired:
            return f"{STEPS} steps took more than {TIMEOUT:.0f} s"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return lines[-1].removeprefix("error: ") if lines else f"exit code {done.returncode}"
        try:
            speed = _speed(read_run(run))
        except RecordError as error:
            return str(error)
        if speed is None:
            return "the short run recorded no speed"
        peak, _, device = done.stdout.splitlines()[-1].partition(" ")
        return replace(speed, peak=int(peak), device=device)


def _run_bound(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `_measuring_process` for as long as this process lives: the pipe it reads closes when this one dies."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "ssl_bench.study.estimate", *argv]
    try:
        return subprocess.run(command, stdin=read, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    finally:
        os.close(read)
        os.close(write)


def _measuring_process(track: str, *overrides: str) -> int:
    """A track's command, in a process that exits at once when the one that started it is gone."""

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)  # nobody writes: it returns when the other end is closed
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = importlib.import_module(f"ssl_bench.{track}").main(list(overrides))
    print(*_peak())
    return code


def _peak() -> tuple[int, str]:
    """The most memory that this process has needed, in bytes, and what it ran on."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved(), torch.cuda.get_device_name()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the CPU"


if __name__ == "__main__":
    leave(_measuring_process(*sys.argv[1:]))
