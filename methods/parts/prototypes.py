"""Prototypes of SwAV and DINO: scores whose layer can be frozen at first, and Sinkhorn's balanced assignments."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Linear):
    """Scores of K prototypes, in which they get no gradient as long as they are frozen.

    Args:
        dim: D, > 0.
        prototypes: K, > 0.
        cosine: normalise embeddings and prototypes: the official DINO's weight-normalised layer with its gain fixed
            at 1.

    Attributes:
        learning: () what the prototypes' gradient is multiplied by; 0 while they are frozen.
    """

    learning: Tensor

    def __init__(self, dim: int, prototypes: int, *, cosine: bool = False) -> None:
        super().__init__(dim, prototypes, bias=False)
        self.cosine = cosine
        self.register_buffer("learning", torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """(n, ..., D) -> (n, ..., K)."""
        fixed = self.weight.detach()
        weight = fixed + self.learning * (self.weight - fixed)  # the same value; the gradient times ``learning``
        if self.cosine:
            z, weight = F.normalize(z, dim=-1), F.normalize(weight)
        return F.linear(z, weight)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, log_weight: Tensor | None = None) -> Tensor:
    """Assigns rows to prototypes, each row once in all and each prototype equally often (Cuturi 2013).

    In logarithms, so that no epsilon overflows. The last normalisation is that of the rows.

    Args:
        scores: (N, K) similarities of the rows to the prototypes.
        epsilon: weight of the assignment's entropy, > 0; smaller is sharper.
        iterations: normalisations of prototypes and rows, >= 1.
        log_weight: (N, 1) 0 for a row that counts among a prototype's, -inf for one that does not; None = all count.

    Returns:
        (N, K) shares, each row's sum 1.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        counted = log_q if log_weight is None else log_q + log_weight
        log_q = log_q - counted.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()
