"""The network of the supervised track: a backbone and a linear layer, trained by cross-entropy."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ssl_bench.methods.base import Method
from ssl_bench.methods.views import Labels, PaddedCrop


class Classifier(Method):
    """A backbone with a linear head; its loss is a mean over images, so that chunks of a batch are accumulated.

    Args:
        backbone: from (n, C, H, W) to (n, feature_dim).
        feature_dim: the backbone's number of features, > 0.
        num_classes: >= 2.

    Raises:
        ValueError: fewer than two classes.
    """

    views = (PaddedCrop(), Labels())
    per_sample = True

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"classifier: num_classes must be at least 2, got {num_classes}")
        super().__init__(backbone, feature_dim, nn.Identity())
        self.head = nn.Linear(feature_dim, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (n, num_classes) of images (n, C, H, W)."""
        return cast(Tensor, self.head(self.backbone(x)))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Scores of normalised images (n, C, H, W), beside their labels (n,)."""
        return {"logits": self.logits(x), "labels": y}

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy; and "top1" and "top5" in percent.

        Args:
            logits: (n, num_classes).
            labels: (n,) int64.
        """
        with torch.no_grad():
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (n, 5)
            top1, top5 = (100 * hits[:, :k].any(dim=1).float().mean() for k in (1, 5))
        return {"loss": cross_entropy(logits, labels), "top1": top1, "top5": top5}
