"""What the loop watches without ever waiting for the device: the logged scalars, and the first non-finite value."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Means of the logged scalars over a logging interval, kept on the device until `flush`."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._names: list[str] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Takes one step's 0-d tensors; the same names at every step."""
        if not self._names:
            self._names = list(scalars)
        self._rows.append(torch.stack([scalars[name].detach().float() for name in self._names]))

    def flush(self, reduce: Any) -> dict[str, float]:
        """The means since the last flush. This is where the loop waits for the device.

        Args:
            reduce: maps a (scalars,) tensor to its mean over processes.
        """
        if not self._rows:
            return {}
        mean = reduce(torch.stack(self._rows).double().mean(0)).tolist()
        self._rows = []
        return dict(zip(self._names, mean, strict=True))

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
        """Takes what `look` returned at a step; nothing else until `found`."""
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
        self._step = torch.where(new, torch.tensor(steps, device=self._step.device)[first], self._step)
        self._layers = torch.where(new, broken[first, 1:], self._layers)

    def found(self, reduce_max: Any) -> dict[str, Any] | None:
        """The first bad step and its first bad tensors, or None. Waits for the device.

        Args:
            reduce_max: maps a tensor to its maximum over processes.
        """
        self._judge()
        step = int(reduce_max(self._step))
        if step < 0:
            return None
        layers = reduce_max(self._layers.to(torch.int64)).tolist()
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
