"""What ran, for the record: code, packages, hardware and every effective setting."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ssl_bench
from ssl_bench.records.storage import jsonable
from ssl_bench.runtime.launcher import usable_cores

# Distribution names; at most one of faiss's is installed.
_PACKAGES = (
    *("torch", "torchvision", "timm", "accelerate", "faiss-gpu", "faiss-cpu", "faiss-gpu-cu12", "numpy"),
    *("pyarrow", "datasets"),
)


def collect_provenance(
    *,
    track: str,
    seeds: Mapping[str, int],
    world_size: int,
    param_groups: Iterable[Mapping[str, Any]],
    device: torch.device | str,
) -> dict[str, Any]:
    """Everything about a run that its recipe does not say, for ``Run.write_provenance``.

    No environment variables, host or user names are recorded.

    Args:
        track: "pretrain" or "classify".
        seeds: each seed by what it seeds.
        world_size: the number of processes.
        param_groups: the optimizer's, with their effective settings (see ``describe_groups``).
        device: what the run computes on.
    """
    return {
        "track": track,
        "started": now(),
        "argv": sys.argv,
        "seeds": dict(seeds),
        "world_size": world_size,
        "device": str(device),
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
        "torch": torch_settings(),
        "param_groups": describe_groups(param_groups),
    }


def now() -> str:
    """The time in UTC, to the second, e.g. 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def code_version() -> Mapping[str, Any]:
    """The package's version, the git commit it runs from, and whether tracked files differ from that.

    Looked up once in a process, near the code's import: what is committed later is not what runs. The commit is None
    for an installed package, even if it lies inside somebody else's checkout.
    """
    version: dict[str, Any] = {"version": ssl_bench.__version__, "commit": None, "dirty": None}
    folder = Path(ssl_bench.__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        version["commit"] = (_git(folder, "rev-parse", "HEAD") or "").strip() or None
        version["dirty"] = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return version


def _git(folder: Path, *arguments: str) -> str | None:
    """A git command's output, or None where it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def package_versions(*more: str) -> dict[str, str]:
    """The versions of Python and of the installed packages that can change a result, and of those named besides."""
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """This machine's processor, usable cores, memory (GiB), GPUs and CUDA version."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def torch_settings() -> dict[str, Any]:
    """torch's global switches that can change a result's last digits."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def describe_groups(param_groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each parameter group's settings, the number of its tensors and elements, and its tensors' names if it has them.

    A setting that JSON cannot hold (a dtype, a function) is described by its text.

    Args:
        param_groups: in the form of ``torch.optim.Optimizer.param_groups``.
    """
    return [
        {
            **{key: _recordable(value) for key, value in group.items() if key not in ("params", "param_names")},
            "tensors": len(group["params"]),
            "elements": sum(parameter.numel() for parameter in group["params"]),
            "param_names": list(group.get("param_names", [])),
        }
        for group in param_groups
    ]


def _recordable(value: Any) -> Any:
    """A value of JSON, or where it is none, a text that is the same in every process."""
    try:
        return jsonable(value)
    except (ValueError, RecursionError):
        pass
    if isinstance(value, torch.Tensor):
        return f"tensor of {tuple(value.shape)}, {value.dtype}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__:  # the text would be its address
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(value)
