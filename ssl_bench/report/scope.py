"""What the runs cover: which belong to a study, which are missing, and their epochs and seeds beside the paper's."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ssl_bench.records.reader import RunRecord
from ssl_bench.report.aggregate import Cell, Collection, Result
from ssl_bench.report.recipes import cell_key, lookup
from ssl_bench.report.tables import Table, is_number

if TYPE_CHECKING:  # the grid needs all of the recipe's machinery, the leaderboard does not
    from ssl_bench.study.grid import Study

# The paper's. For Barlow Twins its appendix states them; for classification only its figures and its authors' code do.
EPOCHS = {"classification": 100, "barlow_twins": 1000}

# A study's run at fewer epochs, or in another arithmetic, is still its run; the tables say how long each one was.
RELAXED = frozenset({"epochs", "steps", "precision", "chunk_size", "deterministic"})


def members(records: Iterable[RunRecord], study: "Study") -> list[RunRecord]:
    """The records whose recipe is in a study, whatever their seed and length."""

    def key(record: RunRecord) -> str | None:
        try:
            return cell_key(record.recipe, less=RELAXED)
        except (KeyError, TypeError, ValueError, AttributeError):  # not a benchmark run's recipe
            return None

    keys = {cell_key(cell.recipe.to_dict(), less=RELAXED) for cell in study.cells}
    return [record for record in records if key(record) in keys]


def coverage(collection: Collection, study: "Study") -> Table:
    """The runs that a study defines and that are not finished; one that failed is done, and listed."""
    found = {(cell_key(run.record.recipe, less=RELAXED), run.seed): run.status for run in collection.results}
    table = Table("coverage", f"Study {study.name}: runs that are not finished", ("status", "run"))
    counts: Counter[str] = Counter()
    for cell in study.cells:
        state = found.get((cell_key(cell.recipe.to_dict(), less=RELAXED), cell.recipe.seed), "no run")
        counts[state] += 1
        table.records.append({"status": state, "run": cell.label, "identity": cell.identity})
        if state != "finished":
            table.add((state, cell.label))
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    relaxed = "A run at another length or precision than the study's counts too."
    table.notes = (f"Of the {len(study.cells)} runs: {states}. {relaxed}",)
    return table


def planned(result: Result, name: str) -> float | None:
    """A number > 0 of the run's plan, e.g. "steps_per_epoch"; None where its record has none."""
    value: Any = lookup(result.record.provenance.get("plan", {}), name)
    return float(value) if is_number(value) and 0 < value < math.inf else None


def epochs_planned(result: Result) -> float | None:
    """The epochs that a run was started for; None where its record does not say."""
    total, each = planned(result, "total_steps"), planned(result, "steps_per_epoch")
    return total / each if total and each else None


def cut_short(cell: Cell) -> bool:
    """Whether a cell's runs were started for fewer epochs than the paper's."""
    epochs, in_paper = epochs_planned(cell.results[0]), EPOCHS.get(cell.problem)
    # Some slack, for epochs become whole steps: at a large batch an epoch has only three.
    return epochs is not None and in_paper is not None and epochs < 0.95 * in_paper


def epochs_trained(cells: Iterable[Cell]) -> float | None:
    """The most epochs that any run of these cells has completed; None where no run has logged metrics."""
    return max(
        (e for cell in cells for result in cell.results if (e := result.clock("epochs")) is not None), default=None
    )


def scope(collection: Collection) -> list[str]:
    """One sentence for each problem: epochs and seeds of the runs, and the paper's epochs beside them."""

    def span(values: list[str]) -> str:
        return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else ""

    sentences = []
    for problem in collection.problems:
        cells = [cell for cell in collection.cells if cell.problem == problem]
        started = {epochs_planned(result) for cell in cells for result in cell.results}
        epochs = span([short(value) for value in sorted(value for value in started if value is not None)])
        paper = EPOCHS.get(problem)
        beside = "" if paper is None else ", as in the paper" if epochs == str(paper) else f" (the paper: {paper})"
        seeds = sorted({len(cell.results) for cell in cells})
        spread = ", so no spread between seeds is known" if seeds == [1] else ""
        count = f"n = {span([str(number) for number in seeds])} {'seed' if seeds == [1] else 'seeds'}"
        sentences.append(f"{problem}: {epochs or '?'} epochs per run{beside}; {count} for each recipe{spread}.")
    return sentences


def short(epochs: float | None) -> str:
    """Epochs to a tenth, for the last step ends a little beyond a whole one (4.014 at B = 4096); or a dash."""
    if epochs is None:
        return "–"
    return f"{epochs:.1f}".removesuffix(".0") if epochs >= 1 else f"{epochs:.2g}"


def counts(collection: Collection) -> str:
    """One line on the number of runs and recipes."""
    statuses = Counter(result.status for result in collection.results)
    states = ", ".join(f"{count} {word}" for word, count in statuses.most_common())
    skipped = f"; skipped folders: {len(collection.skipped)}" if collection.skipped else ""
    return f"runs: {len(collection.results)}, of recipes (seeds aside): {len(collection.cells)} ({states}){skipped}"
