"""A self-supervised learning benchmark suite for large-batch optimizers.

    result = ssl_bench.pretrain(data="digits", optimizer="tvlars", steps=40)
    result.metrics["loss"], result.results, result.backbone, result.run_dir

The functions are those of `ssl_bench.cli.api`, imported when they are first used: ``import ssl_bench`` alone is cheap.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# These four are modules and folders too, and callable (`ssl_bench.runtime.callable_module`).
_MODULES = ("pretrain", "classify", "study", "report")
_API = ("evaluate", "load", "Result", "StudyResult")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ssl_bench.{name}")
    if name in _API:
        return getattr(import_module("ssl_bench.cli.api"), name)
    raise AttributeError(f"module 'ssl_bench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_API})
