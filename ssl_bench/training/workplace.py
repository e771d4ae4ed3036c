"""The processes and the device that a recipe asks for, and its data set on them."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from ssl_bench.data.dataset import Dataset, load_dataset
from ssl_bench.data.holdout import hold_out
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime.console import say
from ssl_bench.runtime.suggestion import nearest


class Workplace:
    """The processes and the device that a recipe asks for.

    Raises:
        ValueError: one line; the recipe does not fit this machine.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.accelerator = _accelerator(recipe)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    @property
    def compiles_views(self) -> bool:
        """Whether ``compile`` pays for the augmentation: on a GPU it saves kernels, on the CPU it costs."""
        return self.recipe.compile and self.device.type == "cuda"

    @property
    def graph_obstacle(self) -> str | None:
        """Why steps cannot be CUDA graphs here; None where they can."""
        recipe = self.recipe
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if self.world_size > 1:
            return f"there are {self.world_size} processes"
        if recipe.chunk_size not in (None, recipe.batch_size):
            return "chunk_size splits the batch"
        return "fp16's gradient scaler waits for the device" if recipe.precision == "fp16" else None

    @property
    def graphs_views(self) -> bool:
        """Whether augmentations are CUDA graphs: each process's own affair, whatever the steps are."""
        return self.recipe.cuda_graphs is not False and self.device.type == "cuda"

    @property
    def graphs_steps(self) -> bool:
        """Whether forward and backward passes are CUDA graphs."""
        return self.recipe.cuda_graphs is not False and self.graph_obstacle is None

    def say(self, message: str) -> None:
        """A line for the user, once and not per process."""
        if self.main:
            say(message)

    def dataset(self) -> Dataset:
        """The recipe's data set, on the device."""
        options = self.recipe.data
        dataset = load_dataset(
            options.name,
            path=options.path,
            size=options.size,
            resident=options.resident,
            workers=options.workers,
            cache_dir=options.cache_dir,
        )
        return (hold_out(dataset, options.holdout) if options.holdout else dataset).to(self.device)


def _accelerator(recipe: Recipe) -> Accelerator:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but torch sees no GPU here; allowed: auto or cpu")
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if recipe.precision == "fp16" and on_cpu:
        raise ValueError("precision: got fp16, which needs a GPU; allowed on the CPU: fp32 or bf16")
    if recipe.tracker:
        _check_tracker(recipe.tracker)
    # Accelerate keeps the first recipe's precision for the life of the process; the next one may have another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=recipe.tracker,
        project_dir=recipe.folder(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(tracker.value) for tracker in get_available_trackers()]
    if name not in known:
        raise ValueError(f"unknown tracker {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if name not in installed:
        here = ", ".join(installed) or "none"
        raise ValueError(f"tracker: got {name!r}, which is not installed (pip install {name}); installed here: {here}")
