"""A run's random numbers: separate streams, each a pure function of (seed, stream, step)."""

import torch

# Streams that must not overlap. A new stream gets a new number; no number is ever reused, because recorded runs depend
# on it.
PERMUTATION = 0
VIEW1 = 1
VIEW2 = 2
INIT = 3
ONLINE = 4
LAYERS = 5
PROJECTOR = 6
ANALYSIS = 7
MICRO = 40  # micro-batches that an optimizer measures
_MORE_VIEWS = 1 << 16  # the third view and those after it

_MASK = (1 << 62) - 1  # torch takes 63 bits; one is left free for callers that count up from a seed


def view(number: int) -> int:
    """The stream of a method's views, counted from 0."""
    return (VIEW1, VIEW2)[number] if number < 2 else _MORE_VIEWS + number


def _mix(value: int) -> int:
    """One round of splitmix64: users choose seeds 0, 1, 2, and neighbouring inputs must give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def derive_seed(seed: int, stream: int, index: int = 0) -> int:
    """A 62-bit seed for one stream at one index (a step, an epoch), unrelated to its neighbours."""
    return _mix(_mix(_mix(seed) ^ stream) ^ index) & _MASK


def generator(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one stream at one index.

    Args:
        seed: the run's seed, >= 0.
        stream: one of this module's constants.
        index: the step (augmentation) or epoch (permutation), >= 0.
    """
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))
