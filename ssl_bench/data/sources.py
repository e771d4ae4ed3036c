"""The images of one split: resident as one tensor, or streamed from disk. Same interface, same bytes."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssl_bench.data.cache import MappedImages
from ssl_bench.data.decode import Shape

# The share of the free memory that "auto" gives to a data set; activations, gradients and the optimizer need the rest.
RESIDENT_FRACTION = 0.5

CPU = torch.device("cpu")


class Source(Protocol):
    """One split of a data set.

    `labels` is (N,) int64 on the CPU, `image_shape` is (3, H, W).
    """

    @property
    def labels(self) -> Tensor: ...

    @property
    def image_shape(self) -> Shape: ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> "Source":
        """The same images for use on a device."""
        ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each (n,) int64 index tensor the (n, 3, H, W) uint8 images on the device, in order."""
        ...


@dataclass(frozen=True)
class StreamingSource:
    """Images that the workers of a DataLoader read batch by batch, ahead of their use.

    Several `batches` may run at a time (an evaluation in the middle of training): each takes a loader of its own.
    Loaders keep their workers and are reused, because starting workers takes longer than a small evaluation.

    Args:
        images: the images, in a raw file or in main memory.
        labels: (N,) int64, CPU.
        workers: reading processes of each loader, >= 0; 0 reads in this process.
        device: where batches go; to a GPU from pinned memory, without waiting.
    """

    images: MappedImages | Tensor
    labels: Tensor
    workers: int = 2
    device: torch.device = CPU
    _idle: list["_Loader"] = field(default_factory=list, compare=False, repr=False)

    @property
    def image_shape(self) -> Shape:
        return cast(Shape, tuple(self.images.shape[1:]))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "StreamingSource":
        return replace(self, device=torch.device(device), _idle=[])

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        pinned = self.device.type == "cuda"
        loader = self._idle.pop() if self._idle else _Loader(self.images, self.workers, pinned)
        try:
            for batch in loader.run(indices):
                yield batch.to(self.device, non_blocking=pinned)
        finally:
            self._idle.append(loader)


class _Rows(Dataset[Tensor]):
    """A data set whose item is a whole batch: its index is an array of indices."""

    def __init__(self, images: MappedImages | Tensor) -> None:
        self.images = images

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        if isinstance(self.images, MappedImages):
            return self.images.rows(indices)
        return self.images[torch.from_numpy(indices)]


class _Following(Sampler[np.ndarray]):
    """A sampler whose batches are exchanged for each pass, so that its loader can keep its workers."""

    indices: Iterable[Tensor] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return (batch.numpy() for batch in self.indices)


class _Loader:
    def __init__(self, images: MappedImages | Tensor, workers: int, pinned: bool) -> None:
        self._sampler = _Following()
        self._loader = DataLoader(
            _Rows(images),
            batch_size=None,
            sampler=self._sampler,
            num_workers=min(workers, os.cpu_count() or 1),  # torch warns about more, which gain nothing
            persistent_workers=workers > 0,
            pin_memory=pinned,
            generator=torch.Generator(),  # else each pass draws its workers' seed from the global generator
        )

    def run(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        self._sampler.indices = indices
        return iter(self._loader)


@dataclass(frozen=True)
class ResidentSource:
    """Images that are one tensor.

    Args:
        images: (N, 3, H, W) uint8 on any device; memory-mapped where they come from the cache.
        labels: (N,) int64, CPU.
        otherwise: what `to` gives instead where the device has too little free memory; None always moves the images.
    """

    images: Tensor
    labels: Tensor
    otherwise: StreamingSource | None = None

    @property
    def image_shape(self) -> Shape:
        return cast(Shape, tuple(self.images.shape[1:]))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ResidentSource | StreamingSource":
        device = torch.device(device)
        if device.type == "cuda" and self.otherwise is not None and self.images.device.type != "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.images.numel() > RESIDENT_FRACTION * free:
                return self.otherwise.to(device)
        return replace(self, images=self.images.to(device))

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in indices:
            yield self.images.index_select(0, batch.to(self.images.device, non_blocking=True))


@dataclass(frozen=True)
class Part:
    """Some images of a source, as a source.

    Args:
        whole: the source.
        indices: (n,) int64 indices into it, on the CPU.
    """

    whole: Source
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        return self.whole.labels[self.indices]

    @property
    def image_shape(self) -> Shape:
        return self.whole.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> "Part":
        return replace(self, whole=self.whole.to(device))

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.whole.batches(self.indices[rows] for rows in indices)
