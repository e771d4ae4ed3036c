"""The part of a train set that selects hyper-parameters, so that the test set need not."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_bench.data.dataset import Dataset, Source


def holdout_indices(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Splits a train set class by class; depends on nothing but the arguments.

    Args:
        labels: (N,) int64.
        fraction: the share of each class to hold out, in (0, 1), rounded; a class of one image is never held out.

    Returns:
        the (n,) sorted indices to train on and the (N - n,) sorted indices held out, int64, on the CPU.

    Raises:
        ValueError: the fraction is out of range.
    """
    from ssl_bench.eval.linear import holdout  # the split of linear-cached-v1, which never changes

    if not 0 < fraction < 1:
        raise ValueError(f"data.holdout: got {fraction}, allowed: between 0 and 1")
    return holdout(labels, fraction)


@dataclass(frozen=True)
class Part:
    """Some images of a source, as a source.

    Attributes:
        whole: the source.
        indices: (n,) int64 indices into it, on the CPU.
    """

    whole: Source
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        """(n,) int64, on the CPU."""
        return self.whole.labels[self.indices]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return self.whole.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> "Part":
        """The same part with its images on the device."""
        return replace(self, whole=self.whole.to(device))

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `Source.batches`; the indices count within the part."""
        return self.whole.batches(self.indices[rows] for rows in indices)


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """The data set less a part of its train images, which take the test images' place.

    Args:
        dataset: its test images are left unread.
        fraction: see `holdout_indices`.
    """
    kept, held = holdout_indices(dataset.train.labels, fraction)
    return replace(dataset, train=Part(dataset.train, kept), test=Part(dataset.train, held))
