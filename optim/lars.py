"""LARS (You et al. 2017, arXiv 1708.03888) with every axis on which its public implementations differ."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssl_bench.optim import blocked
from ssl_bench.optim.layerwise import (
    Bucket,
    LayerStats,
    LayerwiseOptimizer,
    Scalar,
    Tensors,
    check_choice,
    check_range,
    nan_like,
    norms,
    scaled,
)

Denominator = Literal["norm_of_sum", "sum_of_norms"]
ZeroNorm = Literal["update", "gradient", "skip"]


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
            (bolts, lightly, torch-optimizer).
        adapt_without_decay: Whether groups with weight_decay 0 are adapted; False as in timm, lightly and bolts.
        norm_clamp: Upper bound on |w| and on the denominator, > 0 (the authors' TVLARS has 10); None turns it off.
        decay_1d: Whether tensors with ndim <= 1 (biases, norm scales) have weight decay.
        adapt_1d: Whether tensors with ndim <= 1 are adapted.
        foreach: False: one tensor after another, which needs less memory. None or True: multi-tensor operations.
        fused: The cache-blocked CPU path: None where it can serve, True to insist, False to turn it off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("momentum_buffer",)

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
            check_range(self.component, "norm_clamp", group["norm_clamp"], math.ulp(0.0))
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError(f"{self.component}: nesterov needs momentum > 0, got momentum=0")

    def _update(self, group: dict[str, Any], chunk: Bucket, *, fused: bool) -> LayerStats | None:
        rule = Rule(
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            eta=group["eta"],
            adapt=group["adapt"] and (group["adapt_without_decay"] or group["weight_decay"] != 0),
            denominator=group["denominator"],
            eps=group["eps"],
            lr_in_buffer=group["lr_in_buffer"],
            nesterov=group["nesterov"],
            clip=group["clip"],
            zero_norm=group["zero_norm"],
            norm_clamp=group["norm_clamp"],
        )
        return momentum_step(rule, chunk, None, fused=fused, recording=self.recording)


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

    @property
    def outside(self) -> Scalar:
        """What the momentum buffer is multiplied by."""
        return 1.0 if self.lr_in_buffer else self.lr


class Norms(NamedTuple):
    """Norms of K tensors, each (K,); those that were not wanted are NaN."""

    w: Tensor  # |w|
    g: Tensor  # |g|
    d: Tensor  # |g + beta w|


class Ratio(NamedTuple):
    """Trust ratios of K tensors, each (K,)."""

    raw: Tensor  # |w| over the denominator
    q: Tensor  # the factor on the gradient
    hit: Tensor  # bool: a zero norm set q to 1


def momentum_step(rule: Rule, chunk: Bucket, phi: Tensor | None, *, fused: bool, recording: bool) -> LayerStats | None:
    """One step of LARS or TVLARS on K tensors of one device and dtype.

    Args:
        rule: the group's settings.
        chunk: the tensors; parameters and "momentum_buffer" are changed, gradients are not.
        phi: (K,) factor on the ratio, or None.
        fused: whether the CPU's cache-blocked path serves.
        recording: whether statistics are wanted.

    Returns:
        The statistics, or None without `recording`.
    """
    first = chunk.params[0]
    if isinstance(rule.lr, Tensor):  # on the CPU's own path a tensor's value is at hand
        rule = rule._replace(lr=float(rule.lr) if fused else rule.lr.reshape(()).to(first.device))
    elif torch.compiler.is_compiling():
        # A number is an input of the graph only where it multiplies a tensor; as `alpha` it is a constant of it, and
        # every new learning rate would compile anew.
        rule = rule._replace(lr=torch.ones((), dtype=first.dtype, device=first.device) * rule.lr)
    norm, sums = _take_norms(rule, chunk, fused, recording)
    ratio = trust_ratio(rule, norm, phi) if rule.adapt and norm is not None else None
    # A skipped tensor has no decay either.
    bare = ratio.hit if ratio is not None and rule.zero_norm == "skip" and rule.weight_decay != 0 else None
    q = None if ratio is None else ratio.q
    if fused:
        step_norm = _blocked_update(rule, chunk, q, bare, recording)
    else:
        step_norm = _foreach_update(rule, chunk, sums, q, bare, recording)
    if norm is None or step_norm is None:
        return None
    nan = nan_like(norm.w)
    if ratio is None:
        ratio = Ratio(nan, nan, torch.zeros_like(nan, dtype=torch.bool))
    lr = rule.lr * (torch.ones_like(nan) if q is None else q)
    phi = nan if phi is None else phi
    return LayerStats(chunk.params, *norm, ratio.raw, ratio.q, phi, lr, step_norm, ratio.hit)


def trust_ratio(rule: Rule, norm: Norms, phi: Tensor | None) -> Ratio:
    """The factor on each tensor's gradient from its norms.

    Args:
        rule: the group's settings.
        norm: the tensors' norms, each (K,).
        phi: TVLARS's time-varying factor (K,), or None.

    Returns:
        The raw ratios, q and the zero-norm hits, each (K,).
    """
    bottom = norm.d if rule.denominator == "norm_of_sum" else norm.g + rule.weight_decay * norm.w
    hit = (norm.w == 0) | ((bottom if rule.zero_norm == "update" else norm.g) == 0)
    top = norm.w
    if rule.norm_clamp is not None:
        top, bottom = top.clamp(max=rule.norm_clamp), bottom.clamp(max=rule.norm_clamp)
    raw = top / (bottom + rule.eps)
    q = torch.where(hit, 1.0, rule.eta * raw if phi is None else rule.eta * phi * raw)
    if rule.clip:
        q = torch.where(q < rule.lr, q / rule.lr, 1.0)
    return Ratio(raw, q, hit)


def _take_norms(rule: Rule, chunk: Bucket, fused: bool, recording: bool) -> tuple[Norms | None, Tensors]:
    """The norms that the settings or the recording need (None for none), and g + beta w off the CPU's own path."""
    params, grads, decay = chunk.params, chunk.grads, rule.weight_decay
    by_sum = rule.denominator == "norm_of_sum"
    needs_g = recording or (rule.adapt and (not by_sum or rule.zero_norm != "update"))
    needs_d = recording or (rule.adapt and by_sum)
    if fused:
        if not (needs_g or needs_d):
            return None, grads
        return Norms(*blocked.layer_norms(params, grads, decay)), grads
    sums: Tensors = grads
    if decay != 0 and (needs_d or rule.decay_in_update):
        sums = torch._foreach_add(grads, params, alpha=decay)
    if not (needs_g or needs_d):
        return None, sums
    w = norms(params)
    g = norms(grads) if needs_g or decay == 0 else nan_like(w)
    d = g if decay == 0 else norms(sums) if needs_d else nan_like(w)
    return Norms(w, g, d), sums


def _blocked_update(rule: Rule, chunk: Bucket, q: Tensor | None, bare: Tensor | None, recording: bool) -> Tensor | None:
    """The update on the CPU; returns |w_new - w| (K,) if recording."""
    size = len(chunk.params)
    inside = float(rule.lr) if rule.lr_in_buffer else 1.0
    decay = rule.weight_decay if rule.decay_in_update else 0.0
    return blocked.momentum_update_(
        chunk.params,
        chunk.grads,
        chunk.state["momentum_buffer"],
        factors=[inside] * size if q is None else [inside * a for a in q.tolist()],
        decays=[decay] * size if bare is None else [0.0 if b else decay for b in bare.tolist()],
        momentum=rule.momentum,
        lr=float(rule.outside),
        nesterov=rule.nesterov,
        want_norms=recording,
    )


def _foreach_update(
    rule: Rule, chunk: Bucket, sums: Tensors, q: Tensor | None, bare: Tensor | None, recording: bool
) -> Tensor | None:
    """The update by multi-tensor operations, without host synchronisation; returns |w_new - w| (K,) if recording."""
    params, buffers, dtype = chunk.params, chunk.state["momentum_buffer"], chunk.params[0].dtype
    d: Tensors = chunk.grads
    if rule.decay_in_update:
        d = sums
        if bare is not None:
            # Exact: a hit has w = 0 or g = 0, and so g + beta w - beta w = g.
            off = bare.to(dtype) * -rule.weight_decay
            d = torch._foreach_add(d, torch._foreach_mul(params, off.unbind()))
    if q is not None:
        factor = q * rule.lr if rule.lr_in_buffer else q
        d = torch._foreach_mul(d, factor.to(dtype).unbind())
    elif rule.lr_in_buffer:
        d = scaled(d, rule.lr)
    torch._foreach_mul_(buffers, rule.momentum)
    torch._foreach_add_(buffers, d)
    update: Tensors = torch._foreach_add(d, buffers, alpha=rule.momentum) if rule.nesterov else buffers
    if isinstance(rule.outside, Tensor):
        torch._foreach_sub_(params, scaled(update, rule.outside))
    else:
        torch._foreach_add_(params, update, alpha=-rule.outside)
    return norms(update) * rule.outside if recording else None
