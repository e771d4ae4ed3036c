"""Runs evaluators by name on a backbone and a data set, with the features extracted once."""

import difflib
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ssl_bench.eval.base import Augment, Evaluator, ImageDataset, Metrics, Progress, Transform, check_features
from ssl_bench.eval.features import Precision, extract_features
from ssl_bench.eval.knn import KNN
from ssl_bench.eval.linear import LinearCached
from ssl_bench.eval.linear_augmented import LINEAR_AUG, PAPER_PROBE, RELEASED_PROBE, SINGLE_FAULTS
from ssl_bench.eval.online import Online, subset

_ALL: tuple[Evaluator, ...] = (
    *(KNN(), LinearCached(), LINEAR_AUG, PAPER_PROBE, RELEASED_PROBE),
    *SINGLE_FAULTS,
    Online(),
)
EVALUATORS: dict[str, Evaluator] = {evaluator.name: evaluator for evaluator in _ALL}


class Result(TypedDict):
    """One protocol's numbers and what they cost."""

    protocol: str
    metrics: Metrics
    n_test: int
    seconds: float  # of this protocol alone
    feature_seconds: float  # of the extraction that it shares with the others; 0 where it takes images
    precision: str  # of the backbone's passes; what follows them is fp32
    tabulated: bool  # False: a monitor's number, not for a table of results


def get_evaluator(name: str) -> Evaluator:
    """Looks up an evaluator.

    Raises:
        ValueError: on an unknown name, naming the known ones and the nearest.
    """
    if name not in EVALUATORS:
        nearest = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0)
        raise ValueError(
            f"eval: unknown protocol {name!r}, did you mean {nearest[0]!r}? known: {', '.join(EVALUATORS)}"
        )
    return EVALUATORS[name]


Features = tuple[Tensor, Tensor, Tensor, Tensor]  # train_x, train_y, test_x, test_y


class _Features:
    """The features of a data set, or of a monitor's part of it, embedded once and when first asked for."""

    def __init__(self, backbone: nn.Module, dataset: ImageDataset, transform: Transform, **settings: Any) -> None:
        self._backbone, self._transform, self._splits = backbone, transform, (dataset.train, dataset.test)
        device = settings["device"]
        self._settings = {**settings, "output_device": device if torch.device(device).type == "cuda" else "cpu"}
        self._known: dict[tuple[int, int], tuple[Features, float]] = {}

    def __call__(self, limits: tuple[int, int] | None) -> tuple[Features, float]:
        """Features of at most so many train and test images (None: of all), and the seconds that they took."""
        sizes = [len(split) for split in self._splits]
        key = (sizes[0], sizes[1]) if limits is None else (min(sizes[0], limits[0]), min(sizes[1], limits[1]))
        if key not in self._known:
            started = time.perf_counter()
            indices = [subset(size, limit) for size, limit in zip(sizes, key, strict=True)]
            x = [
                extract_features(self._backbone, split, self._transform, indices=i, **self._settings)
                for split, i in zip(self._splits, indices, strict=True)
            ]
            y = [split.labels[i] for split, i in zip(self._splits, indices, strict=True)]
            self._known[key] = (x[0], y[0], x[1], y[1]), time.perf_counter() - started
        return self._known[key]


def _timed(evaluator: Evaluator, compute: Callable[[], Metrics], feature_seconds: float, precision: str) -> Result:
    started = time.perf_counter()
    metrics = compute()
    return Result(
        protocol=evaluator.name,
        metrics=metrics,
        n_test=int(metrics.get("n_test", 0)),
        seconds=time.perf_counter() - started,
        feature_seconds=feature_seconds,
        precision=precision,
        tabulated=evaluator.tabulated,
    )


def evaluate(
    backbone: nn.Module,
    dataset: ImageDataset,
    names: Iterable[str],
    transform: Transform,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 512,
    augment: Augment | None = None,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Progress | None = None,
) -> list[Result]:
    """Runs the named protocols on a frozen backbone.

    All processes must call it. They share the passes of the backbone; what follows on the features is done by the
    main process (rank 0) alone, and the others return at once, with nothing. The backbone, its running statistics,
    modes and gradients, and the global random generators are the same afterwards, bit for bit.

    Args:
        backbone: images (n, 3, h, w) to features (n, D); the bare module, not a DistributedDataParallel wrapper.
        dataset: its `train` and `test` splits must be on the device already.
        names: protocols, keys of `EVALUATORS`.
        transform: the test transform, uint8 images to normalised ones.
        seed: of the probes' own generators.
        device: where the backbone is.
        precision: of the backbone's passes.
        batch_size: images per pass; no protocol's number depends on it but by rounding.
        augment: the probes' training augmentation (random resized crop and flip); needed by image protocols only.
        rank: this process.
        world_size: the number of processes.
        on_progress: called with (what is done, done, total): "features" by batches, a protocol by its epochs.

    Returns:
        one `Result` for each name, in order, on the main process; an empty list on the others.

    Raises:
        ValueError: before any image is read on an unknown name or a missing augmentation; else as the protocols do,
            on every process, for features that are not finite.
    """
    evaluators = [get_evaluator(name) for name in names]
    for evaluator in evaluators:
        if evaluator.inputs == "images" and augment is None:
            raise ValueError(f"{evaluator.name}: needs augment (a random resized crop with flip), got None")
    settings: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "on_progress": on_progress,
    }
    features = _Features(backbone, dataset, transform, **settings)
    results = []
    for evaluator in evaluators:
        if evaluator.inputs == "features":
            inputs, feature_seconds = features(evaluator.limits)
            check_features(evaluator.name, *inputs)  # here on every process, so that all of them raise
            compute = partial(evaluator, *inputs, seed=seed) if rank == 0 else dict
        else:
            feature_seconds = 0.0
            compute = partial(evaluator, backbone, dataset, transform, augment, seed=seed, **settings)
        results.append(_timed(evaluator, compute, feature_seconds, precision))
    return results if rank == 0 else []
