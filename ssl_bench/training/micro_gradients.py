"""Gradients of micro-batches, for the optimizers that ask for them (`ssl_bench.optim.clars.MicroGradients`)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ssl_bench.data.pipeline import Pipeline
from ssl_bench.runtime import seeds
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.processes import Processes


class MicroBatches:
    """Takes one micro-batch after another through the network, at the weights of the step; changes nothing else.

    Args:
        module: the network, on one process.
        batches: gives the micro-batches: the chunks of its batch of a step.
        autocast: gives the context of the forward pass.
    """

    def __init__(self, module: nn.Module, batches: Pipeline, autocast: Callable[[], AbstractContextManager]) -> None:
        self.module, self.batches, self.autocast = module, batches, autocast

    @classmethod
    def of(cls, options: Mapping[str, Any], module: nn.Module, batches: Pipeline, where: Processes) -> Self:
        """Fresh micro-batches of the size in the optimizer's options; without one, the chunks of the run's batches."""
        if "micro_batch" in options:
            size = options["micro_batch"]
            batches = Pipeline(
                batches.source,
                batches.views,
                seed=seeds.derive_seed(batches.seed, seeds.MICRO),
                batch_size=size * options["micro_batches"],
                chunk_size=size,
                rank=where.rank,
                world_size=where.world_size,
                device=batches.device,
            )
        return cls(module, batches, where.accelerator.autocast)

    def __call__(self, step: int, read: Callable[[], Tensor]) -> Tensor:
        """The mean of ``read()`` over the micro-batches of a step; the parameters' ``grad`` is None afterwards."""
        kept = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        found = []
        for batch in self.batches.batches(step, step + 1):
            for chunk in range(self.batches.n_chunks):
                self.module.zero_grad(set_to_none=True)
                compute_gradient(
                    self.module, _only(batch.views(chunk)), 1, torch.Tensor.backward, lambda _chunk: self.autocast()
                )
                found.append(read())
        self.module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in kept:  # batch norm learns nothing of 8 images
                buffer.copy_(before)
        return torch.stack(found).mean(0)


def _only(views: tuple[Tensor, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    """A batch of one chunk."""
    return lambda _: views
