"""The processes and the device of a run: which there are, that they run the same, and what they are called."""

import glob
import hashlib
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from ssl_bench.data.dataset import Dataset
from ssl_bench.recipe.identity import flatten
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.provenance import code_version, cpu_model, package_versions
from ssl_bench.runtime import peers
from ssl_bench.runtime.console import say
from ssl_bench.runtime.distributed import all_objects
from ssl_bench.runtime.suggestion import nearest
from ssl_bench.runtime.tf32 import forbid_tf32

# What `accelerate launch` puts into the environment of every process, and what has no effect on a result: the recipe
# says the rest (precision, compile, device), so these change nothing, and other values are named in the first line.
_PREFIX = "ACCELERATE_"
_USUAL = {
    "MIXED_PRECISION": ("no",),
    "DYNAMO_BACKEND": ("no",),
    "DYNAMO_MODE": ("default",),
    "GRADIENT_ACCUMULATION_STEPS": ("1",),
}
_LEFT_ALONE = ("CPU_AFFINITY", "DEBUG_MODE", "LOG_LEVEL", "ENABLE_RICH")  # placement of threads, and messages
_OFF = ("", "0", "no", "none", "false")
# Another way to compute a step, which a user who asks for it means; not to be ignored.
_REFUSED = {
    "GRADIENT_ACCUMULATION_STEPS": "chunk_size splits a batch here",
    "USE_DEEPSPEED": "DistributedDataParallel is what runs here",
    "USE_FSDP": "DistributedDataParallel is what runs here",
    "USE_MEGATRON_LM": "DistributedDataParallel is what runs here",
    "USE_PARALLELISM_CONFIG": "DistributedDataParallel is what runs here",
    "USE_SAGEMAKER": "DistributedDataParallel is what runs here",
}

# Keys in which processes may differ: each machine may keep the images elsewhere and read them in its own way.
_OWN = ("data.path", "data.cache_dir", "data.workers", "data.resident", "run_dir")

SAMPLED = 32  # images of each split that are compared between processes

_NVIDIA = "/dev/nvidia[0-9]*"  # what the driver shows of each GPU


class Processes:
    """The processes of a run and the device of this one.

    Args:
        accelerator: Accelerate's.
        ignored: what the environment asks for beyond the recipe and does not get, as ``NAME=value``.
    """

    def __init__(self, accelerator: Accelerator, ignored: list[str] | None = None) -> None:
        self.accelerator, self.ignored = accelerator, ignored or []
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process

    def say(self, message: str) -> None:
        """Prints a line for the user, once and not per process."""
        if self.main:
            say(message)

    def describe(self, precision: str, length: str) -> str:
        """The device by name, the number of processes, the precision, the length, and what was asked for in vain."""
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else f"CPU ({cpu_model()})"
        several = "es" if self.world_size > 1 else ""
        ignored = f"; ignored, as the recipe decides: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{name}, {self.world_size} process{several}, {precision}, {length}{ignored}"

    def compare(self, what: Mapping[str, Any]) -> None:
        """Checks that all processes are about to do the same; all must call it.

        Args:
            what: names and values, which must be equal.

        Raises:
            ValueError: the same line on every process: the first few differences, with the ranks that have them.
        """
        if self.world_size == 1:
            return
        of_all = all_objects(dict(what))
        lines = []
        for key in sorted({key for one in of_all for key in one}):
            ranks: dict[str, list[int]] = {}
            for number, one in enumerate(of_all):
                ranks.setdefault(str(one.get(key, "nothing")), []).append(number)
            if len(ranks) > 1:
                sides = [f"{value} on rank {', '.join(map(str, numbers))}" for value, numbers in ranks.items()]
                lines.append(f"{key}: {', '.join(sides)}")
        if lines:
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(f"all processes must run the same, got {'; '.join(lines[:5])}{more}")


def processes(recipe: Recipe) -> Processes:
    """The processes and the device that a recipe asks for; float32 means float32 from here on, without TF32.

    Raises:
        ValueError: in one line; the recipe does not fit this machine, or the processes differ in what they run.
    """
    on_cpu = _on_cpu(recipe.device)
    if recipe.precision == "fp16" and on_cpu:
        raise ValueError("precision must be fp32 or bf16 on the CPU, got fp16, which needs a GPU")
    if recipe.tracker:
        _check_tracker(recipe.tracker)
    asked = peers.asked_of_accelerate()
    ignored = take_environment(recipe, on_cpu=on_cpu)
    if asked > 1 and peers.world_size() == 1:
        ignored.append(f"{asked} processes, of which accelerate starts one on the CPU (ssl-bench --processes {asked})")
    peers.adopt()
    if peers.world_size() > 1 and not torch.distributed.is_initialized():
        peers.meet("gloo" if on_cpu else "nccl")
    forbid_tf32()
    # Accelerate keeps the first recipe's precision for the life of the process; the next one may have another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=recipe.tracker,
        project_dir=recipe.folder(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    where = Processes(accelerator, ignored)
    if where.world_size > 1:
        own = {key: value for key, value in flatten(recipe.to_dict()).items() if key not in _OWN}
        code = code_version()
        versions = {**package_versions(), "ssl_bench": code["version"], "commit": code["commit"]}
        where.compare({**own, "device": where.device.type, **versions})
    return where


def contents(data: Dataset) -> dict[str, Any]:
    """What tells two data sets apart, for `Processes.compare`: counts, labels, statistics and some images.

    The mean and the standard deviation are of all train images, so they tell apart what the samples do not.
    """
    found: dict[str, Any] = {"data's classes": _digest("\n".join(data.classes).encode())}
    found |= {"data's mean": data.mean, "data's std": data.std}
    for name, source in (("train", data.train), ("test", data.test)):
        some = torch.arange(0, len(source), max(1, len(source) // SAMPLED))[:SAMPLED]
        (images,) = source.batches([some])
        found |= {
            f"{name} images": len(source),
            f"{name} labels": _digest(source.labels.numpy().tobytes()),
            f"{name} pixels": _digest(images.cpu().numpy().tobytes()),
        }
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _on_cpu(device: str) -> bool:
    """Whether a run computes on the CPU.

    Raises:
        ValueError: a GPU is asked for or can be seen, and torch cannot use it.
    """
    if device == "cpu" or torch.cuda.is_available():
        return device == "cpu"
    if device == "cuda":
        raise ValueError(f"device must be auto or cpu, got cuda: torch sees no GPU here{_obstacle()}")
    if reason := why_no_gpu():
        raise ValueError(f"device must be cpu, or the GPU be made usable, got auto: {reason}")
    return True


def why_no_gpu() -> str:
    """Why torch does not use the NVIDIA GPU that is here; "" where there is none, or it is hidden on purpose."""
    # By an empty CUDA_VISIBLE_DEVICES, or -1.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or not (found := sorted(glob.glob(_NVIDIA))):
        return ""
    return f"{found[0]} is here, and torch cannot use it{_obstacle()}"


def _obstacle() -> str:
    """Why torch cannot use CUDA, in parentheses; empty where nobody knows."""
    if torch.version.cuda is None:
        return f" (torch {torch.__version__} is a build without CUDA)"
    try:
        torch.cuda.init()
    except Exception as error:  # what the driver says
        return f" ({' '.join(str(error).split())})"
    return ""


def take_environment(recipe: Recipe, *, on_cpu: bool, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Takes Accelerate's settings out of the environment, because the recipe alone decides what a run computes.

    Returns:
        those that asked for something that the recipe does not say, as ``NAME=value``.

    Raises:
        ValueError: in one line; one of them asks for another way to compute.
    """
    ignored = []
    for name in sorted(name for name in environment if name.startswith(_PREFIX)):
        short, value = name.removeprefix(_PREFIX), environment[name].lower()
        if short in _LEFT_ALONE:
            continue
        asks = value not in _USUAL.get(short, ()) and value not in _OFF
        if short == "MIXED_PRECISION" and value == recipe.precision:
            asks = False
        if short == "USE_CPU" and asks and not on_cpu:
            raise ValueError(
                f"{name} must be unset, or device=cpu be given, got {value}: device={recipe.device} is a GPU"
            )
        if asks and short in _REFUSED:
            raise ValueError(f"{name} must be unset, got {value}: the recipe decides ({_REFUSED[short]})")
        if asks and short != "USE_CPU":
            ignored.append(f"{name}={environment[name]}")
        del environment[name]
    return ignored


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(tracker.value) for tracker in get_available_trackers()]
    if name not in known:
        raise ValueError(f"unknown tracker {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if name not in installed:
        here = ", ".join(installed) or "none"
        raise ValueError(f"tracker must be installed, got {name!r}: pip install {name} (installed here: {here})")
