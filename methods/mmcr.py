"""Maximum manifold capacity representations (Yerxa et al. 2023, arXiv 2303.03307)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.views import Crop


class MMCR(Method):
    """Spreads the images' mean embeddings over all dimensions, which also pulls the views of an image together.

    Without the momentum encoder that the official ImageNet code can add.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. Official CIFAR code: 512-128.
        crops: views an image, >= 2. Official CIFAR code: 40, of 32 images; ``method=mmcr`` takes 2, as the other
            methods' cost.
        lmbda: weight of the nuclear norm of each image's own views, >= 0; 0 turns it off. Official code: 0.

    Raises:
        ValueError: if a width is not positive, there are fewer than two views or ``lmbda`` is negative.
    """

    spread_of = "z"

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (512, 128),
        crops: int = 40,
        lmbda: float = 0.0,
    ) -> None:
        if crops < 2:
            raise ValueError(f"mmcr: crops must be >= 2, got {crops}")
        check("mmcr", ">= 0", lmbda=lmbda)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector))
        self.views = (Crop(),) * crops
        self.lmbda = lmbda

    def forward(self, *crops: Tensor) -> dict[str, Tensor]:
        """Embeds each view in a pass of its own: (n, crops, D)."""
        return {"z": torch.stack([self.embed(x) for x in crops], 1)}

    def loss(self, z: Tensor) -> dict[str, Tensor]:
        """-|C|_* + lmbda mean_i |Z_i|_*: nuclear norms of the mean embeddings C and of an image's own Z_i, normalised.

        Args:
            z: (N, crops, D) embeddings of the global batch.

        Returns:
            "loss".
        """
        z = F.normalize(z, dim=2)
        loss = -torch.linalg.matrix_norm(z.mean(dim=1), "nuc")
        if self.lmbda:
            loss = loss + self.lmbda * torch.linalg.matrix_norm(z, "nuc").mean()
        return {"loss": loss}
