"""Reads the YAML files of studies and searches, strictly, and turns their values into words of a command line."""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from ssl_bench.recipe.compose import load_yaml
from ssl_bench.runtime.suggestion import nearest

Words = dict[str, str]  # key -> value, both as on a command line


def find_file(source: str | Path, folder: Path, kind: str, beside: Path | None = None) -> Path:
    """The file that a name or path means.

    Args:
        source: the name of a file in `beside` or `folder`, or a path.
        folder: of the shipped files.
        kind: "study" or "search", for the error.
        beside: a folder that is looked into first.

    Raises:
        ValueError: there is none; lists the shipped ones and the nearest.
    """
    text = str(source)
    if isinstance(source, str) and re.fullmatch(r"[\w-]+", text):
        for place in ([beside] if beside else []) + [folder]:
            if (place / f"{text}.yaml").is_file():
                return place / f"{text}.yaml"
    elif Path(text).is_file():
        return Path(text).resolve()
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    raise ValueError(
        f"unknown {kind} {text!r}{nearest(text, known)} (known: {', '.join(known)}; or a YAML file's path)"
    )


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def parse_file(where: str, text: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ValueError: no YAML, a key that is given twice, or no mapping.
    """
    content = load_yaml(where, text)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}, allowed: a mapping of keys to values")
    return content


def about(text: str) -> str:
    """The comment at the head of a file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def as_words(where: str, values: Any) -> Words:
    """A mapping of the YAML as words of a command line.

    Raises:
        ValueError: it is none, or a value is a mapping.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {values!r}, allowed: a mapping of keys to values")
    return {str(key): as_word(f"{where}: {key}", value) for key, value in values.items()}


def as_word(where: str, value: Any) -> str:
    """A value as it is written on a command line.

    Raises:
        ValueError: it is a mapping.
    """
    if isinstance(value, dict):
        raise ValueError(f"{where}: got a mapping, allowed: one value; write the keys below it with dots")
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
