"""How the processes of a run find each other, and how an error or a signal that reaches one of them ends all.

They meet at a store (torch's TCPStore at MASTER_ADDR:MASTER_PORT), which the launcher holds, or else rank 0. Beside the
process group's own keys it takes the lines that were said and the exit code of the first process that failed: each
process looks for that once a second, because a collective call that the failed one never joins waits for hours.
"""

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from ssl_bench.runtime.console import say

MEETING = 300.0  # seconds within which all processes of a run must have started
SAY_AFTER = 5.0  # seconds of waiting until a process says whom it waits for
# How long a collective call may wait. Rank 0 decodes a data set or fits a probe alone meanwhile; a process that failed
# does not need this clock to be noticed.
SOLO_WORK = timedelta(hours=24)
LOOK_EVERY = 1.0  # seconds
GRACE = 3.0  # seconds in which a process whose peer failed may end by itself
SAVING_GRACE = 60.0  # and while it writes a checkpoint

# (rank, world size, local rank) under launchers that have names of their own for them.
_OTHER_NAMES = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; a batch script has no SLURM_STEP_NUM_TASKS
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
_PORT = 29500
_kept: list[Any] = []
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = ("torchrun", "accelerate", "torch.distributed.run", "accelerate.commands.launch")
LAUNCHER = "SSL_BENCH_LAUNCHER"  # environment variable: the process id of `ssl_bench.runtime.launcher`


def rank() -> int:
    """This process's number as its launcher gave it, before there is a process group."""
    return _number("RANK", 0)


def world_size() -> int:
    """The number of processes as the launcher gave it."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise  # `adopt` refuses what is none


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Completes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from what srun or mpirun say.

    Raises:
        ValueError: in one line; numbers that are none, or a rank outside the world.
    """
    for of_rank, of_size, of_local in _OTHER_NAMES:
        if "RANK" not in environment and int(environment.get(of_size, "1")) > 1:
            environment["RANK"], environment["WORLD_SIZE"] = environment[of_rank], environment[of_size]
            environment["LOCAL_RANK"] = environment[of_local]
    size, number = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    if not (size.isdecimal() and number.isdecimal() and int(number) < int(size)):
        raise ValueError(f"RANK must be a number from 0 to WORLD_SIZE - 1, got RANK={number} and WORLD_SIZE={size}")
    if int(size) > 1:
        job = environment.get("SLURM_JOB_ID", "0")
        environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", number))
        environment.setdefault("MASTER_PORT", str(_PORT + int(job) % 20000 if job.isdecimal() else _PORT))
        environment.setdefault("MASTER_ADDR", _first_host(environment.get("SLURM_STEP_NODELIST", "")))


def _first_host(nodes: str) -> str:
    """The first machine of SLURM's list of them; this machine where there is no list."""
    if "[" not in nodes:
        return nodes.split(",")[0] or "127.0.0.1"
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def follow_parent() -> None:
    """Asks the kernel for SIGTERM when the launcher dies, so that a worker saves and ends and is no orphan.

    Only under a launcher: a run of its own outlives the shell that started it (nohup).
    """
    parent, ours = os.getppid(), os.environ.get(LAUNCHER)
    launched = ours is not None or "TORCHELASTIC_RUN_ID" in os.environ or _is_launcher(parent)
    if not launched or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The launcher may have died before that call, or even before the first look.
    dead = not Path(f"/proc/{ours}").exists() if ours else parent == 1 and not _is_launcher(1)
    if dead or os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def asked_of_accelerate() -> int:
    """How many processes ``accelerate launch`` was asked for by its arguments or its configuration file; 0 without it.

    On the CPU it starts one, whatever it was asked for, and does not tell.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return 0
    names = [Path(word).name for word in words[:4]]
    start = next((i for i, n in enumerate(names) if n in ("launch", "accelerate.commands.launch", "launch.py")), None)
    if start is None or not any("accelerate" in word for word in words[: start + 1]):
        return 0
    with contextlib.suppress(Exception, SystemExit):  # its own business
        from accelerate.commands.config.config_args import default_config_file, load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args([word for word in words[start + 1 :] if word])
        if given.num_processes is None and (given.config_file or Path(default_config_file).is_file()):
            return int(load_config_from_file(given.config_file).num_processes)
        return int(given.num_processes or 0)
    return 0


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name in _LAUNCHERS for word in words[:4])


def meet(backend: str) -> None:
    """Waits for the run's other processes and makes the process group; says whom it waits for if that takes long.

    Args:
        backend: of the group, "gloo" or "nccl".

    Raises:
        ValueError: in one line; they did not all come within `MEETING`.
    """
    import torch.distributed as dist

    where, number, size = _address(), rank(), world_size()
    given = f"WORLD_SIZE={size} RANK={number} in the environment"
    alone = "for a run of one process unset WORLD_SIZE and RANK"

    others = f"the other {size - 1} of {size} processes"
    timer = threading.Timer(
        SAY_AFTER, say, [f"rank {number}: waiting up to {MEETING:.0f} s for {others} at {where} ({given}; {alone})"]
    )
    timer.daemon = True
    timer.start()
    try:
        store = _store(host=number == 0 and not _held_by_launcher(), patience=MEETING)
        _kept.append(store)  # for as long as this process lives: if it holds the store, others still ask it
        deadline = time.monotonic() + MEETING
        store.set(_key(f"here/{number}"), "")
        while away := [other for other in range(size) if not store.check([_key(f"here/{other}")])]:
            if (code := _told(store)) is not None:
                raise PeerError(code)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the {size} processes must all start within {MEETING:.0f} s, got none of rank "
                    f"{', '.join(map(str, away))} at {where} ({given}; {alone})"
                )
            time.sleep(0.05)
        group = dist.PrefixStore(_key("group"), store)
        dist.init_process_group(backend, store=group, rank=number, world_size=size, timeout=SOLO_WORK)
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(f"the {size} processes cannot meet at {where} ({given}; {alone}): {error}") from error
    finally:
        timer.cancel()


class PeerError(Exception):
    """Another process of the run has failed, and said why; this one ends with its exit code.

    Args:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"another process of the run ended with code {code}")
        self.code = code


def first_to_say(text: str) -> bool:
    """Whether this process is the first to say a line; True where the others cannot be asked."""
    with contextlib.suppress(Exception):
        key = _key(f"said/{hashlib.sha256(text.encode()).hexdigest()}")
        return _store().compare_set(key, "", str(rank())).decode() == str(rank())
    return True


def tell(code: int, store: Any = None) -> None:
    """Tells the run's processes that one of them ends with an exit code before the run's end, so that all do.

    Args:
        code: the exit code.
        store: the launcher's own; None = connect to it.
    """
    with contextlib.suppress(Exception):
        store = store or _store()
        store.compare_set(_key("ended"), "", str(code))
        store.set(_key(f"left/{rank()}"), "")
        deadline = time.monotonic() + GRACE
        # Who holds the store stays until the others have asked it too whether their line was said.
        while _kept and rank() == 0 and not _held_by_launcher() and time.monotonic() < deadline:
            if store.check([_key(f"left/{other}") for other in range(world_size())]):
                break
            time.sleep(0.05)


def told() -> int | None:
    """The exit code of the first process that ended before the run's end, if one did."""
    with contextlib.suppress(Exception):
        return _told(_store())
    return None


class Watch:
    """Ends this process, wherever it waits, when another one of the run has ended before its time; a context.

    Args:
        is_saving: whether a checkpoint is being written just now, which is finished first.
        at_end: called with the exit code before the process ends.
    """

    def __init__(self, is_saving: Callable[[], bool], at_end: Callable[[int], None]) -> None:
        self._is_saving, self._at_end, self._over = is_saving, at_end, threading.Event()

    def __enter__(self) -> "Watch":
        if world_size() > 1:
            threading.Thread(target=self._look, daemon=True, name="peers").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _look(self) -> None:
        try:
            store = _store()
            while (code := _told(store)) is None:
                if self._over.wait(LOOK_EVERY):
                    return
        except Exception:  # the store is gone, and who held it
            if _held_by_launcher():
                return  # the kernel's SIGTERM comes (see `follow_parent`), and the run saves
            code = 1
        deadline = time.monotonic() + SAVING_GRACE
        while self._is_saving() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._over.wait(GRACE):
            return
        self._at_end(code)
        sys.stderr.flush()
        os._exit(code)


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', _PORT)}"


def _held_by_launcher() -> bool:
    """Whether the launcher holds the store, as torchrun, accelerate launch (which calls it) and ours do."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(*, host: bool = False, patience: float = 1.0) -> Any:
    """A connection of its own to the store, so that it never waits for another thread's call.

    Raises:
        OSError: nobody answers there.
    """
    address, _, port = _address().rpartition(":")
    deadline = time.monotonic() + patience
    while not host:  # asked by a plain socket first: torch's prints a page of its own where nobody answers
        try:
            socket.create_connection((address, int(port)), timeout=5.0).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    from torch.distributed import TCPStore

    return TCPStore(
        address, int(port), is_master=host, timeout=timedelta(seconds=max(patience, 10.0)), wait_for_workers=False,
        multi_tenant=host,
    )  # fmt: skip


def _told(store: Any) -> int | None:
    return int(store.get(_key("ended"))) if store.check([_key("ended")]) else None


def _key(name: str) -> str:
    """A key in the store, which torchrun keeps when it starts the workers again."""
    return f"ssl_bench/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
