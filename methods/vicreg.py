"""VICReg (Bardes et al. 2022, arXiv 2105.04906)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.off_diagonal import off_diagonal_energy
from ssl_bench.methods.parts.share import WHOLE, Share

EPS = 1e-4  # added to the variance; paper, eq. 2


class VICReg(Method):
    """Pulls the two views' embeddings together, keeps up each dimension's variance and decorrelates the dimensions.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the expander's Linear layers, each > 0; the last is D. TVLARS paper: 2048-2048-4096;
            VICReg paper: 8192-8192-8192.
        sim_coeff: weight of the invariance term (mean squared error), >= 0; 0 turns it off. Paper: 25.
        std_coeff: weight of the variance term (hinge at a standard deviation of 1), >= 0; 0 turns it off. Paper: 25.
        cov_coeff: weight of the covariance term, >= 0; 0 turns it off. Paper: 1.

    Raises:
        ValueError: if a width is not positive or a weight is negative.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 4096),
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
    ) -> None:
        check("vicreg", ">= 0", sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector, hidden_bias=True))
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """sim_coeff MSE + std_coeff mean_j relu(1 - std_j) / 2 + cov_coeff sum_{i != j} Cov_ij^2 / D, over both views.

        Variance and covariance are unbiased. The factor 1/2 is in the official code, not in the paper.

        Args:
            z1: (N, D) embeddings of the global batch's first views, not normalised.
            z2: (N, D) those of the second views.

        Returns:
            "loss", and detached "invariance", "variance" and "covariance", the terms without their weights.
        """
        return self.sharded_loss(WHOLE, z1, z2)

    def sharded_loss(self, share: Share, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The same from this process's rows (n, D)."""
        n, d = share.processes * len(z1), z1.shape[1]
        invariance = share.mean(F.mse_loss(z1, z2))
        variance, covariance = z1.new_zeros(()), z1.new_zeros(())
        means = share.mean(torch.stack([z1.mean(dim=0), z2.mean(dim=0)]))  # (2, D)
        for z, mean in zip((z1, z2), means, strict=True):
            centred = z - mean
            std = (share.total(centred.square().sum(dim=0)) / (n - 1) + EPS).sqrt()
            variance = variance + F.relu(1 - std).mean() / 2
            covariance = covariance + off_diagonal_energy(centred, share=share) / (n - 1) ** 2 / d
        loss = self.sim_coeff * invariance + self.std_coeff * variance + self.cov_coeff * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}
