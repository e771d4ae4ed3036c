"""Evaluators of a frozen backbone, each a named and versioned protocol: a protocol's defaults never change in place.

A new evaluator is one class in one file. It is called with a `Probe` and returns numbers::

    class NearestMean:
        name = "nearest-mean-v1"

        def __call__(self, probe: Probe) -> dict[str, float]:
            x, y = probe.features("train"), probe.labels("train")  # (N, D), (N,)
            means = torch.stack([x[y == label].mean(dim=0) for label in range(probe.classes)])
            found = torch.cdist(probe.features("test"), means).argmin(dim=1)
            return {"top1": 100 * (found == probe.labels("test")).double().mean().item()}

    evaluate(backbone, dataset, ["knn-v1", NearestMean()], transform)
"""

from ssl_bench.eval.features import Progress, extract_features
from ssl_bench.eval.knn import KNN, knn_predict
from ssl_bench.eval.linear import LinearCached, holdout
from ssl_bench.eval.linear_augmented import AugmentedProbe
from ssl_bench.eval.online import Online
from ssl_bench.eval.probe import Probe
from ssl_bench.eval.run import EVALUATORS, Evaluator, Result, evaluate, get_evaluator

__all__ = [
    "EVALUATORS",
    "KNN",
    "AugmentedProbe",
    "Evaluator",
    "LinearCached",
    "Online",
    "Probe",
    "Progress",
    "Result",
    "evaluate",
    "extract_features",
    "get_evaluator",
    "holdout",
    "knn_predict",
]
