"""SimSiam (Chen and He 2021, arXiv 2011.10566)."""

from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector


class SimSiam(Method):
    """Predicts each view's embedding from the other's, with a stop-gradient on the target; no teacher, no negatives.

    The official code also keeps the predictor's learning rate constant; here it follows the schedule like all others.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0, each followed by batch norm; the last is D. Paper:
            2048-2048-2048, and 2048-2048 on CIFAR-10 (appendix D).
        predictor: widths of the predictor's hidden layers, each > 0; its last layer has D. Paper: 512.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 2048),
        predictor: tuple[int, ...] = (512,),
    ) -> None:
        head = build_projector(feature_dim, projector)
        d = projector[-1]
        # As in the official code, the last batch norm has no parameters, and the predictor's last layer has a bias.
        super().__init__(backbone, feature_dim, nn.Sequential(*head, nn.BatchNorm1d(d, affine=False)))
        self.predictor = build_projector(d, (*predictor, d), last_bias=True, name="predictor")

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to embeddings z and predictions p, each (n, D)."""
        z1, z2 = self.embed(x1), self.embed(x2)
        return {"p1": self.predictor(z1), "p2": self.predictor(z2), "z1": z1, "z2": z2}

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Minus the cosine similarity of the prediction to the other view's embedding, mean of both directions (eq. 4).

        Args:
            p1, p2: (N, D) predictions from the first and second views.
            z1, z2: (N, D) embeddings of them, which get no gradient as targets.

        Returns:
            "loss".
        """
        similarity = F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())
        return {"loss": -similarity.mean() / 2}
