"""Cross-entropies of the batch's cosine similarities: SimCLR's NT-Xent, computed in blocks of rows, and InfoNCE."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 24  # similarities held at a time: 64 MiB in float32; up to N = 2048 that is the whole matrix


def _blocks(rows: int) -> Iterator[slice]:
    height = max(1, BLOCK // rows)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _logits(z: Tensor, rows: slice, temperature: float) -> Tensor:
    """(b, M) similarities of a block of anchors to all rows; -inf of an anchor to itself."""
    logits = (z[rows] @ z.T).div_(temperature)
    logits.diagonal(offset=rows.start).fill_(-torch.inf)
    return logits


class _MeanLogSumExp(torch.autograd.Function):
    """mean_i log sum_{j != i} exp(z_i'z_j / temperature), holding one block of the (M, M) matrix at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        log_sums = []
        for rows in _blocks(len(z)):
            logits = _logits(z, rows, temperature)
            log_sums.append(logits.logsumexp(dim=1))
        log_sum = torch.cat(log_sums)  # (M,)
        only = logits if len(log_sums) == 1 else None  # kept if there is only one; more are recomputed
        ctx.temperature = temperature
        ctx.save_for_backward(z, log_sum, only)
        return log_sum.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, log_sum, only = ctx.saved_tensors
        scale = grad / (ctx.temperature * len(z))
        if torch.is_grad_enabled():  # for a second derivative: saved tensors have no graph back to z
            logits = _logits(z, slice(0, len(z)), ctx.temperature)
            p = logits.softmax(dim=1)
            return (p + p.T) @ z * scale, None
        grad_z = torch.empty_like(z)
        for rows in _blocks(len(z)):
            logits = _logits(z, rows, ctx.temperature) if only is None else only
            # z_i gets p_ij z_j as an anchor and p_ji z_j as a view of anchor j; the logits are symmetric, so the same
            # block gives both.
            pull = (logits - log_sum[rows, None]).exp_().add_((logits - log_sum).exp_())
            torch.mm(pull, z, out=grad_z[rows])
        return grad_z.mul_(scale), None


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Computes the mean over all 2N anchors of -log softmax of the positive among the other 2N - 1 views.

    Exact, without sampling or approximation; memory grows with N, not N^2, except for a second derivative.

    Args:
        z1: (N, D) embeddings of the first views, not normalised.
        z2: (N, D) those of the second views.
        temperature: divides the cosine similarities, > 0.
    """
    z1, z2 = F.normalize(z1), F.normalize(z2)
    positive = (z1 * z2).sum(dim=1).mean() / temperature
    return mean_log_sum_exp(torch.cat([z1, z2]), temperature) - positive


def mean_log_sum_exp(z: Tensor, temperature: float) -> Tensor:
    """mean_i log sum_{j != i} exp(z_i'z_j / temperature), in memory that grows with M, not M^2.

    Args:
        z: (M, D) rows of length 1.
        temperature: > 0.
    """
    return _MeanLogSumExp.apply(z, temperature)


def info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Computes the mean over the N queries of -log softmax of the query's own key among all N keys (InfoNCE).

    Args:
        q: (N, D) queries, not normalised.
        k: (N, D) keys, not normalised; row i is the positive of query i.
        temperature: divides the cosine similarities, > 0.
    """
    logits = F.normalize(q) @ F.normalize(k).T / temperature  # (N, N)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()
