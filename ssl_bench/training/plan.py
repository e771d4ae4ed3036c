"""Every duration of a run in steps, computed once from the number of train images."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Rhythm:
    """How often what happens in the loop, in steps; 0 = never.

    Attributes:
        total: the run's length.
        log: between lines of the metrics.
        checkpoint: between checkpoints.
        check_equal: between checks that all processes hold equal parameters.
        snapshots: the steps after which the weights are kept; 0 = before the first.
    """

    total: int
    log: int
    checkpoint: int
    check_equal: int
    snapshots: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """A recipe resolved into steps for a train set of a given size.

    Attributes:
        steps_per_epoch: images in the train set over the batch size; not a whole number in general.
        total: the run's length in steps.
        optimizer, schedule: their keyword arguments, all durations in steps.
    """

    steps_per_epoch: float
    total: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]

    def every(self, epochs: float) -> int:
        """A period given in epochs, in steps; 0 stays 0 = never."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs else 0
