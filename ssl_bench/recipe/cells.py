"""From a cell's words to its recipe: the same as `ssl_bench.recipe.compose` gives, for hundreds of cells in seconds.

Hydra takes 0.15 s for one composition, and cells of a grid differ mostly in numbers. So the words that can decide
which files are read, which rules apply or which durations are dropped are composed once; the other words, plain values
of single keys, are then set in the result and checked like any recipe. Tests compare with `compose`.
"""

import copy
import re
from functools import cache
from typing import Any

import yaml

from ssl_bench.recipe.compose import CONFIGS, GROUPS, build, compose
from ssl_bench.recipe.schema import Recipe

DEFAULT_PROTOCOL = "fair"  # as configs/pretrain.yaml and classify.yaml choose
UNITS = ("steps", "epochs", "fraction")


class Composer:
    """Composes many recipes, remembering what they share."""

    def __init__(self) -> None:
        self._bases: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, Any]] = {}

    def compose(self, track: str, words: dict[str, str]) -> Recipe:
        """The recipe of these words, as ``ssl_bench.recipe.compose.compose`` makes it.

        Raises:
            ValueError: one line that names the key, what was given and what is allowed.
        """
        conditions = _conditions(words.get("protocol", DEFAULT_PROTOCOL))
        plain = {key: value for key, value in words.items() if key not in conditions and _is_plain(key, value)}
        deciding = tuple((key, value) for key, value in words.items() if key not in plain)
        key = (track, deciding)
        try:
            if key not in self._bases:
                self._bases[key] = compose(track, [f"{name}={value}" for name, value in deciding]).to_dict()
        except ValueError:
            # A key that is required (a plug-in's lr, say) may be among the plain ones.
            return compose(track, [f"{name}={value}" for name, value in words.items()])
        nested = copy.deepcopy(self._bases[key])
        for name, value in plain.items():
            *sections, last = name.split(".")
            node = nested
            for section in sections:
                node = node.get(section)  # type: ignore[assignment]
                if not isinstance(node, dict):
                    return compose(track, [f"{name}={value}" for name, value in words.items()])
            node[last] = _value(value)
        return build(track, nested)


def merge(words: dict[str, str], later: dict[str, str]) -> dict[str, str]:
    """Words with later ones on top. A duration given anew replaces the same duration in another unit."""
    replaced = {twin for key in later for twin in _twins(key)}
    return {key: value for key, value in words.items() if key not in replaced} | later


def _twins(key: str) -> set[str]:
    """The same duration's names in other units: epochs and steps, X_epochs and X_steps and X_fraction."""
    match = re.fullmatch(rf"(|.*[._])({'|'.join(UNITS)})", key)
    return {match[1] + unit for unit in UNITS} - {key} if match else set()


def _is_plain(key: str, value: str) -> bool:
    """Whether the key does no more than to hold this value."""
    last = key.rpartition(".")[2]
    return (
        key not in GROUPS
        and last not in ("target", "name")
        and not _twins(key)
        and re.fullmatch(r"[\w.+-]+", value) is not None
    )


@cache
def _conditions(protocol: str) -> frozenset[str]:
    """The keys on which some ``when`` rule of a protocol's file depends."""
    path = CONFIGS / "protocol" / f"{protocol}.yaml"
    rules = yaml.safe_load(path.read_text()).get("when") if path.is_file() else None
    return frozenset(key for rule in rules or [] for key in rule["if"])


@cache
def _value(text: str) -> Any:
    """A plain value by Hydra's grammar, which is what `compose` reads it by."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={text}").value()
