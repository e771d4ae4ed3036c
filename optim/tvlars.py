"""TVLARS (Do et al., "Revisiting LARS for Large Batch Training Generalization of Neural Networks", 2023), all of it.

`variant="paper"` is Algorithm 1 of the text (preprint of 25 September 2023). The others are the authors' code, GitHub
KhoiDOO/tvlars, opt/tvlars.py: "2023-07" at commit d52d3bd (24 July), "2023-08" at 10bcfd2 (17 August), "released" at
89c3291 (20 November, after the published table). They differ in phi, the norms, the decay and the momentum.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssl_bench.optim.kernels import Blocked, Kernels
from ssl_bench.optim.lars import Rule, ZeroNorm, momentum_step
from ssl_bench.optim.layerwise import LayerStats, LayerwiseOptimizer, check_choice, check_range

Variant = Literal["paper", "released", "2023-08", "2023-07"]


class Own(NamedTuple):
    """What a variant has where the caller says nothing."""

    decay: float  # lambda
    alpha: float
    norm_clamp: float | None


OWN = {
    "paper": Own(1e-4, 1.0, None),
    "released": Own(1e-3, 0.1, 10.0),
    "2023-08": Own(1e-3, 0.1, 10.0),
    "2023-07": Own(1e-3, 0.0, None),
}


def phi(
    t: Tensor | float, *, decay: float, delay_steps: float, alpha: float, gamma_min: float, time_unit_steps: float = 1.0
) -> Tensor:
    """The time-varying factor 1 / (alpha + exp(lambda (t - d_e))) + gamma_min (Algorithm 1).

    Args:
        t: steps done so far, >= 0; any shape.
        decay: lambda per time unit.
        delay_steps: d_e in steps.
        alpha: limits the factor to 1 / alpha.
        gamma_min: the factor's limit for large t.
        time_unit_steps: length of lambda's time unit in steps.

    Returns:
        The factor, in t's shape and dtype (float64 for a number).
    """
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    limit = math.log(torch.finfo(t.dtype).max) - 1.0  # 87.7 in float32, past which exp overflows
    exponent = ((t - delay_steps) * (decay / time_unit_steps)).clamp(max=limit)
    return 1.0 / (alpha + exponent.exp()) + gamma_min


class TVLARS(LayerwiseOptimizer):
    """TVLARS: LARS with a time-varying factor phi(t) in place of a warm-up.

    variant="paper": gamma_t = lr eta phi |w| / |g + beta w|; b = mu b + gamma_t g; w -= gamma_t g + mu b (Algorithm 1
    in the cheaper, equal form). The decay enters the norm only, and no tensor is excluded.
    variant="released": d = g + beta w; q = eta phi min(|w|, 10) / min(|d|, 10), phi = 1 / (0.1 + exp(lambda (t + 1)));
    b = mu b + q d; w -= lr b; 1-d tensors: no decay, q = 1.
    variant="2023-08": the same, but phi = 1 for the first d_e steps. variant="2023-07": the same with
    phi = exp(-lambda (t + 1)) and norms that are not clamped.
    Where a norm is zero, "paper" has gamma_t = 0: Algorithm 1 divides nothing by |w|, so a tensor that starts at zero
    stays there; the others have q = 1, without eta and phi. phi is a function of the step counter in the state, so it
    survives a checkpoint and does not advance when a gradient scaler skips a step.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; a group may set "adapt" (bool) and any keyword below.
        lr: Learning rate, a number >= 0 or a one-element tensor; 1 is the paper's text read literally.
        momentum: mu in (0, 1).
        weight_decay: beta >= 0; 0 turns it off.
        eta: Trust coefficient >= 0.
        decay: lambda >= 0, how fast phi falls, per time unit; None for the variant's own, 1e-4 (paper, Table 1 for
            classification; Barlow Twins has 1e-5) or 1e-3 (the code); 0 keeps phi constant.
        delay_steps: d_e in steps, >= 0 (10 epochs in the paper and in "2023-08"); 0 for no delay, as in the other
            variants.
        alpha: Limits phi to 1 / alpha, >= 0; None for the variant's own: 1 (paper), 0.1 (released, 2023-08) or 0
            (2023-07).
        gamma_min: Lower limit of phi, >= 0; 0 turns it off. In variant="paper" only.
        variant: "paper", "released", "2023-08" or "2023-07".
        time_unit_steps: Length of lambda's time unit in steps, > 0: 1 counts steps, the steps per epoch count epochs.
        zero_norm: As in LARS: "update", "gradient", "skip" or "literal"; None for the variant's own, "literal" (paper)
            or "update" (the code).
        decay_1d: Whether 1-d tensors have weight decay; None for the variant's own, yes (paper) or no (the code).
        adapt_1d: Whether 1-d tensors are adapted; None for the variant's own, yes (paper) or no (the code).
        foreach: False: one tensor after another, which needs less memory. None or True: multi-tensor operations.
        fused: torch's fused kernels, on the CPU by cache blocks: None where they can serve, True to insist, False: off.

    Raises:
        ValueError: for a value out of range, or a parameter twice, sharded, sparse, complex or integer.
    """

    STATE = ("momentum_buffer", "step")
    replayable = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        eta: float = 1e-3,
        decay: float | None = None,
        delay_steps: float = 0.0,
        alpha: float | None = None,
        gamma_min: float = 0.0,
        variant: Variant = "paper",
        time_unit_steps: float = 1.0,
        zero_norm: ZeroNorm | None = None,
        decay_1d: bool | None = None,
        adapt_1d: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_choice(self.component, "variant", variant, get_args(Variant))
        paper = variant == "paper"
        zero_norm = self.resolve_options({"variant": variant, "zero_norm": zero_norm})["zero_norm"]
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta,
            "decay": OWN[variant].decay if decay is None else decay,
            "delay_steps": delay_steps, "alpha": OWN[variant].alpha if alpha is None else alpha,
            "gamma_min": gamma_min, "variant": variant, "time_unit_steps": time_unit_steps, "zero_norm": zero_norm,
            "decay_1d": paper if decay_1d is None else decay_1d, "adapt_1d": paper if adapt_1d is None else adapt_1d,
            "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    @staticmethod
    def resolve_options(options: dict[str, Any]) -> dict[str, Any]:
        """The keywords with `zero_norm` in words, as a run's record has it."""
        own = "literal" if options["variant"] == "paper" else "update"
        return options | {"zero_norm": own if options["zero_norm"] is None else options["zero_norm"]}

    def _is_1d(self, param: Tensor) -> bool:
        # The authors' code tests ndim == 1, so it decays and adapts a 0-d tensor.
        return super()._is_1d(param) if self.defaults["variant"] == "paper" else param.ndim == 1

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eta", "decay", "delay_steps", "alpha", "gamma_min"):
            check_range(self.component, name, group[name])
        check_range(self.component, "time_unit_steps", group["time_unit_steps"], above=True)
        check_range(self.component, "momentum", group["momentum"], 0.0, 1.0, above=True)
        check_choice(self.component, "variant", group["variant"], get_args(Variant))
        check_choice(self.component, "zero_norm", group["zero_norm"], get_args(ZeroNorm))
        absent = {"paper": (), "2023-08": ("gamma_min",)}.get(group["variant"], ("delay_steps", "gamma_min"))
        for name in absent:
            if group[name] != 0:
                variant = group["variant"]
                raise ValueError(f"{self.component}: {name} must be 0 with variant={variant!r}, got {group[name]!r}")

    def _update(self, group: dict[str, Any], kernels: Kernels) -> LayerStats | None:
        variant = group["variant"]
        paper = variant == "paper"
        steps = kernels.state["step"]
        t = torch.stack(steps).to(torch.float64 if isinstance(kernels, Blocked) else kernels.params[0].dtype)
        settings = {name: group[name] for name in ("decay", "alpha", "gamma_min", "time_unit_steps")}
        if paper:
            factor = phi(t, delay_steps=group["delay_steps"], **settings)
        else:
            factor = phi(t + 1, delay_steps=0.0, **settings)  # the code counts before it uses t
            if variant == "2023-08":
                factor = torch.where(t < group["delay_steps"], 1.0, factor)
        torch._foreach_add_(steps, 1.0)
        rule = Rule.of(
            group,
            denominator="norm_of_sum",
            eps=0.0,
            clip=False,
            lr_in_buffer=paper,
            nesterov=paper,
            norm_clamp=OWN[variant].norm_clamp,
            decay_in_update=not paper,
        )
        return momentum_step(rule, kernels, factor, self.recording)
