"""torch's SGD and AdamW as they are, with their fused kernels where those exist."""

from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from ssl_bench.optim.layerwise import check_betas, check_nesterov, check_range

FUSED_DEVICES = ("cpu", "cuda")


def sgd(params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False) -> Optimizer:
    """torch's SGD: d = g + beta w; b = mu b + d; w -= lr b (Nesterov: lr (d + mu b)).

    Args:
        params: Parameters, (name, parameter) pairs, or groups; "adapt" has no meaning here.
        lr: Learning rate, >= 0.
        momentum: mu in [0, 1); 0 turns momentum off.
        weight_decay: beta >= 0, an L2 penalty; 0 turns it off.
        nesterov: Nesterov's momentum; False turns it off.

    Raises:
        ValueError: for a value out of range.
    """
    check_range("sgd", "lr", lr)
    check_range("sgd", "momentum", momentum, 0.0, 1.0)
    check_range("sgd", "weight_decay", weight_decay)
    check_nesterov("sgd", momentum, nesterov)
    made = _fused(SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))
    # Only the fused kernel takes a learning rate from the device; without momentum there is no state to count.
    made.replayable = all(group["fused"] for group in made.param_groups)  # type: ignore[attr-defined]
    return made


def adamw(
    params: Any,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """torch's AdamW: Adam with bias correction and decoupled weight decay.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; "adapt" has no meaning here.
        lr: Learning rate, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to sqrt(v), >= 0.
        weight_decay: beta >= 0, decoupled: w -= lr beta w; 0 turns it off.

    Raises:
        ValueError: for a value out of range.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_range("adamw", name, value)
    check_betas("adamw", betas)
    return _fused(AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))


def _fused(optimizer: Optimizer) -> Optimizer:
    """Turn torch's fused kernel on where every parameter allows it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.device.type in FUSED_DEVICES and torch.is_floating_point(p) for p in params):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    # Without the flag that a constructor's fused=True sets, a gradient scaler unscales the gradients itself and calls
    # `step` only when it is due; so step hooks (telemetry) see true gradients and performed steps only.
    return optimizer
