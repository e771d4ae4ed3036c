"""Graceful stops: SIGTERM, SIGUSR1 and Ctrl-C ask a run to save a checkpoint and exit instead of killing it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # a launcher, which only starts runs, needs the signals but not torch
    import torch

# The exit code of a run that a signal stopped and that has saved: EX_TEMPFAIL ("try again") of sysexits.h. A SLURM
# script can requeue on it; ``resume=auto`` continues the run.
REQUEUE_EXIT_CODE = 75

# SLURM sends SIGUSR1 ahead of a preemption or time limit if asked to by --signal=USR1@60.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# One Ctrl-C reaches a torchrun worker twice: from the terminal, which signals the whole process group, and from
# torchrun, which passes it on. Only a Ctrl-C this long after the first counts as a second one.
_SECOND_CTRL_C_AFTER = 2.0  # seconds


class Interrupt:
    """A context in which a signal sets a flag that the training loop polls between steps.

    The first signal of any kind asks the run to finish its step, save and exit with ``REQUEUE_EXIT_CODE``. Further
    SIGTERM and SIGUSR1 change nothing. A second Ctrl-C raises KeyboardInterrupt, except inside ``saving``, where it is
    ignored. Each signal is answered by one line on standard error. The previous handlers are restored on leaving.

    Python installs signal handlers in the main thread only; in any other thread the context does nothing.

        with Interrupt() as interrupt:
            for step in range(...):
                ...
                if step % every == 0 and interrupt.agreed(device):
                    with interrupt.saving():
                        checkpoints.save(...)
                    return REQUEUE_EXIT_CODE
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None  # of the first signal, e.g. "SIGTERM"
        self._first_at = 0.0
        self._saving = False
        self._previous: dict[int, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was signalled; others may not have been. Costs nothing."""
        return self.signal_name is not None

    def agreed(self, device: "torch.device | str | None" = None) -> bool:
        """Whether any process was signalled: the same answer on all of them.

        With several processes this is a collective call that waits for the device, so ask only every so many steps,
        in the same steps on every process.

        Args:
            device: where the process group reduces tensors: the GPU with NCCL, the CPU (default) with gloo.
        """
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=device or "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside this block even a second Ctrl-C is ignored, so that the checkpoint is written whole."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, and cannot be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        name = signal.Signals(number).name
        if self.signal_name is None:
            self.signal_name, self._first_at = name, time.monotonic()
            _say(f"{name}: finishing this step, then saving and exiting with code {REQUEUE_EXIT_CODE}")
        elif self._saving:
            _say(f"{name}: ignored, a checkpoint is being written; the run exits after it")
        elif number == signal.SIGINT and time.monotonic() - self._first_at > _SECOND_CTRL_C_AFTER:
            raise KeyboardInterrupt
        else:
            _say(f"{name}: ignored, already stopping after {self.signal_name}")


def _say(message: str) -> None:
    # Not print: a handler may interrupt a print of the main program, and buffered output cannot be re-entered.
    os.write(2, f"ssl-bench: {message}\n".encode())
