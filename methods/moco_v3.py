"""MoCo v3 (Chen, Xie and He 2021, arXiv 2104.02057)."""

from torch import Tensor, nn

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.nt_xent import info_nce
from ssl_bench.methods.parts.teacher import Teacher, cosine


def _head(size: int, widths: tuple[int, ...], name: str) -> nn.Sequential:
    """Batch norm after every layer; the last one has no parameters, as in the official code."""
    return nn.Sequential(*build_projector(size, widths, name=name), nn.BatchNorm1d(widths[-1], affine=False))


class MoCoV3(Method):
    """Picks the teacher's key of the other view out of the keys of all images in the global batch; made for ViTs.

    The student's backbone is what is evaluated, as in the paper. Batch norm follows every layer of both heads.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0; the last is D. Paper: 4096-4096-256; its code for
            ResNets: 4096-256.
        predictor: widths of the predictor's hidden layers, each > 0; its last layer has D. Paper: 4096.
        temperature: divides the cosine similarities, > 0. Paper, and solo-learn on CIFAR: 0.2; code for ResNet-50: 1.
        momentum: of the teacher's moving average at the first step, in [0, 1]; it goes to 1 along a cosine. Paper and
            solo-learn on CIFAR: 0.99.
        freeze_patch_embed: keep the ViT's patch projection at its random initial weights, which makes training stable
            (section 4.2; the paper does); None = if the backbone has one (timm's ``patch_embed``).

    Raises:
        ValueError: a width or ``temperature`` is not positive, ``momentum`` not in [0, 1], or nothing there to freeze.
    """

    spread_of = "q1"

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (4096, 4096, 256),
        predictor: tuple[int, ...] = (4096,),
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patch_embed: bool | None = None,
    ) -> None:
        check("moco_v3", "> 0", temperature=temperature)
        check("moco_v3", "in [0, 1]", momentum=momentum)
        patches = getattr(backbone, "patch_embed", None)
        if freeze_patch_embed and patches is None:
            raise ValueError("moco_v3: freeze_patch_embed must be null or false without a patch_embed, got true")
        super().__init__(backbone, feature_dim, _head(feature_dim, projector, "projector"))
        self.predictor = _head(projector[-1], (*predictor, projector[-1]), "predictor")
        if patches is not None and freeze_patch_embed is not False:
            patches.requires_grad_(False)
        self.teacher = Teacher(self.backbone, self.projector)
        self.temperature, self.momentum = temperature, momentum

    def begin_step(self, progress: float) -> None:
        """Moves the teacher towards the student."""
        self.teacher.follow(self.backbone, self.projector, cosine(self.momentum, 1.0, progress))

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to the student's queries q and the teacher's keys k, each (n, D)."""
        q1, q2 = self.predictor(self.embed(x1)), self.predictor(self.embed(x2))
        return {"q1": q1, "q2": q2, "k1": self.teacher(x1), "k2": self.teacher(x2)}

    def loss(self, q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> dict[str, Tensor]:
        """2 temperature times the cross-entropy of the query's own key among the other view's, sum of both directions.

        Args:
            q1, q2: (N, D) the student's queries from the first and second views.
            k1, k2: (N, D) the teacher's keys of them, which get no gradient.

        Returns:
            "loss" (algorithm 1).
        """
        both = info_nce(q1, k2.detach(), self.temperature) + info_nce(q2, k1.detach(), self.temperature)
        return {"loss": 2 * self.temperature * both}
