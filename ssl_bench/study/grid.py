"""A study's file: base settings, blocks of axes and seeds, expanded into cells, each one recipe.

# What it costs, on what hardware, and what to expect.
base: {protocol: paper, precision: bf16}   # keys of every cell, as on the command line
include: [table1_clf_cifar10]              # further studies whose cells belong to this one
seeds: [0, 1, 2]                           # [0] if left out
blocks:
  - track: classify                        # or pretrain
    set: {data: cifar10}                   # keys of this block's cells
    axes:                                  # the product of the axes is taken
      - {batch_size: [512, 1024], optimizer.lr: [1, 2]}          # lists that go together, like zip
      - [{optimizer: lars}, {optimizer: tvlars, optimizer.decay: 1.0e-4}]   # cases
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_bench.recipe.compose import CONFIGS, compose, merge
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime.suggestion import nearest
from ssl_bench.study.files import Words, about, as_words, find_file, parse_file, read_text

STUDIES = CONFIGS / "study"
TRACKS = ("pretrain", "classify")
LAUNCHERS_KEYS = ("run_dir", "resume")

STUDY_KEYS = ("base", "include", "seeds", "blocks")
BLOCK_KEYS = ("track", "set", "axes")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study.

    Attributes:
        study: the name of the study.
        words: the keys that the study and the user set; the rest is the recipe's defaults.
        varied: those of them in which the cells of its block differ, the seed included.
        recipe: what they mean.
    """

    study: str
    words: Words
    varied: Words
    recipe: Recipe

    @property
    def track(self) -> str:
        return self.recipe.track

    @cached_property
    def identity(self) -> str:
        return self.recipe.identity()

    @cached_property
    def name(self) -> str:
        """Its run's folder; holds the identity."""
        return self.recipe.name()

    @property
    def label(self) -> str:
        """What tells it from its neighbours, for a line of text."""
        shown: Words = {key: self.words[key] for key in ("data", "method") if key in self.words}
        shown |= self.varied
        return " ".join([self.track, *(f"{key}={value}" for key, value in shown.items())])

    def arguments(self) -> list[str]:
        """The words of the track's command line."""
        return [f"{key}={value}" for key, value in self.words.items()]


@dataclass(frozen=True)
class Study:
    """A grid of recipes.

    Attributes:
        name: the file's name without its ending.
        about: the file's head comment.
        cells: in the order in which they run.
    """

    name: str
    about: str
    cells: tuple[Cell, ...]


def shipped() -> list[str]:
    """The names of the studies in ``configs/study/``."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(
    source: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
) -> Study:
    """Reads a study and expands it.

    Args:
        source: a shipped study's name, or the path of a YAML file.
        overrides: ``key=value`` words for every cell; they have the last word.
        seeds: instead of the file's.
        data_paths: for data sets by name, where to read them (``data.path``).

    Raises:
        ValueError: one line; an unknown key, an empty grid, a wrong recipe, or two cells that are one experiment.
    """
    path = find_file(source, STUDIES, "study")
    if seeds is not None:
        _check_seeds(f"study {path.stem}", list(seeds))
    user = dict(split_word(word) for word in overrides)
    expansion = _Expansion(path.stem, user, None if seeds is None else list(seeds), dict(data_paths or {}))
    text = read_text(path)
    expansion.add(path, parse_file(f"study {path.stem}", text))
    expansion.check_distinct()
    return Study(path.stem, about(text), tuple(expansion.cells))


class _Expansion:
    """Collects the cells of a file and of those that it includes."""

    def __init__(self, study: str, user: Words, seeds: list[int] | None, data_paths: dict[str, str]):
        self.study, self.user, self.seeds, self.data_paths = study, user, seeds, data_paths
        self.cells: list[Cell] = []
        self.open: list[Path] = []

    def add(self, path: Path, content: dict[str, Any]) -> None:
        """The cells of one file."""
        where = f"study {path.stem}"
        if path in self.open:
            raise ValueError(f"{where}: it includes itself through {' -> '.join(one.stem for one in self.open)}")
        _check_keys(where, content, STUDY_KEYS)
        if not content.get("blocks") and not content.get("include"):
            raise ValueError(f"{where}: an empty grid: it has neither blocks nor include")
        base = as_words(f"{where}: base", content.get("base") or {})
        seeds = self.seeds or content.get("seeds", [0])
        _check_seeds(where, seeds)
        self.open.append(path)
        for name in _listed(where, "include", content.get("include") or []):
            inner = find_file(name, STUDIES, "study", beside=path.parent)
            self.add(inner, parse_file(f"study {inner.stem}", read_text(inner)))
        self.open.pop()
        for number, block in enumerate(_listed(where, "blocks", content.get("blocks") or []), start=1):
            self._add_block(f"{where}: block {number}", block, base, seeds)

    def _add_block(self, where: str, block: Any, base: Words, seeds: list[int]) -> None:
        if not isinstance(block, dict):
            raise ValueError(f"{where}: got {block!r}, allowed: the keys {', '.join(BLOCK_KEYS)}")
        _check_keys(where, block, BLOCK_KEYS)
        track = block.get("track")
        if track not in TRACKS:
            raise ValueError(f"{where}: track: got {track!r}, allowed: {' or '.join(TRACKS)}")
        fixed = merge(base, as_words(f"{where}: set", block.get("set") or {}))
        axes = [
            _axis(f"{where}: axis {number}", axis)
            for number, axis in enumerate(_listed(where, "axes", block.get("axes") or []), start=1)
        ]
        _check_disjoint(where, axes)
        for cases in itertools.product(*axes):
            varied = {key: value for case in cases for key, value in case.items()}
            words = self._with_data_path(merge(merge(fixed, varied), self.user))
            for key in LAUNCHERS_KEYS:
                if key in words:
                    raise ValueError(f"{where}: {key} is set for each cell by what starts it; leave it out")
            try:
                recipe = compose(track, [f"{key}={value}" for key, value in words.items()])
            except ValueError as error:
                raise ValueError(f"{where}: {_listing(varied) or 'its only cell'}: {error}") from None
            self._add_seeds(words, varied, recipe, seeds)

    def _add_seeds(self, words: Words, varied: Words, recipe: Recipe, seeds: list[int]) -> None:
        if "seed" in words:
            self.cells.append(Cell(self.study, words, varied, recipe))
            return
        for seed in seeds:
            label = varied if len(seeds) == 1 else {**varied, "seed": str(seed)}
            self.cells.append(Cell(self.study, {**words, "seed": str(seed)}, label, replace(recipe, seed=seed)))

    def _with_data_path(self, words: Words) -> Words:
        path = self.data_paths.get(words.get("data", "cifar10"))
        return {**words, "data.path": path} if path and "data.path" not in self.user else words

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


def _axis(where: str, axis: Any) -> list[Words]:
    """The cases of one axis, from lists that go together or from a list of cases."""
    if isinstance(axis, dict) and axis:
        for key, values in axis.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{where}: {key}: got {values!r}, allowed: a list of at least one value")
        lengths = {key: len(values) for key, values in axis.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: lists that go together have different lengths: {_listing(lengths)}")
        rows = [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]
    elif isinstance(axis, list) and axis and all(isinstance(case, dict) for case in axis):
        rows = axis
    else:
        raise ValueError(f"{where}: got {axis!r}, allowed: {{key: [values]}} or [{{key: value}}, ...], not empty")
    return [as_words(where, row) for row in rows]


def _check_disjoint(where: str, axes: Sequence[Sequence[Words]]) -> None:
    keys = [{key for case in axis for key in case} for axis in axes]
    for one, two in itertools.combinations(keys, 2):
        if one & two:
            raise ValueError(f"{where}: {sorted(one & two)[0]!r} is in two axes; put it into one")


def _check_keys(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)} (known here: {', '.join(known)})")


def _check_seeds(where: str, seeds: Any) -> None:
    good = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: seeds: got {seeds!r}, allowed: a list of different whole numbers >= 0")


def _listed(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key}: got {value!r}, allowed: a list")
    return value


def _listing(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def split_word(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if not sign:
        raise ValueError(f"cannot read {word!r}: expected key=value")
    return key, value
