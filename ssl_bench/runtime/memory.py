"""How much main memory this process may still allocate, within the limits of its control groups."""

from pathlib import Path

import psutil


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest memory limit of this process's control groups (set by containers and SLURM), or None."""
    # By hand, because psutil reports the machine's memory even inside a container with a limit.
    limits = []
    try:
        lines = membership.read_text().splitlines()
        inside = next(line.removeprefix("0::") for line in lines if line.startswith("0::")).lstrip("/")
    except (OSError, StopIteration):
        return None
    for folder in (root / inside, *(root / inside).parents):
        if not folder.is_relative_to(root):
            break
        try:
            limits.append(int((folder / "memory.max").read_text()))
        except (OSError, ValueError):  # the root group has no such file; "max" means no limit
            continue
    return min(limits, default=None)


def available_memory() -> int:
    """The bytes of main memory that new allocations may take."""
    available = psutil.virtual_memory().available
    limit = cgroup_limit()
    return available if limit is None else min(available, limit)
