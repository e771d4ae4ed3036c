"""``--help`` of a track: every key with its meaning and its value, the selected plug-ins' own keys too."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from ssl_bench.recipe import registry
from ssl_bench.recipe.compose import FOREIGN, GROUPS, choices
from ssl_bench.recipe.schema import Plugin, Recipe

USAGE = """[bold]usage[/]: ssl-bench {track} \\[--processes N|auto] \\[group=choice ...] \\[key=value ...] \\[--debug]
       accelerate launch ssl_bench/{track}.py \\[group=choice ...] \\[key=value ...] \\[--debug]
"""

Row = tuple[str, Any, str]  # key, value, meaning


def print_help(recipe: Recipe) -> None:
    """Prints every key of a recipe's track, with the recipe's values and the keys of its plug-ins."""
    console = Console(highlight=False, soft_wrap=False)
    console.print(USAGE.format(track=recipe.track))
    groups = Table(title="groups (group=choice)", title_justify="left", box=None, pad_edge=False)
    groups.add_column("group", style="bold", no_wrap=True)
    groups.add_column("choices")
    for group in GROUPS:
        if not (recipe.track == "classify" and group == "method"):
            groups.add_row(
                group, ", ".join([*choices(group), *(["or package.module:Name"] if group in FOREIGN else [])])
            )
    console.print(groups)
    for title, rows in _sections(recipe):
        table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
        table.add_column("key", style="bold", no_wrap=True)
        table.add_column("here", no_wrap=False, max_width=26, overflow="fold")
        table.add_column("meaning")
        for key, value, text in rows:
            table.add_row(key, _shown(value), text.replace("[", "\\["))
        console.print(table)


def _sections(recipe: Recipe) -> Iterator[tuple[str, list[Row]]]:
    """The top-level keys, then each section's, with the section's title."""
    sections = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Plugin):
            if value.target:
                sections[f"{field.name} ({value.target})"] = _plugin_rows(field.name, value)
        elif dataclasses.is_dataclass(value):
            title = f"{field.name}: {(inspect.getdoc(value) or '').rstrip('.')}"
            sections[title] = _rows(value, recipe.track, f"{field.name}.")
    yield "the run", _rows(recipe, recipe.track)
    yield from sections.items()


def _rows(node: Any, track: str, prefix: str = "") -> list[Row]:
    """The keys of one section that have a meaning on this track."""
    other = {"pretrain": "classification: ", "classify": "pretraining: "}[track]
    hints = get_type_hints(type(node))
    rows = []
    for field in dataclasses.fields(node):
        text = field.metadata.get("help", "")
        if not text or text.startswith(other):
            continue
        text = re.sub(r"^(pretraining|classification): ", "", text)
        if allowed := re.search(r"Literal\[(.*?)\]", str(hints[field.name])):
            text += f" ({allowed[1]}{', true, false' if 'bool' in str(hints[field.name]) else ''})"
        rows.append((prefix + field.name, getattr(node, field.name), text))
    return rows


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
