"""Signum (Bernstein et al. 2018, arXiv 1802.04434): the sign of the momentum."""

from typing import Any

import torch
from torch.optim import Optimizer


class Signum(Optimizer):
    """b = mu b + (1 - mu) g;  w -= lr (sign(b) + weight_decay w).

    Args:
        params: parameters or groups.
        lr: learning rate, > 0.
        momentum: mu in [0, 1); 0 turns it off (signSGD).
        weight_decay: >= 0; 0 turns it off.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        for name, value, good in (
            ("lr", lr, lr > 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not good:
                raise ValueError(f"Signum: {name} is out of range, got {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as torch's optimizers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer.sign(), alpha=group["lr"])
        return loss
