"""What to do when a step does not fit into the device's memory: one line with recompute=blocks, or a chunk_size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ssl_bench.training.memory.recompute import recompute_blocks, recomputed

MARGIN = 0.9  # of the memory that the fit counts on: fragments, and what the optimizer allocates at its first step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, of a GPU or of the main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def evaluating(batch_size: int) -> Iterator[None]:
    """Turns running out of memory in an evaluation into one line that names eval.batch_size.

    Raises:
        ValueError: instead.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0]
        raise ValueError(f"eval.batch_size must be smaller for this memory, got {batch_size}: {reason}") from error


def advice(error: BaseException, trainer: Any) -> str:
    """One line about a step that ran out of memory.

    Args:
        error: of the step; what it holds of the step must be gone, so call this outside of the handler.
        trainer: `ssl_bench.training.loop.Trainer`.
    """
    pipeline = trainer.pipeline
    batch, world_size = pipeline.batch_size, trainer.accelerator.num_processes
    tried = batch // pipeline.n_chunks
    text = str(error).partition(". ")[0]
    fits, how = _measured(trainer, tried), "by the measured peak of smaller ones"
    if fits is None or fits == tried:
        fits, how = largest_divisor(batch, tried // 2, world_size), "half of what did not fit"
    ways = [] if fits is None else [f"chunk_size={fits} ({how})"]
    must, got = "chunk_size must be smaller for this memory", f"{tried} images"
    if not recomputed(trainer.module) and not _is_compiled(trainer.module):
        must, got = "recompute must be blocks, or chunk_size smaller, for this memory", f"none and {tried} images"
        ways.insert(0, _recomputing(trainer, tried))
    if not ways:
        return f"chunk_size={tried} does not fit into this memory, nor is there a smaller one: {text}"
    return f"{must}, got {got}: try {' or '.join(ways)}; resume=auto continues from the last checkpoint ({text})"


def _recomputing(trainer: Any, tried: int) -> str:
    recompute_blocks(trainer.module)  # to measure: the run is over
    fits = _measured(trainer, tried)
    if fits is None:
        return "recompute=blocks (the same result)"
    if fits == tried:
        return "recompute=blocks (the same result, by the measured peak of smaller ones it fits)"
    return f"recompute=blocks chunk_size={fits} (by the measured peak of smaller ones)"


def _is_compiled(module: nn.Module) -> bool:
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in module.children())


def _measured(trainer: Any, tried: int) -> int | None:
    """The largest chunk up to the one tried that should fit as the network is now; None where it cannot be measured."""
    if trainer.device.type != "cuda" or trainer.accelerator.num_processes > 1:  # the others would not take part
        return None
    batch = trainer.pipeline.batch_size
    try:
        fits = largest_chunk(*_two_peaks(trainer, tried), batch=batch)
        return None if fits is None else largest_divisor(batch, min(fits, tried), 1)
    except Exception:  # not even those, or the network takes no such batch
        return None


def largest_chunk(sizes: tuple[int, int], peaks: tuple[int, int], free: int, *, batch: int) -> int | None:
    """The largest divisor of the batch whose step fits, by a line through two measured peaks.

    Args:
        sizes: images of two measured steps, ascending.
        peaks: bytes that they needed beside what stays (weights, optimizer state).
        free: bytes that there are for it.
        batch: images of the whole batch.
    """
    slope = max(peaks[1] - peaks[0], 1) / (sizes[1] - sizes[0])
    fixed = max(peaks[0] - slope * sizes[0], 0)
    return largest_divisor(batch, int((MARGIN * free - fixed) / slope), 1)


def largest_divisor(batch: int, limit: int, world_size: int) -> int | None:
    """The largest divisor of the batch up to a limit, and a multiple of the processes, with two images for each."""
    for size in range(min(limit, batch), 2 * world_size - 1, -1):
        if batch % size == 0 and size % world_size == 0:
            return size
    return None


def _two_peaks(trainer: Any, tried: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The peaks of two small steps on the run's own batch, whose gradients are dropped; and the memory there is."""
    device, release = trainer.device, getattr(trainer.gradient, "release", None)
    if release is not None:
        release()  # a recorded step's memory
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    batch = next(iter(trainer.pipeline.batches(trainer.step, trainer.step + 1)))
    sizes = (max(2, tried // 32), max(4, tried // 16))
    small = [replace(batch, share=size, _ready=None) for size in sizes]
    del batch
    held = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    peaks = []
    for one in small:
        torch.cuda.reset_peak_memory_stats(device)
        trainer.gradient_of(one, 1)
        peaks.append(torch.cuda.max_memory_allocated(device) - held)
        trainer.optimizer.zero_grad(set_to_none=True)
    return sizes, (peaks[0], peaks[1]), free
