"""Finds code by name, for every kind that a recipe names, and checks keyword arguments against signatures.

A name is a key of the folder's dict, an installed entry point (groups ``ssl_bench.methods``, ``ssl_bench.optimizers``,
``ssl_bench.schedules``, ``ssl_bench.evaluators``, ``ssl_bench.datasets``, ``ssl_bench.backbones``), or
``package.module:Name``. Built-in and outside code are treated alike.
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import parse
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ssl_bench.runtime.suggestion import nearest

# Arguments that the suite itself passes: the network, the parameters (in groups: a recipe's param_groups says how those
# of ndim <= 1 are treated), the length of the run and its batch size.
PROVIDED = frozenset({"self", "backbone", "feature_dim", "params", "decay_1d", "adapt_1d", "total_steps", "batch_size"})

_REFUSED = re.compile(r"[\w\[\]]+: (?P<name>\w+)(?P<rest>(\[\d+\])? must be .*), got (?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """One keyword of a plug-in: its annotation, default (``inspect.Parameter.empty`` = required) and help."""

    name: str
    annotation: Any
    default: Any
    help: str

    @cached_property
    def checker(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation, config=ConfigDict(arbitrary_types_allowed=True))


def builtin(kind: str) -> Mapping[str, Any]:
    """What the suite itself offers of a kind, by name; data sets and backbones are known to their folders by name."""
    if kind == "method":
        from ssl_bench.methods import METHODS

        return METHODS
    if kind == "evaluator":
        from ssl_bench.eval import EVALUATORS

        return EVALUATORS
    if kind == "dataset":
        from ssl_bench.data.dataset import DATASETS

        return {name: name for name in DATASETS}
    if kind == "backbone":
        return {}  # any of timm's, which is not imported here
    from ssl_bench.optim import OPTIMIZERS, SCHEDULES

    return OPTIMIZERS if kind == "optimizer" else SCHEDULES


@cache  # reads the metadata of every installed package
def installed(kind: str) -> dict[str, EntryPoint]:
    """Entry points that installed packages offer for a kind, by name."""
    return {point.name: point for point in entry_points(group=f"ssl_bench.{kind}s")}


def resolve(kind: str, target: str) -> Any:
    """The object behind a name.

    Args:
        kind: "method", "optimizer", "schedule", "evaluator", "dataset" or "backbone".
        target: a known name, an entry point's name, or ``package.module:Name`` (the current directory counts as
            importable, as with ``python -m``).

    Returns:
        a method's, optimizer's or schedule's class or function; an evaluator, made without arguments where the name is
        a class's; for a data set or backbone the name itself if it is built in, else the callable.

    Raises:
        ValueError: unknown, with the known names and the nearest; or not importable.
    """
    known = builtin(kind)
    if target in known:
        return known[target]
    foreign = installed(kind)
    try:
        if target in foreign:
            found = foreign[target].load()
        elif ":" in target:
            module, _, attribute = target.partition(":")
            here = str(Path.cwd())
            if here not in sys.path and "" not in sys.path:
                sys.path.append(here)
            found = getattr(importlib.import_module(module), attribute)
        elif kind == "backbone":
            return target
        else:
            names = sorted({*known, *foreign})
            raise ValueError(
                f"unknown {kind} {target!r}{nearest(target, names)} (known: {', '.join(names)}; or package.module:Name)"
            )
        if kind == "evaluator" and inspect.isclass(found):
            found = found()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{kind} {target!r} cannot be imported: {error}") from error
    if not callable(found) or (kind == "evaluator" and not hasattr(found, "name")):
        wanted = "an object with a name that can be called" if kind == "evaluator" else "a class or function"
        raise ValueError(f"{kind} {target!r} must be {wanted}, got {found!r}")
    return found


def foreign(kind: str, target: str) -> Callable[..., Any] | None:
    """What makes a data set or a backbone from outside; None for a built-in one, which its name says."""
    found = resolve(kind, target)
    return None if isinstance(found, str) else found


@cache
def options(factory: Callable[..., Any]) -> dict[str, Option]:
    """The keywords that a recipe may set, from the signature, with their help from the docstring (of any style)."""
    owners = [factory, factory.__init__] if inspect.isclass(factory) else [factory]
    entries = [entry for owner in owners for entry in parse(inspect.getdoc(owner) or "").params]
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}
    hints = get_type_hints(owners[-1])
    return {
        name: Option(name, hints.get(name, Any), parameter.default, texts.get(name, ""))
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in PROVIDED and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def check(kind: str, target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a plug-in's keyword values against its signature and fills in its defaults.

    A keyword ``X_steps`` may be given as ``X_epochs`` (passes over the train set) or ``X_fraction`` (of the run)
    instead; it is returned under that name, and `in_steps` turns it into steps once the size of the data is known.

    Raises:
        ValueError: one line that names the key, what it must be and what was given.
    """
    factory = resolve(kind, target)
    known = options(factory)
    if kind == "optimizer" and "model" in known:
        raise ValueError(f"optimizer {target!r} must take parameters, got one that takes the model")
    units = {unit: name for name in known for unit in units_of(name)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in units and not open_ended:
            raise ValueError(
                f"unknown key '{kind}.{name}'{nearest(name, units)} ({target} takes: {', '.join(sorted(units))})"
            )
        if name in units and value is None and (name not in known or len(units_of(name)) > 1):
            continue  # a duration that is given in another unit, or left at the plug-in's default
        checker = known[name].checker if name in known else TypeAdapter(float if name in units else Any)
        try:
            result[name] = checker.validate_python(value)
        except ValidationError as error:
            raise ValueError(explain(error, f"{kind}.{name}")) from None
        if name in units and name not in known and not 0 <= result[name] < math.inf:
            raise ValueError(f"{kind}.{name} must be a number in [0, inf), got {result[name]!r}")
    for name, option in known.items():
        given = [f"{kind}.{unit}" for unit in units_of(name) if unit in result]
        if len(given) > 1:
            raise ValueError(f"give only one of {', '.join(given)}")
        if not given and option.default is inspect.Parameter.empty:
            what = f" ({option.help.rstrip('.')})" if option.help else ""
            raise ValueError(
                f"{kind} {target!r} needs {' or '.join(f'{kind}.{unit}' for unit in units_of(name))}{what}"
            )
        if not given:
            result[name] = option.default
    # A plug-in may write out defaults that depend on its other keywords: what ran is what is recorded.
    try:
        return getattr(factory, "resolve_options", dict)(result)
    except ValueError as error:
        raise ValueError(in_recipes_terms(kind, str(error), result)) from None


def in_recipes_terms(kind: str, text: str, options: Mapping[str, Any], whole: Mapping[str, str] | None = None) -> str:
    """A plug-in's refusal of a keyword, by the key and in the unit and value of the recipe; another text as it is.

    Args:
        kind: "optimizer", say.
        text: ``COMPONENT: NAME must be ..., got VALUE``.
        options: what the recipe gives.
        whole: what a duration may be at most, by its unit.
    """
    found = _REFUSED.fullmatch(text)
    units = [] if found is None else units_of(found["name"])
    given = next((unit for unit in units if options.get(unit) is not None), None)
    if found is None or given is None:
        return text
    rest, value = found["rest"], found["value"]
    if given != found["name"]:
        value = f"{options[given]:g}"
    for unit, most in (whole or {}).items():
        if given.endswith(unit):
            rest = re.sub(r"total_steps=\d+", most, rest)
    return f"{kind}.{given}{rest}, got {value}"


def units_of(name: str) -> list[str]:
    """The names under which a recipe may give a keyword: itself, and for a duration its other units."""
    stem = name.removesuffix("_steps")
    return [name] if stem == name else [name, f"{stem}_epochs", f"{stem}_fraction"]


def explain(error: ValidationError, path: str = "") -> str:
    """Pydantic's first complaint as one line: ``NAME must be WHAT IS ALLOWED, got WHAT WAS GIVEN``."""
    first = error.errors()[0]
    # Pydantic adds the names of union members and of positions to the location; those are not keys.
    parts = [str(part) for part in first["loc"] if not (isinstance(part, str) and re.search(r"[\[\(]", part))]
    name = ".".join([*([path] if path else []), *parts])
    if first["type"] == "missing":
        return f"{name} is required"
    message = re.sub(r", (unable to|got a) .*| after validation, .*", "", first["msg"])
    message, changed = re.subn(r"^\w+ should ", "must ", message)
    return f"{name}{'' if changed else ':'} {message}, got {first['input']!r}"


def in_steps(
    factory: Callable[..., Any], values: Mapping[str, Any], steps_per_epoch: float, total_steps: int
) -> dict[str, Any]:
    """The same values with every ``X_epochs`` and ``X_fraction`` turned into the keyword ``X_steps``.

    Args:
        factory: the plug-in; a keyword annotated as float may get a fraction of a step, the others a whole number.
        values: what `check` returned.
        steps_per_epoch: images in the train set over the global batch size.
        total_steps: the length of the run.
    """
    result = dict(values)
    for name, option in options(factory).items():
        for unit, length in zip(units_of(name)[1:], (steps_per_epoch, total_steps), strict=False):
            if unit in result:
                value = result.pop(unit) * length
                result[name] = value if option.annotation is float else round(value)
    return result
