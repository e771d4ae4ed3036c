"""A checked claim: its estimate, its verdict, its evidence, and the pairs of runs that several claims compare."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssl_bench.report.aggregate import Cell, Collection, Result
from ssl_bench.report.curves import Curves
from ssl_bench.report.inference import Estimate
from ssl_bench.report.recipes import cell_key, lookup
from ssl_bench.report.tables import Table

Verdict = Literal["supported", "contradicted", "mixed", "undecided", "undecided (n = 1)", "not reached", "not measured"]
Load = Callable[[Result], Curves]
Pair = tuple[Cell, Cell, int]  # two cells and a seed that both have

# Sections of a recipe that may differ between two optimizers compared on equal terms.
_OF_THE_OPTIMIZER = ("optimizer", "schedule", "scaling", "param_groups")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what the runs say about it.

    Attributes:
        letter: a to g.
        title: its subject.
        says: the paper's claim and where it stands.
        rule: what is estimated, and the threshold that decides.
        verdict: one word or two.
        finding: one or two sentences with the numbers.
        table: the evidence, pair by pair.
    """

    letter: str
    title: str
    says: str
    rule: str
    verdict: Verdict
    finding: str
    table: Table


def verdict_of(estimate: Estimate | None, threshold: float) -> Verdict:
    """Supported where the whole interval is at the threshold or above, contradicted where all of it is below."""
    if estimate is None:
        return "not measured"
    if estimate.interval is None:
        return "undecided (n = 1)"
    low, high = estimate.interval
    return "supported" if low >= threshold else "contradicted" if high < threshold else "undecided"


def joint_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """That of a claim with several parts: they must agree."""
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    return "mixed" if {"supported", "contradicted"} <= found else "undecided" if found else "not measured"


def grouped(values: Iterable[tuple[Any, float]]) -> list[list[float]]:
    """Values by their keys, for ``inference.pooled``."""
    groups: Mapping[Any, list[float]] = defaultdict(list)
    for key, value in values:
        groups[key].append(value)
    return list(groups.values())


def warm_and_cold(collection: Collection) -> Iterable[Pair]:
    """Cells (LARS, LAMB) with and without a warm-up that differ in nothing but the schedule, for each shared seed."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if cell.optimizer in ("LARS", "LAMB", "LAMBC"):
            groups[cell.setting, cell_key(cell.recipe, less=("schedule",))].append(cell)
    for cells in groups.values():
        for warm in filter(is_warm, cells):
            for cold in cells:
                if not is_warm(cold):
                    yield from _by_seed(warm, cold)


def warm_lars_and_tvlars(collection: Collection) -> Iterable[Pair]:
    """LARS with a warm-up and TVLARS at the same learning rate and otherwise alike, for each shared seed."""
    rivals: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if cell.optimizer == "TVLARS":
            rivals[_but_optimizer(cell)].append(cell)
    for warm in collection.cells:
        if warm.optimizer == "LARS" and is_warm(warm):
            for rival in rivals[_but_optimizer(warm)]:
                yield from _by_seed(warm, rival)


def _but_optimizer(cell: Cell) -> tuple[Any, ...]:
    """Equal for cells that may be compared: they differ in nothing but the optimizer, at one learning rate."""
    return cell.setting, cell.lr, cell_key(cell.recipe, less=_OF_THE_OPTIMIZER)


def _by_seed(one: Cell, other: Cell) -> Iterable[Pair]:
    """Two cells with each seed that both have."""
    shared = {result.seed for result in one.results} & {result.seed for result in other.results}
    yield from ((one, other, seed) for seed in sorted(shared))


def is_warm(cell: Cell) -> bool:
    """Whether its schedule begins with a warm-up."""
    return "warmup" in str(lookup(cell.recipe, "schedule.target", ""))


def run_of(cell: Cell, seed: int) -> Result:
    """The cell's run of a seed."""
    return next(result for result in cell.results if result.seed == seed)
