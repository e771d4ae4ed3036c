"""LAMB (You et al. 2020, arXiv 1904.00962) and LAMBC (Fong et al. 2020), which clips LAMB's trust ratio."""

from typing import Any, Literal, get_args

import torch

from ssl_bench.optim.kernels import Kernels, Norms
from ssl_bench.optim.layerwise import (
    LayerStats,
    LayerwiseOptimizer,
    Ratio,
    check_betas,
    check_choice,
    check_range,
    layer_stats,
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
        fused: torch's fused kernels, on the CPU by cache blocks: None where they can serve, True to insist, False: off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("exp_avg", "exp_avg_sq", "step")
    replayable = True

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

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_range(self.component, name, group[name])
        check_betas(self.component, group["betas"])
        for name in ("norm_bounds", "ratio_bounds"):
            bounds = group[name]
            if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
                raise ValueError(f"{self.component}: {name} must be None or (lo, hi) with 0 <= lo < hi, got {bounds!r}")
        check_choice(self.component, "trust_ratio", group["trust_ratio"], get_args(TrustRatio))

    def _update(self, group: dict[str, Any], kernels: Kernels) -> LayerStats | None:
        adapt = (
            group["adapt"]
            and group["trust_ratio"] == "norms"
            and (group["adapt_without_decay"] or group["weight_decay"] != 0)
        )
        torch._foreach_add_(kernels.state["step"], 1.0)
        norm, u = kernels.adam_(group, want_norms=adapt or self.recording, want_g=self.recording)
        ratio = trust_ratio(norm, group["norm_bounds"], group["ratio_bounds"]) if adapt else None
        # lr meets a tensor before the sign: torch 2.11 compiles anew for each -lr.
        lr = (torch.ones_like(norm.w) if ratio is None else ratio.q) * kernels.scalar(group["lr"])
        kernels.add_(u, -lr)
        return layer_stats(kernels.params, norm, ratio, None, lr, lr * norm.d) if self.recording else None


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
        fused: torch's fused kernels, on the CPU by cache blocks: None where they can serve, True to insist, False: off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    replayable = True

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
    norm: Norms, norm_bounds: tuple[float, float] | None, ratio_bounds: tuple[float, float] | None
) -> Ratio:
    """LAMB's ratio of each tensor: clamp(|w|) / |u|, or 1 where either is 0; the one place where LAMB has its formula.

    Args:
        norm: |w|, |g| and |u|, each (K,).
        norm_bounds, ratio_bounds: as in `LAMB`; a lower bound above 0 lets a zero tensor move.
    """
    top = norm.w if norm_bounds is None else norm.w.clamp(*norm_bounds)
    hit = (top == 0) | (norm.d == 0)
    raw = top / norm.d
    r = torch.where(hit, 1.0, raw)
    return Ratio(raw, r if ratio_bounds is None else r.clamp(*ratio_bounds), hit)
