"""An average of the weights as the point at which an optimizer is evaluated: EMA (Polyak) or plain mean (SWA)."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ssl_bench.optim.layerwise import check_choice, check_range

Kind = Literal["ema", "mean"]


def has_evaluation_point(optimizer: Optimizer) -> bool:
    """Whether the weights to evaluate are not those that it trains: it has `eval()` and `train()` to switch."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class WeightAverage:
    """Averages an optimizer's weights after each of its steps and gives the optimizer `eval()` and `train()`.

    `optimizer.eval()` puts the average in the place of the weights, `optimizer.train()` puts them back, bit for bit.
    The average is part of `optimizer.state_dict()`. Training itself is not changed.

    Args:
        optimizer: any torch optimizer without an evaluation point of its own.
        kind: "ema" a = decay a + (1 - decay) w (Polyak averaging), or "mean" of all w (SWA: Izmailov et al. 2018,
            arXiv 1803.05407, with an average at every step).
        decay: of the EMA, in [0, 1); no meaning for "mean".
        start: steps before the first that counts, >= 0; until then the evaluation point is the weights themselves.

    Raises:
        ValueError: for a value out of range, or an optimizer that has an evaluation point already.
    """

    def __init__(self, optimizer: Optimizer, kind: Kind = "ema", decay: float = 0.999, start: int = 0) -> None:
        check_choice("WeightAverage", "kind", kind, get_args(Kind))
        check_range("WeightAverage", "decay", decay, 0.0, 1.0)
        check_range("WeightAverage", "start", start)
        if has_evaluation_point(optimizer):
            name = type(optimizer).__name__
            raise ValueError(f"WeightAverage: optimizer must not average its weights itself, got {name}")
        self._optimizer, self._start = optimizer, start
        self._update: Any = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()
        self.steps = 0  # of the optimizer
        self.average: list[Tensor] = []  # in the order of the groups; empty before the first step that counts
        self.evaluating = False
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)
        vars(optimizer).update(eval=self.eval, train=self.train, replayable=False)  # the steps are counted on the host

    def eval(self) -> None:
        """Put the average in the place of the weights."""
        if not self.evaluating:
            self.evaluating = True
            self._swap()

    def train(self) -> None:
        """Put the weights back."""
        if self.evaluating:
            self.evaluating = False
            self._swap()

    def _weights(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average:
            weights = self._weights()
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self.average)
            torch._foreach_copy_(self.average, kept)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if self.evaluating:
            raise RuntimeError("WeightAverage: a step must follow optimizer.train(), got one after eval()")
        self.steps += 1
        if self.steps <= self._start:
            return
        if not self.average:
            self.average = [weight.detach().clone() for weight in self._weights()]
        else:
            self._update(self.average, self._weights(), self.steps - self._start - 1)

    def _save(self, _: Optimizer, state: dict[str, Any]) -> None:
        if self.evaluating:
            raise RuntimeError("WeightAverage: state_dict() must follow optimizer.train(), got it after eval()")
        state["average"] = {"steps": self.steps, "weights": self.average}

    def _load(self, _: Optimizer, state: dict[str, Any]) -> None:
        self.steps = state["average"]["steps"]
        weights = self._weights() if state["average"]["weights"] else []
        pairs = zip(state["average"]["weights"], weights, strict=True)
        self.average = [saved.to(weight.device, copy=True) for saved, weight in pairs]
