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
    gradient_squared: float  # estimate of |E g_B|^2, unbiased for independent batches; may be negative in much noise
    batches: int


def measure_gradient_noise(
    model: nn.Module, losses: Iterable[Loss], *, batch_norm: BatchNormMode = "train"
) -> GradientNoise:
    """The variance of the gradient over batches of one size, summed over all trainable parameters, in float32.

    It is taken about the mean of these batches, not about the whole set's gradient: with batch norm in "train" mode,
    and with a self-supervised loss, the expected gradient itself depends on the batch size. Batches that are disjoint
    parts of a shuffled set count as independent: it is itself a sample, and its distribution's gradient is meant. The
    model's parameters, buffers, modes and gradients are the same afterwards.

    Args:
        model: the bare module that the losses run; not a DistributedDataParallel wrapper.
        losses: one closure for each batch, called once each; at least two.
        batch_norm: see `ssl_bench.eval.sharpness.batch_norm_mode`.

    Raises:
        ValueError: fewer than two batches, no trainable parameter, or a loss that is not finite.
    """
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not params:
        raise ValueError("gradient noise: the model has no parameter that requires a gradient")
    mean = [torch.zeros_like(parameter) for parameter in params]
    count, spread = 0, 0.0
    with batch_norm_mode(model, batch_norm), torch.autocast(params[0].device.type, enabled=False), torch.enable_grad():
        for loss in losses:
            value = loss()
            if not math.isfinite(value.item()):
                raise ValueError(f"gradient noise: the loss of batch {count} is {value.item()}")
            gradient = torch.autograd.grad(value, params, materialize_grads=True)
            # Welford's recurrence: one pass, and no difference of large sums.
            count += 1
            before = [g - m for g, m in zip(gradient, mean, strict=True)]
            torch._foreach_add_(mean, before, alpha=1 / count)
            spread += inner_product(before, [g - m for g, m in zip(gradient, mean, strict=True)])
    if count < 2:
        raise ValueError(f"gradient noise: got {count} batch, allowed: two or more")
    variance = spread / (count - 1)
    return GradientNoise(variance, inner_product(mean, mean) - variance / count, count)
