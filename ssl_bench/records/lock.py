"""Exclusive locks that the kernel releases when their holder dies, however it dies."""

import fcntl
import os
import socket
import time
from pathlib import Path

from ssl_bench.records.storage import naming

# Not filelock, which `ssl_bench.data` uses: even to look it opens the file for writing, which readers of somebody
# else's runs may not, and the oldest version we allow (3.12) erases the holder's name in a failed attempt and is
# inherited by forks.

# Descriptors to close in a forked child: flock belongs to the open file, so a DataLoader worker that outlives its
# killed trainer by some seconds would otherwise keep the run directory locked.
_held: set[int] = set()


def _drop_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


class InUseError(ValueError):
    """A live process holds the lock."""


class Lock:
    """Holds a file locked until ``release`` or the end of this process; the file itself stays.

    Args:
        path: the file, created if need be.
        holder: who holds it; the file's contents from now on.
        new: refuse a file that exists already.
        patience: seconds to wait for another holder before giving up, >= 0. The default only outlasts the instant
            that ``is_locked`` takes to look.

    Raises:
        InUseError: this or another process holds it.
        FileExistsError: ``new`` was asked for and the file exists.
        OSError: the file cannot be written or the file system has no locks.
    """

    def __init__(self, path: Path, holder: str, *, new: bool = False, patience: float = 0.2) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if new else 0)
        self._descriptor = os.open(path, flags, 0o644)
        _held.add(self._descriptor)
        deadline = time.monotonic() + patience
        try:
            while not _try_flock(self._descriptor, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    other = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                    raise InUseError(f"in use by {other or 'another process'}")
                time.sleep(0.02)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode(), 0)
        except BaseException:
            self.release()
            raise

    @property
    def held(self) -> bool:
        return self._descriptor in _held

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self.held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def is_locked(path: Path) -> bool:
    """Whether a live process holds a ``Lock`` on the file; needs no write access.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim(folder: Path, *, patience: float = 0.2) -> Lock:
    """Locks a folder, which exists, for this process: its file ``.lock``, which names the process.

    Raises:
        InUseError: this or another process holds it: its id and machine.
        OSError: as `Lock`, in one line.
    """
    with naming(f"{folder / '.lock'}: locking"):
        try:
            return Lock(folder / ".lock", f"process {os.getpid()} on {socket.gethostname()}\n", patience=patience)
        except InUseError as error:
            raise InUseError(f"{folder}: {error}") from None


def is_claimed(folder: Path) -> bool:
    """Whether a live process holds the folder."""
    try:
        return is_locked(folder / ".lock")
    except OSError:
        return False  # never claimed, or no such folder
