"""The weights at which a network is measured and kept, where these are not the weights that are trained."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ssl_bench.data.pipeline import Pipeline
from ssl_bench.optim.averaging import has_evaluation_point

# Batch norm's statistics at the evaluation point are those of at least so many images, the last that training saw.
IMAGES = 10_000


class EvaluationPoint:
    """Moves a network to its optimizer's evaluation point and back: ``with point(step): measure``.

    Schedule-Free, SPlus and averages of the weights train at one point and are meant to be evaluated at another, to
    which ``optimizer.eval()`` switches. Batch norm's running statistics belong to the first; here they are taken anew
    at the second. On the way back weights and statistics are what they were, bit for bit, which ``optimizer.train()``
    alone, that computes the weights, would not achieve.

    Args:
        optimizer: has ``eval()`` and ``train()``.
        module: the network, as trained.
        batches: the run's, whose last ones before the step give the statistics.
        autocast: gives the context of a forward pass.
    """

    about = f"the optimizer's evaluation point, batch norm's statistics taken anew over the last {IMAGES} images"

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, batches: Pipeline, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        self.optimizer, self.module, self.batches, self.autocast = optimizer, module, batches, autocast

    def __call__(self, step: int) -> AbstractContextManager:
        """The context of one visit; entered and never left, the network stays there."""
        return _Visit(self, step)


def evaluation_point(
    optimizer: Optimizer, module: nn.Module, batches: Pipeline, autocast: Callable[[], AbstractContextManager]
) -> Callable[[int], AbstractContextManager]:
    """The optimizer's evaluation point; for most it is where they train, and the context does nothing."""
    return EvaluationPoint(optimizer, module, batches, autocast) if has_evaluation_point(optimizer) else nullcontext


class _Visit(AbstractContextManager):
    def __init__(self, point: EvaluationPoint, step: int) -> None:
        self.point, self.step = point, step
        self.there = step > 0  # before the first step there is no other point, nor a state to compute it from

    def __enter__(self) -> None:
        if not self.there:
            return
        module = self.point.module
        self.kept = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.point.optimizer.eval()  # type: ignore[attr-defined]
        self._take_statistics()

    def __exit__(self, *_: object) -> None:
        if not self.there:
            return
        self.point.optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for name, tensor in self.point.module.state_dict().items():
                tensor.copy_(self.kept[name])

    @torch.no_grad()
    def _take_statistics(self) -> None:
        """The plain mean of the statistics of recent batches, as in `torch.optim.swa_utils.update_bn`."""
        module = self.point.module
        layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not layers:
            return
        momenta, was_training = [layer.momentum for layer in layers], module.training
        module.train()
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
            batches = self.point.batches
            first = max(0, self.step - math.ceil(IMAGES / batches.batch_size))
            for batch in batches.batches(first, self.step):
                for chunk in range(batches.n_chunks):
                    with self.point.autocast():
                        module(*batch.views(chunk))
        finally:
            module.train(was_training)
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
