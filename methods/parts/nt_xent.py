"""Cross-entropies of the batch's cosine similarities: SimCLR's NT-Xent, computed in blocks of rows, and InfoNCE."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.methods.parts.share import WHOLE, Share, refuse_second_derivative

BLOCK = 1 << 24  # similarities held at a time: 64 MiB in float32; up to N = 2048 that is the whole matrix


def _blocks(rows: int, width: int) -> Iterator[slice]:
    height = max(1, BLOCK // width)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _logits(z: Tensor, keys: Tensor, rows: slice, first: int, temperature: float) -> Tensor:
    """(b, M) similarities of a block of the anchors z to all keys, among which z starts at ``first``.

    That of an anchor to itself is -inf.
    """
    logits = (z[rows] @ keys.T).div_(temperature)
    logits.diagonal(offset=first + rows.start).fill_(-torch.inf)
    return logits


class _MeanLogSumExp(torch.autograd.Function):
    """mean_i log sum_{j != i} exp(z_i'z_j / temperature), holding one block of the (m, M) matrix at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, share: Share) -> Tensor:
        keys, ctx.first = share.gather(z), share.rank * len(z)
        log_sums = []
        for rows in _blocks(len(z), len(keys)):
            logits = _logits(z, keys, rows, ctx.first, temperature)
            log_sums.append(logits.logsumexp(dim=1))
        log_sum = torch.cat(log_sums)  # (m,)
        only = logits if len(log_sums) == 1 else None  # kept if there is only one; more are recomputed
        ctx.temperature, ctx.share = temperature, share
        ctx.save_for_backward(z, keys, log_sum, share.gather(log_sum), only)
        return share.mean(log_sum.mean())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, keys, log_sum, of_keys, only = ctx.saved_tensors
        # Times the processes: each back-propagates the same value (the convention of `runtime.distributed`).
        scale = grad / (ctx.temperature * len(keys)) * ctx.share.processes
        if torch.is_grad_enabled():  # for a second derivative: saved tensors have no graph back to z
            refuse_second_derivative(ctx.share)
            logits = _logits(z, z, slice(0, len(z)), 0, ctx.temperature)
            p = logits.softmax(dim=1)
            return (p + p.T) @ z * scale, None, None
        grad_z = torch.empty_like(z)
        for rows in _blocks(len(z), len(keys)):
            logits = _logits(z, keys, rows, ctx.first, ctx.temperature) if only is None else only
            # z_i gets p_ij z_j as an anchor and p_ji z_j as a view of anchor j, whichever process has that; the logits
            # are symmetric, so the same block gives both.
            pull = (logits - log_sum[rows, None]).exp_().add_((logits - of_keys).exp_())
            torch.mm(pull, keys, out=grad_z[rows])
        return grad_z.mul_(scale), None, None


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, share: Share = WHOLE) -> Tensor:
    """Computes the mean over all 2N anchors of -log softmax of the positive among the other 2N - 1 views.

    Exact, without sampling or approximation; memory grows with N, not N^2, except for a second derivative.

    Args:
        z1: (n, D) embeddings of this process's first views, not normalised.
        z2: (n, D) those of the second views.
        temperature: divides the cosine similarities, > 0.
        share: which of the N images these are.
    """
    z1, z2 = F.normalize(z1), F.normalize(z2)
    positive = share.mean((z1 * z2).sum(dim=1).mean()) / temperature
    return mean_log_sum_exp(torch.cat([z1, z2]), temperature, share) - positive


def mean_log_sum_exp(z: Tensor, temperature: float, share: Share = WHOLE) -> Tensor:
    """mean_i log sum_{j != i} exp(z_i'z_j / temperature) over all M rows, in memory that grows with M, not M^2.

    Args:
        z: (m, D) this process's rows, of length 1.
        temperature: > 0.
        share: which of the M rows these are.
    """
    return _MeanLogSumExp.apply(z, temperature, share)


def info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Computes the mean over the N queries of -log softmax of the query's own key among all N keys (InfoNCE).

    Args:
        q: (N, D) queries, not normalised.
        k: (N, D) keys, not normalised; row i is the positive of query i.
        temperature: divides the cosine similarities, > 0.
    """
    logits = F.normalize(q) @ F.normalize(k).T / temperature  # (N, N)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()
