"""Claims on a study's cells by atomic files, so that workers on any number of machines share a folder and no database.

A claim is a file ``NAME.claim-GENERATION`` that its holder touches every few seconds. One that was not touched for
`EXPIRY` seconds is dead; so is one whose holder ran under this kernel and no longer holds the file's lock, which needs
no waiting. A dead claim is never removed by another than its successor: who takes over creates the next generation,
which only one can, and steps back if another claim turns out to be alive.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

EXPIRY = 90.0  # seconds without a sign of life
BEAT_EVERY = 10.0  # seconds between signs of life


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: a process on a machine, under one boot of its kernel."""

    owner: str
    process: int
    machine: str
    boot: str

    @classmethod
    def here(cls, owner: str = "") -> "Holder":
        """This process. `owner`: a name that outlives the process, such as a batch job's."""
        return cls(owner, os.getpid(), socket.gethostname(), _boot())

    def __str__(self) -> str:
        return f"process {self.process} on {self.machine}" + (f" ({self.owner})" if self.owner else "")


class CellClaim:
    """A claim that this process holds; made by `CellClaim.acquire`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def acquire(cls, folder: Path, name: str, *, owner: str = "", expiry: float = EXPIRY) -> "CellClaim | None":
        """Claims a name, or returns None if another holds it.

        Args:
            folder: where all workers keep their claims; made if need be.
            name: the cell's.
            owner: who asks, if that outlives a process: a claim of the same owner's earlier process is taken over.
            expiry: seconds after which a claim without a sign of life is dead.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _claims(folder, name)
        if any(_alive(path, owner, expiry) for path in earlier.values()):
            return None
        path = folder / f"{name}.claim-{max(earlier, default=0) + 1}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return None  # another was faster
        # The lock before the contents: who finds this kernel's boot in the file may rely on the lock.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, json.dumps(vars(Holder.here(owner))).encode())
        claim = cls(path, descriptor)
        others = {number: other for number, other in _claims(folder, name).items() if other != path}
        if any(_alive(other, owner, expiry) for other in others.values()):
            claim.release()
            return None
        for other in others.values():
            other.unlink(missing_ok=True)
        return claim

    def beat(self) -> None:
        """A sign of life."""
        with contextlib.suppress(FileNotFoundError):  # taken for dead and taken over: the run's own lock protects it
            os.utime(self.path)

    def release(self) -> None:
        """Gives the name back; a second call does nothing."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def holder(folder: Path, name: str, *, expiry: float = EXPIRY) -> str | None:
    """Who holds a live claim on the name, as text, or None."""
    for path in _claims(folder, name).values():
        if _alive(path, "", expiry):
            return str(_read(path) or "another process")
    return None


def _claims(folder: Path, name: str) -> dict[int, Path]:
    """The claims on a name by generation, dead or alive."""
    pattern = re.compile(re.escape(name) + r"\.claim-(\d+)")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    return {int(match[1]): folder / one for one in names if (match := pattern.fullmatch(one))}


def _alive(path: Path, owner: str, expiry: float) -> bool:
    try:
        age = _clock(path.parent) - path.stat().st_mtime
        if age > expiry:
            return False
        held = _read(path)
        if held is None:
            return True  # just created
        if owner and held.owner == owner:
            return False
        return held.boot != _boot() or not held.boot or _locked(path)
    except FileNotFoundError:
        return False


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _clock(folder: Path) -> float:
    """The time by the file system's own clock, which a file server need not share with this machine."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        return os.fstat(file.fileno()).st_mtime


def _boot() -> str:
    """This boot of the kernel; "" where it has no name. Containers on one machine share it, and so the locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
