"""What the evaluators share: their shape, the check of what they are given, and top-k accuracy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Metrics = dict[str, float]
Progress = Callable[[str, int, int], None]  # (what is done, done, total)
Transform = Callable[[Tensor], Tensor]  # uint8 (n, 3, H, W) -> normalised (n, 3, H, W)


class ImageSource(Protocol):
    """One split of a data set, as `ssl_bench.data.dataset.Source` gives it."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""

    def __len__(self) -> int: ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each (n,) int64 tensor of indices the uint8 (n, 3, H, W) images, on the device, in order."""


class ImageDataset(Protocol):
    """A train and a test split."""

    @property
    def train(self) -> ImageSource: ...

    @property
    def test(self) -> ImageSource: ...


class Augment(Protocol):
    """A random augmentation whose parameters are drawn apart from its application."""

    def draw(self, n: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Parameters of n images, each (n, ...), on the CPU."""

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor: ...


class Evaluator(Protocol):
    """What a name in `EVALUATORS` stands for.

    With ``inputs == "features"`` it is called as ``(train_x, train_y, test_x, test_y, *, seed)``, on one process; with
    ``inputs == "images"`` as `AugmentedProbe.__call__` is, on all of them.
    """

    @property
    def name(self) -> str:
        """The protocol's name and version, as it stands beside every number it gives."""

    @property
    def inputs(self) -> Literal["features", "images"]: ...

    @property
    def tabulated(self) -> bool:
        """Whether its numbers may stand in a table of results; a monitor's may not."""

    @property
    def limits(self) -> tuple[int, int] | None:
        """The most train and test images whose features it takes (the `subset`); None for all of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics: ...


def check_features(name: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Refuses features that no number should be computed from.

    Args:
        name: the protocol, for the message.
        train_x: (N, D) features of the train set.
        train_y: (N,) int64 labels.
        test_x: (M, D) features of the test set.
        test_y: (M,) int64 labels.

    Raises:
        ValueError: in one line, on a wrong shape, labels that do not match, a single class, or a non-finite feature
            (a diverged model has no accuracy).
    """
    for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"{name}: {split} features must be (N, D) with N >= 1, got {tuple(x.shape)}")
        if y.shape != (len(x),):
            raise ValueError(f"{name}: {len(x)} {split} features need ({len(x)},) labels, got {tuple(y.shape)}")
        if y.is_floating_point() or int(y.min()) < 0:
            raise ValueError(f"{name}: {split} labels must be integers >= 0, got {y.dtype} from {y.min().item()}")
        bad = int((~torch.isfinite(x)).any(dim=1).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(x)} {split} features are not finite: the model has diverged")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"{name}: train features have {train_x.shape[1]} dimensions, test {test_x.shape[1]}")
    if int(train_y.min()) == int(train_y.max()):
        raise ValueError(f"{name}: at least 2 classes are needed, the train labels are all {int(train_y[0])}")


def count_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many labels are among the k largest logits; k is limited to the number of classes.

    Args:
        logits: (..., n, C).
        labels: (n,) int64, or broadcastable to (..., n).
        k: 1 or 5.

    Returns:
        (...,) float64 counts, on the logits' device.
    """
    if k == 1:
        hits = logits.argmax(dim=-1) == labels
    else:
        hits = (logits.topk(min(k, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)).any(dim=-1)
    return hits.sum(dim=-1, dtype=torch.float64)
