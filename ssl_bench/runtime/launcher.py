"""Starts the processes of one run on this machine, on torch's elastic process context, and passes signals on to them.

What torchrun and ``accelerate launch`` do not do: the run's exit code is the launcher's, SIGUSR1 and the like reach
every process, one that fails ends the others within seconds, and none outlives the launcher.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, SIGNALS
from ssl_bench.runtime.peers import LAUNCHER, SAVING_GRACE, follow_parent, tell

POLL = 0.1  # seconds
# Seconds from the first process's end until the others get SIGTERM, and from there until they are killed. They know of
# the failure by themselves (`ssl_bench.runtime.peers`), and one that is saving takes longer.
PATIENCE = 10.0


def launch(words: Sequence[str], processes: int) -> int:
    """Runs a command in several processes, to its end.

    Args:
        words: the command; each process gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and so on in its environment.
        processes: how many, >= 2.

    Returns:
        0; `REQUEUE_EXIT_CODE` where a signal stopped the run; else the first failed process's code (1 for one that was
        killed).
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    caught: list[int] = []  # signals
    children: list[Any] = []

    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of a handler)
        caught.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port, and nobody else's
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "ssl-bench",
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // processes)),
    }
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in SIGNALS if number not in ignored}
    follow_parent()  # it may be started by a study's launcher or a batch job in its turn
    # The context would install handlers that raise, in the middle of the start.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    context = start_processes(
        name="ssl-bench",
        entrypoint=words[0],
        args={rank: tuple(words[1:]) for rank in range(processes)},
        envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        for number in before:  # an older torch has installed its own all the same
            signal.signal(number, pass_on)
        children += [handler.proc for handler in context.subprocess_handlers.values()]  # type: ignore[attr-defined]
        for early in tuple(caught):
            pass_on(early, None)
        _wait(children, store)
        return _exit_code([child.returncode for child in children], caught)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        context.close()  # its threads that would follow log files
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _wait(children: Sequence[Any], store: Any) -> None:
    """Waits for all processes; once one has ended before the run's end, not for long."""
    ended_at = deadline = None
    while running := [child for child in children if child.poll() is None]:
        failed = [code for child in children if (code := child.poll())]
        now = time.monotonic()
        if failed and ended_at is None:
            ended_at = now
            if failed[0] < 0:  # killed: it could not say so itself
                tell(1, store)
        if ended_at is not None and deadline is None and now > ended_at + PATIENCE:
            deadline = now + SAVING_GRACE
            for child in running:
                child.terminate()
        if deadline is not None and now > deadline:
            for child in running:
                child.kill()
        time.sleep(POLL)


def _exit_code(codes: Sequence[int], caught: Sequence[int]) -> int:
    """The run's exit code from those of its processes, and the signals that were passed on to them."""
    failed = [code for code in codes if code > 0 and code != REQUEUE_EXIT_CODE]
    # A signal that a process meets before it has handlers kills it, and nothing is lost.
    killed = [-code for code in codes if code < 0 and -code not in caught]
    if killed:
        names = ", ".join(signal.Signals(number).name for number in killed)
        print(f"error: {len(killed)} of {len(codes)} processes killed by {names}", file=sys.stderr)
    return failed[0] if failed else 1 if killed else REQUEUE_EXIT_CODE if any(codes) else 0


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
