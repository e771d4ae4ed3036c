"""How fast the spectrum of the features' covariance decays (`alpha-req-v1`)."""

import torch
from torch import Tensor

from ssl_bench.eval.probe import Metrics, Probe
from ssl_bench.eval.rankme import IMAGES, singular_values

FIRST, LAST = 6, 100  # the ranks fitted, counted from 1: the first few eigenvalues and the tail follow no power law


def decay_exponent(x: Tensor) -> float:
    """alpha of a power law, lambda_i ~ i^-alpha, through the eigenvalues of the covariance of (N, D) features.

    Least squares of log lambda_i on log i with weights 1 / i, over the ranks 6 to 100 (or the last), as the authors'
    package reptrix fits it. Infinite where fewer than two of these eigenvalues are above 1e-12 of the largest.

    Raises:
        ValueError: the covariance has fewer than 7 eigenvalues.
    """
    last = min(LAST, x.shape[1], len(x) - 1)
    if last <= FIRST:
        raise ValueError(f"features must be (N, D) with N > {FIRST + 1} and D > {FIRST}, got {tuple(x.shape)}")
    eigenvalues = singular_values(x.double() - x.double().mean(dim=0)) ** 2  # the factor 1 / (N - 1) changes no slope
    rank = torch.arange(FIRST, last + 1, dtype=torch.float64, device=x.device)
    chosen = eigenvalues[FIRST - 1 : last]
    positive = chosen > 1e-12 * eigenvalues[0]
    if int(positive.sum()) < 2:
        return float("inf")
    rank, chosen = rank[positive], chosen[positive]
    weight, log_rank, log_value = 1 / rank, rank.log(), chosen.log()
    centred = log_rank - (weight * log_rank).sum() / weight.sum()
    return (-(weight * centred * log_value).sum() / (weight * centred**2).sum()).item()


class AlphaReQ:
    """`alpha-req-v1`: alpha-ReQ (Agrawal et al. 2022, NeurIPS) of at most 25,600 fixed train images; best near 1."""

    name = "alpha-req-v1"
    tabulated = True
    needs_labels = needs_test = False

    def __call__(self, probe: Probe) -> Metrics:
        """Measures the features, and the embeddings where the probe has a projector.

        Returns:
            "alpha" (no unit; large = few directions hold the variance), "alpha_embeddings" likewise, and "n_images".

        Raises:
            ValueError: fewer than 8 images or 7 dimensions.
        """
        probe = probe.subset(train=IMAGES, test=0)
        spaces = probe.spaces("train")
        if not probe.main:
            return {}
        found = {f"alpha{suffix}": decay_exponent(x) for suffix, x in spaces.items()}
        return {**found, "n_images": len(probe.images("train"))}
