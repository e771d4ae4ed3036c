"""Barlow Twins with the Hilbert-Schmidt criterion (Tsai et al. 2021, arXiv 2104.13712)."""

from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector


class BTHSIC(Method):
    """Pulls the off-diagonal of the cross-correlation to -1 instead of Barlow Twins' 0.

    Args:
        projector: widths of the projector's layers.
        lambd: weight of the off-diagonal term, >= 0; 0 turns it off.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, *, projector: tuple[int, ...] = (512, 512), lambd: float = 0.0051
    ) -> None:
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector))
        self.lambd = lambd

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """sum_i (1 - C_ii)^2 + lambd sum_{i != j} (1 + C_ij)^2; z1, z2 are (N, D) of the global batch."""
        z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
        c = z1.T @ z2 / len(z1)  # (D, D)
        on_diagonal = (1 - c.diagonal()).square().sum()
        off_diagonal = (1 + c).square().sum() - (1 + c.diagonal()).square().sum()
        loss = on_diagonal + self.lambd * off_diagonal
        return {"loss": loss, "on_diagonal": on_diagonal.detach(), "off_diagonal": off_diagonal.detach()}
