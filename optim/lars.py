"""LARS (You et al. 2017, arXiv 1708.03888) with every axis on which its public implementations differ."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssl_bench.optim.kernels import Kernels, Momentum, Norms, Scalar
from ssl_bench.optim.layerwise import (
    LayerStats,
    LayerwiseOptimizer,
    Ratio,
    check_choice,
    check_nesterov,
    check_range,
    layer_stats,
)

Denominator = Literal["norm_of_sum", "sum_of_norms"]
ZeroNorm = Literal["update", "gradient", "skip", "literal"]
BY_DENOMINATOR = ("update", "literal")  # a hit is |w| or the denominator, not |w| or |g|


class LARS(LayerwiseOptimizer):
    """LARS: momentum SGD whose step on each tensor is scaled by eta |w| / |g + beta w|.

    d = g + beta w;  q = eta |w| / |d|;  b = mu b + q d;  w -= lr b.  Tensors that are not adapted have q = 1. The
    defaults are the rule of the official Barlow Twins and VICReg code.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor.
        momentum: mu in [0, 1); 0 turns momentum off.
        weight_decay: beta >= 0, an L2 penalty; 0 turns it off.
        eta: Trust coefficient >= 0 (1e-3 in the papers).
        denominator: "norm_of_sum" |g + beta w| (Barlow Twins, SimCLR, optax) or "sum_of_norms" |g| + beta |w|
            (You 2017, MLPerf, timm, lightly, bolts).
        eps: Added to the denominator, >= 0; 0 turns it off (timm and lightly have 1e-8).
        lr_in_buffer: False: w -= lr b. True: the learning rate enters the momentum buffer (You 2017, SimCLR, MLPerf,
            optax); another optimizer while the learning rate changes.
        nesterov: Nesterov's momentum as torch's SGD has it; False turns it off.
        clip: LARC's clip: q is at most the learning rate, min(q / lr, 1) x lr in all; False turns it off.
        zero_norm: What happens where a norm is zero. "update": q = 1 if |w| or the denominator is 0 (Barlow Twins,
            SimCLR, optax). "gradient": q = 1 if |w| or |g| is 0 (MLPerf, timm). "skip": the same, and no decay either
            (bolts, lightly, torch-optimizer). "literal": q = 0 where "update" has 1, as the formula says for |w| = 0,
            so that a tensor which starts at zero stays there.
        adapt_without_decay: Whether groups with weight_decay 0 are adapted; False as in timm, lightly and bolts.
        norm_clamp: Upper bound on |w| and on the denominator, > 0 (the authors' TVLARS has 10); None turns it off.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.
        foreach: False: one tensor after another, which needs less memory. None or True: multi-tensor operations.
        fused: torch's fused kernels, on the CPU by cache blocks: None where they can serve, True to insist, False: off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("momentum_buffer",)
    replayable = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        eta: float = 1e-3,
        denominator: Denominator = "norm_of_sum",
        eps: float = 0.0,
        lr_in_buffer: bool = False,
        nesterov: bool = False,
        clip: bool = False,
        zero_norm: ZeroNorm = "update",
        adapt_without_decay: bool = True,
        norm_clamp: float | None = None,
        decay_1d: bool = False,
        adapt_1d: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "denominator": denominator,
            "eps": eps, "lr_in_buffer": lr_in_buffer, "nesterov": nesterov, "clip": clip, "zero_norm": zero_norm,
            "adapt_without_decay": adapt_without_decay, "norm_clamp": norm_clamp, "decay_1d": decay_1d,
            "adapt_1d": adapt_1d, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eta", "eps"):
            check_range(self.component, name, group[name])
        check_range(self.component, "momentum", group["momentum"], 0.0, 1.0)
        check_choice(self.component, "denominator", group["denominator"], get_args(Denominator))
        check_choice(self.component, "zero_norm", group["zero_norm"], get_args(ZeroNorm))
        if group["norm_clamp"] is not None:
            check_range(self.component, "norm_clamp", group["norm_clamp"], above=True)
        check_nesterov(self.component, group["momentum"], group["nesterov"])

    def _update(self, group: dict[str, Any], kernels: Kernels) -> LayerStats | None:
        adapt = group["adapt"] and (group["adapt_without_decay"] or group["weight_decay"] != 0)
        return momentum_step(Rule.of(group, adapt=adapt), kernels, None, self.recording)


class Rule(NamedTuple):
    """One group's momentum SGD with trust ratios: LARS's keywords as they hold for the group."""

    lr: Scalar
    momentum: float
    weight_decay: float
    eta: float
    adapt: bool  # whether the group's tensors are scaled by their norms at all
    denominator: Denominator = "norm_of_sum"
    eps: float = 0.0
    lr_in_buffer: bool = False
    nesterov: bool = False
    clip: bool = False
    zero_norm: ZeroNorm = "update"
    norm_clamp: float | None = None
    decay_in_update: bool = True  # False: beta w is part of the norm only (TVLARS's Algorithm 1)

    @classmethod
    def of(cls, group: dict[str, Any], **resolved: Any) -> "Rule":
        """The group's settings, and those that its optimizer resolves itself."""
        return cls(**({name: group[name] for name in cls._fields if name in group} | resolved))


def trust_ratio(rule: Rule, norm: Norms, phi: Tensor | None) -> Ratio:
    """The factor on each tensor's gradient from its norms; the one place where LARS and TVLARS have their formula.

    Args:
        rule: the group's settings.
        norm: the tensors' norms, each (K,).
        phi: TVLARS's time-varying factor (K,), or None.

    Returns:
        The raw ratios, q and the zero-norm hits, each (K,).
    """
    bottom = norm.d if rule.denominator == "norm_of_sum" else norm.g + rule.weight_decay * norm.w
    hit = (norm.w == 0) | ((bottom if rule.zero_norm in BY_DENOMINATOR else norm.g) == 0)
    top = norm.w
    if rule.norm_clamp is not None:
        top, bottom = top.clamp(max=rule.norm_clamp), bottom.clamp(max=rule.norm_clamp)
    raw = top / (bottom + rule.eps)
    at_zero = 0.0 if rule.zero_norm == "literal" else 1.0
    q = torch.where(hit, at_zero, rule.eta * raw if phi is None else rule.eta * phi * raw)
    if rule.clip:
        q = torch.where(q < rule.lr, q / rule.lr, 1.0)
    return Ratio(raw, q, hit)


def momentum_step(rule: Rule, kernels: Kernels, phi: Tensor | None, recording: bool) -> LayerStats | None:
    """One step of LARS or TVLARS on K tensors of one device and dtype.

    Args:
        rule: the group's settings.
        kernels: the tensors; parameters and "momentum_buffer" are changed, gradients are not.
        phi: (K,) factor on the ratio, or None.
        recording: whether statistics are wanted.

    Returns:
        The statistics, or None without `recording`.
    """
    rule = rule._replace(lr=kernels.scalar(rule.lr))
    by_sum = rule.denominator == "norm_of_sum"
    # Each norm is a pass over memory on a GPU: only what the ratio or the recording needs.
    want_g = recording or (rule.adapt and not (by_sum and rule.zero_norm in BY_DENOMINATOR))
    want_d = recording or (rule.adapt and by_sum)
    norm = kernels.norms(rule.weight_decay, want_g=want_g, want_d=want_d) if want_g or want_d else None
    ratio = trust_ratio(rule, norm, phi) if rule.adapt and norm is not None else None
    factor: Scalar | None = None if ratio is None else ratio.q
    if rule.lr_in_buffer:
        factor = rule.lr if factor is None else factor * rule.lr
    outside = 1.0 if rule.lr_in_buffer else rule.lr
    decay = rule.weight_decay if rule.decay_in_update else 0.0
    bare = ratio.hit if ratio is not None and rule.zero_norm == "skip" else None
    sgd = Momentum(outside, rule.momentum, decay, rule.nesterov)
    step_norm = kernels.momentum_(sgd, factor, bare, want_norm=recording)
    if norm is None or step_norm is None:
        return None
    lr = rule.lr * (torch.ones_like(norm.w) if ratio is None else ratio.q)
    return layer_stats(kernels.params, norm, ratio, phi, lr, step_norm)
