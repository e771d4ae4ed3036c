"""Evaluators of a frozen backbone, each a named and versioned protocol: a protocol's defaults never change in place."""

from ssl_bench.eval.base import Evaluator, Progress
from ssl_bench.eval.features import extract_features
from ssl_bench.eval.knn import KNN, knn_predict
from ssl_bench.eval.linear import LinearCached, holdout
from ssl_bench.eval.linear_augmented import AugmentedProbe
from ssl_bench.eval.online import Online
from ssl_bench.eval.run import EVALUATORS, Result, evaluate, get_evaluator

__all__ = [
    "EVALUATORS",
    "KNN",
    "AugmentedProbe",
    "Evaluator",
    "LinearCached",
    "Online",
    "Progress",
    "Result",
    "evaluate",
    "extract_features",
    "get_evaluator",
    "holdout",
    "knn_predict",
]
