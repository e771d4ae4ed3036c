"""Runs cells on this machine: one process each, side by side on GPUs or cores, each with its own log.

A cell that crashes takes nothing with it: its error is kept and the others go on. Several such launchers, here or on
other machines, may work on the same runs folder at once; a cell's claim says which of them runs it.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_bench.records.tracker import STUDY
from ssl_bench.runtime.console import say
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Interrupt
from ssl_bench.runtime.launcher import usable_cores
from ssl_bench.runtime.memory import available_memory
from ssl_bench.runtime.peers import LAUNCHER
from ssl_bench.study import warm
from ssl_bench.study.cells import CellStore, State
from ssl_bench.study.claims import CellClaim
from ssl_bench.study.grid import Cell
from ssl_bench.study.progress import Standing, StudyProgress, standing

POLL = 0.1  # seconds between looks at the processes
LOOK_EVERY = 2.0  # seconds between looks for room and for cells, unless one of ours has ended
CORES_PER_CELL = 4  # of a CPU run, where the number of workers is not given
BYTES_PER_CELL = 4 << 30  # of main memory, likewise
SETTLE = 60.0  # seconds until a run shows how much of a GPU's memory it needs; its first logged line may come sooner
HEADROOM = 1.2  # times that memory must be free for another run like it
SHAPES_MEMORY = ("model", "method", "data", "batch_size", "chunk_size", "recompute", "precision", "compile")

Command = Callable[[Cell, Path], list[str]]


@dataclass(frozen=True)
class Slot:
    """A place for one process.

    Attributes:
        number: from 0.
        environment: added to the process's.
        gpu: the device's id, None on the CPU.
    """

    number: int
    environment: dict[str, str]
    gpu: str | None = None


def slots(workers: int | None = None, per_gpu: int = 1) -> list[Slot]:
    """The places for processes on this machine.

    Args:
        workers: how many cells run at a time; None = as many as fit: `per_gpu` on each GPU, or on the CPU one for each
            `CORES_PER_CELL` cores and `BYTES_PER_CELL` of free memory.
        per_gpu: how many cells may share a GPU, as far as its memory allows.

    Raises:
        ValueError: fewer than one.
    """
    for name, value in (("workers", workers), ("per_gpu", per_gpu)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    cores, gpus = usable_cores(), _gpus()
    if gpus:
        # Every GPU gets its first cell before any gets a second, so that few workers are spread out.
        # In the order of the bus, as nvidia-smi counts them; CUDA's own order is by speed.
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        places = [(gpu, {"CUDA_VISIBLE_DEVICES": gpu, **order}) for _ in range(per_gpu) for gpu in gpus]
        count = min(workers or len(places), len(places))
    else:
        count = workers or max(1, min(cores // CORES_PER_CELL, available_memory() // BYTES_PER_CELL))
        places = [(None, {})] * count  # type: ignore[list-item]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))}
    return [Slot(number, {**places[number][1], **threads}, places[number][0]) for number in range(count)]


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def gpu_memory(gpu: str) -> tuple[float, float] | None:
    """A GPU's used and total memory in MiB; None where nobody knows: no nvidia-smi, or its "[N/A]" (MIG)."""
    # Not torch.cuda.mem_get_info: it opens a CUDA context, which would take some hundred MiB of every GPU for as long
    # as the launcher lives, count as a run's memory here, and lock the runs out of a GPU in exclusive-process mode.
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        used, total = map(float, done.stdout.split("\n")[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return used, total


def local_command(cell: Cell, run_dir: Path) -> list[str]:
    """The cell as one process of this Python."""
    return [sys.executable, "-m", f"ssl_bench.{cell.track}", *_arguments(cell, run_dir)]


def all_gpus_command(cell: Cell, run_dir: Path) -> list[str]:
    """The cell as one process for each GPU that can be seen, or one on the CPU."""
    return [sys.executable, "-m", "ssl_bench", cell.track, "--processes", "auto", *_arguments(cell, run_dir)]


def print_commands(cells: Sequence[Cell], store: CellStore) -> list[str]:
    """Shell lines that run the cells on any cluster; accelerate's own configuration gives the number of processes."""
    return [
        shlex.join(["accelerate", "launch", "-m", f"ssl_bench.{cell.track}", *_arguments(cell, store.folder(cell))])
        for cell in cells
    ]


def _arguments(cell: Cell, run_dir: Path) -> list[str]:
    return [*cell.arguments(), f"run_dir={run_dir}", "resume=auto"]


@dataclass
class CellProcess:
    """A running cell with its claim, which is held until `end`; and where an earlier process had left it."""

    cell: Cell
    claim: CellClaim
    command: list[str]
    process: warm.Process
    before: Standing | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls,
        cell: Cell,
        claim: CellClaim,
        store: CellStore,
        environment: Mapping[str, str],
        command: Command = local_command,
        server: warm.ForkServer | None = None,
    ) -> "CellProcess":
        """Starts the cell's process, with its output going to the cell's log; by a server where that can do it."""
        store.forget_failure(cell)
        arguments, before = command(cell, store.folder(cell)), standing(store.folder(cell))
        # By its launcher's id it notices when that dies, and saves (`ssl_bench.runtime.peers`).
        whole = {**os.environ, **environment, LAUNCHER: str(os.getpid()), STUDY: cell.study}
        with open(store.log(cell), "ab") as log:
            log.write(f"$ {shlex.join(arguments)}\n".encode())
            log.flush()
            forked = server.start(arguments, whole, store.log(cell)) if server else None
            process: warm.Process = forked or subprocess.Popen(
                arguments,
                env=whole,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal reaches the launcher alone, which then asks each run once to stop.
                start_new_session=True,
                # A batch system may signal every process of a job; the launcher's warning must not kill the run.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        return cls(cell, claim, arguments, process, before)

    def end(self, store: CellStore, code: int) -> State:
        """After the process's end: keeps its error if there is one, releases the claim, and returns the new state."""
        try:
            if code == REQUEUE_EXIT_CODE:
                return State("interrupted")
            status, reason = store.ending(self.cell) if code == 0 else (None, "")
            if code == 0 and status is None and not reason:
                reason = f"the process reported success and left no results in {store.folder(self.cell)}"
            if status is None:
                return State("failed", store.fail(self.cell, code=code, command=self.command, reason=reason))
            store.forget_failure(self.cell)
            return State(status)
        finally:
            self.claim.release()

    def stop(self) -> None:
        """Asks the process to save and exit; safe to call again."""
        if self.process.poll() is None:
            self.process.terminate()


class LocalLauncher:
    """Works through cells until none is left that is missing, also counting what other workers do.

    Args:
        store: the runs.
        places: see `slots`.
        retry_failed: whether cells that had failed before are tried again, once.
        command: what runs a cell.
    """

    def __init__(
        self, store: CellStore, places: Sequence[Slot], *, retry_failed: bool = False, command: Command = local_command
    ) -> None:
        self.store, self.places, self.retry_failed, self.command = store, places, retry_failed, command
        self.running: dict[int, CellProcess] = {}
        self.failed_before: dict[str, float] = {}
        self.done = self.total = 0
        self._needs: dict[str, float] = {}  # MiB of a GPU that a run of some shape was seen to take
        self._next_look, self._waits = 0.0, False
        self._server = warm.ForkServer()

    def run(self, cells: Sequence[Cell]) -> int:
        """Runs what is missing.

        Returns:
            0 when every cell is done, 1 when some failed, `REQUEUE_EXIT_CODE` after a signal.
        """
        self.total = len(cells)
        if self.retry_failed:
            self.failed_before = {cell.name: self.store.failed_at(cell) for cell in cells}
        states = {cell: self.store.state(cell) for cell in cells}
        waiting = [cell for cell in cells if states[cell].status == "running" or self._startable(cell, states[cell])]
        self.done = len(cells) - len(waiting)
        progress_of = StudyProgress(self.store, len(cells), len(self.places))
        with self._server, Interrupt() as interrupt, progress_of as progress:
            try:
                while (waiting or self.running) and not interrupt.requested:
                    waiting = self._fill(waiting)
                    self._reap(waiting, progress)
                    progress({child.cell: child.started for child in self.running.values()}, waiting, self.done)
                    time.sleep(POLL)
            finally:
                self._stop_all()
        if interrupt.requested:
            return REQUEUE_EXIT_CODE
        return int(any(self.store.state(cell).status == "failed" for cell in cells))

    def _fill(self, waiting: list[Cell]) -> list[Cell]:
        """Starts cells where there is room; returns those that are neither started nor known to have ended."""
        if time.monotonic() < self._next_look:
            return waiting
        self._next_look = time.monotonic() + LOOK_EVERY
        left: list[Cell] = []
        for index, cell in enumerate(waiting):
            # One of each GPU: another of the same would ask nvidia-smi the same once more.
            free = {one.gpu: one for one in reversed(self.places) if one.number not in self.running}
            slot = next(
                (one for one in sorted(free.values(), key=lambda one: one.number) if self._has_room(one, cell)), None
            )
            if slot is None:
                return left + waiting[index:]
            state = self.store.state(cell)
            if state.status == "running":
                left.append(cell)
            elif not self._startable(cell, state):
                self.done += 1
            elif (claim := self.store.claim(cell)) is None:
                left.append(cell)
            else:
                self._start(slot, cell, claim)
        if left and not self.running and not self._waits:
            # Not given up: if the other workers die, these cells fall to this one.
            self._waits = True
            say(f"waiting for {len(left)} cells that other workers are running")
        return left

    def _startable(self, cell: Cell, state: State) -> bool:
        if state.status == "failed":
            return self.retry_failed and self.failed_before[cell.name] == self.store.failed_at(cell)
        return not state.ended

    def _start(self, slot: Slot, cell: Cell, claim: CellClaim) -> None:
        # Asked again under the claim: another worker may have finished the cell between the look and the claim.
        status, _ = self.store.ending(cell)
        state = State(status or ("failed" if self.store.failed_at(cell) else "missing"))
        if self._startable(cell, state):
            self.running[slot.number] = CellProcess.start(
                cell, claim, self.store, slot.environment, self.command, self._server
            )
        else:
            claim.release()
            self.done += 1

    def _reap(self, waiting: list[Cell], progress: StudyProgress) -> None:
        """Notes the processes that have ended; a run that somebody else asked to stop is started again."""
        for number, child in list(self.running.items()):
            child.claim.beat()
            code = child.process.poll()
            if code is None:
                continue
            del self.running[number]
            self._next_look = 0.0
            state = child.end(self.store, code)
            if state.status == "interrupted":
                say(f"requeued: {child.cell.label}")
                waiting.insert(0, child.cell)
                continue
            self.done += 1
            seconds = time.monotonic() - child.started
            if state.ended:
                progress.ended(child.cell, seconds)
            detail = f": {state.detail} (log: {self.store.log(child.cell)})" if state.status == "failed" else ""
            say(f"[{self.done}/{self.total}] {state.status} in {seconds:.0f} s: {child.cell.label}{detail}")

    def _stop_all(self) -> None:
        """Asks all processes to save and exit, and waits for them; a second Ctrl-C kills them."""
        for child in self.running.values():
            child.stop()
        try:
            for child in self.running.values():
                while child.process.poll() is None:
                    child.claim.beat()
                    time.sleep(POLL)
        finally:
            for child in self.running.values():
                if (code := child.process.poll()) is None:
                    child.process.kill()
                    code = child.process.wait()
                if code < 0:
                    child.claim.release()  # killed by us, or asked to stop before it could answer: no failure
                else:
                    child.end(self.store, code)
            self.running.clear()

    def _has_room(self, slot: Slot, cell: Cell) -> bool:
        """Whether the slot's GPU has memory for the cell beside those that are on it; no, where nobody knows."""
        shared = {other.number for other in self.places if other.gpu == slot.gpu}
        neighbours = [child for number, child in self.running.items() if number in shared]
        if slot.gpu is None or not neighbours:
            return True
        starting = sum(not self._has_settled(child) for child in neighbours)
        shapes = {_shape(child.cell) for child in neighbours}
        involved = shapes | {_shape(cell)}
        if starting and not involved <= set(self._needs):
            return False
        memory = gpu_memory(slot.gpu)
        if memory is None:
            return False
        used, total = memory
        if not starting and len(shapes) == 1:
            (shape,) = shapes
            self._needs[shape] = max(self._needs.get(shape, 0.0), used / len(neighbours))
        # What the starting ones have taken so far is counted twice, which errs on the safe side.
        need = max(self._needs.get(shape, used / len(neighbours)) for shape in involved)
        return total - used > HEADROOM * need * (1 + starting)

    def _has_settled(self, child: CellProcess) -> bool:
        """Whether the run has computed steps; a resumed one's earlier lines do not count."""
        if time.monotonic() - child.started >= SETTLE:
            return True
        return standing(self.store.folder(child.cell)) not in (None, child.before)


def _shape(cell: Cell) -> str:
    """What decides how much memory a run needs, to tell runs alike."""
    return repr([cell.track, *(getattr(cell.recipe, name, None) for name in SHAPES_MEMORY)])
