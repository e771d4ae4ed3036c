"""A cell's process as a fork of one that has imported torch and the suite already, so that it starts seconds sooner.

Python's own fork server does the work. What a cell computes, says and records is what its command, ``python -m
ssl_bench.classify ...``, does in a new Python.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ssl_bench.recipe.command import leave
from ssl_bench.runtime.interrupt import SIGNALS

TRACKS = ("ssl_bench.pretrain", "ssl_bench.classify")

# A batch system may send these to every process of a job. They are for the launcher and the runs; a server that died of
# one could not tell how its runs have ended.
_FOR_OTHERS = {*SIGNALS, signal.SIGUSR2}
_THREADS = "OMP_NUM_THREADS"

_server_threads: list[str | None] = []  # what the server was started with, as libraries read it when they are loaded


class Process(Protocol):
    """What a launcher needs of a cell's process; `subprocess.Popen` is one."""

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal's number; None before the end."""

    def poll(self) -> int | None:
        """Looks whether it has ended; returns ``returncode``."""

    def wait(self) -> int:
        """Waits for the end; returns ``returncode``."""

    def terminate(self) -> None:
        """Sends SIGTERM."""

    def kill(self) -> None:
        """Sends SIGKILL."""


class WarmProcess:
    """A process of the fork server as `Process` has it."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.terminate, self.kill = process.terminate, process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process | None:
    """Starts a track's command in a fork, in a session of its own, with its output going to the end of the log.

    Args:
        command: its words.
        environment: the process's, whole.
        log: a file.

    Returns:
        the process; None where a fork cannot stand for the command, which has to be run itself.
    """
    if not sys.platform.startswith("linux") or list(command[:2]) != [sys.executable, "-m"] or command[2] not in TRACKS:
        return None
    threads = environment.get(_THREADS)
    if _server_threads and _server_threads[0] != threads:
        return None
    multiprocessing.set_forkserver_preload(["ssl_bench.cli.preloaded"])
    context = multiprocessing.get_context("forkserver")
    try:
        resource_tracker.ensure_running()  # the server starts it otherwise, which lets signals through
        with _all_blocked() as mask, _without_main():
            with _in_environment(environment):
                forkserver.ensure_running()
            _server_threads[:] = [threads]
            process = context.Process(target=_run, args=(list(command[2:]), dict(environment), str(log), mask))
            process.start()
    except (OSError, EOFError):  # no place for its socket (a long TMPDIR), or it could not start
        return None
    return WarmProcess(process)


def _run(words: list[str], environment: dict[str, str], log: str, mask: set[signal.Signals]) -> None:
    """In the fork: becomes ``python -m`` of the words, and does not return."""
    os.setsid()
    for source, targets in (((os.devnull, os.O_RDONLY), (0,)), ((log, os.O_WRONLY | os.O_APPEND), (1, 2))):
        opened = os.open(*source)
        for target in targets:
            os.dup2(opened, target)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module(words[0])
    sys.argv = [str(module.__file__), *words[1:]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A batch system may signal every process of a job; the launcher's warning must not kill the run.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_follow_launcher, daemon=True, name="launcher").start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came in the meantime is delivered now
    leave(module.main())


def _follow_launcher() -> None:
    """Asks this process to save and end when the launcher dies, which the server, its parent, survives."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _all_blocked() -> Iterator[set[signal.Signals]]:
    """Holds signals back from this thread, and from what it starts; gives the mask of before."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_OTHERS)
    try:
        yield {signal.Signals(number) for number in mask}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _in_environment(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hides the program that called the suite, which a fork would import, and so run again from its first line."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
