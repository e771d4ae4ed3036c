"""Layer statistics of an optimizer's steps, kept on the device and flushed in blocks."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssl_bench.optim.kernels import Bucket, Norms, nan_like, norms, split_by_kind
from ssl_bench.optim.layerwise import LayerStats, LayerwiseOptimizer, layer_stats

# weight_norm, grad_norm, update_norm, raw_ratio, ratio, phi and lr as `LayerStats` explains them, NaN where there is no
# such value; relative_step = |w_new - w| / |w|, infinite where w = 0, or NaN if it stays 0; zero_norm = 1 where a zero
# norm replaced the ratio, else 0.
VALUES = (*LayerStats._fields[1:8], "relative_step", "zero_norm")


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
            raise ValueError(f"Telemetry: every must be an integer >= 0 (0 turns it off), got {every!r}")
        self.every = every
        self.step = first_step  # number of the next step; counts performed steps, and may be set
        self._blocks: list[tuple[int, list[str], Tensor]] = []  # (step, layers, (len(VALUES), layers) on the device)
        self._before: list[tuple[LayerStats, list[Tensor]]] = []  # a plain optimizer's parameters before the step
        self._handles = []
        if every:
            self._handles = [
                optimizer.register_step_pre_hook(self._start),
                optimizer.register_step_post_hook(self._finish),
            ]

    @property
    def due(self) -> bool:
        """Whether the next step is one to record."""
        return self.every > 0 and self.step % self.every == 0

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
        return self.named(*self.take())

    def take(self) -> tuple[dict[str, list[int] | list[str]], Tensor]:
        """What `columns` hands over, without its wait: "step" and "layer", and the values on the device, for `named`.

        Returns:
            the first two columns, and a float32 tensor (len(VALUES), R).
        """
        blocks, self._blocks = self._blocks, []
        where: dict[str, list[int] | list[str]] = {
            "step": [step for step, layers, _ in blocks for _ in layers],
            "layer": [layer for _, layers, _ in blocks for layer in layers],
        }
        return where, torch.cat([b[2] for b in blocks], 1) if blocks else torch.empty(len(VALUES), 0)

    @staticmethod
    def named(where: dict[str, list[int] | list[str]], values: Tensor) -> dict[str, list[int] | list[str] | Tensor]:
        """What `take` returned as `columns`."""
        return where | dict(zip(VALUES, values.cpu().unbind(0), strict=True))

    @torch.no_grad()
    def _start(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        due = self.due
        if isinstance(optimizer, LayerwiseOptimizer):
            optimizer.recording = due
        elif due:
            self._before = [seen for group in optimizer.param_groups for seen in _look(group)]

    @torch.no_grad()
    def _finish(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        step, self.step = self.step, self.step + 1
        if step % self.every != 0:
            return
        if isinstance(optimizer, LayerwiseOptimizer):
            stats = list(optimizer.layer_stats)
            optimizer.recording, optimizer.layer_stats = False, ()
        else:
            for seen, before in self._before:
                torch._foreach_sub_(before, seen.params)
            stats = [seen._replace(step_norm=norms(before)) for seen, before in self._before]
            self._before = []
        if not stats:
            return
        names: dict[int, str] = {}  # a parameter's own name, or group and position
        for i, group in enumerate(optimizer.param_groups):
            given = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            names |= {id(p): name for p, name in zip(group["params"], given, strict=True)}
        tables = []
        for s in stats:
            rows = (*s[1:8], s.step_norm / s.weight_norm, s.zero_norm)  # in the order of VALUES
            tables.append(torch.stack([row.to(torch.float32) for row in rows]).to(stats[0].weight_norm.device))
        layers = [names[id(p)] for s in stats for p in s.params]
        self._blocks.append((step, layers, torch.cat(tables, 1)))


def _look(group: dict[str, Any]) -> list[tuple[LayerStats, list[Tensor]]]:
    """What there is to see before a plain optimizer's step, and copies of the parameters to subtract after it."""
    params = [p for p in group["params"] if p.grad is not None]
    seen = []
    for bucket in split_by_kind(Bucket(params, [p.grad for p in params], {})):
        w_norm = norms(bucket.params)
        nan = nan_like(w_norm)
        norm = Norms(w_norm, norms(bucket.grads), nan)
        stats = layer_stats(bucket.params, norm, None, None, torch.zeros_like(nan) + group["lr"], nan)
        seen.append((stats, [p.clone() for p in bucket.params]))
    return seen
