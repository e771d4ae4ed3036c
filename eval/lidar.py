"""The rank of what tells images apart beyond what augmentation changes (`lidar-v1`)."""

import torch
from torch import Tensor

from ssl_bench.eval.linear_augmented import augmented_spaces
from ssl_bench.eval.probe import Metrics, Probe
from ssl_bench.eval.rankme import effective_rank

DELTA = 1e-4  # the paper's, on the diagonal of the covariance within images
IMAGES, VIEWS = 1000, 10


def lidar(z: Tensor) -> float:
    """The effective rank of S_w^-1/2 S_b S_w^-1/2, between 1 and min(n - 1, D).

    S_b is the covariance of the images' means, S_w the mean covariance of the views of an image plus 1e-4 I.

    Args:
        z: (n, q, D) features of q views of n images.
    """
    z = z.double()
    means = z.mean(dim=1)  # (n, D)
    between = means - means.mean(dim=0)
    within = (z - means[:, None]).flatten(0, 1)  # (n q, D)
    s_b = between.T @ between / len(between)
    s_w = within.T @ within / len(within)
    s_w.diagonal().add_(DELTA)
    values, vectors = torch.linalg.eigh(s_w)
    whiten = vectors * values.rsqrt() @ vectors.T
    return effective_rank(torch.linalg.eigvalsh(whiten @ s_b @ whiten).clamp_min(0))


class LiDAR:
    """`lidar-v1`: LiDAR (Thilak et al. 2023, arXiv 2312.04000) of 10 views of at most 1,000 fixed train images.

    The views are random resized crops with flips, of every method alike, whatever it was trained with.
    """

    name = "lidar-v1"
    tabulated = True
    needs_labels = needs_test = False
    needs_augment = True

    def __call__(self, probe: Probe) -> Metrics:
        """Measures the features, and the embeddings where the probe has a projector.

        Returns:
            "lidar", "lidar_embeddings" likewise, and "n_images".
        """
        probe = probe.subset(train=IMAGES, test=0)
        spaces = augmented_spaces(probe, VIEWS)
        if not probe.main:
            return {}
        found = {f"lidar{suffix}": lidar(z.transpose(0, 1)) for suffix, z in spaces.items()}
        return {**found, "n_images": len(probe.images("train"))}
