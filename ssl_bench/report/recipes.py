"""What of a recipe makes a cell of the report: the key that its runs share, and what tells it from other cells."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ssl_bench.recipe.identity import IRRELEVANT, PLACES, counts_by_path, flatten, without_additions
from ssl_bench.report.tables import on_one_line, one_line

# Axes of every table, so never part of a variant's name.
_AXES = frozenset(
    {"seed", "track", "data.name", "data.path", "batch_size", "method.target", "optimizer.target", "optimizer.lr"}
)
# What is measured during a run and does not change its result.
_OBSERVING = frozenset(
    {
        *("telemetry.every", "eval.protocols", "eval.baseline", "eval.batch_size"),
        *("eval.online_every_epochs", "eval.test_every_epochs"),
        *("eval.data", "eval.data_size", "eval.data_content"),  # what is measured there has a protocol of its own
    }
)
_PLUGINS = ("method", "optimizer", "schedule")  # sections of a recipe whose options depend on their target


def cell_key(recipe: Mapping[str, Any], *, less: Container[str] = ()) -> str:
    """16 hex digits, a hash of the recipe.

    Args:
        recipe: nested; its seed and everything that cannot change a result are left out.
        less: more dotted keys, or whole sections, to leave out.
    """
    flat = flatten(recipe)
    relevant = _comparable(flat) | {name: flat.get(name) for name in _AXES - {"seed", "data.path"}}
    relevant = {n: value for n, value in relevant.items() if n not in less and n.split(".")[0] not in less}
    if counts_by_path(flat):  # elsewhere the path only says where the same files lie
        relevant["data.path"] = flat.get("data.path")
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def variants(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each recipe the keys, with its values, in which recipes of its batch size differ; "" where they do not.

    Args:
        recipes: nested; of one optimizer, problem and data set.
    """
    flat = [_comparable(flatten(recipe)) for recipe in recipes]
    by_batch: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for recipe, here in zip(recipes, flat, strict=True):
        by_batch[int(recipe["batch_size"])].append(here)
    found = {name for group in by_batch.values() for name in _varying(group)}
    varying = sorted(found, key=lambda name: (name.split(".")[0], not name.endswith(".target"), name))
    return [
        on_one_line(
            ", ".join(f"{name.removesuffix('.target')}={_printed(here[name])}" for name in varying if name in here)
        )
        for here in flat
    ]


def lookup(recipe: Mapping[str, Any], dotted: str, default: Any = None) -> Any:
    """A value of a nested recipe by its dotted key."""
    value: Any = recipe
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _comparable(flat: Mapping[str, Any]) -> dict[str, Any]:
    left_out = IRRELEVANT | _AXES | _OBSERVING | PLACES.keys()
    return {name: value for name, value in without_additions(flat).items() if name not in left_out}


def _varying(recipes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys with more than one value; a plug-in's options are compared among recipes with the same plug-in."""
    varying = set()
    for name in {name for recipe in recipes for name in recipe}:
        target = f"{name.split('.')[0]}.target"
        groups: dict[Any, set[str]] = defaultdict(set)
        for recipe in recipes:
            plugin = recipe.get(target) if name.split(".")[0] in _PLUGINS and name != target else None
            groups[plugin].add(json.dumps(recipe.get(name)))
        if any(len(values) > 1 for values in groups.values()):
            varying.add(name)
    return varying


def _printed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else one_line(value)
