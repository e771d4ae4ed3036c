"""Which samples a step sees: pure functions of (seed, step).

Nothing here keeps state, so that a run can start at any step, on any number of processes, and be the same experiment:
everything is drawn for the *global* batch and then sliced by rank.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ssl_bench.runtime.seeds import PERMUTATION, generator

# If the batch size does not divide an epoch, its last batch is completed from the next epoch ("carry"), or short.
LastBatch = Literal["carry", "short"]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, PERMUTATION, epoch))


def steps_per_epoch(batch_size: int, size: int, last_batch: LastBatch = "carry") -> float:
    """How many steps an epoch takes: size / batch_size, rounded up where the last batch is short."""
    return size / batch_size if last_batch == "carry" else math.ceil(size / batch_size)


def span(step: int, batch_size: int, size: int, last_batch: LastBatch = "carry") -> range:
    """The places of one step's images in the endless chain of epochs; it starts at the number of images before it.

    Args:
        step: the step, from 0.
        batch_size: the global batch, in images.
        size: the number of images in the data set, one epoch.
        last_batch: "carry": ``batch_size`` places, whether or not an epoch ends among them. "short": at most so many,
            all of one epoch.
    """
    if last_batch == "carry":
        return range(step * batch_size, (step + 1) * batch_size)
    epoch, batch = divmod(step, math.ceil(size / batch_size))
    first = epoch * size + batch * batch_size
    return range(first, min(first + batch_size, (epoch + 1) * size))


def batch_indices(seed: int, step: int, batch_size: int, size: int, last_batch: LastBatch = "carry") -> Tensor:
    """The data-set indices of one step's global batch.

    The sampler is an endless chain of permutations of the data set, of which nothing is dropped. A batch may cross an
    epoch's border, unless the last one is to be short; within one that does, an image can appear twice.

    Args:
        seed: the run's seed.
        step: the step, from 0.
        batch_size: the global batch, in images.
        size: the number of images in the data set.
        last_batch: see `span`.

    Returns:
        (batch_size,) int64 indices in [0, size), on the CPU; fewer in a short batch.
    """
    places = span(step, batch_size, size, last_batch)
    parts = []
    for epoch in range(places.start // size, (places.stop - 1) // size + 1):
        start, stop = max(places.start - epoch * size, 0), min(places.stop - epoch * size, size)
        parts.append(_permutation(seed, epoch, size)[start:stop])
    return torch.cat(parts)


def images_per_chunk(batch_size: int, chunk_size: int | None, world_size: int) -> int:
    """How many images of the global batch make a chunk; without a ``chunk_size`` the batch is one chunk.

    Raises:
        ValueError: the batch does not divide into chunks, or a chunk not evenly into processes.
    """
    name, images = ("chunk_size", chunk_size) if chunk_size else ("batch_size", batch_size)
    if batch_size % images:
        raise ValueError(f"chunk_size must be a divisor of batch_size={batch_size}, got {chunk_size}")
    if images % world_size:
        raise ValueError(f"{name} must be a multiple of the {world_size} processes, got {images}")
    return images


def local_positions(batch_size: int, chunk_size: int, rank: int, world_size: int) -> list[slice]:
    """Which positions of the global batch a process computes, chunk by chunk.

    A chunk is a slice of the *global* batch and is itself split over the processes, so that synchronised batch norm
    sees the same samples at any world size.

    Args:
        batch_size: the global batch, a multiple of ``chunk_size``.
        chunk_size: the samples of one pass over all processes, a multiple of ``world_size``.
        rank: this process, in [0, world_size).
        world_size: the number of processes.

    Returns:
        one slice into the global batch for each chunk, each of ``chunk_size // world_size`` samples.
    """
    share = chunk_size // world_size
    return [slice(start + rank * share, start + (rank + 1) * share) for start in range(0, batch_size, chunk_size)]
