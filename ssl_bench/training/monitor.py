"""What the loop watches without ever waiting for the device: the logged scalars, and the first non-finite value."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Moment:
    """A moment in the device's work, after all that has been started; on the CPU, now. Making one waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def is_past(self) -> bool:
        """Whether the device has come so far."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Waits until the device has come so far, and no longer."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds from an earlier moment, by the device's clock. Waits for this one."""
        self.wait()
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return earlier._event.elapsed_time(self._event) / 1000


class Arriving:
    """A tensor's values on their way to the host. Making one waits for nothing."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._arrived = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._arrived = Moment(tensor.device)

    def values(self) -> Tensor:
        """The values, of a GPU's tensor on the CPU. Waits until the device has come that far, and no longer."""
        if self._arrived is not None:
            self._arrived.wait()
        return self._values


class Meter:
    """Means of the logged scalars over a logging interval, kept on the device."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._names: list[str] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Takes one step's 0-d tensors; the same names at every step."""
        if not self._names:
            self._names = list(scalars)
        self._rows.append(torch.stack([scalars[name].detach().float() for name in self._names]))

    def take(self, reduce: Any) -> Tensor:
        """The means since the last call, (scalars,) in float64 on the device, and starts anew.

        Args:
            reduce: maps a (scalars,) tensor to its mean over processes.
        """
        rows, self._rows = self._rows, []
        return reduce(torch.stack(rows).double().mean(0)) if rows else torch.empty(0, dtype=torch.float64)

    def named(self, means: Tensor) -> dict[str, float]:
        """What `take` returned, on the CPU, by name."""
        return dict(zip(self._names, means.tolist(), strict=True)) if len(means) else {}

    def state_dict(self) -> dict[str, Any]:
        """What the interval has so far."""
        return {"names": self._names, "rows": [row.cpu() for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on where `state_dict` was taken."""
        self._names, self._rows = state["names"], [row.to(device) for row in state["rows"]]


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient was not finite, and in which tensors.

    Args:
        names: the parameters' names, in the order of ``update``'s gradients.
        gradients: whether non-finite gradients count; false under a gradient scaler, for which they are everyday.
    """

    def __init__(self, names: Sequence[str], device: torch.device, gradients: bool = True):
        self.names, self.gradients = list(names), gradients
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._layers = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        self._zero = torch.zeros((), device=device)
        self._seen: list[tuple[int, Tensor]] = []  # step, and (1 + layers,) its loss and gradients' sums, to be judged

    def look(self, loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """(1 + layers,) the loss and what tells of each gradient; one pass over the gradients, and no wait."""
        gradients: Any = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # Infinity and NaN survive a maximum and a sum, while a sum of squares could overflow. Each is the cheaper one
        # on its device; a sum leaves float32's range only with gradients that no training would survive either.
        on_cpu = self._zero.device.type == "cpu"
        norms = iter([g.sum() for g in gradients] if on_cpu else torch._foreach_norm(gradients, float("inf")))
        row = [loss.detach().float(), *(self._zero if p.grad is None else next(norms) for p in parameters)]
        return torch.stack(row)

    def take(self, step: int, row: Tensor) -> None:
        """Takes what `look` returned at a step; judged by `found`."""
        self._seen.append((step, row))

    def _judge(self) -> None:
        """Keeps the first bad step of those taken since the last time, if none was before."""
        if not self._seen:
            return
        steps, rows = zip(*self._seen, strict=True)
        self._seen = []
        broken = torch.stack(rows).isfinite().logical_not()  # (steps, 1 + layers)
        bad = broken.any(dim=1) if self.gradients else broken[:, 0]
        first, new = bad.int().argmax(), bad.any() & (self._step < 0)
        # Neither `steps[first]` nor a tensor of the steps: both would wait for the device. They follow one another.
        self._step = torch.where(new, steps[0] + first, self._step)
        self._layers = torch.where(new, broken.index_select(0, first.reshape(1))[0, 1:], self._layers)

    def found(self, reduce_max: Any) -> Tensor:
        """(1 + layers,) int64 on the device: the first bad step, -1 without one, and 1 for each bad tensor in it.

        Args:
            reduce_max: maps a tensor to its maximum over processes.
        """
        self._judge()
        return reduce_max(torch.cat([self._step.reshape(1), self._layers.to(torch.int64)]))

    def explain(self, found: Tensor) -> dict[str, Any] | None:
        """What `found` returned, on the CPU, in words; None without a bad step."""
        step, *layers = found.tolist()
        if step < 0:
            return None
        broken = [name for name, is_broken in zip(self.names, layers, strict=True) if is_broken]
        return {"step": step, "layer": broken[0] if broken else None, "layers": len(broken), "of": len(self.names)}

    def state_dict(self) -> dict[str, Tensor]:
        """What has been found so far. Waits for the device."""
        self._judge()
        return {"step": self._step.cpu(), "layers": self._layers.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken."""
        self._seen = []
        self._step, self._layers = state["step"].to(self._step.device), state["layers"].to(self._step.device)
