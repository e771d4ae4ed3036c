"""The last embeddings of earlier batches: MoCo's negatives and NNCLR's support set."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queue(nn.Module):
    """A ring of rows, kept in buffers and written in place by tensor operations alone, so that a CUDA graph replays it.

    It starts with random directions, as in the papers. Every process holds the same rows, those of the global batches.

    Args:
        size: the number of rows, > 0; a multiple of the batch or not.
        dim: their width D.

    Attributes:
        rows: (size, D) of length 1.
        pointer: () int64, where the oldest row is, which is overwritten next.

    Raises:
        ValueError: if ``size`` is not positive.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue must be > 0, got {size}")
        self.register_buffer("rows", F.normalize(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, z: Tensor) -> None:
        """Overwrites the oldest rows.

        Args:
            z: (N, D) of length 1. If there are more than ``size``, that many of them are kept.
        """
        # The order of the global batch's rows depends on the number of processes and chunks. An order of the rows' own
        # keeps the queue, and which of its rows are overwritten first, the same.
        order = z[:, 0].argsort()
        n, size = min(len(z), len(self.rows)), len(self.rows)
        if n < len(z):
            order = order[torch.arange(n, device=z.device) * len(z) // n]  # evenly, not the first ones in that order
        at = (self.pointer + torch.arange(n, device=z.device)) % size
        self.rows.index_copy_(0, at, z[order])
        self.pointer.add_(n).remainder_(size)
