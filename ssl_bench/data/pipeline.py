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

from ssl_bench.augment.views import Labels, Params, View, take
from ssl_bench.data import sampler
from ssl_bench.data.dataset import Source
from ssl_bench.runtime import seeds


@dataclass
class Batch:
    """One process's share of a step's global batch.

    Attributes:
        images: (n, 3, H, W) uint8 on the device; chunk after chunk.
        params: for each view, what was drawn for it, of length n.
        places: (n,) int64 the images' places in the global batch, on the device.
        share: how many of the n belong to one chunk.
    """

    images: Tensor
    params: list[Params]
    places: Tensor
    share: int
    makers: Sequence[View]
    _ready: dict[int, tuple[Tensor, ...]] | None = None

    def views(self, chunk: int) -> tuple[Tensor, ...]:
        """The network's inputs for one chunk, the same at every call, each (share, ...)."""
        if self._ready is not None and chunk in self._ready:
            return self._ready[chunk]
        rows = self._rows(chunk)
        return tuple(
            view(self.images[rows], take(params, rows)) for view, params in zip(self.makers, self.params, strict=True)
        )

    def positions(self, chunk: int) -> Tensor:
        """(share,) int64 the places of a chunk's images in the global batch."""
        return self.places[self._rows(chunk)]

    def _rows(self, chunk: int) -> slice:
        return slice(chunk * self.share, (chunk + 1) * self.share)

    def prepare(self, chunk: int) -> None:
        """Makes one chunk's views now and keeps them."""
        self._ready = {chunk: self.views(chunk)}


class Pipeline:
    """The batches of a run.

    Args:
        source: the train images, on the device.
        views: makes the network's inputs, in order; each has its own stream of randomness.
        seed: the run's seed.
        batch_size: the global batch, in images; divisible by ``chunk_size`` and the latter by ``world_size``.
        chunk_size: the part of the global batch in memory at a time; None = all of it.
        rank, world_size: which share of every chunk this process computes.
        last_batch: "carry": every batch has exactly ``batch_size`` images. "short": an epoch's last batch has what is
            left, in as many chunks as the others.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        seed: int,
        batch_size: int,
        chunk_size: int | None,
        rank: int,
        world_size: int,
        device: torch.device,
        last_batch: sampler.LastBatch = "carry",
    ):
        chunk_size = sampler.images_per_chunk(batch_size, chunk_size, world_size)
        if batch_size > len(source):
            raise ValueError(f"batch_size must be at most the {len(source)} images of the train set, got {batch_size}")
        self.source, self.views, self.seed, self.batch_size, self.device = source, views, seed, batch_size, device
        self.last_batch, self.n_chunks = last_batch, batch_size // chunk_size
        lengths = {batch_size}
        if last_batch == "short" and (rest := len(source) % batch_size):
            # An uneven share would need weights in every mean; of single images batch norm has no variance.
            parts = self.n_chunks * world_size
            if rest % parts or rest == parts:
                why = "do not divide by" if rest % parts else "would come one at a time over"
                raise ValueError(
                    f"last_batch must be carry, got short: the last {rest} of {len(source)} images {why} "
                    f"{self.n_chunks} chunks x {world_size} processes"
                )
            lengths.add(rest)
        self._positions: dict[int, Tensor] = {}  # in the global batch of this length: chunk after chunk
        for length in lengths:
            slices = sampler.local_positions(length, length // self.n_chunks, rank, world_size)
            self._positions[length] = torch.cat([torch.arange(length)[part] for part in slices])
        # In the same memory at every step, from which a CUDA graph may read them.
        self._places = {length: positions.to(device) for length, positions in self._positions.items()}
        self._whole = self.n_chunks * world_size == 1  # this process computes all of it, in order

    @property
    def steps_per_epoch(self) -> float:
        """Images in the train set over the batch size; not a whole number in general, unless last batches are short."""
        return sampler.steps_per_epoch(self.batch_size, len(self.source), self.last_batch)

    def samples(self, steps: int) -> int:
        """How many images the first ``steps`` steps see, over all processes."""
        return self._span(steps).start

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's batches of the steps [start, stop)."""
        batches = self._raw(start, stop)
        return self._ahead(batches) if self.device.type == "cuda" else batches

    def _span(self, step: int) -> range:
        return sampler.span(step, self.batch_size, len(self.source), self.last_batch)

    def _indices(self, step: int) -> Tensor:
        indices = sampler.batch_indices(self.seed, step, self.batch_size, len(self.source), self.last_batch)
        return indices if self._whole else indices[self._positions[len(indices)]]

    def _raw(self, start: int, stop: int) -> Iterator[Batch]:
        images = self.source.batches(self._indices(step) for step in range(start, stop))
        for step, batch in zip(range(start, stop), images, strict=True):
            length = len(self._span(step))
            places, params = self._positions[length], []
            for number, view in enumerate(self.views):
                if isinstance(view, Labels):
                    params.append({"labels": self.source.labels[self._indices(step)]})
                    continue
                drawn = view.draw(length, seeds.generator(self.seed, seeds.view(number), step))
                params.append(drawn if self._whole else take(drawn, places))
            yield Batch(batch, params, self._places[length], len(batch) // self.n_chunks, self.views)

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
