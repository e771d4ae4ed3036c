"""How close two views of an image are, and how evenly images spread over the sphere (`alignment-uniformity-v1`)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.eval.linear_augmented import augmented_spaces
from ssl_bench.eval.probe import Metrics, Probe
from ssl_bench.eval.rankme import IMAGES

T = 2.0  # of the Gaussian kernel


def alignment(x: Tensor, y: Tensor) -> float:
    """The mean over pairs of |x - y|^2, of rows of length 1: 0 = equal, 4 = opposite.

    Args:
        x: (N, D) features of one view of each image; normalised here.
        y: (N, D) those of another.
    """
    return (F.normalize(x.double()) - F.normalize(y.double())).square().sum(dim=1).mean().item()


def uniformity(x: Tensor, rows: int = 1024) -> float:
    """log of the mean over the pairs of distinct images of exp(-2 |x_i - x_j|^2): 0 = one point, near -4 = even.

    Args:
        x: (N, D) features, N >= 2; normalised here.
        rows: how many are compared with all at a time, >= 1; it bounds the memory.
    """
    x = F.normalize(x.double())
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(rows):
        total += (2 * T * (part @ x.T - 1)).exp().sum()  # |a - b|^2 = 2 - 2 a.b
    own = (2 * T * (x.square().sum(dim=1) - 1)).exp().sum()  # each image with itself
    return ((total - own) / (len(x) * (len(x) - 1))).log().item()


class AlignmentUniformity:
    """`alignment-uniformity-v1` (Wang and Isola 2020, arXiv 2005.10242; alpha = 2, t = 2), of at most 25,600 images.

    Two random resized crops with flips of each of these fixed train images; both of every method alike.
    """

    name = "alignment-uniformity-v1"
    tabulated = True
    needs_labels = needs_test = False
    needs_augment = True

    def __call__(self, probe: Probe) -> Metrics:
        """Measures the features, and the embeddings where the probe has a projector.

        Returns:
            "alignment" and "uniformity" (the mean of both views'; of both lower is better), those of the
            "..._embeddings", and "n_images".

        Raises:
            ValueError: fewer than 2 images.
        """
        probe = probe.subset(train=IMAGES, test=0)
        if len(probe.images("train")) < 2:
            raise ValueError(f"there must be at least 2 images, got {len(probe.images('train'))}")
        spaces = augmented_spaces(probe, 2)
        if not probe.main:
            return {}
        found = {}
        for suffix, (x, y) in spaces.items():
            found[f"alignment{suffix}"] = alignment(x, y)
            found[f"uniformity{suffix}"] = (uniformity(x) + uniformity(y)) / 2
        return {**found, "n_images": len(probe.images("train"))}
