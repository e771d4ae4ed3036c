"""``--help`` of a track: every key with its help, default and type, the selected plug-ins' keys too."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from ssl_bench.recipe import registry
from ssl_bench.recipe.compose import GROUPS, PLUGINS, choices, compose
from ssl_bench.recipe.schema import Plugin, Recipe

USAGE = """[bold]usage[/]: accelerate launch ssl_bench/{track}.py \\[group=choice ...] \\[key=value ...] \\[--debug]
       ssl-bench {track} \\[group=choice ...] \\[key=value ...] \\[--debug]
"""


def print_help(track: str, words: Sequence[str]) -> None:
    """Prints every key of a track; ``words`` select the groups whose plug-ins' keys are shown, as in a run."""
    console = Console(highlight=False, soft_wrap=False)
    console.print(USAGE.format(track=track))
    groups = Table(title="groups (group=choice)", title_justify="left", box=None, pad_edge=False)
    groups.add_column("group", style="bold", no_wrap=True)
    groups.add_column("choices")
    for group in GROUPS:
        if not (track == "classify" and group == "method"):
            names = [name for name in choices(group) if name != "plugin"]
            more = ", or package.module:Class" if group in PLUGINS else ""
            groups.add_row(group, ", ".join(names) + more)
    console.print(groups)
    recipe = compose(track, words)
    for title, rows in _sections(recipe):
        table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
        table.add_column("key", style="bold", no_wrap=True)
        table.add_column("here", no_wrap=False, max_width=26, overflow="fold")
        table.add_column("meaning")
        for key, value, text in rows:
            table.add_row(key, _shown(value), text.replace("[", "\\["))
        console.print(table)


def _sections(recipe: Recipe) -> Iterator[tuple[str, list[tuple[str, Any, str]]]]:
    top: list[tuple[str, Any, str]] = []
    nested: list[tuple[str, list[tuple[str, Any, str]]]] = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Plugin):
            if value.target:
                nested.append((f"{field.name} ({value.target})", _plugin_rows(field.name, value)))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            title = f"{field.name}: {(inspect.getdoc(value) or '').rstrip('.')}"
            rows = [
                (f"{field.name}.{inner.name}", getattr(value, inner.name), _text(type(value), inner))
                for inner in dataclasses.fields(value)
                if _serves(recipe.track, inner.metadata.get("help", ""))
            ]
            nested.append((title, rows))
        elif field.name != "track":
            top.append((field.name, value, _text(Recipe, field)))
    yield "the run", top
    yield from nested


def _serves(track: str, text: str) -> bool:
    """Whether a key is of use on this track; helps that begin with the other track's name are left out."""
    other = {"pretrain": "classification:", "classify": "pretraining:"}[track]
    return not text.startswith(other)


def _text(owner: type, field: dataclasses.Field[Any]) -> str:
    text = re.sub(r"^(pretraining|classification): ", "", field.metadata.get("help", ""))
    hint = get_type_hints(owner)[field.name]
    words = re.search(r"Literal\[(.*?)\]", str(hint))
    also = ", true, false" if words and "bool" in str(hint) else ""
    return f"{text} ({words[1]}{also})" if words else text


def _plugin_rows(kind: str, plugin: Plugin) -> list[tuple[str, Any, str]]:
    known = registry.options(registry.resolve(kind, plugin.target))
    rows: list[tuple[str, Any, str]] = [(f"{kind}.target", plugin.target, "which one")]
    for name, option in known.items():
        stem = name.removesuffix("_steps")
        given = [unit for unit in (name, f"{stem}_epochs", f"{stem}_fraction") if unit in plugin.options]
        shown = given[0] if given else name
        text = option.help
        if stem != name:
            text += f" (also as {stem}_epochs or {stem}_fraction of the run)"
        rows.append((f"{kind}.{shown}", plugin.options.get(shown), text))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "\\[" + ",".join(_shown(one) for one in value) + "]"
    return str(value)
