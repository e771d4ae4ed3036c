"""Layer statistics of an optimizer's steps, kept on the device and flushed in blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssl_bench.optim.layerwise import Bucket, LayerStats, LayerwiseOptimizer, nan_like, norms, split_by_kind

VALUES = (
    "weight_norm",  # |w| before the step
    "grad_norm",  # |g|
    "update_norm",  # |g + beta w|, for LAMB |u|; NaN for optimizers without layer-wise ratios
    "raw_ratio",  # |w| over the denominator, without eta, phi and clip; NaN where the tensor is not adapted
    "ratio",  # the factor that was applied; NaN where the tensor is not adapted
    "phi",  # TVLARS's time-varying factor; NaN elsewhere
    "lr",  # what the gradient is multiplied by before momentum
    "relative_step",  # |w_new - w| / |w|; infinite where w = 0
    "zero_norm",  # 1 where a zero norm replaced the ratio, else 0
)


class Telemetry:
    """Record every N-th step of an optimizer, layer by layer, without a host synchronisation in the step.

    It hooks into the optimizer's own `step`, so a step that a gradient scaler skips leaves no row. Works with every
    torch optimizer; LARS, LAMB and TVLARS hand over the norms that they take anyway.

    Args:
        optimizer: the torch optimizer itself, not a wrapper.
        every: record the steps 0, N, 2N, ...; 0 turns recording off.
        first_step: number of the next step, for a run that resumes.

    Raises:
        ValueError: for every < 0.
    """

    def __init__(self, optimizer: Optimizer, every: int = 1, *, first_step: int = 0) -> None:
        if every < 0:
            raise ValueError(f"Telemetry: every must be an integer >= 0 (0 = off), got {every!r}")
        self.every = every
        self.step = first_step  # number of the next step; counts performed steps, and may be set
        self._optimizer = optimizer
        self._blocks: list[
            tuple[int, Sequence[str], Tensor]
        ] = []  # (step, layers, (len(VALUES), layers) on the device)
        self._before: list[tuple[LayerStats, list[Tensor]]] = []  # a plain optimizer's parameters before the step
        self._handles = []
        if every:
            self._handles = [
                optimizer.register_step_pre_hook(self._start),
                optimizer.register_step_post_hook(self._finish),
            ]

    def close(self) -> None:
        """Stop recording; what has been recorded can still be flushed."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def columns(self) -> dict[str, list[int] | list[str] | Tensor]:
        """Hand over what has been recorded since the last call, and forget it. This waits for the device.

        Returns:
            Columns of equal length R: "step" (ints), "layer" (parameter names), and each of `VALUES` as a float32 CPU
            tensor (R,); rows in the order of steps, within a step in the order of the parameter groups.
        """
        blocks, self._blocks = self._blocks, []
        values = torch.cat([b[2] for b in blocks], 1).cpu() if blocks else torch.empty(len(VALUES), 0)
        out: dict[str, list[int] | list[str] | Tensor] = {
            "step": [step for step, layers, _ in blocks for _ in layers],
            "layer": [layer for _, layers, _ in blocks for layer in layers],
        }
        return out | dict(zip(VALUES, values.unbind(0), strict=True))

    # ------------------------------------------------------------------------------------------------------- hooks

    @torch.no_grad()
    def _start(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        due = self.step % self.every == 0
        if isinstance(optimizer, LayerwiseOptimizer):
            optimizer.recording = due
        elif due:
            self._before = [seen for group in optimizer.param_groups for seen in _look(group)]

    @torch.no_grad()
    def _finish(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        if self.step % self.every == 0:
            if isinstance(optimizer, LayerwiseOptimizer):
                stats = list(optimizer.layer_stats)
                optimizer.recording, optimizer.layer_stats = False, ()
            else:
                stats = [_plain_stats(*seen) for seen in self._before]
                self._before = []
            if stats:
                names = self._names()
                layers = [names[id(p)] for s in stats for p in s.params]
                device = stats[0].weight_norm.device
                self._blocks.append((self.step, layers, torch.cat([_table(s).to(device) for s in stats], 1)))
        self.step += 1

    def _names(self) -> dict[int, str]:
        """A name for every parameter: its own, or group and position."""
        names: dict[int, str] = {}
        for i, group in enumerate(self._optimizer.param_groups):
            given = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            names |= {id(p): name for p, name in zip(group["params"], given, strict=True)}
        return names


def _table(stats: LayerStats) -> Tensor:
    """The statistics of K tensors as (len(VALUES), K) float32, rows as in `VALUES`."""
    rows = (*stats[1:8], stats.step_norm / stats.weight_norm, stats.zero_norm)
    return torch.stack([row.to(torch.float32) for row in rows])


def _look(group: dict[str, Any]) -> list[tuple[LayerStats, list[Tensor]]]:
    """What there is to see before a plain optimizer's step, and copies of the parameters to subtract after it."""
    params = [p for p in group["params"] if p.grad is not None]
    seen = []
    for bucket in split_by_kind(Bucket(params, [p.grad for p in params], {})):
        w_norm = norms(bucket.params)
        nan = nan_like(w_norm)
        lr = torch.zeros_like(w_norm) + group["lr"]
        stats = LayerStats(
            bucket.params, w_norm, norms(bucket.grads), nan, nan, nan, nan, lr, nan, torch.zeros_like(nan)
        )  # fmt: skip
        seen.append((stats, [p.clone() for p in bucket.params]))
    return seen


def _plain_stats(seen: LayerStats, before: list[Tensor]) -> LayerStats:
    """The statistics of a plain optimizer's step after it; `before` is used up."""
    torch._foreach_sub_(before, seen.params)
    return seen._replace(step_norm=norms(before))
