"""Runs evaluators on a backbone and a data set, with the features extracted once."""

import difflib
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NotRequired, Protocol, TypedDict

from torch import nn

from ssl_bench.eval.alignment_uniformity import AlignmentUniformity
from ssl_bench.eval.alpha_req import AlphaReQ
from ssl_bench.eval.features import Transform
from ssl_bench.eval.few_shot import FewShot
from ssl_bench.eval.finetune import Finetune
from ssl_bench.eval.knn import KNN
from ssl_bench.eval.lidar import LiDAR
from ssl_bench.eval.linear import LinearCached
from ssl_bench.eval.linear_augmented import LINEAR_AUG, PAPER_PROBE, RELEASED_PROBE, SINGLE_FAULTS
from ssl_bench.eval.online import Online
from ssl_bench.eval.pca_2d import PCA2D
from ssl_bench.eval.probe import ImageDataset, Metrics, Points, Probe, WithPoints
from ssl_bench.eval.rankme import RankMe


class Evaluator(Protocol):
    """A named protocol that turns a probe into numbers; two of its attributes may be missing.

    `tabulated` (True where missing): whether its numbers may stand in a table of results; a monitor's may not.
    `needs_augment` (False where missing): whether it uses `probe.augment`, which is then required.
    """

    @property
    def name(self) -> str:
        """Name and version, which stand beside every number it gives."""

    @property
    def tabulated(self) -> bool:
        return True

    def __call__(self, probe: Probe) -> Metrics:
        """Measures, on every process; the numbers of the main process count.

        Returns:
            numbers by name, accuracies in percent: "top1" is the headline where there is one; "n_test", the number of
            test images, where it is not that of the probe.
        """


_PROBES = (LINEAR_AUG, PAPER_PROBE, RELEASED_PROBE, *SINGLE_FAULTS)
_LABEL_FREE = (RankMe(), AlphaReQ(), LiDAR(), AlignmentUniformity(), PCA2D())
EVALUATORS: dict[str, Evaluator] = {
    each.name: each for each in (KNN(), LinearCached(), *_PROBES, FewShot(), Finetune(), *_LABEL_FREE, Online())
}


def get_evaluator(name: str) -> Evaluator:
    """Looks up a built-in evaluator.

    Raises:
        ValueError: on an unknown name, with the nearest and all known ones.
    """
    if name not in EVALUATORS:
        close = difflib.get_close_matches(name, EVALUATORS, n=1)
        suggestion = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown evaluator {name!r}{suggestion} (known: {', '.join(EVALUATORS)})")
    return EVALUATORS[name]


class Result(TypedDict):
    """The numbers of one evaluator and what they cost."""

    protocol: str
    metrics: Metrics
    n_test: int | None  # None where there are no test images
    seconds: float  # of this evaluator alone
    feature_seconds: float  # of extracting the features, which it may share with others; 0 if it uses none
    precision: str  # of the backbone's passes; what follows them is fp32
    tabulated: bool  # False: a monitor's number, not for a table of results
    points: NotRequired[Points]  # of a picture, see `WithPoints`


def evaluate(
    backbone: nn.Module,
    dataset: ImageDataset,
    evaluators: Iterable[Evaluator | str],
    transform: Transform,
    **settings: Any,
) -> list[Result]:
    """Runs evaluators on a frozen backbone; all processes must call it.

    The backbone, its running statistics, modes and gradients, and the global random generators are the same
    afterwards, bit for bit.

    Args:
        backbone: see `Probe`.
        dataset: see `Probe`.
        transform: see `Probe`.
        evaluators: evaluators, or keys of `EVALUATORS`.
        settings: `Probe`'s keywords: seed, device, precision, batch_size, augment, rank, world_size, on_progress.

    Returns:
        one `Result` for each evaluator, in order, on the main process; an empty list on the others.

    Raises:
        ValueError: before any image is read on an unknown name or a missing augmentation; else as the evaluators do,
            with the evaluator's name in front.
    """
    found = [get_evaluator(each) if isinstance(each, str) else each for each in evaluators]
    probe = Probe(backbone, dataset, transform, **settings)
    for evaluator in found:
        if probe.augment is None and getattr(evaluator, "needs_augment", False):
            raise ValueError(f"{evaluator.name}: augment must be a random resized crop with flip, got None")
    results: list[Result] = []
    for evaluator in found:
        before, probe = set(probe.extracted), replace(probe, used=set())
        started = time.perf_counter()
        try:
            metrics = evaluator(probe)
        except ValueError as error:
            raise ValueError(f"{evaluator.name}: {error}") from error
        elapsed = time.perf_counter() - started
        for name, value in metrics.items():
            if not isinstance(value, int | float):  # a tensor would fail only later, when the results are written
                raise ValueError(f"{evaluator.name}: {name} must be a plain number, got a {type(value).__name__}")
        if not probe.main:
            continue
        feature_seconds = {key: probe.extracted[key][1] for key in probe.used}
        results.append(
            Result(
                protocol=evaluator.name,
                metrics=dict(metrics),
                n_test=int(metrics.get("n_test", len(probe.images("test")))) or None,
                seconds=elapsed - sum(took for key, took in feature_seconds.items() if key not in before),
                feature_seconds=sum(feature_seconds.values()),
                precision=probe.precision,
                tabulated=getattr(evaluator, "tabulated", True),
            )
        )
        if isinstance(metrics, WithPoints):
            results[-1]["points"] = metrics.points
    return results
