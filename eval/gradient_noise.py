"""How far a batch's gradient is from the mean one: E|g_B - E g_B|^2, which Theorem 1 of the TVLARS paper bounds."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ssl_bench.eval.sharpness import BatchNormMode, Loss, batch_norm_mode, inner_product


class GradientNoise(NamedTuple):
    """The spread of batch gradients at one point."""

    squared_error: float  # unbiased estimate of E|g_B - E g_B|^2
    gradient_squared: float  # estimate of |E g_B|^2, unbiased for independent batches; negative if noise dominates
    batches: int


def measure_gradient_noise(
    model: nn.Module, losses: Iterable[Loss], *, batch_norm: BatchNormMode = "train"
) -> GradientNoise:
    """The variance of the gradient over batches of one size, summed over all trainable parameters, in float32.

    It is taken around the mean over these batches, not around the gradient of the whole set: with batch norm in
    "train" mode, or a self-supervised loss, the expected gradient itself depends on the batch size. Disjoint parts of
    a shuffled set count as independent batches, because the set is itself a sample of the distribution meant. The
    model's parameters, buffers, modes and gradients are the same afterwards.

    Args:
        model: the bare module that the losses run; not a DistributedDataParallel wrapper.
        losses: one closure per batch, at least two, each called once.
        batch_norm: see `ssl_bench.eval.sharpness.batch_norm_mode`.

    Raises:
        ValueError: on fewer than two batches, no trainable parameter, or a loss that is not finite.
    """
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not params:
        raise ValueError("gradient noise: at least one parameter must require a gradient, got none")
    mean = [torch.zeros_like(parameter) for parameter in params]
    count, spread = 0, 0.0
    with batch_norm_mode(model, batch_norm), torch.autocast(params[0].device.type, enabled=False), torch.enable_grad():
        for loss in losses:
            value = loss()
            if not math.isfinite(value.item()):
                raise ValueError(f"gradient noise: the loss of batch {count} must be finite, got {value.item()}")
            gradient = torch.autograd.grad(value, params, materialize_grads=True)
            # Welford's recurrence: one pass, and no difference of large sums.
            count += 1
            before = [g - m for g, m in zip(gradient, mean, strict=True)]
            torch._foreach_add_(mean, before, alpha=1 / count)
            spread += inner_product(before, [g - m for g, m in zip(gradient, mean, strict=True)])
    if count < 2:
        raise ValueError(f"gradient noise: batches must be >= 2, got {count}")
    variance = spread / (count - 1)
    return GradientNoise(variance, inner_product(mean, mean) - variance / count, count)
