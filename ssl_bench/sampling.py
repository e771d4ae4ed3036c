"""Which samples a step sees, and the randomness it sees them with: pure functions of (seed, step).

Nothing here keeps state, so a run can start at any step, on any number of processes, and be the same experiment:
everything is drawn for the *global* batch and then sliced by rank.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Streams of randomness that must not overlap. A new stream takes a new number; a used number is never reassigned,
# because recorded runs depend on it.
PERMUTATION = 0
VIEW1 = 1
VIEW2 = 2
INIT = 3
ONLINE = 4
LAYERS = 5
PROJECTOR = 6
ANALYSIS = 7

_MASK = (1 << 62) - 1  # torch takes 63 bits; one is left for callers that count up from a seed


def _mix(value: int) -> int:
    """One round of splitmix64: neighbouring inputs give unrelated outputs (seeds 0, 1, 2 are what users choose)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def derive_seed(seed: int, stream: int, index: int = 0) -> int:
    """A 62-bit seed for one stream of randomness at one index (a step, an epoch), unrelated to its neighbours."""
    return _mix(_mix(_mix(seed) ^ stream) ^ index) & _MASK


def generator(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one stream at one index.

    Args:
        seed: the run's seed, >= 0.
        stream: one of this module's constants.
        index: the step (augmentation) or epoch (permutation) it serves, >= 0.
    """
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, PERMUTATION, epoch))


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """The data-set indices of one step's global batch, always exactly ``batch_size`` of them.

    The sampler is an endless chain of permutations of the data set; a batch may cross an epoch's border, so nothing
    is dropped and no batch is short. Within a batch that crosses a border an image can appear twice.

    Args:
        seed: the run's seed.
        step: the step, from 0.
        batch_size: the global batch, in images.
        size: the number of images in the data set.

    Returns:
        (batch_size,) int64 indices in [0, size), on the CPU.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // size, (last - 1) // size + 1):
        start, stop = max(first - epoch * size, 0), min(last - epoch * size, size)
        parts.append(_permutation(seed, epoch, size)[start:stop])
    return torch.cat(parts)


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
