"""``ssl-bench study``: runs what is missing of a grid of recipes, or says what is done and what is left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from ssl_bench.runtime.console import duration, say
from ssl_bench.study.cells import STATUSES, CellStore, State
from ssl_bench.study.estimate import Speed, speeds, total_seconds, workload
from ssl_bench.study.grid import Cell, Study, load_study
from ssl_bench.study.progress import standing

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
    trust: bool = False,
) -> int:
    """Runs what is missing of a study.

    Args: those of ``ssl-bench study run --help``; `workers` None = as many as fit, or on SLURM all at once.

    Returns:
        the exit code: 0 when all is done (or submitted), 1 when cells failed, `REQUEUE_EXIT_CODE` after a signal.

    Raises:
        ValueError: one line; the study or an argument is wrong.
    """
    if launcher not in get_args(LauncherName):
        raise ValueError(f"launcher must be {' or '.join(get_args(LauncherName))}, got {launcher!r}")
    study = load_study(source, overrides=overrides, seeds=seeds, data_paths=data_paths, trust=trust)
    store = CellStore(runs)
    if dry_run:
        _list_cells(study, store, workers, per_gpu)
        return 0
    if print_commands:
        from ssl_bench.study import launch

        missing = [cell for cell in study.cells if not store.state(cell).ended]
        print("\n".join(launch.print_commands(missing, store)))
        return 0
    if launcher == "slurm":
        from ssl_bench.study.slurm import submit

        return submit(study, store, parameters=slurm or {}, at_once=workers, retry_failed=retry_failed)
    return run_study(study, store, workers=workers, per_gpu=per_gpu, retry_failed=retry_failed)


def run_study(
    study: Study, store: CellStore, *, workers: int | None = None, per_gpu: int = 1, retry_failed: bool = False
) -> int:
    """Runs what is missing of an expanded study on this machine; see `study_main`."""
    from ssl_bench.study.launch import LocalLauncher, slots

    code = LocalLauncher(store, slots(workers, per_gpu), retry_failed=retry_failed).run(study.cells)
    states = {cell: store.state(cell) for cell in study.cells}  # from disk, to count what other workers did
    say(f"{study.name}: {_counts(states)} (in {store.runs})")
    return code


def status_main(
    source: str | Path,
    *,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
    trust: bool = False,
) -> int:
    """Prints how many cells are done, running, failed, diverged and missing, and lists those that are not finished.

    Of a running one it says the step, the speed and the time left.

    Args and Raises: as `study_main`.

    Returns:
        0 if every cell is done, else 1.
    """
    study = load_study(source, overrides=overrides, seeds=seeds, data_paths=data_paths, trust=trust)
    store = CellStore(runs)
    states = {cell: store.state(cell) for cell in study.cells}
    print(f"{study.name}: {_counts(states)}")
    for cell, state in states.items():
        if state.status != "finished":
            at = standing(store.folder(cell)) if state.status == "running" else None
            about = ", ".join(str(part) for part in (at, state.detail) if part)
            print(f"  {state.status:<11} {cell.label}{f': {about}' if about else ''}")
    return int(not all(state.ended for state in states.values()))


def _counts(states: Mapping[Cell, State]) -> str:
    """The cells by status in one line, e.g. ``216 cells: 200 finished, 4 diverged, 12 missing``."""
    found = [state.status for state in states.values()]
    return f"{len(found)} cells: " + ", ".join(f"{found.count(one)} {one}" for one in STATUSES if one in found)


def _list_cells(study: Study, store: CellStore, workers: int | None, per_gpu: int) -> None:
    """The dry run: every cell, its state, and the training time it still needs."""
    from ssl_bench.study.launch import slots

    print(study.about + "\n" if study.about else "")
    states = {cell: store.state(cell) for cell in study.cells}
    left = [cell for cell in study.cells if not states[cell].ended]
    known = speeds(study.cells, store)
    for cell in study.cells:
        speed = known.get(workload(cell.recipe), "")
        time = duration(speed.seconds(cell.recipe)) if isinstance(speed, Speed) and cell in left else "-"
        print(f"{states[cell].status:<11} {time:>9}  {cell.label}")
    for kind, speed in known.items():
        what = " ".join(part for part in kind if part not in ("None", ""))
        rate = f"{speed.images_per_second:.0f} images/s" if isinstance(speed, Speed) else f"unknown: {speed}"
        print(f"{what}: {rate}")
    seconds, unknown = total_seconds(left, known)
    print(
        f"{study.name}: {_counts(states)}; {duration(seconds)} of training left at this speed, one cell at a time"
        + (f", and {unknown} cells of unknown speed" if unknown else "")
        + f"; this machine runs {len(slots(workers, per_gpu))} at a time; evaluations come on top"
    )
