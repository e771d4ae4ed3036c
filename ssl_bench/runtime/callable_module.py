"""Modules that can be called: ``ssl_bench.pretrain`` is the launchers' script and the Python API's function, in one.

A function of that name in ``ssl_bench/__init__.py`` would be replaced by the module as soon as somebody imports that,
and the other way round; which of the two ``ssl_bench.pretrain`` is would depend on the order of imports.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


def make_callable(module: str, function: str) -> None:
    """Makes a loaded module callable.

    Args:
        module: its ``__name__``.
        function: ``package.module:name`` of what a call runs, imported at the first call.
    """
    own = sys.modules[module]
    own.__dict__["_function"] = function
    own.__class__ = _CallableModule


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self.__wrapped__(*args, **keys)

    @property
    def __wrapped__(self) -> Any:
        """By which `inspect.signature`, and so a notebook's help, find the function's signature."""
        where, _, name = self.__dict__["_function"].partition(":")
        return getattr(importlib.import_module(where), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)
