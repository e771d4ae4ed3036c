"""SwAV (Caron et al. 2020, arXiv 2006.09882)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check
from ssl_bench.methods.parts.multi_crop import multi_crop, prediction_loss
from ssl_bench.methods.parts.prototypes import Prototypes, sinkhorn


class SwAV(Method):
    """Predicts one crop's assignment to prototypes from another crop, the assignments of a batch being balanced.

    The prototypes are normalised in ``begin_step``, before each step, as in the official code (commit 06b1b7c).

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0; the last is D. Paper: 2048-128.
        prototypes: K, > 0. Paper: 3000, three times ImageNet's classes; ``method=swav`` takes 512 for small data.
        temperature: divides the scores whose softmax is the prediction, > 0. Paper: 0.1.
        epsilon: weight of the entropy in Sinkhorn's assignment, > 0. Paper: 0.05.
        iterations: Sinkhorn's, >= 1. Paper: 3.
        frozen: share of the run, from its start, in which the prototypes get no gradient, in [0, 1]; 0 = none. Code:
            the first epoch.
        queue: earlier images that are assigned along with the batch, a multiple of the batch size; 0 = none. Paper:
            3840 with batches of 256, none with 4096.
        queue_start: share of the run after which images enter the queue, in [0, 1]. Paper: 15 of 200 epochs.
        global_scale: range of the two large crops' share of the image's area, in (0, 1]. Paper: 0.14 to 1.
        local_scale: that of the small crops. Paper: 0.05 to 0.14.
        local_crops: how many small crops, >= 0; 0 = none. Paper: 6.
        local_size: pixels of their sides; 0 = 96/224 of the images', as in the paper, in whole patches.

    Raises:
        ValueError: a value out of its range, or small crops that the backbone cannot take.
    """

    queue: Tensor | None
    queue_weight: Tensor
    entering: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 128),
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        frozen: float = 0.01,
        queue: int = 0,
        queue_start: float = 0.075,
        global_scale: tuple[float, float] = (0.14, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.14),
        local_crops: int = 6,
        local_size: int = 0,
    ) -> None:
        check("swav", "> 0", prototypes=prototypes, temperature=temperature, epsilon=epsilon, iterations=iterations)
        check("swav", "in [0, 1]", frozen=frozen, queue_start=queue_start)
        check("swav", ">= 0", queue=queue)
        super().__init__(backbone, feature_dim, build_projector(feature_dim, projector, hidden_bias=True))
        self.views = multi_crop(
            "swav", backbone, global_scale=global_scale, local_scale=local_scale, local_crops=local_crops,
            local_size=local_size, blur_p=0.5, solarize_p=0.0,
        )  # fmt: skip
        self.prototypes = Prototypes(projector[-1], prototypes)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.frozen, self.queue_start = frozen, queue_start
        self.register_buffer("queue", torch.zeros(2, queue, projector[-1]) if queue else None)
        if queue:
            self.register_buffer("queue_weight", torch.zeros(queue, 1))  # 1 where there is an image
            self.register_buffer("entering", torch.zeros(1, 1))  # the weight of the next ones

    @classmethod
    def check_batch(cls, n: int, *, queue: int, **_others: object) -> None:
        """Refuses (ValueError) a batch of ``n`` images that does not fit the queue; asked before a run starts."""
        if queue % n:  # else which images leave the queue would depend on their order in the batch
            raise ValueError(f"swav: queue must be a multiple of the batch of {n} images, got {queue}")

    @torch.no_grad()
    def begin_step(self, progress: float) -> None:
        """Normalises the prototypes; ends their freeze, and opens the queue, when it is time."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        self.prototypes.learning.fill_(progress >= self.frozen)
        if self.queue is not None:
            self.entering.fill_(progress >= self.queue_start)

    def forward(self, *crops: Tensor) -> dict[str, Tensor]:
        """Scores each crop's normalised embedding against the prototypes, (n, crops, K), each crop in its own pass."""
        z = [F.normalize(self.embed(x)) for x in crops]
        return {"scores": self.prototypes(torch.stack(z, 1)), "z1": z[0].detach(), "z2": z[1].detach()}

    def loss(self, scores: Tensor, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of every crop's softmax to the large crops' assignments, over all pairs of different crops.

        Args:
            scores: (N, crops, K) of the global batch, the two large crops first.
            z1, z2: (N, D) the large crops' embeddings, for the queue.

        Returns:
            "loss".
        """
        codes = torch.stack([self._codes(scores[:, crop].detach(), crop) for crop in (0, 1)], 1)  # (N, 2, K)
        if self.queue is not None:
            order = z1[:, 0].argsort()  # the rows' own, as in `Queue`: the batch's depends on processes and chunks
            n, entering = len(z1), torch.stack([z1, z2])[:, order].detach()
            self.queue.copy_(torch.cat([entering, self.queue[:, :-n]], 1))
            self.queue_weight.copy_(torch.cat([self.entering.expand(n, 1), self.queue_weight[:-n]]))
        return {"loss": prediction_loss(scores, codes, self.temperature)}

    def _codes(self, scores: Tensor, crop: int) -> Tensor:
        """(N, K) the batch's balanced assignments, those of the queue's images being made along with them."""
        if self.queue is None:
            return sinkhorn(scores, self.epsilon, self.iterations)
        n = len(scores)
        self.check_batch(n, queue=self.queue.shape[1])
        everything = torch.cat([scores, F.linear(self.queue[crop], self.prototypes.weight.detach())])
        log_weight = torch.cat([torch.zeros_like(scores[:, :1]), self.queue_weight.log()])
        return sinkhorn(everything, self.epsilon, self.iterations, log_weight)[:n]
