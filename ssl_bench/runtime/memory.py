"""How much main memory this process may take, control groups included."""

from pathlib import Path

import psutil


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest memory limit of this process's control groups (containers and SLURM set them); None without any."""
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
        except (OSError, ValueError):  # no such file in the root, "max" where there is no limit
            continue
    return min(limits, default=None)


def available_memory() -> int:
    """The bytes of main memory that a new allocation may take."""
    available = psutil.virtual_memory().available
    limit = cgroup_limit()
    return available if limit is None else min(available, limit)
