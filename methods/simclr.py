"""SimCLR (Chen et al. 2020, arXiv 2002.05709)."""

from torch import Tensor, nn

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.nt_xent import nt_xent
from ssl_bench.methods.parts.share import WHOLE, Share


class SimCLR(Method):
    """Picks each image's other view out of all other views in the global batch.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0, each followed by batch norm; the last is D. Two
            layers as in the paper, which found no effect of D (figure 8); the paper's D is 128.
        temperature: divides the cosine similarities, > 0. In the paper 0.5 is best on CIFAR-10; solo-learn uses 0.2.

    Raises:
        ValueError: if a width or ``temperature`` is not positive.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 4096),
        temperature: float = 0.5,
    ) -> None:
        check("simclr", "> 0", temperature=temperature)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector, last_norm=True))
        self.temperature = temperature

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """NT-Xent: cross-entropy of each anchor's positive among the other 2N - 1 views, mean over the 2N anchors.

        Args:
            z1: (N, D) embeddings of the global batch's first views.
            z2: (N, D) those of the second views.

        Returns:
            "loss".
        """
        return self.sharded_loss(WHOLE, z1, z2)

    def sharded_loss(self, share: Share, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The same from this process's rows (n, D): its 2n anchors among all views."""
        return {"loss": nt_xent(z1, z2, self.temperature, share)}
