"""W-MSE (Ermolov et al. 2021, arXiv 2007.06346)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods.base import Method, build_projector, check


class WMSE(Method):
    """Pulls the two views' embeddings together after whitening each view over the batch, so that they cannot collapse.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0; the last is D. Paper: 1024-64 on CIFAR, 1024-128 on
            STL-10 and Tiny ImageNet.
        sub_batch: images that are whitened together, > D, a divisor of the batch; None = the whole batch, whose loss
            does not depend on the order of its rows. Paper: 128 on CIFAR, 256 on STL-10 and Tiny ImageNet, from a
            random permutation. Here they are consecutive rows of the batch, which is a random draw itself; with
            ``chunk_size`` on several processes these are other rows, so the run is another one.
        eps: the share of the identity in the covariance that is whitened, in [0, 1]. Official code: 0, which needs more
            than D images.

    Raises:
        ValueError: if a width is not positive, ``sub_batch`` is not above D, or ``eps`` is not in [0, 1].
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (1024, 64),
        sub_batch: int | None = None,
        eps: float = 0.0,
    ) -> None:
        head = build_projector(feature_dim, projector)  # a last bias would be centred away
        if sub_batch is not None and sub_batch <= projector[-1]:
            raise ValueError(f"w_mse: sub_batch must be > the projector's last width {projector[-1]}, got {sub_batch}")
        check("w_mse", "in [0, 1]", eps=eps)
        super().__init__(backbone, feature_dim, head)
        self.sub_batch, self.eps = sub_batch, eps

    @classmethod
    def check_batch(cls, n: int, *, projector: tuple[int, ...], sub_batch: int | None, eps: float) -> None:
        """Refuses (ValueError) a batch of ``n`` images that these keywords cannot whiten; asked before a run starts."""
        size, d = sub_batch or n, projector[-1]
        if n % size:
            raise ValueError(f"w_mse: sub_batch must divide the batch of {n} images, got {size}")
        if size <= d and not eps:
            raise ValueError(f"w_mse: the batch must have more images than the embedding's {d} dimensions, got {n}")

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Squared distance of the whitened and then normalised embeddings of the two views, 2 - 2 cos, mean over pairs.

        Args:
            z1: (N, D) embeddings of the global batch's first views, not normalised.
            z2: (N, D) those of the second views.

        Returns:
            "loss"; NaN if the embeddings are collinear to float64's rounding, which ends the run as diverged.

        Raises:
            ValueError: if the batch is no multiple of ``sub_batch``, or has too few images to be whitened.
        """
        n, d = z1.shape
        self.check_batch(n, projector=(d,), sub_batch=self.sub_batch, eps=self.eps)
        size = self.sub_batch or n
        pairs = [(self._whiten(a), self._whiten(b)) for a, b in zip(z1.split(size), z2.split(size), strict=True)]
        similarity = torch.stack([F.cosine_similarity(a, b).mean() for a, b in pairs])
        return {"loss": 2 - 2 * similarity.mean()}

    def _whiten(self, z: Tensor) -> Tensor:
        """(m, D) rows to rows of mean 0 and covariance 1: L^-1 (z - mean), where L L' is their covariance.

        In float64: a covariance squares the ratio of the embeddings' extents; in float32 one of 1 to 3,000 is lost.
        """
        kept, z = z.dtype, z.double()
        centred = z - z.mean(dim=0)
        covariance = centred.T @ centred / (len(z) - 1)
        covariance = (1 - self.eps) * covariance + self.eps * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        factor, failed = torch.linalg.cholesky_ex(covariance)  # unlike `cholesky`, does not wait for the device
        factor = torch.where(failed > 0, torch.nan, factor)
        return torch.linalg.solve_triangular(factor, centred.T, upper=False).T.to(kept)
