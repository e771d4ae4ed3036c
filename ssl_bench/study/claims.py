"""Claims on a study's cells, as files: workers on any number of machines need a shared folder and no database.

A claim is a file ``NAME.claim-GENERATION`` that its holder touches every few seconds (the heartbeat) and keeps locked.
Under one kernel the lock alone tells whether the holder lives (between machines locks are not to be relied on). A claim
from another machine is dead when it was not touched for `EXPIRY` seconds. File times alone do not tell that, because
clocks are set: who has watched a claim for so long without a touch knows by its own clock, and one that looks old is
watched for `CONFIRM` seconds, in which a living holder would touch it. Only its successor removes a dead claim:
whoever takes over creates the next generation, which only one worker can, and steps back if another claim turns out to
be alive.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.records.lock import Lock, is_locked

EXPIRY = 90.0  # seconds without a heartbeat until a claim is dead
BEAT_EVERY = 10.0  # seconds between heartbeats
CONFIRM = 25.0  # seconds without a heartbeat, by our own clock, until a claim that looks old is taken for dead

# The time of each claim's last touch when we saw it first, and when that was by the monotonic clock.
_watched: dict[Path, tuple[int, float]] = {}


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: a process on a machine, under one boot of its kernel."""

    owner: str  # a name that outlives the process, or ""
    process: int
    machine: str
    boot: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.machine}" + (f" ({self.owner})" if self.owner else "")


class CellClaim:
    """A claim that this process holds; made by `CellClaim.acquire`."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path, self._lock = path, lock
        self._last_beat = time.monotonic()

    @classmethod
    def acquire(cls, folder: Path, name: str, *, owner: str = "", expiry: float = EXPIRY) -> "CellClaim | None":
        """Claims a name, or returns None if another holds it.

        Args:
            folder: where all workers keep their claims; made if need be.
            name: the cell's.
            owner: a name that outlives the process (a batch job's): a claim of its earlier process is taken over.
            expiry: seconds after which a claim without a heartbeat is dead.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _claims(folder, name)
        if any(_alive(path, owner, expiry) for path in earlier.values()):
            return None
        path = folder / f"{name}.claim-{max(earlier, default=0) + 1}"
        try:
            # Locked before it has contents: whoever reads this kernel's boot in the file may rely on the lock.
            here = Holder(owner, os.getpid(), socket.gethostname(), _boot())
            lock = Lock(path, json.dumps(vars(here)), new=True)
        except FileExistsError:
            return None  # another was faster
        claim = cls(path, lock)
        others = [other for other in _claims(folder, name).values() if other != path]
        if any(_alive(other, owner, expiry) for other in others):
            claim.release()
            return None
        for other in others:
            other.unlink(missing_ok=True)
        return claim

    def beat(self) -> None:
        """Keeps the claim alive; cheap enough to call at every look."""
        if time.monotonic() - self._last_beat > BEAT_EVERY:
            self._last_beat = time.monotonic()
            with contextlib.suppress(FileNotFoundError):  # thought dead and taken over: the run's own lock protects it
                os.utime(self.path)

    def release(self) -> None:
        """Gives the name back; a second call does nothing."""
        if self._lock.held:
            self.path.unlink(missing_ok=True)
            self._lock.release()


def holder(folder: Path, name: str, *, expiry: float = EXPIRY) -> str | None:
    """Who holds a live claim on the name, as text, or None."""
    for path in _claims(folder, name).values():
        if _alive(path, "", expiry, True):
            return str(_read(path) or "another process")
    return None


def _claims(folder: Path, name: str) -> dict[int, Path]:
    """The claims on a name by generation, dead or alive."""
    start = f"{name}.claim-"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    ends = {one: one.removeprefix(start) for one in names if one.startswith(start)}
    return {int(end): folder / one for one, end in ends.items() if end.isdecimal()}


def _alive(path: Path, owner: str, expiry: float, glance: bool = False) -> bool:
    """Whether a claim's holder lives; at a glance (for a display) nothing is written, and what looks old is dead."""
    try:
        touched = path.stat()
        held = _read(path)
        if held is not None and owner and held.owner == owner:  # this job's process from before it was requeued
            return False
        if held is not None and held.boot and held.boot == _boot():
            return is_locked(path)
        last, since = _watched.get(path, (None, 0.0))
        if last != touched.st_mtime_ns:
            since = time.monotonic()
            _watched[path] = (touched.st_mtime_ns, since)
        watched = time.monotonic() - since
        if watched > expiry:
            return False
        now = time.time() if glance else _clock(path.parent)
        return now - touched.st_mtime <= expiry or (watched < CONFIRM and not glance)
    except FileNotFoundError:
        return False


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _clock(folder: Path) -> float:
    """The time by the file system's own clock, which a file server need not share with this machine."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # somebody without write access asks for the status
        return time.time()


def _boot() -> str:
    """This boot of the kernel; "" where it has no name. Containers on one machine share it, and so the locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
