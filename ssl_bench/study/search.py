"""A search's file: for every optimizer a declared space, and the same number of quasi-random trials in each.

# What it costs, and what to expect.
track: classify
base: {protocol: fair, data: cifar10, epochs: 10}   # overrides of every run
holdout: 0.1      # share of each class of the train set that selects
trials: 16        # for each optimizer
select: test-v1   # the protocol whose top-1 on the held-out images decides
seed: 0           # of the trials' runs and of the points
seeds: [0, 1, 2]  # of the final runs, on the whole train set
arms:
  - set: {optimizer: lars}
    space:
      optimizer.lr: {low: 0.1, high: 10, log: true}
      optimizer.nesterov: {choices: [false, true]}

Every arm searches the same things (the warm-up's length, phi's decay and how long a layer stays frozen stand for each
other) and treats the same tensors alike, or the comparison is one of spaces; ``equal: false`` allows it all the same.
"""

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from ssl_bench.recipe.compose import CONFIGS
from ssl_bench.recipe.registry import explain
from ssl_bench.runtime.suggestion import nearest
from ssl_bench.study.grid import Overrides, as_argument, as_overrides, read_file

SEARCHES = CONFIGS / "tune"
DIGITS = 4  # significant ones of a point's numbers, as they stand on the command line
# How an arm keeps its first steps small or its last ones: one dimension, whatever the optimizer calls it.
EARLY = re.compile(
    r"schedule\.warmup_(steps|epochs|fraction)|optimizer\.(decay|(delay|measured|warmup)_(steps|epochs|fraction))"
    r"|param_groups\.freeze_(steps|epochs|fraction)"
)

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Range:
    """The interval of a number; of whole ones where the key takes no others."""

    __pydantic_config__ = _STRICT
    low: int | float
    high: int | float
    log: bool = False


@dataclass(frozen=True)
class Choices:
    """A set of values."""

    __pydantic_config__ = _STRICT
    choices: Annotated[list[bool | int | float | str | None], Field(min_length=1)]


def _kind(values: Any) -> str:
    return "choices" if isinstance(values, Choices) or (isinstance(values, dict) and "choices" in values) else "range"


Space = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_kind)]


@dataclass(frozen=True)
class Arm:
    """One optimizer and the space of what is tuned."""

    __pydantic_config__ = _STRICT
    set: dict[str, Any]
    space: Annotated[dict[str, Space], Field(min_length=1)]

    @property
    def label(self) -> str:
        return " ".join(f"{key}={as_argument(key, value)}" for key, value in self.set.items())

    @property
    def dimensions(self) -> list[str]:
        """What is searched, with one name for the warm-up, phi and frozen layers."""
        return sorted("the warm-up, phi or frozen layers" if EARLY.fullmatch(key) else key for key in self.space)


@dataclass(frozen=True)
class Search:
    """A search's file; see the module."""

    __pydantic_config__ = _STRICT
    track: Literal["pretrain", "classify"]
    trials: Annotated[int, Field(gt=0)]
    select: str
    arms: Annotated[list[Arm], Field(min_length=1)]
    base: dict[str, Any] = field(default_factory=dict)
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    equal: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = field(default_factory=lambda: [0, 1, 2])


def load_search(source: str | Path) -> tuple[str, str, Search]:
    """Reads a search.

    Args:
        source: a shipped search's name, or the path of a YAML file.

    Returns:
        its name, its head comment and its contents.

    Raises:
        ValueError: one line that names the key, what was given and what is allowed.
    """
    path, about, content = read_file(source, SEARCHES, "search")
    where = f"search {path.stem}"
    try:
        search = TypeAdapter(Search).validate_python(content)
    except ValidationError as error:
        # A misspelt key also makes the right one missing; the misspelt one is the better one to name.
        unknown = [one["loc"] for one in error.errors() if one["type"] == "unexpected_keyword_argument"]
        if not unknown:
            raise ValueError(f"{where}: {explain(error)}") from None
        *scope, key = map(str, unknown[0])
        kind = {"range": Range, "choices": Choices}.get(scope[-1], Arm) if scope else Search
        known = [one.name for one in fields(kind)]
        hint = f"{nearest(key, known)} (known here: {', '.join(known)})"
        raise ValueError(f"{where}: unknown key {key!r}{hint}") from None
    _check(where, search)
    return path.stem, about, search


def _check(where: str, search: Search) -> None:
    """Refuses what no single field can tell."""
    if len(set(search.seeds)) < len(search.seeds):
        raise ValueError(f"{where}: seeds must be different, got {search.seeds}")
    labels = [arm.label for arm in search.arms]
    first = search.arms[0]
    for arm in search.arms if search.equal else ():
        if arm.dimensions != first.dimensions:
            wanted, got = ", ".join(first.dimensions), ", ".join(arm.dimensions)
            raise ValueError(
                f"{where}: {arm.label}: space must be over what {first.label} searches ({wanted}), got {got} "
                "(equal: false allows it)"
            )
    for arm in search.arms:
        if labels.count(arm.label) > 1:
            raise ValueError(f"{where}: two arms are {arm.label!r}")
        for key, values in arm.space.items():
            if key in arm.set:
                raise ValueError(f"{where}: {arm.label}: {key!r} is both set and searched")
            if isinstance(values, Range) and not (values.low < values.high and (values.low > 0 or not values.log)):
                allowed = "0 < low < high" if values.log else "low < high"
                got = f"low = {values.low}, high = {values.high}"
                raise ValueError(f"{where}: {arm.label}: {key} must have {allowed}, got {got}")


def points(arm: Arm, trials: int, seed: int, whole: Collection[str] = ()) -> list[Overrides]:
    """The trials of an arm: Optuna's scrambled Sobol sequence over its space, the same for equal arguments.

    Args:
        arm: whose space.
        trials: how many.
        seed: of the scrambling.
        whole: the keys that take whole numbers only.
    """
    import optuna

    distributions = {key: _distribution(values, key in whole) for key, values in arm.space.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=sampler)
        # The sampler learns its space from the first completed trial, and would draw that one at random.
        known = {key: one.choices[0] if isinstance(one, Choices) else one.low for key, one in arm.space.items()}
        study.add_trial(optuna.trial.create_trial(params=known, distributions=distributions, value=0.0))
        found = []
        for _ in range(trials):
            trial = study.ask(distributions)
            rounded = {key: float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x for key, x in trial.params.items()}
            found.append(as_overrides(arm.label, rounded))
            study.tell(trial, 0.0)
    finally:
        optuna.logging.set_verbosity(level)
    return found


def _distribution(values: Range | Choices, whole: bool) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choices):
        return CategoricalDistribution(values.choices)
    if whole and isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
