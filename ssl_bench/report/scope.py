"""How far the runs go: epochs and seeds, beside the paper's."""

from collections.abc import Iterable
from typing import Any

from ssl_bench.report.aggregate import Cell, Collection, Result, lookup
from ssl_bench.report.evidence import is_number
from ssl_bench.report.paper import EPOCHS


def steps_per_epoch(result: Result) -> float | None:
    """Of a run's plan; None where its record does not say."""
    return _planned(result, "steps_per_epoch")


def epochs_planned(result: Result) -> float | None:
    """The epochs that a run was started for; None where its record does not say."""
    total, each = _planned(result, "total_steps"), steps_per_epoch(result)
    return total / each if total and each else None


def cut_short(cell: Cell) -> bool:
    """Whether a cell's runs were started for fewer epochs than the paper's."""
    planned, papers = epochs_planned(cell.results[0]), EPOCHS.get(cell.problem)
    return planned is not None and papers is not None and planned < 0.95 * papers


def epochs_trained(cells: Iterable[Cell]) -> float | None:
    """The most epochs that a run of these cells has done; None where no run has a line of metrics."""
    last = [result.record.metrics[-1] for cell in cells for result in cell.results if result.record.metrics]
    return max((row.get("epochs", 0.0) for row in last), default=None)


def beside_the_papers(cells: Iterable[Cell], problem: str) -> str:
    """Epochs of ours and of the paper, "4 / 100", for a table that has the paper's numbers."""
    return f"{short(epochs_trained(cells))} / {EPOCHS.get(problem, '–')}"


def scope(collection: Collection) -> list[str]:
    """One sentence for each problem: for how many epochs and on how many seeds, and the paper's epochs beside ours."""
    said = []
    for problem in dict.fromkeys(cell.problem for cell in collection.cells):
        cells = [cell for cell in collection.cells if cell.problem == problem]
        planned = [epochs_planned(result) for cell in cells for result in cell.results]
        epochs = _range([short(value) for value in sorted({value for value in planned if value is not None})])
        papers = EPOCHS.get(problem)
        beside = "" if papers is None else ", as in the paper" if epochs == str(papers) else f" (the paper: {papers})"
        seeds = sorted({len(cell.results) for cell in cells})
        spread = ", so no spread between seeds is known" if seeds == [1] else ""
        count = f"n = {_range([str(number) for number in seeds])} {'seed' if seeds == [1] else 'seeds'}"
        said.append(f"{problem}: {epochs or '?'} epochs a run{beside}; {count} for each recipe{spread}.")
    return said


def short(epochs: float | None) -> str:
    """Epochs to a tenth, for the last step ends a little beyond a whole one (4.014 at B = 4096); or a dash."""
    if epochs is None:
        return "–"
    return f"{epochs:.1f}".removesuffix(".0") if epochs >= 1 else f"{epochs:.2g}"


def _range(values: list[str]) -> str:
    return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else ""


def _planned(result: Result, name: str) -> float | None:
    value: Any = lookup(result.record.provenance.get("plan", {}), name)
    return float(value) if is_number(value) and value > 0 else None
