"""Parameters, gradients and a loop that several optimizer tests share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SHAPES = {
    "conv": (4, 3, 3, 3),
    "conv.bias": (4,),
    "linear": (7, 5),
    "zero": (6, 4),  # starts at zero
    "zero.bias": (6,),  # starts at zero
    "still": (3, 5),  # has a zero gradient every other step
    "per_channel": (1, 1, 6),
    "scalar": (),
}


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, torch.nn.Parameter]:
    """Fresh parameters, always the same, of all shapes that matter, two of them zero."""
    g = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, value in values.items():
        if name.startswith("zero"):
            value.zero_()
    return {name: torch.nn.Parameter(value.to(dtype)) for name, value in values.items()}


def gradient(name: str, shape: Sequence[int], step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The gradient of a parameter in a step, always the same."""
    if name == "still" and step % 2:
        return torch.zeros(shape, dtype=dtype)
    g = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(shape, generator=g, dtype=torch.float64).mul(0.3).to(dtype)


def lr_at(step: int) -> float:
    """A learning rate that warms up and drops."""
    return 0.1 * (step + 1) if step < 8 else 0.8 / (1 + 0.1 * step)


def run(
    make: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    lr: Callable[[int], float] = lr_at,
) -> dict[str, Tensor]:
    """Train fresh parameters on the known gradients; returns their values after the last step."""
    params = make_params(dtype)
    optimizer = make(params)
    advance(optimizer, params, range(steps), lr)
    return {name: p.detach().clone() for name, p in params.items()}


def advance(
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    steps: Sequence[int],
    lr: Callable[[int], float] = lr_at,
) -> None:
    """Do the given steps with the known gradients and the given learning rates."""
    for k in steps:
        for name, p in params.items():
            p.grad = gradient(name, p.shape, k, p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr(k)
        optimizer.step()


def reference(
    rule: Callable[[Tensor, Tensor, dict[str, Any], float, int], Tensor],
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    lr: Callable[[int], float] = lr_at,
) -> dict[str, Tensor]:
    """Apply a formula tensor by tensor: rule(w, g, state, lr, step) -> the new w."""
    out = {}
    for name, p in make_params(dtype).items():
        w, state = p.detach(), {}
        for k in range(steps):
            w = rule(w, gradient(name, w.shape, k, dtype), state, lr(k), k)
        out[name] = w
    return out


def split(params: dict[str, torch.nn.Parameter], **groups_1d: Any) -> list[dict[str, Any]]:
    """The parameters with more than one dimension, then the others with the given settings."""
    return [
        {"params": [p for p in params.values() if p.ndim > 1]},
        {"params": [p for p in params.values() if p.ndim <= 1]} | groups_1d,
    ]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two results, each tensor's relative to its norm."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / (b[n].norm() + 1e-6)) for n in a)
