"""The process that a study's cells are forks of (see `ssl_bench.study.warm`): it has imported torch and the suite.

It reads a line of JSON for each cell, or for a signal to one, from its standard input and writes one for each beginning
and end to its standard output. At the end of its input, when the launcher has gone, it ends, of which the kernel tells
its forks (`ssl_bench.runtime.peers.follow_parent`).
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import sys
import warnings
from typing import Any

from ssl_bench.recipe.command import leave

LOOK_EVERY = 0.02  # seconds between looks at the forks


def preload() -> None:
    """Imports what a run imports. Nothing here may touch a GPU: a process that is forked after that cannot use it."""
    for name in ("classify", "pretrain", "recipe.compose", "recipe.content", "training.build"):
        importlib.import_module(f"ssl_bench.{name}")
    from ssl_bench.records.provenance import code_version

    code_version()  # of the code that is in memory from here on; a commit may come while the cells run
    gc.freeze()  # a fork that looked at these objects again would copy their memory


def serve() -> dict[str, Any] | None:
    """Forks as it is asked to; returns None at the end of the input, and in each fork the request."""
    # Away from where a fork, and whoever prints, has its input and output.
    requests, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (0, 1))
    _redirect(os.devnull, os.O_RDWR, 0, 1)
    forks: dict[int, int] = {}  # a cell's number: its process
    text = b""
    while True:
        ready, _, _ = select.select([requests], [], [], LOOK_EVERY if forks else None)
        if ready:
            if not (read := os.read(requests, 1 << 16)):
                return None
            *lines, text = (text + read).split(b"\n")
            for request in map(json.loads, lines):
                number = request["number"]
                if "signal" in request:
                    if number in forks:
                        os.kill(forks[number], request["signal"])
                    continue
                with warnings.catch_warnings():  # of threads, which are those of BLAS, and it knows of forks
                    warnings.simplefilter("ignore", DeprecationWarning)
                    forks[number] = os.fork()
                if not forks[number]:
                    os.close(requests)
                    os.close(answers)
                    return request
                _answer(answers, number=number, process=forks[number])
        for number, process in list(forks.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del forks[number]
                _answer(answers, number=number, code=os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any]) -> int:
    """In a fork: runs the cell's command as ``python -m`` does; returns its exit code."""
    os.setsid()  # a Ctrl-C in the launcher's terminal reaches the launcher alone
    _redirect(os.devnull, os.O_RDONLY, 0)
    _redirect(request["log"], os.O_WRONLY | os.O_APPEND, 1, 2)
    # Where the launcher has none, neither had the server.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.update(request["environment"])
    sys.modules["numpy"].random.seed()  # forks would all draw the same
    module: Any = importlib.import_module(request["module"])
    sys.argv = [str(module.__file__), *request["arguments"]]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a batch system's warning to the whole job is for the launcher
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])  # what came in the meantime is delivered now
    return module.main()


def _redirect(path: str, flags: int, *targets: int) -> None:
    opened = fcntl.fcntl(source := os.open(path, flags), fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(source)
    for target in targets:
        os.dup2(opened, target)
    os.close(opened)


def _answer(answers: int, **what: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher has gone; so will the input's end say
        os.write(answers, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    preload()
    asked = serve()
    leave(0 if asked is None else become(asked))
