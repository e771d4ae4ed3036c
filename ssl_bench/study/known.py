"""Recipes that were composed before: a study's status then needs neither torch nor the plug-ins.

They are kept in the cache as `recipes.json`, and count as long as no file of the suite that they depend on changes.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssl_bench.recipe.compose import PLUGINS, compose, composed
from ssl_bench.recipe.identity import NAMED_DATA
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.storage import atomic_file
from ssl_bench.runtime.paths import cache_folder

MOST = 2000  # recipes in the file, some 3 kB each
_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = ("recipe", "methods", "optim", "eval", "data", "configs")


class KnownRecipes:
    """Composes recipes, or knows them from an earlier time; either way their plug-ins' options are plain values."""

    def __init__(self) -> None:
        self._path, self._changed = cache_folder() / "recipes.json", False
        self._recipes: dict[str, Any] = {}
        self._read: dict[str, Any] = {}
        try:
            content = json.loads(self._path.read_bytes())
            if content["fingerprint"] == _fingerprint():
                self._read = dict(content["recipes"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # none, or a damaged one

    def __call__(self, track: str, overrides: Sequence[str]) -> Recipe:
        """See `ssl_bench.recipe.compose.compose`."""
        key = json.dumps([track, *overrides])
        if key in self._read:
            try:
                recipe = composed(self._read[key])
            except (ValueError, KeyError, TypeError, AttributeError):
                pass  # damaged
            else:
                self._recipes[key] = self._read[key]
                return recipe
        plain = (recipe := compose(track, overrides)).to_dict()
        if _lasts(recipe):
            self._recipes[key], self._changed = plain, True
        return composed(plain)

    def save(self) -> None:
        """Keeps what was composed, these last; without a word where that cannot be written."""
        if not self._changed:
            return
        others = {key: plain for key, plain in self._read.items() if key not in self._recipes}
        recipes = dict(list((others | self._recipes).items())[-MOST:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as file:
                file.write(json.dumps({"fingerprint": _fingerprint(), "recipes": recipes}).encode())
        except OSError:
            pass


def _lasts(recipe: Recipe) -> bool:
    """Whether a recipe depends on nothing but the suite's own files: no code, data or weights from outside."""
    from ssl_bench.recipe.registry import builtin

    evaluators = builtin("evaluator")
    return (
        all(plugin.target in ("", *builtin(kind)) for kind in PLUGINS if (plugin := getattr(recipe, kind)))
        and {recipe.data.name, recipe.eval.data} <= {*NAMED_DATA, None}
        and all(name in evaluators for name in recipe.eval.protocols)
        and recipe.model.checkpoint is None
        and ":" not in recipe.model.name
    )


@cache
def _fingerprint() -> str:
    """Name, size and time of the files, and the versions, on which a composed recipe depends."""
    files = [path for folder in _FOLDERS for path in (_PACKAGE / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    seen = [(str(path), (about := path.stat()).st_size, about.st_mtime_ns) for path in sorted(files)]
    return json.dumps([sys.version, *map(_version, ("torch", "timm", "pydantic")), seen])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
