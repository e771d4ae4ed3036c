"""``ssl-bench study``: runs what is missing of a grid of recipes, or says what is done and what is left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from ssl_bench.runtime.console import say
from ssl_bench.study.cells import CellStore, State, count
from ssl_bench.study.estimate import Speed, duration, speeds, total_seconds, workload
from ssl_bench.study.grid import Cell, Study, load_study

LauncherName = Literal["local", "slurm"]


def study_main(
    source: str | Path,
    *,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
    launcher: str = "local",
    workers: int | None = None,
    per_gpu: int = 1,
    slurm: Mapping[str, str] | None = None,
    dry_run: bool = False,
    print_commands: bool = False,
    retry_failed: bool = False,
) -> int:
    """Does what is missing of a study.

    Args:
        source: a shipped study's name, or a YAML file's path.
        runs: the folder of all runs; this study's go to the folder of its name below it.
        overrides: ``key=value`` words for every cell.
        seeds: instead of the study's.
        data_paths: where to read data sets, by name.
        launcher: "local" (this machine) or "slurm".
        workers: cells at a time; None = what the machine carries, or on SLURM all at once.
        per_gpu: cells that may share a GPU.
        slurm: sbatch's parameters, for the launcher "slurm".
        dry_run: only list the cells, with an estimate of the time from a measured step.
        print_commands: only print the missing cells' command lines for any other cluster.
        retry_failed: try failed cells again.

    Returns:
        the exit code: 0 when all is done (or submitted), 1 when cells failed, `REQUEUE_EXIT_CODE` after a signal.

    Raises:
        ValueError: one line; the study or an argument is wrong.
    """
    if launcher not in get_args(LauncherName):
        raise ValueError(f"study: launcher: got {launcher!r}, allowed: {' or '.join(get_args(LauncherName))}")
    study = load_study(source, overrides=overrides, seeds=seeds, data_paths=data_paths)
    store = CellStore(runs)
    if dry_run:
        _list_cells(study, store, workers, per_gpu)
        return 0
    return run_study(
        study,
        store,
        launcher=launcher,
        workers=workers,
        per_gpu=per_gpu,
        slurm=slurm,
        print_commands=print_commands,
        retry_failed=retry_failed,
    )


def run_study(
    study: Study,
    store: CellStore,
    *,
    launcher: str = "local",
    workers: int | None = None,
    per_gpu: int = 1,
    slurm: Mapping[str, str] | None = None,
    print_commands: bool = False,
    retry_failed: bool = False,
) -> int:
    """Does what is missing of an expanded study; see `study_main`."""
    if print_commands:
        from ssl_bench.study import launch

        states = {cell: store.state(cell) for cell in study.cells}
        print("\n".join(launch.print_commands([cell for cell in study.cells if not states[cell].ended], store)))
        return 0
    if launcher == "slurm":
        from ssl_bench.study.slurm import submit

        return submit(study, store, parameters=slurm or {}, at_once=workers, retry_failed=retry_failed)
    from ssl_bench.study.launch import LocalLauncher, slots

    code = LocalLauncher(store, slots(workers, per_gpu), retry_failed=retry_failed).run(study.cells)
    say(f"{study.name}: {summary(study, store)} (in {store.runs})")
    return code


def status_main(
    source: str | Path,
    *,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
) -> int:
    """Prints how many cells are done, running, failed, diverged and missing, and lists those that are not finished.

    Args and Raises: as `study_main`.

    Returns:
        0 if every cell is done, else 1.
    """
    study = load_study(source, overrides=overrides, seeds=seeds, data_paths=data_paths)
    store = CellStore(runs)
    states = {cell: store.state(cell) for cell in study.cells}
    print(f"{study.name}: {_counts(states)}")
    for cell, state in states.items():
        if state.status != "finished":
            print(f"  {state.status:<11} {cell.label}{f': {state.detail}' if state.detail else ''}")
    return int(not all(state.ended for state in states.values()))


def summary(study: Study, store: CellStore) -> str:
    """The cells by status in one line, e.g. ``216 cells: 200 finished, 4 diverged, 12 missing``."""
    return _counts({cell: store.state(cell) for cell in study.cells})


def _counts(states: Mapping[Cell, State]) -> str:
    return f"{len(states)} cells: " + ", ".join(f"{number} {status}" for status, number in count(states).items())


def _list_cells(study: Study, store: CellStore, workers: int | None, per_gpu: int) -> None:
    """The dry run: every cell, its state, and the training time that it has still to come."""
    from ssl_bench.study.launch import slots

    print(study.about + "\n" if study.about else "")
    states = {cell: store.state(cell) for cell in study.cells}
    left = [cell for cell in study.cells if not states[cell].ended]
    known = speeds(left, store)
    for cell in study.cells:
        speed = known.get(workload(cell.recipe), "")
        time = duration(speed.seconds(cell.recipe)) if isinstance(speed, Speed) and cell in left else "-"
        print(f"{states[cell].status:<11} {time:>9}  {cell.label}")
    for kind, speed in known.items():
        what = " ".join(part for part in kind if part not in ("None", ""))
        print(
            f"{what}: "
            + (f"{speed.images_per_second:.0f} images/s" if isinstance(speed, Speed) else f"unknown: {speed}")
        )
    seconds, unknown = total_seconds(left, known)
    places = len(slots(workers, per_gpu))
    print(
        f"{study.name}: {_counts(states)}; {duration(seconds)} of training left at this speed, one cell at a time"
        + (f", and {unknown} cells of unknown speed" if unknown else "")
        + f"; this machine runs {places} at a time; evaluations come on top"
    )
