"""TiCo (Zhu et al. 2022, arXiv 2206.10698)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.teacher import Teacher, cosine


class TiCo(Method):
    """Pulls an embedding towards a teacher's of the other view, and away from where a batch's embeddings already lie.

    That place is a running covariance, which stands for a memory bank of unlimited size.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. Paper, as BYOL: 4096-256.
        beta: the covariance's momentum, in [0, 1]; 0 = the batch's own. Paper: 0.9.
        rho: weight of the covariance term, >= 0; 0 turns it off. Paper: 8.
        momentum: the teacher's at the start, in [0, 1]; a cosine takes it to 1. lightly: 0.99.

    Raises:
        ValueError: if a width is not positive, ``rho`` is negative or another value outside [0, 1].
    """

    covariance: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (4096, 256),
        beta: float = 0.9,
        rho: float = 8.0,
        momentum: float = 0.99,
    ) -> None:
        check("tico", "in [0, 1]", beta=beta, momentum=momentum)
        check("tico", ">= 0", rho=rho)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector))
        self.teacher = Teacher(self.backbone, self.projector)
        self.beta, self.rho, self.momentum = beta, rho, momentum
        self.register_buffer("covariance", torch.zeros(projector[-1], projector[-1]))

    def begin_step(self, progress: float) -> None:
        """Moves the teacher."""
        self.teacher.follow(self.backbone, self.projector, cosine(self.momentum, 1.0, progress))

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """The first view's embedding, and the teacher's of the second."""
        return {"z1": self.embed(x1), "t2": self.teacher(x2)}

    def loss(self, z1: Tensor, t2: Tensor) -> dict[str, Tensor]:
        """mean_i (1 - z1_i . t2_i) + rho mean_i z1_i' C z1_i, C = beta C + (1 - beta) z1' z1 / N; z and t normalised.

        As in lightly, no gradient goes through C.

        Args:
            z1: (N, D) embeddings of the global batch's first views.
            t2: (N, D) the teacher's of the second views.

        Returns:
            "loss", and detached "invariance" and "contrast", the two terms without weights.
        """
        z1, t2 = F.normalize(z1), F.normalize(t2.detach())
        fixed = z1.detach()
        covariance = torch.lerp(fixed.T @ fixed / len(z1), self.covariance, self.beta)
        self.covariance.copy_(covariance)
        invariance = 1 - (z1 * t2).sum(dim=1).mean()
        contrast = ((z1 @ covariance) * z1).sum(dim=1).mean()
        loss = invariance + self.rho * contrast
        return {"loss": loss, "invariance": invariance.detach(), "contrast": contrast.detach()}
