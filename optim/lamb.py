"""LAMB (You et al. 2020, arXiv 1904.00962) and LAMBC (Fong et al. 2020), which clips LAMB's trust ratio."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssl_bench.optim import blocked
from ssl_bench.optim.layerwise import (
    Bucket,
    LayerStats,
    LayerwiseOptimizer,
    check_choice,
    check_range,
    nan_like,
    norms,
)

TrustRatio = Literal["norms", "one"]


class LAMB(LayerwiseOptimizer):
    """LAMB: Adam whose step on each tensor is scaled by |w| / |u|.

    m, v as Adam's; u = m / (sqrt(v) + eps) + beta w; r = clamp(|w|, lo, hi) / |u|, 1 if either is 0; w -= lr r u.
    There is no hidden gradient clipping. Tensors that are not adapted have r = 1.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor.
        betas: Decay rates of m and v, each in [0, 1).
        eps: Added to sqrt(v), >= 0.
        weight_decay: beta >= 0, part of u; 0 turns it off.
        bias_correction: Adam's bias correction of m and v (timm, NVIDIA); False as in the paper's third version,
            torch-optimizer and the TVLARS authors' code.
        norm_bounds: Bounds (lo, hi) of |w| in the ratio, 0 <= lo < hi (torch-optimizer has (0, 10)); None turns them
            off.
        ratio_bounds: Bounds (lo, hi) of the ratio itself (LAMBC), 0 <= lo < hi; None turns them off.
        trust_ratio: "norms", or "one" for r = 1 everywhere: the TVLARS authors' Barlow Twins code (commit 89c3291),
            with bias_correction=False Adam without bias correction.
        adapt_without_decay: Whether groups with weight_decay 0 are adapted; False as in timm.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.
        foreach: False: one tensor after another, which needs less memory. None or True: multi-tensor operations.
        fused: The cache-blocked CPU path: None where it can serve, True to insist, False to turn it off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("exp_avg", "exp_avg_sq", "step")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 5e-4,
        bias_correction: bool = True,
        norm_bounds: tuple[float, float] | None = None,
        ratio_bounds: tuple[float, float] | None = None,
        trust_ratio: TrustRatio = "norms",
        adapt_without_decay: bool = True,
        decay_1d: bool = False,
        adapt_1d: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction,
            "norm_bounds": norm_bounds, "ratio_bounds": ratio_bounds, "trust_ratio": trust_ratio,
            "adapt_without_decay": adapt_without_decay, "decay_1d": decay_1d, "adapt_1d": adapt_1d, "foreach": foreach,
            "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._scratch: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = None

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_range(self.component, name, group[name])
        if len(group["betas"]) != 2:
            raise ValueError(f"{self.component}: betas must be two numbers in [0, 1), got {group['betas']!r}")
        for i, beta in enumerate(group["betas"]):
            check_range(self.component, f"betas[{i}]", beta, 0.0, 1.0)
        for name in ("norm_bounds", "ratio_bounds"):
            bounds = group[name]
            if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
                raise ValueError(f"{self.component}: {name} must be None or (lo, hi) with 0 <= lo < hi, got {bounds!r}")
        check_choice(self.component, "trust_ratio", group["trust_ratio"], get_args(TrustRatio))

    def _update(self, group: dict[str, Any], chunk: Bucket, *, fused: bool) -> LayerStats | None:
        adapt = (
            group["adapt"]
            and group["trust_ratio"] == "norms"
            and (group["adapt_without_decay"] or group["weight_decay"] != 0)
        )
        torch._foreach_add_(chunk.state["step"], 1.0)
        direction = self._blocked_direction if fused else _foreach_direction
        w_norm, g_norm, u_norm, u = direction(group, chunk, self.recording, adapt)
        lr = float(group["lr"]) if fused else group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(w_norm.device)
        if adapt:
            raw, r, hit = trust_ratio(w_norm, u_norm, group["norm_bounds"], group["ratio_bounds"])
        else:
            raw, r, hit = nan_like(w_norm), torch.ones_like(w_norm), torch.zeros_like(w_norm, dtype=torch.bool)
        lrs = r * lr  # the number times a tensor before anything else: torch 2.11 compiles anew for each -lr
        scales = -lrs
        if isinstance(u, Tensor):
            blocked.scaled_add_(chunk.params, u, scales.tolist())
        else:
            torch._foreach_addcmul_(chunk.params, u, list(scales.to(chunk.params[0].dtype).unbind()))
        if not self.recording:
            return None
        ratio = r if adapt else nan_like(r)
        return LayerStats(
            chunk.params, w_norm, g_norm, u_norm, raw, ratio, nan_like(r), lrs, lrs * u_norm, hit
        )  # fmt: skip

    def _blocked_direction(
        self, group: dict[str, Any], chunk: Bucket, recording: bool, adapt: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """|w|, |g|, |u| (K,) and u, all tensors in one vector, on the CPU's cache-blocked path."""
        del adapt  # the norms cost nothing here
        size = sum(p.numel() for p in chunk.params)
        if self._scratch is None or self._scratch.numel() < size or self._scratch.dtype != chunk.params[0].dtype:
            self._scratch = torch.empty(size, dtype=chunk.params[0].dtype)
        steps = chunk.state["step"]
        if not group["bias_correction"]:
            steps = [torch.tensor(math.inf)] * len(steps)  # 1 - beta ** inf = 1
        w_norm, g_norm, u_norm = blocked.adam_direction_(
            chunk.params, chunk.grads, chunk.state["exp_avg"], chunk.state["exp_avg_sq"], steps, self._scratch,
            betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], want_grad_norms=recording,
        )  # fmt: skip
        return w_norm, g_norm, u_norm, self._scratch


class LAMBC(LAMB):
    """LAMBC (Fong et al. 2020): LAMB with the trust ratio clipped to [lower, upper].

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor.
        betas: Decay rates of m and v, each in [0, 1).
        eps: Added to sqrt(v), >= 0.
        weight_decay: beta >= 0, part of u; 0 turns it off.
        bias_correction: Adam's bias correction of m and v; False turns it off.
        norm_bounds: Bounds (lo, hi) of |w| in the ratio, 0 <= lo < hi; None turns them off.
        lower: Lower bound of the ratio, >= 0; 0 turns it off.
        upper: Upper bound of the ratio, > lower; 1 is the paper's best.
        adapt_without_decay: Whether groups with weight_decay 0 are adapted; False as in timm.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.
        foreach: False: one tensor after another, which needs less memory. None or True: multi-tensor operations.
        fused: The cache-blocked CPU path: None where it can serve, True to insist, False to turn it off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 5e-4,
        bias_correction: bool = True,
        norm_bounds: tuple[float, float] | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        adapt_without_decay: bool = True,
        decay_1d: bool = False,
        adapt_1d: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction,
            norm_bounds=norm_bounds, ratio_bounds=(lower, upper), adapt_without_decay=adapt_without_decay,
            decay_1d=decay_1d, adapt_1d=adapt_1d, foreach=foreach, fused=fused,
        )  # fmt: skip


def trust_ratio(
    w_norm: Tensor,
    u_norm: Tensor,
    norm_bounds: tuple[float, float] | None,
    ratio_bounds: tuple[float, float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LAMB's ratio of each tensor.

    Args:
        w_norm, u_norm: |w| and |u|, each (K,).
        norm_bounds, ratio_bounds: as in `LAMB`; a lower bound above 0 lets a zero tensor move.

    Returns:
        clamp(|w|) / |u|, the ratio that applies, and where a zero norm set it to 1 (bool); each (K,).
    """
    top = w_norm if norm_bounds is None else w_norm.clamp(*norm_bounds)
    hit = (top == 0) | (u_norm == 0)
    raw = top / u_norm
    r = torch.where(hit, 1.0, raw)
    return raw, r if ratio_bounds is None else r.clamp(*ratio_bounds), hit


def _foreach_direction(
    group: dict[str, Any], chunk: Bucket, recording: bool, adapt: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """|w|, |g|, |u| (K,; NaN where not wanted) and u of each tensor, by multi-tensor operations."""
    m, v, dtype = chunk.state["exp_avg"], chunk.state["exp_avg_sq"], chunk.params[0].dtype
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(m, chunk.grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, chunk.grads, chunk.grads, value=1 - beta2)
    bottom = torch._foreach_sqrt(v)
    t = torch.stack(chunk.state["step"]).to(dtype)
    if group["bias_correction"]:
        torch._foreach_div_(bottom, list(_bias_correction(beta2, t).sqrt().unbind()))
    torch._foreach_add_(bottom, group["eps"])
    u = torch._foreach_div(m, bottom)
    if group["bias_correction"]:
        torch._foreach_div_(u, list(_bias_correction(beta1, t).unbind()))
    if group["weight_decay"] != 0:
        torch._foreach_add_(u, chunk.params, alpha=group["weight_decay"])
    if not (adapt or recording):
        nan = nan_like(t)
        return nan, nan, nan, list(u)
    w_norm = norms(chunk.params)
    return w_norm, norms(chunk.grads) if recording else nan_like(w_norm), norms(u), list(u)


def _bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, without the cancellation that costs float32 four digits at beta = 0.999 and small t."""
    return torch.ones_like(t) if beta == 0 else -torch.expm1(t * math.log(beta))
