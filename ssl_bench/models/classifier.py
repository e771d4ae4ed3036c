"""The network of the supervised track: a backbone and a linear layer, trained by cross-entropy."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ssl_bench.models.backbone import Init, Stem, create_backbone, seeded
from ssl_bench.runtime.seeds import INIT, derive_seed


class Classifier(nn.Module):
    """A backbone with a linear head; `forward` returns the loss, so that methods and classifiers share a training loop.

    Args:
        backbone: from (n, C, H, W) to (n, feature_dim).
        feature_dim: the backbone's number of features.
        num_classes: >= 2.
        seed: of the head's weights (torch's default for a linear layer, which timm and torchvision keep), >= 0.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, *, seed: int = 0) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"classifier: num_classes must be at least 2, got {num_classes}")
        self.backbone = backbone
        with seeded(derive_seed(seed, INIT, 1)):
            self.head = nn.Linear(feature_dim, num_classes)

    @classmethod
    def create(cls, name: str, num_classes: int, *, stem: Stem, init: Init, seed: int) -> "Classifier":
        """A classifier on a new backbone; see `create_backbone`."""
        backbone, feature_dim = create_backbone(name, stem=stem, init=init, seed=seed)
        return cls(backbone, feature_dim, num_classes, seed=seed)

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (n, num_classes) of images (n, C, H, W)."""
        return cast(Tensor, self.head(self.backbone(x)))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The mean loss and accuracies of a batch.

        Args:
            x: (n, C, H, W) normalised images.
            y: (n,) int64 labels.

        Returns:
            "loss": mean cross-entropy in float32; "top1" and "top5": percent, detached. All scalars on x's device.
        """
        logits = self.logits(x)  # (n, num_classes)
        with torch.autocast(x.device.type, enabled=False):
            loss = cross_entropy(logits.float(), y)
        with torch.no_grad():
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]  # (n, 5)
            top1, top5 = (100 * hits[:, :k].any(dim=1).float().mean() for k in (1, 5))
        return {"loss": loss, "top1": top1, "top5": top5}
