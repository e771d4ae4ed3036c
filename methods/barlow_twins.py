"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.off_diagonal import off_diagonal_energy
from ssl_bench.methods.parts.share import WHOLE, Share

EPS = 1e-5  # added to the variance; the default of batch norm, which the official code uses


class BarlowTwins(Method):
    """Makes the cross-correlation matrix of the two views' embeddings the identity.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. TVLARS paper: 2048-2048-4096;
            Barlow Twins paper: 8192-8192-8192.
        lambd: weight of the off-diagonal term, >= 0; 0 turns it off. Barlow Twins paper and code: 0.0051.
        divisor: what the cross-correlation is divided by, in pairs, > 0; None for the batch's own size. The TVLARS
            authors' code (commit 89c3291) divides by the nominal batch size, even if the last batch is shorter.

    Raises:
        ValueError: if a width or ``divisor`` is not positive, or ``lambd`` is negative.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 4096),
        lambd: float = 0.0051,
        divisor: int | None = None,
    ) -> None:
        check("barlow_twins", ">= 0", lambd=lambd)
        if divisor is not None and divisor < 1:
            raise ValueError(f"barlow_twins: divisor must be > 0 or None, got {divisor}")
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector))
        self.lambd, self.divisor = lambd, divisor

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2, C = z1' z2 / N of embeddings standardised over the batch.

        ``divisor`` replaces the N under z1' z2 only; the standardisation still uses the batch's own N.

        Args:
            z1: (N, D) embeddings of the global batch's first views.
            z2: (N, D) those of the second views.

        Returns:
            "loss", and detached "on_diagonal" and "off_diagonal", the two sums, not weighted.
        """
        return self.sharded_loss(WHOLE, z1, z2)

    def sharded_loss(self, share: Share, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The same from this process's rows (n, D)."""
        n = self.divisor or share.processes * len(z1)
        z1, z2 = _standardise(share, z1, z2)
        on_diagonal = (1 - share.total((z1 * z2).sum(dim=0)) / n).square().sum()
        off_diagonal = off_diagonal_energy(z1, z2, share) / n**2
        loss = on_diagonal + self.lambd * off_diagonal
        return {"loss": loss, "on_diagonal": on_diagonal.detach(), "off_diagonal": off_diagonal.detach()}


def _standardise(share: Share, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 (biased) of each dimension over the global batch, each view by itself."""
    if share.processes == 1:
        a, b = (F.batch_norm(z, None, None, training=True, eps=EPS) for z in (z1, z2))
        return a, b
    mean = share.mean(torch.stack([z1.mean(dim=0), z2.mean(dim=0)]))
    z1, z2 = z1 - mean[0], z2 - mean[1]
    var = share.mean(torch.stack([z1.square().mean(dim=0), z2.square().mean(dim=0)]))
    inv_std = (var + EPS).rsqrt()
    return z1 * inv_std[0], z2 * inv_std[1]
