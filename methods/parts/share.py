"""A process's share of the global batch: what a loss needs to be computed by all processes together, each for its rows.

A loss written with a `Share` is one formula for one process and several: sums over the batch are sums over this
process's rows, added up by ``total``, and what an anchor is compared with comes from ``gather``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Share:
    """This process's rows among those of all processes, which have as many each; without arguments, the whole batch.

    Attributes:
        processes: how many share the batch.
        rank: this one's place in [0, processes).
        total: sums a tensor over the processes; each gets the sum. Differentiable.
        gather: (n, ...) this process's rows to those of all processes by rank, (processes * n, ...). Differentiable.
    """

    processes: int = 1
    rank: int = 0
    total: Callable[[Tensor], Tensor] = _alone
    gather: Callable[[Tensor], Tensor] = _alone

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes of a mean over their rows: that over the global batch's."""
        return x if self.processes == 1 else self.total(x) / self.processes


WHOLE = Share()


def refuse_second_derivative(share: Share) -> None:
    """For a hand-written backward pass, whose formula for a second derivative is that of the whole batch.

    Raises:
        NotImplementedError: several processes share the batch.
    """
    if share.processes > 1:
        raise NotImplementedError("a loss that several processes share has a first derivative only")
