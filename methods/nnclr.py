"""NNCLR (Dwibedi et al. 2021, arXiv 2104.14548)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.memory_queue import Queue
from ssl_bench.methods.parts.nt_xent import info_nce


class NNCLR(Method):
    """Contrasts each view's prediction with the nearest neighbour that the other view has in a queue of embeddings.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the projector's Linear layers, each > 0, each followed by batch norm; the last is D. Paper:
            2048-2048-256.
        predictor: widths of the predictor's hidden layers, each > 0; its last layer has D. Paper: 4096.
        queue: the number of embeddings in the support set, > 0. Paper: 98304; solo-learn on CIFAR: 65536.
        temperature: divides the cosine similarities, > 0. Paper: 0.1; solo-learn on CIFAR: 0.2.

    Raises:
        ValueError: if a width, ``queue`` or ``temperature`` is not positive.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 256),
        predictor: tuple[int, ...] = (4096,),
        queue: int = 98304,
        temperature: float = 0.1,
    ) -> None:
        check("nnclr", "> 0", temperature=temperature)
        head, d = build_projector(feature_dim, projector), projector[-1]
        super().__init__(backbone, feature_dim, nn.Sequential(*head, nn.BatchNorm1d(d)))
        self.predictor = build_projector(d, (*predictor, d), last_bias=True, name="predictor")
        self.queue = Queue(queue, d)
        self.temperature = temperature

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to embeddings z and predictions p, each (n, D)."""
        z1, z2 = self.embed(x1), self.embed(x2)
        return {"p1": self.predictor(z1), "p2": self.predictor(z2), "z1": z1, "z2": z2}

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the neighbour's own prediction among the batch's, mean of both directions.

        (The paper's pseudocode.) Then the first views' embeddings are enqueued; the support set is that of the global
        batches, the same on every process.

        Args:
            p1, p2: (N, D) predictions from the first and second views.
            z1, z2: (N, D) embeddings of them, which get no gradient.

        Returns:
            "loss".
        """
        both = info_nce(self._nearest(z1), p2, self.temperature) + info_nce(self._nearest(z2), p1, self.temperature)
        self.queue.enqueue(F.normalize(z1.detach()))
        return {"loss": both / 2}

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        """(N, D) each row's nearest neighbour in the queue, by cosine similarity."""
        rows = self.queue.rows
        return rows[(F.normalize(z) @ rows.T).argmax(dim=1)]
