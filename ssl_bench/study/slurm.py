"""Runs cells as one SLURM job array, through submitit: a cell is a task; a preempted one is requeued and goes on."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_bench.runtime.console import say
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE
from ssl_bench.study.cells import CellStore
from ssl_bench.study.claims import CONFIRM, CellClaim
from ssl_bench.study.grid import Cell, Study
from ssl_bench.study.launch import POLL, CellProcess, all_gpus_command

# Submitit's own parameters, which are numbers; every other is handed to sbatch as it is.
NUMBERS = ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "signal_delay_s")
DEFAULTS = {"timeout_min": 24 * 60, "cpus_per_task": 4, "gpus_per_node": 1}  # gpus_per_node=0 asks for none
OTHER_GPU_KEYS = {"gres", "gpus", "gpus_per_task", "gpus_per_socket"}
MAX_TIMEOUTS = 1000  # how often a task that hits its time limit is requeued: in effect without limit

# Seconds between a run's exit after a SIGTERM that was not ours and its restart: long enough for SLURM to kill the job
# if that is what the signal announced.
KILL_WAIT = 60.0


class CellJob:
    """One task of the array; pickled by submitit and called on the node.

    Args:
        cell: which cell.
        runs: the folder of all runs, seen by every node.
        job: a name of this submission and cell, which outlives a requeue: the claims' owner.
    """

    def __init__(self, cell: Cell, runs: Path, job: str) -> None:
        self.cell, self.runs, self.job = cell, runs, job
        self._child: CellProcess | None = None
        self._preempted = False

    def __call__(self) -> str:
        """Runs the cell unless it is done or another worker has it; returns its status."""
        store = CellStore(self.runs, owner=self.job)
        while not self._preempted:
            state = store.state(self.cell)
            if state.ended:
                return state.status
            claim = self._claim(store)
            if claim is None:
                return "running elsewhere"
            threads = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1")}
            self._child = CellProcess.start(self.cell, claim, store, threads, all_gpus_command)
            code = self._wait(self._child)
            ended = self._child.end(store, code)
            if ended.status == "failed":
                raise RuntimeError(f"{self.cell.label}: {ended.detail}")
            if code != REQUEUE_EXIT_CODE:
                return ended.status
            time.sleep(KILL_WAIT)
        return "interrupted"

    def _claim(self, store: CellStore) -> CellClaim | None:
        """Claims the cell, from a dead worker too, which it takes a while to tell."""
        deadline = time.monotonic() + 2 * CONFIRM
        while (claim := store.claim(self.cell)) is None and time.monotonic() < deadline:
            if store.state(self.cell).status == "running":
                return None
            time.sleep(1.0)
        return claim

    def checkpoint(self) -> Any:
        """Called by submitit when SLURM is about to take the node away: the run saves, and the job is requeued."""
        from submitit.helpers import DelayedSubmission

        self._preempted = True
        if self._child is not None:
            self._child.stop()
            self._wait(self._child)
            self._child.claim.release()
        return DelayedSubmission(CellJob(self.cell, self.runs, self.job))

    @staticmethod
    def _wait(child: CellProcess) -> int:
        while (code := child.process.poll()) is None:
            child.claim.beat()
            time.sleep(POLL)
        return code


def submit(
    study: Study,
    store: CellStore,
    *,
    parameters: Mapping[str, str],
    at_once: int | None = None,
    retry_failed: bool = False,
) -> int:
    """Submits what is missing of a study as a job array, and does not wait for it.

    Args:
        study: whose cells.
        store: the runs, on a file system that every node sees.
        parameters: submitit's ``timeout_min``, ``gpus_per_node`` (one where it is left out; a cell uses all of them),
            ``cpus_per_task``, ``mem_gb``; any other is sbatch's (``partition``, ``account``, ``gres``, ...).
        at_once: tasks that run at a time; None = as many as SLURM allows.
        retry_failed: submit failed cells too.

    Returns:
        the exit code.

    Raises:
        ValueError: submitit is not installed, there is no SLURM here, or a parameter is wrong.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--launcher slurm needs the package submitit: pip install 'ssl-bench[slurm]'") from None
    if shutil.which("sbatch") is None:
        raise ValueError("--launcher slurm needs sbatch, which is not here; for other clusters see --print-commands")
    wanted = ("missing", "interrupted", *(("failed",) if retry_failed else ()))
    cells = [cell for cell in study.cells if store.state(cell).status in wanted]
    if not cells:
        say(f"{study.name}: nothing to submit")
        return 0
    executor = submitit.AutoExecutor(folder=store.notes / "slurm", cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        name=f"ssl-bench-{study.name}", slurm_array_parallelism=at_once or len(cells), **_parameters(parameters)
    )
    runs, stamp = store.runs.resolve(), time.strftime("%Y%m%dT%H%M%S")
    with executor.batch():
        jobs = [executor.submit(CellJob(cell, runs, f"{stamp}-{cell.name}")) for cell in cells]
    say(f"{study.name}: submitted {len(cells)} cells as job {jobs[0].job_id.split('_')[0]}")
    return 0


def _parameters(given: Mapping[str, str]) -> dict[str, Any]:
    """The user's ``--slurm`` as submitit's parameters."""
    parameters: dict[str, Any] = dict(DEFAULTS)
    for name in NUMBERS:
        if name in given:
            try:
                number = float(given[name])
            except ValueError:
                raise ValueError(f"--slurm {name} must be a number, got {given[name]!r}") from None
            key = "slurm_signal_delay_s" if name == "signal_delay_s" else name
            parameters[key] = number if name == "mem_gb" else int(number)
    rest = {name: value for name, value in given.items() if name not in NUMBERS}
    # Asked for in another way, or not at all: in SLURM a zero is not the same as nothing.
    if parameters["gpus_per_node"] == 0 or ("gpus_per_node" not in given and OTHER_GPU_KEYS & rest.keys()):
        del parameters["gpus_per_node"]
    return {**parameters, "slurm_additional_parameters": rest} if rest else parameters
