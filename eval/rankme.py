"""The effective rank of features, which needs no label (`rankme-v1`)."""

import torch
from torch import Tensor

from ssl_bench.eval.probe import Metrics, Probe

EPSILON = 1e-7  # of the paper, added to every share
IMAGES = 25_600  # of the train set, fixed, or all if there are fewer


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of a spectrum's shares, p_k = s_k / sum |s| + 1e-7: k for k equal values, 1 for a single one.

    Args:
        spectrum: (K,) singular values or eigenvalues, >= 0.
    """
    shares = spectrum / spectrum.abs().sum().clamp_min(torch.finfo(spectrum.dtype).tiny) + EPSILON
    return (-(shares * shares.log()).sum()).exp().item()


def singular_values(x: Tensor) -> Tensor:
    """The min(N, D) singular values of (N, D) features in float64, descending, by the smaller Gram matrix."""
    x = x.double()
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


class RankMe:
    """`rankme-v1`: RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1) of at most 25,600 fixed train images."""

    name = "rankme-v1"
    tabulated = True
    needs_labels = needs_test = False

    def __call__(self, probe: Probe) -> Metrics:
        """Measures the features, and the embeddings where the probe has a projector.

        Returns:
            "rankme", in [1, min(N, D)], "rankme_embeddings" likewise, and "n_images", their number N.
        """
        probe = probe.subset(train=IMAGES, test=0)
        spaces = probe.spaces("train")
        if not probe.main:
            return {}
        found = {f"rankme{suffix}": effective_rank(singular_values(x)) for suffix, x in spaces.items()}
        return {**found, "n_images": len(probe.images("train"))}
