"""Reads the values of recipes: YAML of bounded size, and the text of a command line by what its key holds."""

import re
from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import YAMLError

# What somebody else's study file may hold: a file of a few hundred bytes can mean a billion values.
YAML_CHARS, YAML_DEPTH, YAML_VALUES = 1 << 16, 50, 100_000

# What is read as YAML on a command line. The rest is text: paths with colons or backslashes, dates, 007, off.
_NUMBER = r"[+-]?((0|[1-9][\d_]*)(\.\d*)?|\.\d+)(e[+-]?\d+)?"
_YAML_VALUE = re.compile(rf"{_NUMBER}|true|false|null|\[.*\]|\{{.*\}}", re.IGNORECASE | re.DOTALL)

Kind = Literal["text", "texts"]  # what a key holds that is not read as YAML


def load_yaml(where: str, text: str, *, texts: bool = False) -> Any:
    """Parses YAML 1.2, in which ``off`` and ``no`` are text and ``1e-4`` is a number.

    Args:
        where: what the text is, for the error.
        text: the YAML.
        texts: whether every scalar is text, as it is written.

    Raises:
        ValueError: one line that names the place; invalid YAML, a key that is given twice, or more than `YAML_CHARS`,
            `YAML_DEPTH` or `YAML_VALUES` (counted with every alias written out) allow.
    """
    if len(text) > YAML_CHARS:
        raise ValueError(f"{where}: YAML must have at most {YAML_CHARS} characters, got {len(text)}")
    parser = YAML(typ="base" if texts else "safe", pure=True)
    parser.max_depth = YAML_DEPTH
    try:
        content = parser.load(text)
    except MaxDepthExceededError:
        raise ValueError(f"{where}: YAML must have at most {YAML_DEPTH} levels, got more") from None
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(problem.split()).partition(" with value ")[0]  # a duplicate key's values may be long
        raise ValueError(f"{where}: invalid YAML{line}: {problem}") from None
    _count_values(where, content)
    return content


def _count_values(where: str, content: Any) -> None:
    """Refuses what is too deep or too much, counted as if every alias were written out."""
    found, level = 0, [content]
    for _ in range(YAML_DEPTH):
        level = [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        found += len(level)
        if not level:
            return
        if found > YAML_VALUES:
            raise ValueError(f"{where}: YAML must have at most {YAML_VALUES} values, got {found} or more")
    raise ValueError(f"{where}: YAML must have at most {YAML_DEPTH} levels, got more")


def holds(annotation: Any) -> Kind | None:
    """Whether a key's type is text, or a list of texts, so that 007, true and [1] are not read as YAML."""
    if get_origin(annotation) is Annotated:
        return holds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = {holds(each) for each in get_args(annotation) if each is not type(None)}
        return kinds.pop() if len(kinds) == 1 else None
    if get_origin(annotation) is Literal:
        return "text" if all(isinstance(each, str) for each in get_args(annotation)) else None
    if get_origin(annotation) in (list, tuple, Sequence):
        inner = [each for each in get_args(annotation) if each is not Ellipsis]
        return "texts" if inner and all(each is str for each in inner) else None
    return "text" if annotation is str else None


@cache
def read_value(key: str, text: str, kind: Kind | None = None) -> Any:
    """Reads a command line's value: numbers, true, false, null, lists and mappings as YAML, anything else as text.

    Args:
        key: the key, for the error.
        text: the value.
        kind: what the key's type says: "text" is read as it is written (but null), "texts" as a list of such.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if not _YAML_VALUE.fullmatch(text) or (kind == "text" and text.lower() != "null"):
        return text
    # YAML would take a glob pattern in a list, [*.bn*], for an alias.
    quoted = re.sub(r"(?<=[\[,])\s*(\*[^\s,'\"\[\]]*)", r"'\1'", text)
    return load_yaml(f"{key}={text}", quoted, texts=kind == "texts" and text.startswith("["))
