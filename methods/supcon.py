"""SupCon (Khosla et al. 2020, arXiv 2004.11362)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.nt_xent import mean_log_sum_exp
from ssl_bench.methods.parts.share import WHOLE, Share
from ssl_bench.methods.views import Crop, Labels, View


class SupCon(Method):
    """SimCLR with labels: all views of images of the same class are positives. The supervised member of the family.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0, without batch norm; the last is D. Paper: 2048-128.
        temperature: divides the cosine similarities, > 0. Paper, and its code on CIFAR: 0.1.

    Raises:
        ValueError: if a width or ``temperature`` is not positive.
    """

    views: Sequence[View] = (Crop(), Crop(), Labels())

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 128),
        temperature: float = 0.1,
    ) -> None:
        check("supcon", "> 0", temperature=temperature)
        head = build_projector(feature_dim, projector, hidden_norm=False, last_bias=True)
        super().__init__(backbone, feature_dim, head)
        self.temperature = temperature

    def forward(self, x1: Tensor, x2: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to embeddings (n, D), beside the labels (n,)."""
        return {"z1": self.embed(x1), "z2": self.embed(x2), "labels": labels}

    def loss(self, z1: Tensor, z2: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """-log softmax of a positive among the other 2N - 1 views, mean over an anchor's positives, then over anchors.

        (L_out, eq. 2. The official code multiplies it by temperature / 0.07.)

        Args:
            z1: (N, D) embeddings of the global batch's first views.
            z2: (N, D) those of the second views.
            labels: (N,) the images' classes.

        Returns:
            "loss".
        """
        return self.sharded_loss(WHOLE, z1, z2, labels)

    def sharded_loss(self, share: Share, z1: Tensor, z2: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The same from this process's rows (n, ...): its 2n anchors among all views."""
        z1, z2 = F.normalize(z1), F.normalize(z2)
        alike = (labels[:, None] == share.gather(labels)).to(z1.dtype)  # (n, N)
        others = 2 * alike.sum(dim=1) - 1  # (n,) views of the anchor's class, without itself
        of_class = alike @ share.gather(z1 + z2)  # (n, D) their sum, with itself: an anchor's similarities add up
        positive1, positive2 = (((z * (of_class - z)).sum(dim=1) / others).mean() for z in (z1, z2))
        positive = share.mean(positive1 + positive2) / 2 / self.temperature
        return {"loss": mean_log_sum_exp(torch.cat([z1, z2]), self.temperature, share) - positive}
