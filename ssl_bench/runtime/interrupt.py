"""Graceful stops: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask a run to save a checkpoint and exit, not to die."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:  # a launcher, which only starts runs, needs the signals but not torch
    import torch

# The exit code of a run that a signal stopped and that has saved: EX_TEMPFAIL ("try again") of sysexits.h. A SLURM
# script can requeue on it; ``resume=auto`` continues the run.
REQUEUE_EXIT_CODE = 75

# The file in a run's folder that says the same where a launcher swallows the exit code (torchrun makes every code 1).
REQUEUE_NOTE = "requeue"

# SLURM sends SIGUSR1 ahead of a preemption or time limit if asked to by --signal=USR1@60; a closed terminal, SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

LOOK_EVERY = 1.0  # seconds between looks of several processes for each other's signals

# One Ctrl-C reaches a torchrun worker twice: from the terminal, which signals the whole process group, and from
# torchrun, which passes it on. Only a Ctrl-C this long after the first counts as a second one.
_SECOND_CTRL_C_AFTER = 2.0  # seconds


class Stopped(BaseException):
    """A signal asked to stop where nothing has to be finished first, or what was being done can be continued.

    The exit code is ``REQUEUE_EXIT_CODE``.
    """


class Interrupt:
    """A context in which a signal sets a flag that the training loop polls between steps.

    The first signal of any kind asks the run to finish its step, save and exit with ``REQUEUE_EXIT_CODE``. Further
    ones change nothing, but that a second Ctrl-C raises KeyboardInterrupt, except inside ``saving``, where it is
    ignored. Each signal is answered by one line on standard error. The previous handlers are restored on leaving.
    A SIGHUP that is ignored (nohup) stays ignored.

    Python installs signal handlers in the main thread only; in any other thread the context does nothing.

    Args:
        at_once: raise `Stopped` at the first signal, as there is nothing to save (while data is read, or evaluated
            from a checkpoint), except inside ``finishing`` and ``saving``.

        with Interrupt() as interrupt:
            for step in range(...):
                ...
                if step % every == 0 and interrupt.agreed(device):
                    with interrupt.saving():
                        checkpoints.save(...)
                    return REQUEUE_EXIT_CODE

    What is long and knows no context (decoding, a download) asks `stop_if_requested`.
    """

    _active: ClassVar["Interrupt | None"] = None

    def __init__(self, *, at_once: bool = False) -> None:
        self.signal_name: str | None = None  # of the first signal, e.g. "SIGTERM"
        self._at_once = at_once
        self._first_at = 0.0
        self._saving = False
        self._previous: dict[int, signal._HANDLER] = {}
        self._outer: Interrupt | None = None

    @property
    def requested(self) -> bool:
        """Whether this process was signalled; others may not have been. Costs nothing."""
        return self.signal_name is not None

    def agreed(self, device: "torch.device | str | None" = None) -> bool:
        """Whether any process was signalled: the same answer on all of them.

        With several processes this is a collective call that waits for the device: all must call it, and not at every
        step (see `Agreement`).

        Args:
            device: where the process group reduces tensors: the GPU with NCCL, the CPU (default) with gloo.
        """
        return bool(_maximum([float(self.requested)], device)[0])

    @property
    def is_saving(self) -> bool:
        return self._saving

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside this block even a second Ctrl-C is ignored, so that the checkpoint is written whole."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside this block a signal only sets the flag, although ``at_once`` was asked for."""
        before, self._at_once = self._at_once, False
        try:
            yield
        finally:
            self._at_once = before

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            self._outer, Interrupt._active = Interrupt._active, self
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, and cannot be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if Interrupt._active is self:
            Interrupt._active = self._outer

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        name = signal.Signals(number).name
        if self.signal_name is None:
            self.signal_name, self._first_at = name, time.monotonic()
            if self._at_once and not self._saving:
                _say(f"{name}: exiting with code {REQUEUE_EXIT_CODE}")
                raise Stopped
            _say(f"{name}: finishing this step, then saving and exiting with code {REQUEUE_EXIT_CODE}")
        elif self._saving:
            _say(f"{name}: ignored, a checkpoint is being written; the run exits after it")
        elif number == signal.SIGINT and time.monotonic() - self._first_at > _SECOND_CTRL_C_AFTER:
            raise KeyboardInterrupt
        else:
            _say(f"{name}: ignored, already stopping after {self.signal_name}")


class Agreement:
    """Whether any process was signalled, asked about once in `LOOK_EVERY` seconds, in the same steps on all processes.

    Each look is a collective call. Clocks differ, so at each look the largest number of steps that a process counts
    until the next one holds for all; a look comes at every step where a step takes longer.

    Args:
        interrupt: of this process.
        device: as for `Interrupt.agreed`.
    """

    def __init__(self, interrupt: Interrupt, device: "torch.device | str") -> None:
        self._interrupt, self._device = interrupt, device
        self._seen = self._next = self._every = 0
        self._at = time.monotonic()

    def reached(self, step: int) -> bool:
        """Whether to stop after so many steps: the same answer on all processes, which all must ask."""
        if step < self._next:
            return False
        now = time.monotonic()
        pace = (step - self._seen) / max(now - self._at, 1e-6) * LOOK_EVERY
        # At most twice as many as before: one slow look (an evaluation came between) must not decide for minutes.
        every = max(1, min(int(pace), 2 * self._every))
        stop, steps = _maximum([float(self._interrupt.requested), float(every)], self._device)
        self._seen, self._every, self._next = step, int(steps), step + int(steps)
        self._at = time.monotonic()
        return bool(stop)


def leave_note(folder: Path) -> None:
    """Leaves the file `REQUEUE_NOTE` in a run's folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEUE_NOTE).write_text(f"{REQUEUE_EXIT_CODE}: start the run again with resume=auto to continue it\n")


def _maximum(values: list[float], device: "torch.device | str | None") -> list[float]:
    """The largest of each value over all processes."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, device=device or "cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def stop_if_requested(what: str) -> None:
    """Raises `Stopped` if a signal asked this process to stop, with what was being done in its message."""
    active = Interrupt._active
    if active is not None and active.requested:
        raise Stopped(f"{what} stopped by {active.signal_name}")


def _say(message: str) -> None:
    # Not print: a handler may interrupt a print of the main program, and buffered output cannot be re-entered.
    os.write(2, f"ssl-bench: {message}\n".encode())
