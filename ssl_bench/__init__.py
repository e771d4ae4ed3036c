"""A self-supervised learning benchmark suite for large-batch optimizers.

    result = ssl_bench.pretrain(data="digits", optimizer="tvlars", steps=40)
    result.metrics["loss"], result.results, result.backbone, result.run_dir

The functions are those of `ssl_bench.cli.api`, imported when they are first used: ``import ssl_bench`` alone is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_bench.cli.api import Result, StudyResult, classify, evaluate, load, pretrain, report, study

__version__ = "0.1.0"

__all__ = ["Result", "StudyResult", "classify", "evaluate", "load", "pretrain", "report", "study"]

_MODULES = ("classify", "pretrain", "report", "study")  # too, and callable (`ssl_bench.runtime.callable_module`)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ssl_bench.{name}")
    if name in __all__:
        return getattr(import_module("ssl_bench.cli.api"), name)
    raise AttributeError(f"module 'ssl_bench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
