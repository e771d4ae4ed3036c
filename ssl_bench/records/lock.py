"""An exclusive claim on a folder that the kernel gives back when its holder dies, however it dies."""

import fcntl
import os
import socket
import time
from pathlib import Path

from ssl_bench.records.storage import naming

# A claim's file descriptor must not outlive its process in a forked child (a DataLoader worker, say): flock belongs to
# the open file, so a worker that survives a killed trainer for some seconds would keep the folder locked.
_held: set[int] = set()


def _drop_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


class InUseError(ValueError):
    """The folder is claimed by a live process."""


class Claim:
    """Holds a folder for this process until ``release`` or the process's end.

    Args:
        folder: the folder, which exists. The claim is an flock on its file ``.lock``; the file stays.
        patience: seconds to wait for another holder before giving up, >= 0. The default only outlasts the instant
            that ``is_claimed`` takes to look.

    Raises:
        InUseError: another process, or this one, holds it: its id and machine.
        OSError: the file cannot be written or the file system has no locks, in one line.
    """

    def __init__(self, folder: Path, *, patience: float = 0.2) -> None:
        path = folder / ".lock"
        deadline = time.monotonic() + patience
        with naming(f"{path}: claiming"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                while not _try_lock(descriptor):
                    if time.monotonic() > deadline:
                        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                        raise InUseError(f"{folder}: in use by {holder or 'another process'}")
                    time.sleep(0.02)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            except BaseException:
                os.close(descriptor)
                raise
        _held.add(descriptor)
        self._descriptor = descriptor

    def release(self) -> None:
        """Gives the folder back; a second call does nothing."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_claimed(folder: Path) -> bool:
    """Whether a live process holds a ``Claim`` on the folder."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # never claimed, or no folder at all
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
