"""A cell's process as a fork of one that has imported torch and the suite already, so that it starts seconds sooner.

What a cell computes, says and records is what its command, ``python -m ssl_bench.classify ...``, does in a new Python.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ssl_bench.records.tracker import STUDY
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, SIGNALS
from ssl_bench.runtime.peers import LAUNCHER

TRACKS = ("ssl_bench.pretrain", "ssl_bench.classify")

# A batch system may send these to every process of a job. They are for the launcher and the runs; a server that died of
# one could not tell how its runs have ended.
_FOR_OTHERS = {*SIGNALS, signal.SIGUSR2}

# What may differ between cells of one server. Of the rest, libraries read much when they are imported.
_OF_A_CELL = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", LAUNCHER, STUDY)
_POLL = 0.02  # seconds
_PATIENCE = 10.0  # seconds for the server to end by itself


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


class ForkServer:
    """Starts cells as forks of one process, which is started with the first and ends with this context."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._like: tuple[dict[str, str], str] = {}, ""  # the environment and the working folder of its start
        self._numbers = itertools.count()
        self._text = b""
        self.processes: dict[int, int] = {}  # of the cells that have started, by their numbers
        self.codes: dict[int, int] = {}  # of those that have ended

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.communicate(timeout=_PATIENCE)  # the end of its input ends it
            self._server.kill()
            self._server.wait()
            self._server = None

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "ForkedProcess | None":
        """Starts a track's command in a fork, in a session of its own, with its output going to the end of the log.

        Args:
            command: its words.
            environment: the process's, whole.
            log: a file.

        Returns:
            the process; None where a fork cannot stand for the command, which has to be run itself.
        """
        if not sys.platform.startswith("linux") or list(command[:2]) != [sys.executable, "-m"]:
            return None
        shared = {name: value for name, value in environment.items() if name not in _OF_A_CELL}
        if command[2] not in TRACKS or (self._server is not None and (shared, os.getcwd()) != self._like):
            return None
        if self._server is None:
            self._like = shared, os.getcwd()
            self._server = subprocess.Popen(
                [sys.executable, "-m", "ssl_bench.cli.fork_server"],
                env=shared,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_OTHERS),
            )
            assert self._server.stdout is not None
            os.set_blocking(self._server.stdout.fileno(), False)
        number = next(self._numbers)
        mask = [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        request = {"module": command[2], "arguments": list(command[3:]), "log": str(Path(log).absolute())}
        own = {name: environment[name] for name in _OF_A_CELL if name in environment}
        sent = self.ask(number, **request, environment=own, mask=mask)
        return ForkedProcess(self, number) if sent else None

    def ask(self, number: int, **what: Any) -> bool:
        """Sends a request about a cell; returns whether there is somebody to take it."""
        assert self._server is not None
        assert self._server.stdin is not None
        text = json.dumps({"number": number, **what}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while text:  # an unbuffered pipe may take a part
                text = text[self._server.stdin.write(text) :]
        return not text

    def look(self) -> bool:
        """Reads what the server has said; returns whether it still lives."""
        assert self._server is not None
        assert self._server.stdout is not None
        alive = self._server.poll() is None
        while said := self._server.stdout.read(1 << 16):
            *lines, self._text = (self._text + said).split(b"\n")
            for answer in map(json.loads, lines):
                if "code" in answer:
                    self.codes[answer["number"]] = answer["code"]
                else:
                    self.processes[answer["number"]] = answer["process"]
        return alive


class ForkedProcess:
    """A cell of a `ForkServer`; as `Process` has it."""

    def __init__(self, server: ForkServer, number: int) -> None:
        self._server, self._number = server, number

    @property
    def returncode(self) -> int | None:
        return self._server.codes.get(self._number)

    def poll(self) -> int | None:
        if self.returncode is None and not self._server.look() and self.returncode is None:
            # The server was killed, and the kernel has asked its forks to save and end, as `follow_parent` wants it.
            process = self._server.processes.get(self._number)
            if process is None or _has_ended(process):
                self._server.codes[self._number] = REQUEUE_EXIT_CODE
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(_POLL)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if not self._server.ask(self._number, signal=int(number)) and self._number in self._server.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server.processes[self._number], number)


def _has_ended(process: int) -> bool:
    """Whether a process that is not this one's child has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
