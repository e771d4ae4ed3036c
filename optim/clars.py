"""CLARS (Huo, Gu, Huang: "Large Batch Training Does Not Need Warmup", AAAI 2021, arXiv 2002.01576).

As in the author's code, GitHub slowbull/largebatch, lars_optimizer.py at commit 064a1ab.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_bench.optim.kernels import Kernels
from ssl_bench.optim.layerwise import LayerStats, LayerwiseOptimizer, Ratio, check_range, layer_stats


class MicroGradients(Protocol):
    """What an optimizer with an attribute `micro_gradients` is given before its first step, and calls in `step`."""

    def __call__(self, step: int, read: Callable[[], Tensor]) -> Tensor:
        """Leave the gradient of one micro-batch after another in the parameters' `grad` and read each.

        Args:
            step: number of the optimizer's step, >= 0; which micro-batches they are is a function of it.
            read: called once for each micro-batch.

        Returns:
            The mean of what `read` returned. The parameters' `grad` is undefined afterwards.
        """


class CLARS(LayerwiseOptimizer):
    """CLARS: layer-wise rates bounded by the norms of micro-batch gradients, in place of a warm-up.

    d = g + beta w;  M = mean over micro-batches of |their gradient|, raw, taken anew before every step;
    s = min(cap, s0 |d| / (M + eps)) with s0 = eta |w| / (|d| + eps), or 1 where |w| or |d| is 0;
    b = mu b + d;  w -= lr s b: s multiplies the buffer, outside the momentum. After `measured_steps`, plain LARS:
    s = eta_after |w| / (|d| + eps). Tensors that are not adapted have s = 1. Exact for a loss that is a mean over
    samples, so for classification alone; a step costs a pass over micro_batch x micro_batches images more.

    Whoever trains with it sets `micro_gradients` (see `MicroGradients`); the suite's trainer does.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor.
        momentum: mu in [0, 1); 0 turns momentum off.
        weight_decay: beta >= 0, an L2 penalty; 0 turns it off.
        eta: Trust coefficient while M is measured, >= 0.
        eta_after: Trust coefficient afterwards, >= 0.
        cap: Upper bound of s while M is measured, > 0.
        eps: Added to |d| and M, >= 0.
        micro_batch: Images of a micro-batch, >= 1.
        micro_batches: Micro-batches of a step, >= 1.
        measured_steps: Steps during which M is measured, >= 0 (the author's code: 200 epochs); None for all.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("momentum_buffer", "micro_norm")
    SCALARS = ("micro_norm",)
    micro_gradients: MicroGradients | None = None

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        eta: float = 1e-2,
        eta_after: float = 1e-3,
        cap: float = 0.1,
        eps: float = 1e-6,
        micro_batch: int = 8,
        micro_batches: int = 64,
        measured_steps: int | None = None,
        decay_1d: bool = True,
        adapt_1d: bool = False,
    ) -> None:
        for name, value in (("micro_batch", micro_batch), ("micro_batches", micro_batches)):
            check_range(self.component, name, value, 1)
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "eta_after": eta_after,
            "cap": cap, "eps": eps, "micro_batch": micro_batch, "micro_batches": micro_batches,
            "measured_steps": measured_steps, "decay_1d": decay_1d, "adapt_1d": adapt_1d, "foreach": None,
            "fused": False, "taken": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eta", "eta_after", "eps"):
            check_range(self.component, name, group[name])
        check_range(self.component, "momentum", group["momentum"], 0.0, 1.0)
        check_range(self.component, "cap", group["cap"], above=True)
        if group["measured_steps"] is not None:
            check_range(self.component, "measured_steps", group["measured_steps"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure M and update every parameter that has a gradient; `p.grad` is not changed.

        Args:
            closure: as in torch's optimizers; called once, before M is measured.

        Returns:
            The closure's value, or None without one.

        Raises:
            ValueError: nobody set `micro_gradients`, or a sparse or sharded gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(_measures(group) for group in self.param_groups):
            self._measure()
        super().step()
        for group in self.param_groups:
            group["taken"] += 1
        return loss

    def _measure(self) -> None:
        """M of every parameter that has a gradient, into its state."""
        if self.micro_gradients is None:
            raise ValueError(f"{self.component}: micro_gradients must be set before the first step, got None")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params]

        def read() -> Tensor:
            found = [torch.zeros((), device=p.device) if p.grad is None else p.grad for p in params]
            return torch.stack([norm.double() for norm in torch._foreach_norm(found)])

        with torch.enable_grad():
            means = self.micro_gradients(self.param_groups[0]["taken"], read)
        for param, gradient, mean in zip(params, gradients, means.unbind(), strict=True):
            param.grad = gradient
            self.state[param]["micro_norm"] = mean.clone()

    def _update(self, group: dict[str, Any], kernels: Kernels) -> LayerStats | None:
        decay, eps = group["weight_decay"], group["eps"]
        norm = kernels.norms(decay, want_g=self.recording, want_d=True)
        ratio = None
        if group["adapt"]:
            hit = (norm.w == 0) | (norm.d == 0)
            raw = norm.w / (norm.d + eps)
            eta = group["eta"] if _measures(group) else group["eta_after"]
            scale = torch.where(hit, 1.0, eta * raw)
            if _measures(group):
                micro = torch.stack(kernels.state["micro_norm"]).to(norm.w)
                scale = (scale * norm.d / (micro + eps)).clamp(max=group["cap"])
            ratio = Ratio(raw, scale, hit)
        buffers, dtype = kernels.state["momentum_buffer"], kernels.params[0].dtype
        lr = kernels.scalar(group["lr"]) * (torch.ones_like(norm.w) if ratio is None else ratio.q)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, kernels.grads)
        if decay != 0:
            torch._foreach_add_(buffers, kernels.params, alpha=decay)
        torch._foreach_addcmul_(kernels.params, buffers, list((-lr).to(dtype).unbind()))
        if not self.recording:
            return None
        moved = torch.stack(list(torch._foreach_norm(buffers))) * lr
        return layer_stats(kernels.params, norm, ratio, None, lr, moved)


def _measures(group: dict[str, Any]) -> bool:
    """Whether M counts in the group's next step."""
    return group["measured_steps"] is None or group["taken"] < group["measured_steps"]


class CLARSChunks(CLARS):
    """CLARS over the chunks of the step's own batch, for losses of a whole batch: not the optimizer of the paper.

    The loss of a self-supervised method depends on the batch, so that of 8 images is another loss. Here a micro-batch
    is one of the chunks of `chunk_size` images in which the step is computed, its loss that of the chunk alone.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor.
        momentum: mu in [0, 1); 0 turns momentum off.
        weight_decay: beta >= 0, an L2 penalty; 0 turns it off.
        eta: Trust coefficient while M is measured, >= 0.
        eta_after: Trust coefficient afterwards, >= 0.
        cap: Upper bound of s while M is measured, > 0.
        eps: Added to |d| and M, >= 0.
        measured_steps: Steps during which M is measured, >= 0; None for all.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        eta: float = 1e-2,
        eta_after: float = 1e-3,
        cap: float = 0.1,
        eps: float = 1e-6,
        measured_steps: int | None = None,
        decay_1d: bool = True,
        adapt_1d: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, eta_after=eta_after, cap=cap, eps=eps,
            measured_steps=measured_steps, decay_1d=decay_1d, adapt_1d=adapt_1d,
        )  # fmt: skip
