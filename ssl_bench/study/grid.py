"""A study's file: base settings, blocks of axes and seeds, expanded into cells, each one recipe.

# What it costs, on what hardware, and what to expect.
base: {protocol: paper, precision: bf16}   # overrides of every cell, as on the command line
include: [table1_clf_cifar10]              # further studies whose cells belong to this one
seeds: [0, 1, 2]                           # [0] if left out
blocks:
  - track: classify                        # or pretrain
    set: {data: cifar10}                   # overrides of this block's cells
    axes:                                  # the product of the axes is taken
      - {batch_size: [512, 1024], optimizer.lr: [1, 2]}          # lists that go together, like zip
      - [{optimizer: lars}, {optimizer: tvlars, optimizer.decay: 1.0e-4}]   # cases
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_bench.recipe.compose import CONFIGS, merge
from ssl_bench.recipe.content import with_content
from ssl_bench.recipe.schema import Recipe
from ssl_bench.recipe.trust import refuse_untrusted
from ssl_bench.recipe.values import YAML_CHARS, load_yaml
from ssl_bench.runtime.suggestion import nearest
from ssl_bench.study.known import KnownRecipes

STUDIES = CONFIGS / "study"
TRACKS = ("pretrain", "classify")
MAX_CELLS = 20_000
LAUNCHERS_KEYS = ("run_dir", "resume")

STUDY_KEYS = ("base", "include", "seeds", "blocks")
BLOCK_KEYS = ("track", "set", "axes")

Overrides = dict[str, str]  # key -> value, both as on a command line


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study.

    Attributes:
        study: the name of the study.
        overrides: the keys that the study and the user set; the rest of the recipe is defaults.
        varied: those of them in which the cells of its block differ, the seed included.
        recipe: what they compose to.
    """

    study: str
    overrides: Overrides
    varied: Overrides
    recipe: Recipe

    @property
    def track(self) -> str:
        return self.recipe.track

    @cached_property
    def identity(self) -> str:
        return self.recipe.identity()

    @cached_property
    def name(self) -> str:
        """The name of its run directory; ends in the identity."""
        return self.recipe.name(self.identity)

    @property
    def label(self) -> str:
        """What tells it from its neighbours, for a line of text."""
        shown = {key: self.overrides[key] for key in ("data", "method") if key in self.overrides} | self.varied
        return f"{self.track} {_listing(shown)}".rstrip()

    def arguments(self) -> list[str]:
        """The overrides as arguments of the track's command line."""
        return [f"{key}={value}" for key, value in self.overrides.items()]


@dataclass(frozen=True)
class Study:
    """A grid of recipes.

    Attributes:
        name: the file's name without its ending.
        about: the comment at the head of the file.
        cells: in the order in which they run.
    """

    name: str
    about: str
    cells: tuple[Cell, ...]


def load_study(
    source: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
    trust: bool = False,
) -> Study:
    """Reads a study and expands it.

    Args:
        source: a shipped study's name, or the path of a YAML file.
        overrides: ``key=value`` for every cell; they win over the file's.
        seeds: instead of the file's.
        data_paths: for data sets by name, where to read them (``data.path``).
        trust: whether the file may name code to import and paths to read (see `ssl_bench.recipe.trust`).

    Raises:
        ValueError: one line; an unknown key, an empty grid, a wrong recipe, or two cells that are one experiment.
    """
    path, about, content = read_file(source, STUDIES, "study")
    expansion = _Expansion(path.stem, dict(map(split_override, overrides)), seeds, dict(data_paths or {}), trust)
    expansion.add(path, content)
    expansion.check_distinct()
    expansion.compose.save()
    return Study(path.stem, about, tuple(expansion.cells))


class _Expansion:
    """Collects the cells of a file and of those that it includes."""

    def __init__(
        self, study: str, user: Overrides, seeds: Sequence[int] | None, data_paths: dict[str, str], trust: bool
    ):
        self.study, self.user, self.data_paths, self.trust = study, user, data_paths, trust
        self.contents: dict[str, str | None] = {}
        self.compose = KnownRecipes()
        self.seeds = None if seeds is None else list(seeds)
        self.cells: list[Cell] = []
        self.open: list[Path] = []

    def add(self, path: Path, content: dict[str, Any]) -> None:
        """The cells of one file."""
        where = f"study {path.stem}"
        if path in self.open:
            raise ValueError(f"{where} includes itself through {' -> '.join(one.stem for one in self.open)}")
        _check_keys(where, content, STUDY_KEYS)
        if not content.get("blocks") and not content.get("include"):
            raise ValueError(f"{where} must have blocks or include, got neither (an empty grid)")
        base = as_overrides(f"{where}: base", content.get("base") or {})
        seeds = content.get("seeds", [0]) if self.seeds is None else self.seeds
        good = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not good or len(set(seeds)) < len(seeds):
            raise ValueError(f"{where}: seeds must be a list of different integers >= 0, got {seeds!r}")
        self.open.append(path)
        for name in _listed(where, "include", content):
            if not self.trust and not re.fullmatch(r"[\w-]+", str(name)):
                raise ValueError(f"{where}: include must be names of studies, got {name!r}: --trust reads a path")
            inner, _, inner_content = read_file(name, STUDIES, "study", beside=path.parent)
            self.add(inner, inner_content)
        self.open.pop()
        for number, block in enumerate(_listed(where, "blocks", content), start=1):
            self._add_block(f"{where}: block {number}", block, base, seeds)

    def _add_block(self, where: str, block: Any, base: Overrides, seeds: list[int]) -> None:
        if not isinstance(block, dict):
            raise ValueError(f"{where} must be a mapping with the keys {', '.join(BLOCK_KEYS)}, got {block!r}")
        _check_keys(where, block, BLOCK_KEYS)
        track = block.get("track")
        if track not in TRACKS:
            raise ValueError(f"{where}: track must be {' or '.join(TRACKS)}, got {track!r}")
        fixed = merge(base, as_overrides(f"{where}: set", block.get("set") or {}))
        axes = [
            _axis(f"{where}: axis {number}", axis) for number, axis in enumerate(_listed(where, "axes", block), start=1)
        ]
        for one, two in itertools.combinations([{key for case in axis for key in case} for axis in axes], 2):
            if one & two:
                raise ValueError(f"{where}: {min(one & two)!r} is in two axes; put it into one")
        number_of_cells = math.prod(map(len, axes)) * len(seeds) + len(self.cells)
        if number_of_cells > MAX_CELLS:
            raise ValueError(f"{where}: a study must have at most {MAX_CELLS} cells, got {number_of_cells} or more")
        for cases in itertools.product(*axes):
            varied = {key: value for case in cases for key, value in case.items()}
            overrides = merge(merge(fixed, varied), self.user)
            data_path = self.data_paths.get(overrides.get("data", "cifar10"))
            if data_path and "data.path" not in self.user:
                overrides["data.path"] = data_path
            if not self.trust:
                refuse_untrusted(where, overrides, [*self.user, *(["data.path"] if data_path else [])])
            for key in LAUNCHERS_KEYS:
                if key in overrides:
                    raise ValueError(f"{where}: {key} is set for each cell by the launcher; leave it out")
            try:
                recipe = self.compose(track, [f"{key}={value}" for key, value in overrides.items()])
                recipe = with_content(recipe, self.contents)
            except (ValueError, OSError) as error:
                raise ValueError(f"{where}: {_listing(varied) or 'its only cell'}: {error}") from None
            if "seed" in overrides:
                self.cells.append(Cell(self.study, overrides, varied, recipe))
                continue
            for seed in seeds:  # a recipe is composed once and not once a seed: composing is what takes the time
                seeded = {**overrides, "seed": str(seed)}
                shown = varied if len(seeds) == 1 else {**varied, "seed": str(seed)}
                self.cells.append(Cell(self.study, seeded, shown, replace(recipe, seed=seed)))

    def check_distinct(self) -> None:
        """Refuses two cells of the same identity."""
        seen: dict[str, Cell] = {}
        for cell in self.cells:
            twin = seen.setdefault(cell.identity, cell)
            if twin is not cell:
                raise ValueError(
                    f"study {self.study}: two cells are the same experiment ({cell.identity}): "
                    f"'{twin.label}' and '{cell.label}'"
                )


def _axis(where: str, axis: Any) -> list[Overrides]:
    """The cases of one axis, from lists that go together or from a list of cases."""
    if isinstance(axis, dict) and axis:
        for key, values in axis.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{where}: {key} must be a list of at least one value, got {values!r}")
        lengths = {key: len(values) for key, values in axis.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: lists that go together must have the same length, got {_listing(lengths)}")
        rows = [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]
    elif isinstance(axis, list) and axis and all(isinstance(case, dict) for case in axis):
        rows = axis
    else:
        raise ValueError(f"{where} must be {{key: [values]}} or [{{key: value}}, ...] and not empty, got {axis!r}")
    return [as_overrides(where, row) for row in rows]


def _check_keys(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)} (known here: {', '.join(known)})")


def _listed(where: str, key: str, content: Mapping[str, Any]) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} must be a list, got {value!r}")
    return value


def _listing(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def split_override(text: str) -> tuple[str, str]:
    """Key and value of a ``key=value``.

    Raises:
        ValueError: it is none.
    """
    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"an override must be key=value, got {text!r}")
    return key, value


# Files of studies and searches ----------------------------------------------------------------------------------------


def read_file(
    source: str | Path, folder: Path, kind: str, beside: Path | None = None
) -> tuple[Path, str, dict[str, Any]]:
    """Reads a study's or a search's file.

    Args:
        source: the name of a file in `beside` or `folder`, or a path.
        folder: of the shipped files.
        kind: "study" or "search", for errors.
        beside: a folder that is looked into first.

    Returns:
        its path, the comment at its head, and its contents.

    Raises:
        ValueError: there is no such file (lists the shipped ones and the nearest), or it holds no mapping.
    """
    name = str(source)
    if isinstance(source, str) and re.fullmatch(r"[\w-]+", name):
        candidates = [place / f"{name}.yaml" for place in (beside, folder) if place]
    else:
        candidates = [Path(name).resolve()]
    path = next((one for one in candidates if one.is_file()), None)
    if path is None:
        known = sorted(one.stem for one in folder.glob("*.yaml"))
        hint = f"(known: {', '.join(known)}; or a YAML file's path)"
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)} {hint}")
    try:
        if path.stat().st_size > YAML_CHARS:
            raise ValueError(f"{kind} {path.stem} must have at most {YAML_CHARS} bytes, got {path.stat().st_size}")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    content = load_yaml(f"{kind} {path.stem}", text)
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {path.stem} must be a mapping of keys to values, got {content!r}")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    about = "\n".join(line.removeprefix("#").removeprefix(" ") for line in head)
    return path, about, content


def as_overrides(where: str, values: Any) -> Overrides:
    """A mapping of the YAML as overrides of a command line.

    Raises:
        ValueError: it is none, or a value is a mapping.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {values!r}")
    return {str(key): as_argument(f"{where}: {key}", value) for key, value in values.items()}


def as_argument(where: str, value: Any) -> str:
    """A value as it is written on a command line.

    Raises:
        ValueError: it is a mapping.
    """
    if isinstance(value, dict):
        raise ValueError(f"{where} must be one value, got a mapping: write the keys below it with dots")
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)  # JSON is YAML, by which a command line is read
