"""Looks up methods, optimizers and schedules by name, and checks their keyword arguments against their signatures.

A name is a key of the folder's dict, an installed entry point (groups ``ssl_bench.methods``, ``ssl_bench.optimizers``,
``ssl_bench.schedules``), or ``package.module:Attribute``. Built-in and foreign plug-ins take the same way.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ssl_bench.runtime.suggestion import nearest

KINDS = {"method": "methods", "optimizer": "optimizers", "schedule": "schedules"}

# What the suite itself passes: the network, the parameters (in groups: a recipe's param_groups says how those of
# ndim <= 1 are treated), and the length of the run.
PROVIDED = frozenset({"self", "backbone", "feature_dim", "params", "decay_1d", "adapt_1d", "total_steps"})


@dataclass(frozen=True)
class Option:
    """One keyword of a plug-in: its annotation, default (``inspect.Parameter.empty`` = required) and help."""

    name: str
    annotation: Any
    default: Any
    help: str


def _builtin(kind: str) -> Mapping[str, Callable[..., Any]]:
    if kind == "method":
        from ssl_bench.methods import METHODS

        return METHODS
    if kind == "optimizer":
        from ssl_bench.optim import OPTIMIZERS

        return OPTIMIZERS
    from ssl_bench.optim import SCHEDULES

    return SCHEDULES


def installed(kind: str) -> dict[str, Any]:
    """Entry points that other packages offer for this kind, by name."""
    return {point.name: point for point in entry_points(group=f"ssl_bench.{KINDS[kind]}")}


def resolve(kind: str, target: str) -> Callable[..., Any]:
    """The class or function behind a name.

    Args:
        kind: "method", "optimizer" or "schedule".
        target: a known name, an entry point's name, or ``package.module:Attribute`` (the current folder counts as
            importable, as with ``python -m``).

    Raises:
        ValueError: nothing of that name; lists the known ones and the nearest.
    """
    known = _builtin(kind)
    if target in known:
        return known[target]
    foreign = installed(kind)  # reads every package's metadata: not for a name that is known already
    if target in foreign:
        return foreign[target].load()
    if ":" not in target:
        names = sorted({*known, *foreign})
        raise ValueError(
            f"unknown {kind} {target!r}{nearest(target, names)} (known: {', '.join(names)}; or package.module:Class)"
        )
    module, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {target!r} cannot be imported: {error}") from error


def options(factory: Callable[..., Any]) -> dict[str, Option]:
    """The keywords that a recipe may set, from the signature, with their help from the docstring's ``Args:``."""
    signature = inspect.signature(factory)
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    texts = _documented(inspect.getdoc(factory) or "")
    if inspect.isclass(factory):
        texts |= _documented(inspect.getdoc(factory.__init__) or "")
    return {
        name: Option(name, hints.get(name, Any), parameter.default, texts.get(name, ""))
        for name, parameter in signature.parameters.items()
        if name not in PROVIDED and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _documented(docstring: str) -> dict[str, str]:
    """The entries of a Google style ``Args:`` block."""
    block = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    if not block:
        return {}
    entries = re.findall(r"^    (\w+)(?: \(.*?\))?: (.*?)(?=^    \w|\Z)", block[1] + "\n", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def check(kind: str, target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a plug-in's keyword values against its signature and fills in its defaults.

    A keyword ``X_steps`` may be given as ``X_epochs`` (passes over the train set) or ``X_fraction`` (of the run)
    instead; it is returned under that name, and `in_steps` turns it into steps once the size of the data is known.

    Raises:
        ValueError: one line that names the key, what was given and what is allowed.
    """
    factory = resolve(kind, target)
    known = options(factory)
    units = {unit: name for name in known for unit in _units(name)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name in units and value is None and (name not in known or len(_units(name)) > 1):
            continue  # a duration that is given in another unit, or left at the plug-in's default
        if name in known:
            result[name] = checked(f"{kind}.{name}", known[name].annotation, value)
        elif name in units:
            result[name] = checked(f"{kind}.{name}", float, value)
        elif open_ended:
            result[name] = value
        else:
            raise ValueError(
                f"unknown key '{kind}.{name}'{nearest(name, units)} ({target} takes: {', '.join(sorted(units))})"
            )
    for name, option in known.items():
        given = [unit for unit in _units(name) if unit in result]
        if len(given) > 1:
            raise ValueError(f"give only one of {', '.join(f'{kind}.{unit}' for unit in given)}")
        if given:
            continue
        if option.default is inspect.Parameter.empty:
            raise ValueError(f"{kind} {target!r} needs {' or '.join(f'{kind}.{unit}' for unit in _units(name))}")
        result[name] = option.default
    return result


def _units(name: str) -> list[str]:
    """The names under which a recipe may give a keyword: itself, and for a duration its other units."""
    stem = name.removesuffix("_steps")
    return [name] if stem == name else [name, f"{stem}_epochs", f"{stem}_fraction"]


def checked(path: str, annotation: Any, value: Any) -> Any:
    """A value converted to its annotation, or a one-line ValueError that names the key."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(explain(error, path)) from None


def explain(error: ValidationError, path: str = "") -> str:
    """The first complaint of pydantic as one line: key, what was given, what is allowed."""
    first = error.errors()[0]
    # Pydantic adds the names of union members and of positions to the location; those are no keys.
    parts = [str(part) for part in first["loc"] if not (isinstance(part, str) and re.search(r"[\[\(]", part))]
    name = ".".join([*([path] if path else []), *parts])
    if first["type"] == "missing":
        return f"{name} is required"
    message = first["msg"].replace("Input should be ", "")
    return f"{name}: got {first['input']!r}, allowed: {message}"


def in_steps(
    factory: Callable[..., Any], values: Mapping[str, Any], steps_per_epoch: float, total_steps: int
) -> dict[str, Any]:
    """The same values with every ``X_epochs`` and ``X_fraction`` turned into the keyword ``X_steps``, once.

    Args:
        factory: the plug-in; a keyword annotated as float may get a fraction of a step, the others a whole number.
        values: what `check` returned.
        steps_per_epoch: images in the train set over the global batch size.
        total_steps: the length of the run.
    """
    result = dict(values)
    for name, option in options(factory).items():
        for unit, length in zip(_units(name)[1:], (steps_per_epoch, total_steps), strict=False):
            if unit in result:
                value = result.pop(unit) * length
                result[name] = value if option.annotation is float else round(value)
    return result
