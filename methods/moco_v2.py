"""MoCo v2 (Chen et al. 2020, arXiv 2003.04297; the queue is that of MoCo, He et al. 2020, arXiv 1911.05722)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.memory_queue import Queue
from ssl_bench.methods.parts.teacher import Teacher


class MoCoV2(Method):
    """Picks the teacher's key of the other view out of a queue of keys of earlier batches.

    The official code shuffles the images between GPUs before the teacher's batch norms, so that the statistics of a
    query's own small part of the batch do not tell its key apart. Here all batch norms see the whole global batch
    (``sync_batch_norm``), so no part has statistics of its own; without it, or with chunks, they give that hint.

    The student's backbone is what is evaluated.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0, without batch norm; the last is D. Paper: 2048-128.
        queue: the number of keys in the queue, > 0. Paper: 65536; the authors' CIFAR-10 demo: 4096.
        temperature: divides the cosine similarities, > 0. Paper: 0.2; the CIFAR-10 demo: 0.1.
        momentum: of the teacher's moving average, in [0, 1], constant. Paper: 0.999; the CIFAR-10 demo: 0.99.

    Raises:
        ValueError: if a width, ``queue`` or ``temperature`` is not positive, or ``momentum`` is not in [0, 1].
    """

    spread_of = "q"

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 128),
        queue: int = 65536,
        temperature: float = 0.2,
        momentum: float = 0.999,
    ) -> None:
        check("moco_v2", "> 0", temperature=temperature)
        check("moco_v2", "in [0, 1]", momentum=momentum)
        head = build_projector(feature_dim, projector, hidden_norm=False, last_bias=True)
        super().__init__(backbone, feature_dim, head)
        self.teacher = Teacher(self.backbone, self.projector)
        self.queue = Queue(queue, projector[-1])
        self.temperature, self.momentum = temperature, momentum

    def begin_step(self, progress: float) -> None:  # noqa: ARG002 (the momentum is constant)
        """Moves the teacher towards the student."""
        self.teacher.follow(self.backbone, self.projector, self.momentum)

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Two views (n, 3, H, W) to the student's queries of the first and the teacher's keys of the second, (n, D)."""
        return {"q": self.embed(x1), "k": self.teacher(x2)}

    def loss(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the query's own key among itself and the queue's keys (MoCo, eq. 1).

        Then the batch's keys are enqueued.

        Args:
            q: (N, D) the student's queries from the first views.
            k: (N, D) the teacher's keys of the second views, which get no gradient.

        Returns:
            "loss".
        """
        q, k = F.normalize(q), F.normalize(k.detach())
        negatives = self.queue.rows.clone()  # the backward pass needs them as they were before the batch's keys
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / self.temperature  # (N, 1 + K)
        self.queue.enqueue(k)
        return {"loss": (logits.logsumexp(dim=1) - logits[:, 0]).mean()}
