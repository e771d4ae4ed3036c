"""What a checked claim is made of: its verdict, and the rows of its evidence."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssl_bench.recipe.schema import flatten
from ssl_bench.report.aggregate import Cell, Collection, Result, cell_key, lookup
from ssl_bench.report.curves import Curves
from ssl_bench.report.tables import Table, Value

Verdict = Literal["supported", "contradicted", "mixed", "undecided", "not reached", "not measured"]
Load = Callable[[Result], Curves]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, with what the runs say.

    Attributes:
        letter: (a) to (e).
        title: what it is about.
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


# What one optimizer's recipe may have otherwise than another's, and both still meet on equal terms.
_OF_THE_OPTIMIZER = ("optimizer", "schedule", "scaling", "param_groups")


def warm_and_cold(collection: Collection) -> Iterable[tuple[Cell, Cell, int]]:
    """Cells alike in all but the schedule, with a warm-up and without (LARS and LAMB), with each seed of both."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if cell.optimizer in ("LARS", "LAMB", "LAMBC"):
            groups[cell.setting, cell.optimizer, cell.lr].append(cell)
    for cells in groups.values():
        for warm in (cell for cell in cells if _is_warm(cell)):
            for cold in (cell for cell in cells if not _is_warm(cell)):
                if _alike(warm, cold, ("schedule",)):
                    yield from ((warm, cold, seed) for seed in _shared(warm, cold))


def warm_lars_and_tvlars(collection: Collection) -> Iterable[tuple[Cell, Cell, int]]:
    """LARS with a warm-up and TVLARS at one learning rate and otherwise alike, with each seed of both."""
    for warm in (cell for cell in collection.cells if cell.optimizer == "LARS" and _is_warm(cell)):
        for rival in collection.cells:
            where_ = (rival.optimizer, rival.setting, rival.lr)
            if where_ == ("TVLARS", warm.setting, warm.lr) and _alike(warm, rival, _OF_THE_OPTIMIZER):
                yield from ((warm, rival, seed) for seed in _shared(warm, rival))


def _alike(one: Cell, other: Cell, families: Container[str]) -> bool:
    """Whether two recipes are the same but for these families of keys and the seed."""
    names = {name for cell in (one, other) for name in flatten(cell.recipe) if name.split(".")[0] in families}
    return cell_key(one.recipe, less=names) == cell_key(other.recipe, less=names)


def _shared(one: Cell, other: Cell) -> list[int]:
    return sorted({result.seed for result in one.results} & {result.seed for result in other.results})


def _is_warm(cell: Cell) -> bool:
    return "warmup" in str(lookup(cell.recipe, "schedule.target", ""))


def verdict_of(outcomes: Sequence[bool]) -> Verdict:
    if not outcomes:
        return "not measured"
    return "supported" if all(outcomes) else "contradicted" if not any(outcomes) else "mixed"


def of_seed(cell: Cell, seed: int) -> Result:
    return next(result for result in cell.results if result.seed == seed)


def where(cell: Cell) -> tuple[str, str, str]:
    return cell.problem, cell.dataset, str(cell.batch_size)


def record_for(cell: Cell, seed: int) -> dict[str, Value]:
    where: dict[str, Value] = {"problem": cell.problem, "dataset": cell.dataset, "batch_size": cell.batch_size}
    return where | {"lr": cell.lr, "optimizer": cell.optimizer, "variant": cell.variant, "seed": seed}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
