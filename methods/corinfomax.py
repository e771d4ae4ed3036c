"""CorInfoMax (Ozsoy et al. 2022, arXiv 2209.07999)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check


class CorInfoMax(Method):
    """Keeps up the log-determinant of the embeddings' running covariance, and pulls the two views together.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. Official code for CIFAR-10:
            2048-2048-64.
        sim_coeff: weight of the invariance term, >= 0; 0 turns it off. Official code for CIFAR-10: 250.
        cov_coeff: weight of the log-determinant, >= 0; 0 turns it off. Official code: 1.
        forget: the share of the running mean and covariance that a step keeps, in [0, 1]; 0 = the batch's own.
            Official code: 0.01.
        eps: added to the covariance's diagonal, > 0. Official code: 1e-8.

    Raises:
        ValueError: a value out of its range.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 64),
        sim_coeff: float = 250.0,
        cov_coeff: float = 1.0,
        forget: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        check("corinfomax", ">= 0", sim_coeff=sim_coeff, cov_coeff=cov_coeff)
        check("corinfomax", "in [0, 1]", forget=forget)
        check("corinfomax", "> 0", eps=eps)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector, hidden_bias=True))
        self.sim_coeff, self.cov_coeff, self.forget, self.eps = sim_coeff, cov_coeff, forget, eps
        # In float64, as in the official code: eigenvalues near eps drown in float32's rounding.
        identity = torch.eye(projector[-1], dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(2, 1, projector[-1], dtype=torch.float64))
        self.register_buffer("covariance", torch.stack([identity, identity]))

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """sim_coeff MSE - cov_coeff sum_v logdet(R_v + eps 1) / D, R_v the running covariance of view v; z normalised.

        Args:
            z1: (N, D) embeddings of the global batch's first views.
            z2: (N, D) those of the second views.

        Returns:
            "loss", and detached "invariance" and "log_det", the two terms without weights.
        """
        z = F.normalize(torch.stack([z1, z2]), dim=2)
        invariance = F.mse_loss(z[0], z[1])
        z = z.double()
        mean = torch.lerp(z.mean(dim=1, keepdim=True), self.mean, self.forget)
        centred = z - mean
        covariance = torch.lerp(centred.mT @ centred / len(z1), self.covariance, self.forget)
        self.mean.copy_(mean.detach())
        self.covariance.copy_(covariance.detach())
        regular = covariance + self.eps * torch.eye(covariance.shape[1], dtype=z.dtype, device=z.device)
        log_det = torch.logdet(regular).sum().to(z1.dtype) / covariance.shape[1]
        loss = self.sim_coeff * invariance - self.cov_coeff * log_det
        return {"loss": loss, "invariance": invariance.detach(), "log_det": log_det.detach()}
