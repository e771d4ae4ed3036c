"""A checked claim: its verdict, its evidence, and the pairs of runs that several claims compare."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssl_bench.recipe.schema import flatten
from ssl_bench.report.aggregate import Cell, Collection, Result, cell_key, lookup
from ssl_bench.report.curves import Curves
from ssl_bench.report.tables import Table

Verdict = Literal["supported", "contradicted", "mixed", "undecided", "not reached", "not measured"]
Load = Callable[[Result], Curves]
Pair = tuple[Cell, Cell, int]  # two cells and a seed that both have

# Sections of a recipe that may differ between two optimizers compared on equal terms.
_OF_THE_OPTIMIZER = ("optimizer", "schedule", "scaling", "param_groups")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what the runs say about it.

    Attributes:
        letter: a to e.
        title: its subject.
        says: the paper's claim, or what it takes for granted.
        verdict: one word or two.
        finding: one or two sentences with the numbers.
        table: the evidence, run by run.
    """

    letter: str
    title: str
    says: str
    verdict: Verdict
    finding: str
    table: Table


def verdict_of(outcomes: Sequence[bool]) -> Verdict:
    """Supported or contradicted only if every outcome agrees."""
    if not outcomes:
        return "not measured"
    return "supported" if all(outcomes) else "contradicted" if not any(outcomes) else "mixed"


def warm_and_cold(collection: Collection) -> Iterable[Pair]:
    """Cells (LARS, LAMB) with and without a warm-up that differ in nothing but the schedule, for each shared seed."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if cell.optimizer in ("LARS", "LAMB", "LAMBC"):
            groups[cell.setting, cell.optimizer, cell.lr].append(cell)
    for cells in groups.values():
        for warm in filter(_is_warm, cells):
            for cold in cells:
                if not _is_warm(cold):
                    yield from _pairs(warm, cold, ("schedule",))


def warm_lars_and_tvlars(collection: Collection) -> Iterable[Pair]:
    """LARS with a warm-up and TVLARS at the same learning rate and otherwise alike, for each shared seed."""
    for warm in collection.cells:
        if warm.optimizer == "LARS" and _is_warm(warm):
            for rival in collection.cells:
                if (rival.optimizer, rival.setting, rival.lr) == ("TVLARS", warm.setting, warm.lr):
                    yield from _pairs(warm, rival, _OF_THE_OPTIMIZER)


def _pairs(one: Cell, other: Cell, sections: Container[str]) -> Iterable[Pair]:
    """Two cells with each seed that both have; none if their recipes differ outside these sections."""
    names = {name for cell in (one, other) for name in flatten(cell.recipe) if name.split(".")[0] in sections}
    if cell_key(one.recipe, less=names) == cell_key(other.recipe, less=names):
        shared = {result.seed for result in one.results} & {result.seed for result in other.results}
        yield from ((one, other, seed) for seed in sorted(shared))


def _is_warm(cell: Cell) -> bool:
    return "warmup" in str(lookup(cell.recipe, "schedule.target", ""))
