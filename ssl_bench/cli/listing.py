"""What a recipe and a study can name: ``ssl-bench list [methods|optimizers|...]``."""

import inspect
import re
from collections.abc import Callable, Iterator
from textwrap import shorten

from ssl_bench.recipe.compose import CONFIGS, choices
from ssl_bench.recipe.registry import builtin, installed
from ssl_bench.recipe.values import load_yaml

Rows = Iterator[tuple[str, str]]  # name, one line about it


def main(what: str | None) -> int:
    """Prints names and a line about each.

    Args:
        what: one of ``KINDS``; None for all of them.

    Raises:
        ValueError: another word, in one line.
    """
    if what is not None and what not in KINDS:
        raise ValueError(f"list: the argument must be {', '.join(KINDS)} or nothing, got {what!r}")
    for kind in KINDS if what is None else (what,):
        if what is None:
            print(f"{kind}:")
        rows = list(KINDS[kind]())
        width, indent = max(len(name) for name, _ in rows), "" if what else "  "
        for name, about in rows:
            text = shorten(about, 118 - width - len(indent), placeholder=" ...")
            print(f"{indent}{name:<{width}}  {text}".rstrip())
    return 0


def _plugins(kind: str) -> Callable[[], Rows]:
    """Built-in ones, the further files of their group in configs/, and entry points."""

    def rows() -> Rows:
        known = builtin(kind)
        for name in sorted({*known, *(choices(kind) if (CONFIGS / kind).is_dir() else ())}):
            yield name, _first_line(known[name]) if name in known else _comment(kind, name)
        yield from _installed(kind)

    return rows


def _first_line(thing: object) -> str:
    named = thing if callable(thing) and hasattr(thing, "__name__") else type(thing)
    return (inspect.getdoc(named) or "").partition("\n")[0]


def _installed(kind: str) -> Rows:
    for name, point in sorted(installed(kind).items()):
        yield name, f"installed: {point.value}"


def _comment(group: str, name: str) -> str:
    """The first sentence of a config file's opening comment, or the class that it names."""
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    words = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words += line.lstrip("# ").split()
    if words:
        return re.split(r"[.] (?=[A-Z])", " ".join(words))[0].rstrip(".")
    content = load_yaml(name, text) or {}
    return str(content.get("target") or content.get("name") or "")


def _data() -> Rows:
    from ssl_bench.data.dataset import SOURCES

    yield from SOURCES.items()
    yield from _installed("dataset")


def _models() -> Rows:
    for name in choices("model"):
        yield name, _comment("model", name)
    yield from _installed("backbone")
    yield "model.name=NAME", "any of timm's models (timm.list_models())"


def _studies() -> Rows:
    for group in ("study", "tune"):
        for name in choices(group):
            yield name, f"{'' if group == 'study' else 'tune: '}{_comment(group, name)}"


KINDS: dict[str, Callable[[], Rows]] = {
    "methods": _plugins("method"),
    "optimizers": _plugins("optimizer"),
    "schedules": _plugins("schedule"),
    "evaluators": _plugins("evaluator"),
    "data": _data,
    "models": _models,
    "studies": _studies,
}
