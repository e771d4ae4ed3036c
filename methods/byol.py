"""BYOL (Grill et al. 2020, arXiv 2006.07733)."""

from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.teacher import Teacher, cosine


class BYOL(Method):
    """Predicts from each view what a slowly moving copy of the network makes of the other view; no negatives.

    The student's backbone is what is evaluated, as in the paper.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. Paper: 4096-256.
        predictor: widths of the predictor's hidden layers, each > 0; its last layer has D. Paper: 4096.
        momentum: of the teacher's moving average at the first step, in [0, 1]; it goes to 1 along a cosine. Paper:
            0.996 for 1000 epochs; its code: 0.99 for 100 and 300, 0.97 for 40. solo-learn on CIFAR: 0.99.

    Raises:
        ValueError: if a width is not positive, or ``momentum`` is not in [0, 1].
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (4096, 256),
        predictor: tuple[int, ...] = (4096,),
        momentum: float = 0.996,
    ) -> None:
        check("byol", "in [0, 1]", momentum=momentum)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector, hidden_bias=True))
        d = projector[-1]
        self.predictor = build_projector(d, (*predictor, d), hidden_bias=True, name="predictor")
        self.teacher = Teacher(self.backbone, self.projector)
        self.momentum = momentum

    def begin_step(self, progress: float) -> None:
        """Moves the teacher towards the student."""
        self.teacher.follow(self.backbone, self.projector, cosine(self.momentum, 1.0, progress))

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to the student's predictions p and the teacher's projections z, each (n, D)."""
        p1, p2 = self.predictor(self.embed(x1)), self.predictor(self.embed(x2))
        return {"p1": p1, "p2": p2, "z1": self.teacher(x1), "z2": self.teacher(x2)}

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Squared distance of the normalised prediction to the other view's target, sum of both directions (eq. 2).

        Args:
            p1, p2: (N, D) the student's predictions from the first and second views.
            z1, z2: (N, D) the teacher's projections of them, which get no gradient.

        Returns:
            "loss".
        """
        similarity = F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())
        return {"loss": 4 - 2 * similarity.mean()}
