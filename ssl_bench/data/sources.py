"""The images of one split: resident as one tensor, or streamed from disk. Same interface, same bytes."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ssl_bench.data.cache import MappedImages
from ssl_bench.data.decode import Shape

# The share of the free memory that "auto" gives to a data set; activations, gradients and the optimizer need the rest.
RESIDENT_FRACTION = 0.5

BATCHES_AHEAD = 2  # of each reading thread, as a DataLoader's prefetch_factor

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
    """Images that threads read batch by batch, ahead of their use.

    Threads and not processes: decoded rows are only copied, for which numpy lets go of the interpreter's lock, and
    threads need no /dev/shm (64 MB in a container), no signals of their own, and cannot be killed one by one.

    Args:
        images: the images, in a raw file or in main memory.
        labels: (N,) int64, CPU.
        workers: reading threads of each pass, >= 0; 0 reads when a batch is needed.
        device: where batches go; to a GPU from pinned memory, without waiting.
    """

    images: MappedImages | Tensor
    labels: Tensor
    workers: int = 2
    device: torch.device = CPU

    @property
    def image_shape(self) -> Shape:
        return cast(Shape, tuple(self.images.shape[1:]))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "StreamingSource":
        return replace(self, device=torch.device(device))

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        pinned = self.device.type == "cuda"
        for batch in self._read_ahead(indices) if self.workers else map(self._read, indices):
            yield batch.to(self.device, non_blocking=pinned)

    def _read_ahead(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        ahead: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ssl_bench-reader")
        try:
            for batch in indices:
                ahead.append(pool.submit(self._read, batch))
                if len(ahead) > BATCHES_AHEAD * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # also when the pass is abandoned

    def _read(self, indices: Tensor) -> Tensor:
        """Copies of the images at (n,) indices, in pinned memory for a GPU."""
        images = self.images.array if isinstance(self.images, MappedImages) else self.images.numpy()
        low, high = (int(indices.min()), int(indices.max())) if len(indices) else (0, 0)
        if low < 0 or high >= len(images):
            raise IndexError(f"indices must be 0 to {len(images) - 1}, got {low} to {high}")
        shape = (len(indices), *images.shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        # "clip" changes nothing, as the indices were checked, but writes into `out` directly.
        np.take(images, indices.numpy(), axis=0, out=batch.numpy(), mode="clip")
        return batch


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
