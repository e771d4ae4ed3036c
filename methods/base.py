"""What all methods share: the projector, the forward passes of the two views, and gathering the global batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.runtime.distributed import gather


def build_projector(
    feature_dim: int, widths: tuple[int, ...], *, hidden_bias: bool = False, last_norm: bool = False
) -> nn.Sequential:
    """Builds Linear, BatchNorm and ReLU for each hidden width, then a Linear without bias.

    Args:
        feature_dim: the number of the backbone's features, > 0.
        widths: the width of each Linear layer, all > 0; the last is the embedding's D.
        hidden_bias: give the hidden Linear layers a bias, although batch norm follows (the official VICReg does).
        last_norm: add a batch norm with scale but without shift after the last layer (SimCLR does).

    Raises:
        ValueError: if ``feature_dim`` or a width is not positive, or there is no width.
    """
    if feature_dim < 1:
        raise ValueError(f"projector: feature_dim must be > 0, got {feature_dim}")
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"projector: widths must be one or more numbers > 0, got {tuple(widths)}")
    layers: list[nn.Module] = []
    size = feature_dim
    for width in widths[:-1]:
        layers += [nn.Linear(size, width, bias=hidden_bias), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        size = width
    layers.append(nn.Linear(size, widths[-1], bias=False))
    if last_norm:
        norm = nn.BatchNorm1d(widths[-1])
        norm.bias.requires_grad_(False)  # stays 0: torch has no batch norm with a scale alone
        layers.append(norm)
    return nn.Sequential(*layers)


def full_precision(x: Tensor) -> Tensor:
    """Casts bfloat16 and float16 to float32; float64 stays (tests of gradients need it)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Method(nn.Module):
    """A backbone, a projector and a loss over the embeddings of the global batch's two views.

    A method is a subclass with a ``loss`` and a constructor whose typed keywords are its hyper-parameters.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: maps features to embeddings (n, D); see ``build_projector``.

    Raises:
        ValueError: if ``feature_dim`` differs from the backbone's own ``num_features`` (timm sets it).
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, projector: nn.Module) -> None:
        super().__init__()
        features = getattr(backbone, "num_features", feature_dim)
        if features != feature_dim:
            raise ValueError(f"method: feature_dim must be the backbone's {features}, got {feature_dim}")
        self.backbone = backbone
        self.projector = projector

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Computes the loss of the global batch, which must not depend on the order of the pairs.

        Args:
            z1: (N, D) float32 embeddings of the first views of the global batch; must not be changed in place.
            z2: (N, D) those of the second views, in the same order.

        Returns:
            "loss", a scalar to differentiate, and detached scalars to log.
        """
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Embeds one view: (n, 3, H, W) to (n, D)."""
        return self.projector(self.backbone(x))

    def global_loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Gathers this process's embeddings into the global batch and computes its loss in float32, autocast off.

        Args:
            z1: (n, D) this process's embeddings of the first views, in any floating dtype.
            z2: (n, D) those of the second views.

        Returns:
            what ``loss`` returns and "z_std", the mean over dimensions of the standard deviation of z1 / |z1|:
            1 / sqrt(D) if the embeddings spread evenly, 0 if they have collapsed to one point.

        Raises:
            ValueError: if the shapes differ or the global batch is a single pair.
        """
        if z1.shape != z2.shape:
            raise ValueError(f"method: z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
        with torch.autocast(z1.device.type, enabled=False):
            z1, z2 = gather(full_precision(z1)), gather(full_precision(z2))
            if len(z1) < 2:
                raise ValueError(f"method: the global batch must have >= 2 pairs, got {len(z1)}")
            terms = self.loss(z1, z2)
            with torch.no_grad():
                terms["z_std"] = F.normalize(z1).std(dim=0).mean()
        return terms

    def forward(self, x1: Tensor, x2: Tensor, *, embed_only: bool = False) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """Embeds each view in its own pass (batch norm sees one view at a time, as in the official codes).

        Args:
            x1: (n, 3, H, W) this process's first views.
            x2: (n, 3, H, W) the second views of the same images.
            embed_only: return this process's embeddings instead of the loss, for chunked gradients.

        Returns:
            what ``global_loss`` returns, or (z1, z2), each (n, D).
        """
        z1, z2 = self.embed(x1), self.embed(x2)
        return (z1, z2) if embed_only else self.global_loss(z1, z2)
