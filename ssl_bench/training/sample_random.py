"""Random numbers inside the network (dropout, stochastic depth, masks) that belong to a sample, not to a process.

torch's generator deals out numbers in the order of the calls, so that a sample's dropout mask would depend on how the
batch is split over processes and chunks. Here a number is a hash of (seed and step, number of the call, the sample's
place in the global batch, its place within the sample): the same however the batch is split, on every device, also in
a CUDA graph, which reads the step's key from memory.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_MASK = 0xFFFFFFFF
_aten = torch.ops.aten


def _hash(x: Tensor) -> Tensor:
    """Mixes int64 values in [0, 2^32) in place: the rounds of Chris Wellons's lowbias32 (public domain)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


class SampleRandom:
    """Draws a network's random numbers by sample.

    The first step runs under a mode that sees every operation; a network that draws nothing in it runs without the
    mode from then on, at no cost.

    Args:
        device: the network's.
    """

    def __init__(self, device: torch.device) -> None:
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._drawn = self._decided = False

    def begin_step(self, seed: int) -> None:
        """Sets the step's key, on the device.

        Args:
            seed: a function of the run's seed and the step, the same on all processes.
        """
        if self._drawn or not self._decided:
            self._key.fill_(seed & _MASK)

    def end_step(self) -> None:
        """After a step it is known whether the network draws numbers."""
        self._decided = True

    def rows(self, positions: Tensor) -> AbstractContextManager:
        """A context for the forward pass of some rows.

        Args:
            positions: (n,) int64 the rows' places in the global batch, on any device.
        """
        return nullcontext() if self._decided and not self._drawn else self._mode(positions)

    @contextmanager
    def _mode(self, positions: Tensor) -> Iterator[None]:
        with _Mode(self._key, positions) as mode:
            yield
        self._drawn |= mode.calls > 0


def numbers_from_here() -> Callable[[], AbstractContextManager] | None:
    """Makes contexts that repeat what the forward pass under way draws from now on; None if nothing looks after it."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, _Mode):
            return partial(_Mode, mode.key, mode.positions, mode.calls)
    return None


class _Mode(TorchDispatchMode):
    """Answers torch's random operations; each call has its own numbers, the same at each pass through the network."""

    def __init__(self, key: Tensor, positions: Tensor, calls: int = 0) -> None:
        super().__init__()
        self.key, self.positions, self.calls = key, positions, calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:  # else the caller's own
            options = {name: value for name, value in kwargs.items() if name != "generator"}
            if (draw := _DRAWS.get(function)) is not None:
                return draw(self, *args, **options)
            if (fill := _FILLED.get(function)) is not None:
                made = function(*args, **kwargs)
                return made.copy_(fill(self, made))
        return function(*args, **kwargs)

    def bits(self, like: Tensor) -> Tensor:
        """Independent int64 values in [0, 2^32) in a tensor's shape, row by row.

        Rows are samples, or, in a tensor of several times as many rows, copies of the batch one after the other, as
        torch.cat of two views has it. Any other tensor has the same numbers in every chunk and process.
        """
        n_rows = like.shape[0] if like.ndim else 1
        if n_rows and n_rows % len(self.positions) == 0:
            copies = torch.arange(n_rows // len(self.positions), device=like.device)
            rows = ((copies << 24)[:, None] + self.positions.to(like.device)).flatten()
        else:
            rows = torch.arange(n_rows, device=like.device)
        self.calls += 1
        call = _hash((self.key + self.calls * 0x9E3779B9).bitwise_and_(_MASK))
        columns = _hash((torch.arange(like.numel() // max(n_rows, 1), device=like.device) + call).bitwise_and_(_MASK))
        rows = _hash(_hash(rows) ^ call)
        return _hash(rows[:, None] ^ columns).view(like.shape)

    def uniform(self, like: Tensor) -> Tensor:
        """U(0, 1) float32, never 0 or 1: both ends are half of one part in 2^24 away."""
        return (self.bits(like) >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)

    def normal(self, like: Tensor) -> Tensor:
        """N(0, 1) float32, by Box and Muller."""
        radius = self.uniform(like).log_().mul_(-2).sqrt_()
        return radius.mul_(self.uniform(like).mul_(2 * math.pi).cos_())

    def bernoulli(self, like: Tensor, p: Any) -> Tensor:
        """True with probability p, a number or a tensor of the shape."""
        return self.bits(like) < p * 2.0**32


def _dropout(mode: _Mode, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = mode.bernoulli(x, 1 - p)
    return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept


# Whatever else draws (randint, multinomial, an attention kernel's own dropout) takes torch's generator, which is seeded
# alike on every process.
_DRAWS: dict[Any, Any] = {
    _aten.native_dropout.default: _dropout,
    _aten.bernoulli.default: lambda mode, p: mode.bernoulli(p, p).to(p.dtype),
    _aten.bernoulli.p: lambda mode, x, p=0.5: mode.bernoulli(x, p).to(x.dtype),
    _aten.bernoulli_.float: lambda mode, x, p=0.5: x.copy_(mode.bernoulli(x, p)),
    _aten.bernoulli_.Tensor: lambda mode, x, p: x.copy_(mode.bernoulli(x, p)),
    _aten.uniform_.default: lambda mode, x, low=0.0, high=1.0: x.copy_(mode.uniform(x) * (high - low) + low),
    _aten.normal_.default: lambda mode, x, mean=0.0, std=1.0: x.copy_(mode.normal(x) * std + mean),
    _aten.exponential_.default: lambda mode, x, rate=1.0: x.copy_(mode.uniform(x).log_() / -rate),
}
_FILLED: dict[Any, Any] = {
    _aten.rand.default: _Mode.uniform,
    _aten.rand_like.default: _Mode.uniform,
    _aten.randn.default: _Mode.normal,
    _aten.randn_like.default: _Mode.normal,
}
