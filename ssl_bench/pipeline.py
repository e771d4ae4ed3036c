"""From images to augmented views: what a step feeds the network, as a pure function of (seed, step).

The samples and the parameters of their augmentation are drawn for the global batch and then sliced by rank. Views are
made on demand, chunk by chunk, so that exact large batches need the memory of one chunk; on CUDA the next batch's views
are made on a side stream while the network works on this one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_bench import sampling
from ssl_bench.augment import Augmentation, Params, take
from ssl_bench.data import Source


@dataclass
class Batch:
    """One process's share of a step's global batch.

    Attributes:
        images: (n, 3, H, W) uint8 on the device; chunk after chunk.
        params: for each view, the parameters of its augmentation, of length n.
        labels: (n,) int64 on the device, or None where the task has no use for them.
        share: how many of the n belong to one chunk.
    """

    images: Tensor
    params: list[Params]
    labels: Tensor | None
    share: int
    augmentations: Sequence[Augmentation]
    _ready: dict[int, tuple[Tensor, ...]] | None = None

    def views(self, chunk: int) -> tuple[Tensor, ...]:
        """The network's inputs for one chunk, the same at every call: each view (share, 3, h, w), then the labels."""
        if self._ready is not None and chunk in self._ready:
            return self._ready[chunk]
        rows = slice(chunk * self.share, (chunk + 1) * self.share)
        views = [
            augment(self.images[rows], take(params, rows))
            for augment, params in zip(self.augmentations, self.params, strict=True)
        ]
        return (*views, self.labels[rows]) if self.labels is not None else tuple(views)

    def prepare(self, chunk: int) -> None:
        """Makes one chunk's views now and keeps them."""
        self._ready = {chunk: self.views(chunk)}


class Pipeline:
    """The batches of a run.

    Args:
        source: the train images, on the device.
        augmentations: one for each view.
        streams: the stream of randomness of each view (constants of `ssl_bench.sampling`).
        seed: the run's seed.
        batch_size: the global batch, in images; divisible by ``chunk_size`` and the latter by ``world_size``.
        chunk_size: the part of the global batch in memory at a time; None = all of it.
        rank, world_size: which share of every chunk this process computes.
        with_labels: whether the network wants the labels too.
    """

    def __init__(
        self,
        source: Source,
        augmentations: Sequence[Augmentation],
        streams: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        chunk_size: int | None,
        rank: int,
        world_size: int,
        device: torch.device,
        with_labels: bool = False,
    ):
        chunk_size = chunk_size or batch_size
        if batch_size > len(source):
            raise ValueError(
                f"batch_size: got {batch_size}, allowed: at most the {len(source)} images of the train set"
            )
        if batch_size % chunk_size:
            raise ValueError(f"chunk_size: got {chunk_size}, allowed: a divisor of batch_size={batch_size}")
        if chunk_size % world_size:
            what = "batch_size" if chunk_size == batch_size else "chunk_size"
            raise ValueError(f"{what}: got {chunk_size}, allowed: a multiple of the {world_size} processes")
        self.source, self.augmentations, self.streams = source, augmentations, streams
        self.seed, self.batch_size, self.device, self.with_labels = seed, batch_size, device, with_labels
        slices = sampling.local_positions(batch_size, chunk_size, rank, world_size)
        self.positions = torch.cat([torch.arange(part.start, part.stop) for part in slices])
        self.share = chunk_size // world_size
        self.n_chunks = batch_size // chunk_size

    @property
    def steps_per_epoch(self) -> float:
        """Images in the train set over the batch size; not a whole number in general."""
        return len(self.source) / self.batch_size

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's batches of the steps [start, stop)."""
        batches = self._raw(start, stop)
        return self._ahead(batches) if self.device.type == "cuda" else batches

    def _indices(self, step: int) -> Tensor:
        return sampling.batch_indices(self.seed, step, self.batch_size, len(self.source))[self.positions]

    def _raw(self, start: int, stop: int) -> Iterator[Batch]:
        images = self.source.batches(self._indices(step) for step in range(start, stop))
        for step, batch in zip(range(start, stop), images, strict=True):
            params = [
                take(augment.draw(self.batch_size, sampling.generator(self.seed, stream, step)), self.positions)
                for augment, stream in zip(self.augmentations, self.streams, strict=True)
            ]
            labels = None
            if self.with_labels:
                labels = self.source.labels[self._indices(step)].to(self.device, non_blocking=True)
            yield Batch(batch, params, labels, self.share, self.augmentations)

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """One batch ahead: its first chunk's views are made on a side stream."""
        side: Any = torch.cuda.Stream(self.device)

        def prepared() -> tuple[Batch, Any] | None:
            with torch.cuda.stream(side):
                batch = next(batches, None)
                if batch is None:
                    return None
                batch.prepare(0)
                return batch, side.record_event()

        side.wait_stream(torch.cuda.current_stream(self.device))  # the images are on their way to the device
        following = prepared()
        while following is not None:
            batch, event = following
            # Queued before the caller queues this batch's step, so that the two run side by side.
            following = prepared()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in (batch.images, *batch.views(0)):
                tensor.record_stream(current)
            yield batch
