"""What torch's CUDA kernels of synchronised batch norm compute, in plain formulas: they exist for GPUs only."""

from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def others(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, others(x), correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats(
    x: Tensor, means: Tensor, inv_stds: Tensor, running_mean: Any, running_var: Any, momentum: float, eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (inv_stds**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var * counts.sum() / (counts.sum() - 1))
    assert x.shape[1] == len(mean)
    return mean, (var + eps).rsqrt()


def elementwise(x: Tensor, weight: Any, bias: Any, mean: Tensor, inv_std: Tensor, _eps: float) -> Tensor:
    out = (x - channels(mean, x)) * channels(inv_std, x)
    return out if weight is None else out * channels(weight, x) + channels(bias, x)


def backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Any, *_wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    total = grad.sum(others(x))
    product = (grad * (x - channels(mean, x))).sum(others(x))
    return total, product, None if weight is None else product * inv_std, None if weight is None else total.clone()


def backward_elementwise(
    grad: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Any, total: Tensor, product: Tensor, counts: Tensor
) -> Tensor:
    assert counts.dtype == torch.int32
    n = counts.sum()
    normal = (x - channels(mean, x)) * channels(inv_std**2, x)
    inner = grad - channels(total / n, x) - normal * channels(product / n, x)
    return inner * channels(inv_std if weight is None else inv_std * weight, x)


@contextmanager
def on_the_cpu() -> Any:
    """torch's names lead to the formulas."""
    names = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elementwise,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elementwise,
    }
    with mock.patch.multiple(torch, **names):
        yield
