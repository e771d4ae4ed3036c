"""What LARS, LAMB and TVLARS share: checks, parameter groups, the walk over a step's chunks, layer statistics."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssl_bench.optim.kernels import (
    LOW_PRECISION,
    Blocked,
    Bucket,
    Fused,
    Kernels,
    Norms,
    chunks,
    nan_like,
    split_by_kind,
)


class Ratio(NamedTuple):
    """Trust ratios of K tensors, each (K,)."""

    raw: Tensor  # |w| over the denominator
    q: Tensor  # the factor on the gradient
    hit: Tensor  # bool: a zero norm set q to 1, or to 0 (LARS's zero_norm)


class LayerStats(NamedTuple):
    """What one step saw and did in one chunk of K tensors; each entry a (K,) tensor on the parameters' device."""

    params: list[Tensor]
    weight_norm: Tensor  # |w| before the step
    grad_norm: Tensor  # |g|
    update_norm: Tensor  # |g + beta w|, for LAMB |u|
    raw_ratio: Tensor  # |w| over the denominator, no eta, phi or clip; NaN where the tensor is not adapted
    ratio: Tensor  # the factor that was applied, eta, phi and clip included; NaN where the tensor is not adapted
    phi: Tensor  # the time-varying factor; NaN where the optimizer has none
    lr: Tensor  # what the gradient is multiplied by before momentum: lr x ratio
    step_norm: Tensor  # |w_new - w|
    zero_norm: Tensor  # bool: a zero norm replaced the ratio


def layer_stats(
    params: list[Tensor], norm: Norms, ratio: Ratio | None, phi: Tensor | None, lr: Tensor, step_norm: Tensor
) -> LayerStats:
    """The statistics of K tensors, which are not adapted where `ratio` is None."""
    nan = nan_like(norm.w)
    raw, q, hit = ratio or Ratio(nan, nan, torch.zeros_like(nan, dtype=torch.bool))
    return LayerStats(params, *norm, raw, q, nan if phi is None else phi, lr, step_norm, hit)


def check_range(
    component: str, name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """Refuse (ValueError) anything but a number in [low, high), or in (low, high) with `above`.

    A one-element tensor passes, because reading its value would wait for the device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{component}: {name} must be a number or a one-element tensor, got {value.numel()} elements"
            )
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value < high or (above and value == low):
        allowed = f"{'(' if above else '['}{low:g}, {high:g})"
        raise ValueError(f"{component}: {name} must be a number in {allowed}, got {value!r}")


def check_choice(component: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse (ValueError) a name that is not in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{component}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_betas(component: str, betas: Sequence[Any], count: int = 2) -> None:
    """Refuse (ValueError) anything but so many decay rates in [0, 1)."""
    if len(betas) != count:
        raise ValueError(f"{component}: betas must be {count} numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        check_range(component, f"betas[{i}]", beta, 0.0, 1.0)


def check_nesterov(component: str, momentum: float, nesterov: bool) -> None:
    """Refuse (ValueError) Nesterov's look-ahead without momentum."""
    if nesterov and momentum == 0:
        raise ValueError(f"{component}: momentum must be > 0 with nesterov=True, got {momentum!r}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor holds only this process's part of a parameter (DTensor, FSDP), so that its norm is partial."""
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return True
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only where its module has been imported
    return module is not None and isinstance(tensor, module.DTensor)


def is_replayable(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph can hold its step: no number but each group's lr changes from step to step on the host.

    Said by ``replayable`` of the object or of its own class; a subclass may count steps, so it has to say so itself.
    """
    return bool(vars(optimizer).get("replayable", vars(type(optimizer)).get("replayable", False)))


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that scale each tensor's step by its norms.

    A subclass names its per-parameter state in `STATE`, checks a group's settings in `_check_group` and has its rule
    in `_update`. The base splits the groups, creates state, refuses what has no layer-wise norm, and walks over the
    chunks.
    """

    STATE: tuple[str, ...] = ()
    SCALARS: tuple[str, ...] = ("step",)  # those of the state that are one number for a tensor
    recording = False  # set by Telemetry for the steps whose statistics it wants
    layer_stats: Sequence[LayerStats] = ()  # of the last recorded step

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # `capturable` makes load_state_dict keep "step" in float32 on the parameter's device whatever the
        # parameter's dtype; the counters always live there, so that no step needs the host.
        super().__init__(params, {"adapt": True, "capturable": True} | defaults)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}

    @property
    def component(self) -> str:
        """The name that error messages begin with."""
        return type(self).__name__

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range. `group` holds every keyword, the group's own over the defaults."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], kernels: Kernels) -> LayerStats | None:
        """Update a chunk's parameters and state in place; return statistics if `self.recording`."""
        raise NotImplementedError

    def _is_1d(self, param: Tensor) -> bool:
        """Whether the tensor is a bias or a norm's scale, left out of decay and adaptation by default."""
        return param.ndim <= 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those with ndim <= 1 go to a group of their own without decay and adaptation.

        A group that sets "adapt" or "weight_decay" itself keeps that value for all of its tensors.

        Args:
            param_group: "params" (tensors, or (name, tensor) pairs) and any settings that differ from the defaults.

        Raises:
            ValueError: a parameter twice, sharded, sparse or not real floating point; a setting out of range.
        """
        group = dict(param_group)
        items: Any = group.pop("params")
        if isinstance(items, Tensor):
            items = [items]
        if isinstance(items, set):
            raise TypeError(f"{self.component}: params must be ordered, got a set")
        items = list(zip(group.pop("param_names"), items, strict=True)) if "param_names" in group else list(items)
        tensors = [item[1] if isinstance(item, tuple) else item for item in items]
        for tensor in tensors:
            if isinstance(tensor, Tensor):  # torch refuses anything else
                self._check_param(tensor)
        if len({id(t) for t in tensors}) != len(tensors):
            raise ValueError(f"{self.component}: params must hold each parameter once, got one of them more than once")
        self._check_group(self.defaults | group)
        special: dict[str, Any] = {}  # what holds for 1-d tensors where the group does not say otherwise
        if not self.defaults["adapt_1d"]:
            special["adapt"] = False
        if not self.defaults["decay_1d"]:
            special["weight_decay"] = 0.0
        apart = [not special.keys() <= group.keys() and isinstance(t, Tensor) and self._is_1d(t) for t in tensors]
        for part, extra in ((False, {}), (True, special)):
            chosen = [item for item, flag in zip(items, apart, strict=True) if flag is part]
            if chosen or (not items and not part):  # torch takes an empty group
                super().add_param_group(extra | group | {"params": chosen})

    def _check_param(self, param: Tensor) -> None:
        """Refuse parameters whose layer-wise norm this process cannot take."""
        if is_sharded(param):
            raise ValueError(
                f"{self.component}: params must be whole (DistributedDataParallel), got a {type(param).__name__} that "
                "is sharded: its local norm is not the layer's"
            )
        if not param.is_floating_point():
            raise ValueError(f"{self.component}: params must be real floating-point tensors, got {param.dtype}")
        if param.layout != torch.strided:
            raise ValueError(f"{self.component}: params must be dense tensors, got layout {param.layout}")

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *state: list[Tensor]
    ) -> bool:
        """Collect the group's parameters that have a gradient, create missing state (the name is Dynamo's)."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise ValueError(f"{self.component}: gradients must be dense, got layout {param.grad.layout}")
            if is_sharded(param.grad):
                raise ValueError(f"{self.component}: gradients must be whole, got a sharded one")
            entries = self.state[param]
            for name, values in zip(self.STATE, state, strict=True):
                if name not in entries:
                    if name in self.SCALARS:
                        entries[name] = torch.zeros((), dtype=torch.float32, device=param.device)
                    else:
                        entries[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
                values.append(entries[name])
            params.append(param)
            grads.append(param.grad)
        return False  # no complex parameters

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; `p.grad` is not changed.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's value, or None without one.

        Raises:
            ValueError: for a sparse or sharded gradient, or `fused=True` where the fused path cannot serve.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stats: list[LayerStats | None] = []
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            state: list[list[Tensor]] = [[] for _ in self.STATE]
            self._init_group(group, params, grads, *state)
            for bucket in split_by_kind(Bucket(params, grads, dict(zip(self.STATE, state, strict=True)))):
                fused = None
                if group["fused"] is not False:
                    fused = next((kind for kind in (Blocked, Fused) if kind.serves(bucket)), None)
                if group["fused"] and fused is None:
                    raise ValueError(
                        f"{self.component}: fused must be None (where it can serve) or False here, got True, which "
                        "needs dense float32 or float64 parameters on the CPU or a GPU, gradients laid out alike, and "
                        "no torch.compile"
                    )
                for chunk in chunks(bucket, foreach=group["foreach"] is not False):
                    if fused is not None:
                        stats.append(self._update(group, fused(chunk, self._scratch)))
                    else:
                        stats.append(self._in_float32(group, chunk))
        if self.recording:
            self.layer_stats = [s for s in stats if s is not None]
        return loss

    def _in_float32(self, group: dict[str, Any], chunk: Bucket) -> LayerStats | None:
        """Update by `Kernels`, bf16/fp16 tensors on float32 copies that are rounded once when they are written back.

        A ratio of 1e-3 times a small gradient underflows in float16, and bf16 would round d, q d and b in turn.
        """
        if chunk.params[0].dtype not in LOW_PRECISION:
            return self._update(group, Kernels(chunk, self._scratch))
        wide = Bucket(
            [p.float() for p in chunk.params],
            [g.float() for g in chunk.grads],
            {name: [t.float() for t in values] for name, values in chunk.state.items()},
        )
        stats = self._update(group, Kernels(wide, self._scratch))
        torch._foreach_copy_(chunk.params, wide.params)
        for name, values in chunk.state.items():
            torch._foreach_copy_(values, wide.state[name])
        return None if stats is None else stats._replace(params=chunk.params)
