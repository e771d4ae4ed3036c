"""What LARS, LAMB and TVLARS share: groups, validation, norms, zero norms, the step over buckets, layer statistics."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

Scalar = float | Tensor
Tensors = list[Tensor] | tuple[Tensor, ...]
LOW_PRECISION = (torch.bfloat16, torch.float16)
# One chunk's weights and gradients stay in a CPU's last cache level between the norms and the update.
CPU_CHUNK = 1 << 20  # elements


class Bucket(NamedTuple):
    """Tensors of one parameter group that share device and dtype, and so one sequence of multi-tensor operations."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]  # e.g. {"momentum_buffer": [...], "step": [...]}, parallel to `params`


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


# ------------------------------------------------------------------------------------------------------- validation


def check_range(component: str, name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a number outside [low, high) or not finite; a one-element tensor passes (reading it would synchronise).

    Raises:
        ValueError: names the component, the argument, the value and the allowed range.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{component}: {name} must be a number or a one-element tensor, got {value.numel()} elements"
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{component}: {name} must be a number in [{low:g}, {high:g}), got {value!r}")


def check_choice(component: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a name that is not in `allowed`.

    Raises:
        ValueError: names the component, the argument, the value and the allowed names.
    """
    if value not in allowed:
        raise ValueError(f"{component}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor holds only this process's part of a parameter (DTensor, FSDP), so that its norm is partial."""
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return True
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only where its module has been imported
    return module is not None and isinstance(tensor, module.DTensor)


def check_param(component: str, param: Tensor) -> None:
    """Refuse parameters whose layer-wise norm this process cannot take.

    Raises:
        ValueError: for a sharded, complex, integer or sparse parameter.
    """
    if is_sharded(param):
        raise ValueError(
            f"{component}: parameter of type {type(param).__name__} is sharded, so its local norm is not the layer's; "
            "allowed: whole parameters (DistributedDataParallel)"
        )
    if not param.is_floating_point():
        raise ValueError(f"{component}: parameters must be real floating-point tensors, got {param.dtype}")
    if param.layout != torch.strided:
        raise ValueError(f"{component}: parameters must be dense tensors, got layout {param.layout}")


# ------------------------------------------------------------------------------------------------- norms and ratios


def norms(tensors: Tensors) -> Tensor:
    """Euclidean norm of each tensor, accumulated in at least float32: (K,) on the tensors' device."""
    dtype = torch.float32 if tensors[0].dtype in LOW_PRECISION else None
    return torch.stack(list(torch._foreach_norm(tensors, 2, dtype)))


def nan_like(reference: Tensor) -> Tensor:
    """NaN in the reference's shape: a statistic that does not exist here."""
    return torch.full_like(reference, math.nan)


def scaled(tensors: Tensors, factor: Scalar) -> Tensors:
    """Each tensor times a number or a 0-d tensor, which is not read on the host."""
    return torch._foreach_mul(tensors, factor)


# ---------------------------------------------------------------------------------------------------- the optimizer


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that scale each tensor's step by its norms.

    A subclass names its per-parameter state in `STATE`, checks a group's settings in `_check_group` and does the
    arithmetic of a chunk of tensors in `_update`. The base resolves the groups, creates state, refuses what has no
    layer-wise norm, and walks over the chunks.
    """

    STATE: tuple[str, ...] = ()
    recording = False  # set by Telemetry for the steps whose statistics it wants
    layer_stats: Sequence[LayerStats] = ()  # of the last recorded step

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # `capturable` makes load_state_dict keep "step" in float32 on the parameter's device whatever the
        # parameter's dtype; the counters always live there, so that no step needs the host.
        super().__init__(params, {"adapt": True, "capturable": True} | defaults)

    @property
    def component(self) -> str:
        """The name that error messages begin with."""
        return type(self).__name__

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range. `group` holds every keyword, the group's own over the defaults."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], chunk: Bucket, *, fused: bool) -> LayerStats | None:
        """Update the chunk's parameters and state in place; return statistics if `self.recording`."""
        raise NotImplementedError

    def _is_1d(self, param: Tensor) -> bool:
        """Whether the tensor is a bias or a norm's scale, left out of decay and adaptation by default."""
        return param.ndim <= 1

    # ------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those with ndim <= 1 go to a group of their own without decay and adaptation.

        A group that sets "adapt" or "weight_decay" itself keeps that value for all of its tensors.

        Args:
            param_group: "params" (tensors, or (name, tensor) pairs) and any settings that differ from the defaults.

        Raises:
            ValueError: a parameter twice, sharded, sparse or not real floating point; a setting out of range.
        """
        group = dict(param_group)
        params = group["params"]
        items: Any = [params] if isinstance(params, Tensor) else params
        if not isinstance(items, set):  # which torch refuses, with the reason
            items = list(items)
        tensors = [item[1] if isinstance(item, tuple) else item for item in items]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                check_param(self.component, tensor)
        if len({id(t) for t in tensors}) != len(tensors):
            raise ValueError(f"{self.component}: params holds a parameter more than once; allowed: each one once")
        self._check_group(self.defaults | group)
        for part in self._split(group, items, tensors):
            super().add_param_group(part)

    def _split(self, group: dict[str, Any], items: Any, tensors: list[Any]) -> list[dict[str, Any]]:
        """The group as one group, or as two where 1-d tensors take other settings than the rest."""
        special: dict[str, Any] = {}
        if not self.defaults["adapt_1d"] and "adapt" not in group:
            special["adapt"] = False
        if not self.defaults["decay_1d"] and "weight_decay" not in group:
            special["weight_decay"] = 0.0
        flags = [isinstance(t, Tensor) and self._is_1d(t) for t in tensors]
        if not special or not any(flags):
            return [group | {"params": items}]
        names = group.get("param_names")
        parts = []
        for wanted, extra in ((False, {}), (True, special)):
            chosen = [i for i, flag in enumerate(flags) if flag is wanted]
            part = group | extra | {"params": [items[i] for i in chosen]}
            if names is not None:
                part["param_names"] = [names[i] for i in chosen]
            if chosen:
                parts.append(part)
        return parts

    # --------------------------------------------------------------------------------------------------------- step

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
                raise ValueError(f"{self.component}: gradient is sharded; allowed: whole parameters")
            entries = self.state[param]
            for name in self.STATE:
                if name not in entries:
                    if name == "step":
                        entries[name] = torch.zeros((), dtype=torch.float32, device=param.device)
                    else:
                        entries[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            for values, name in zip(state, self.STATE, strict=True):
                values.append(entries[name])
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
        stats: list[LayerStats] = []
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            state: list[list[Tensor]] = [[] for _ in self.STATE]
            self._init_group(group, params, grads, *state)
            whole = Bucket(params, grads, dict(zip(self.STATE, state, strict=True)))
            for bucket in split_by_kind(whole):
                fused = self._use_fused(group, bucket)
                for chunk in chunks(bucket, chunk_elements(group, bucket)):
                    found = in_float32(self._update, group, chunk, fused=fused)
                    if found is not None:
                        stats.append(found)
        if self.recording:
            self.layer_stats = stats
        return loss

    def _use_fused(self, group: dict[str, Any], bucket: Bucket) -> bool:
        """Whether the CPU's cache-blocked path serves this bucket."""
        if group["fused"] is False:
            return False
        able = not torch.compiler.is_compiling() and can_fuse(bucket)
        if group["fused"] and not able:
            raise ValueError(
                f"{self.component}: fused=True needs dense float32 or float64 parameters on the CPU, gradients laid "
                "out alike, and no torch.compile; allowed: fused=None (used where it can serve) or False"
            )
        return able


def can_fuse(bucket: Bucket) -> bool:
    """Whether every tensor is a dense float32/float64 CPU tensor laid out like its gradient and its state."""
    first = bucket.params[0]
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.float64):
        return False
    moments = [values for name, values in bucket.state.items() if name != "step"]
    for p, g, *state in zip(bucket.params, bucket.grads, *moments, strict=True):
        if type(g) is not Tensor or g.dtype != p.dtype or not is_dense(p):
            return False
        if any(t.stride() != p.stride() for t in (g, *state)):
            return False
    return True


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def split_by_kind(bucket: Bucket) -> list[Bucket]:
    """The bucket's tensors by device and dtype; empty without tensors."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(bucket.params):
        kinds.setdefault((p.device, p.dtype), []).append(i)
    return [bucket] if len(kinds) == 1 else [take(bucket, chosen) for chosen in kinds.values()]


def take(bucket: Bucket, chosen: Sequence[int]) -> Bucket:
    """The tensors at the given positions."""
    return Bucket(
        [bucket.params[i] for i in chosen],
        [bucket.grads[i] for i in chosen],
        {name: [values[i] for i in chosen] for name, values in bucket.state.items()},
    )


def chunk_elements(group: dict[str, Any], bucket: Bucket) -> float:
    """How many elements go through one multi-tensor operation: 0 for the per-tensor loop, infinity off the CPU."""
    if group["foreach"] is False:
        return 0
    return CPU_CHUNK if bucket.params[0].device.type == "cpu" and not torch.compiler.is_compiling() else math.inf


def chunks(bucket: Bucket, elements: float) -> Iterator[Bucket]:
    """Consecutive tensors with together at most so many elements; a larger tensor comes alone."""
    if elements == math.inf:
        yield bucket
        return
    start, total = 0, 0
    for i, p in enumerate(bucket.params):
        if i > start and total + p.numel() > elements:
            yield take(bucket, range(start, i))
            start, total = i, 0
        total += p.numel()
    if start < len(bucket.params):
        yield take(bucket, range(start, len(bucket.params)))


def in_float32(
    update: Callable[..., LayerStats | None], group: dict[str, Any], chunk: Bucket, *, fused: bool
) -> LayerStats | None:
    """Run `update`, for bf16/fp16 tensors on float32 copies that are rounded once when they are written back.

    A ratio of 1e-3 times a small gradient underflows in float16, and bf16 would round d, q d and b in turn.
    """
    dtype = chunk.params[0].dtype
    if dtype not in LOW_PRECISION:
        return update(group, chunk, fused=fused)
    wide = Bucket(
        [p.float() for p in chunk.params],
        [g.float() for g in chunk.grads],
        {name: [t.float() for t in values] for name, values in chunk.state.items()},
    )
    stats = update(group, wide, fused=False)
    torch._foreach_copy_(chunk.params, wide.params)
    for name, values in chunk.state.items():
        torch._foreach_copy_(values, wide.state[name])
    return None if stats is None else stats._replace(params=chunk.params)
