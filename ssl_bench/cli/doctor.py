"""``ssl-bench doctor``: whether this machine can run the suite, and what to do about what is wrong."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1 << 30
LOW_DISK, FULL_DISK = 20 * GIB, 1 * GIB  # Tiny ImageNet, decoded, and some checkpoints; a checkpoint
LOW_MEMORY = 4 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        level: "ok", "note" (it works, and could be better) or "fault".
        text: what was found.
        advice: what to do; "" for what is fine.
    """

    what: str
    level: Literal["ok", "note", "fault"]
    text: str
    advice: str = ""


def main(runs: str = "runs") -> int:
    """Prints a line about each check, with what to do below a fault.

    Returns:
        1 if something is at fault, else 0.
    """
    found = [finding for check in CHECKS for finding in guarded(check)]
    found += guarded(lambda: disk("runs", Path(runs)))
    for one in found:
        print(f"{one.level:<5}  {one.what:<11} {one.text}")
        if one.advice:
            print(f"       {'':<11} -> {one.advice}")
    faults = sum(one.level == "fault" for one in found)
    print(f"{faults} fault{'s' if faults != 1 else ''}")
    return int(faults > 0)


def guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check's findings; one that raises is a fault itself: whatever a broken installation does."""
    try:
        return list(check())
    except Exception as error:
        name = getattr(check, "__name__", "check")
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Finding(name, "fault", text, "install it again: pip install --force-reinstall NAME")]


def python() -> Iterator[Finding]:
    from ssl_bench import __version__

    text = f"{platform.python_version()}, ssl_bench {__version__}, {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", text)


def torch_and_driver() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    driver = driver_version()
    if built is None:
        text = f"{torch.__version__}, a build without CUDA"
        advice = "pip install torch with CUDA, from the index that pytorch.org names for your driver"
        yield Finding("torch", "fault" if driver else "ok", text, advice if driver else "")
    elif driver is None:
        yield Finding("torch", "ok", f"{torch.__version__} for CUDA {built}; no NVIDIA driver: runs are on the CPU")
    elif _numbers(driver[1]) < _numbers(built)[:1]:
        text = f"{torch.__version__} for CUDA {built}; driver {driver[0]} serves CUDA {driver[1]}"
        major = _numbers(driver[1])[0]
        yield Finding("torch", "fault", text, f"install a newer driver, or a torch for CUDA {major}.x (pytorch.org)")
    else:
        text = f"{torch.__version__} for CUDA {built}; driver {driver[0]} serves CUDA {driver[1]}"
        yield Finding("torch", "ok", text)


def driver_version() -> tuple[str, str] | None:
    """The NVIDIA driver's version and the newest CUDA that it serves; None where there is none."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Driver Version: *([\d.]+).*CUDA Version: *([\d.]+)", done.stdout)
    return (found[1], found[2]) if found else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def gpus() -> Iterator[Finding]:
    import torch

    from ssl_bench.training.processes import why_no_gpu

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
        if reason := why_no_gpu():
            advice = "restart after a driver update; else see the line about torch, or run with device=cpu"
            yield Finding("gpu", "fault", reason, advice)
        else:
            yield Finding("gpu", "ok", "none" + (", hidden by CUDA_VISIBLE_DEVICES" if hidden else ""))
        return
    known = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{index}: {gpu.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if f"sm_{gpu.major}{gpu.minor}" not in known and not any(f"sm_{gpu.major}" in arch for arch in known):
            advice = "install a torch that is built for it (pytorch.org)"
            yield Finding("gpu", "fault", f"{text}; this torch is built for {', '.join(known)}", advice)
        elif free < total / 2:
            yield Finding("gpu", "note", text, "another program uses it: nvidia-smi names it")
        else:
            yield Finding("gpu", "ok", text)
    yield from _kernels()


def _kernels() -> Iterator[Finding]:
    """What Triton, which compiles the augmentation's kernels and compile=true's, lacks."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    lacks = [name for name, there in (("a C compiler", compiler), (str(headers), headers.is_file())) if not there]
    if lacks:
        advice = "apt-get install gcc python3-dev, or what your system calls them: a step's views would be made faster"
        yield Finding("kernels", "note", f"Triton cannot compile without {' and '.join(lacks)}", advice)


def torchvision() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    have = importlib.metadata.version("torch")
    text = f"{importlib.metadata.version('torchvision')} with torch {have}"
    for needs in map(Requirement, importlib.metadata.requires("torchvision") or []):
        if needs.name == "torch" and not needs.specifier.contains(have, prereleases=True):
            advice = f"pip install 'torch{needs.specifier}', or the torchvision of torch {have}: they are one build"
            yield Finding("torchvision", "fault", f"{text}; it needs torch {needs.specifier}", advice)
            return
    import torchvision.ops  # noqa: F401 (its compiled part fails here where the two do not fit)

    yield Finding("torchvision", "ok", text)


def faiss() -> Iterator[Finding]:
    names = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
    installed = []
    for name in names:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if not installed:
        advice = "pip install faiss-gpu (Linux x86_64), else faiss-cpu: kNN needs one"
        yield Finding("faiss", "fault", "not installed", advice)
        return
    import faiss as module

    text = f"{', '.join(installed)}, {module.get_num_gpus() if hasattr(module, 'get_num_gpus') else 0} GPUs"
    if len(installed) > 1:
        both = " ".join(one.split()[0] for one in installed)
        yield Finding("faiss", "fault", text, f"they overwrite each other: pip uninstall {both}, then install one")
    else:
        yield Finding("faiss", "ok", text)


def memory() -> Iterator[Finding]:
    from ssl_bench.runtime.launcher import usable_cores
    from ssl_bench.runtime.memory import available_memory

    free = available_memory()
    text = f"{free / GIB:.1f} GiB free, {usable_cores()} cores usable"
    advice = "close other programs, or give recompute=blocks or a chunk_size; ssl-bench estimate says what a run needs"
    yield Finding("memory", "note" if free < LOW_MEMORY else "ok", text, advice if free < LOW_MEMORY else "")


def cache() -> Iterator[Finding]:
    from ssl_bench.runtime.paths import cache_folder

    yield from disk("cache", cache_folder(None), "set SSL_BENCH_CACHE or data.cache_dir to a folder that has room")


def disk(what: str, folder: Path, elsewhere: str = "run_dir or --runs can name another disk") -> Iterator[Finding]:
    """Whether a folder, or the one that it would be made in, can be written and has room."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {free / GIB:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(what, "fault", f"{text}; {there} cannot be written", elsewhere)
    elif free < LOW_DISK:
        yield Finding(what, "fault" if free < FULL_DISK else "note", text, f"{elsewhere}; ssl-bench data clear")
    else:
        yield Finding(what, "ok", text)


def accelerate() -> Iterator[Finding]:
    """The configuration that ``accelerate launch`` reads where no other is given."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        yield Finding("accelerate", "ok", "no configuration of its own (configs/accelerate/ has ready ones)")
        return
    try:
        config = load_config_from_file(None)
    except Exception as error:  # yaml's, or its own
        text = f"{default_config_file}: {' '.join(str(error).split())[:200]}"
        yield Finding("accelerate", "fault", text, "accelerate config default writes it anew")
        return
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    shape = f"{config.num_processes} processes, mixed precision {config.mixed_precision}"
    text = f"{default_config_file}: {kind}, {shape}"
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        advice = "DistributedDataParallel is what runs here: accelerate launch --config_file configs/accelerate/..."
        yield Finding("accelerate", "fault", text, advice)
    elif str(config.mixed_precision).lower() not in ("no", "none"):
        yield Finding("accelerate", "note", text, "precision= of the recipe decides, whatever this file says")
    else:
        yield Finding("accelerate", "ok", text)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(python, torch_and_driver, gpus, torchvision, faiss, memory, cache, accelerate),
)
