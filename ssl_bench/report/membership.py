"""Which runs belong to a study, and which of a study's runs are missing."""

from collections import Counter
from collections.abc import Iterable

from ssl_bench.records.reader import RunRecord
from ssl_bench.report.aggregate import Collection, cell_key
from ssl_bench.report.tables import Table, Value
from ssl_bench.study.grid import Study

# A study's run at fewer epochs, or in another arithmetic, is still its run; the tables say how long each one was.
RELAXED = frozenset({"epochs", "steps", "precision", "chunk_size", "deterministic"})


def members(records: Iterable[RunRecord], study: Study) -> list[RunRecord]:
    """The records whose recipe is in a study, whatever their seed and length."""
    keys = {cell_key(cell.recipe.to_dict(), less=RELAXED) for cell in study.cells}
    return [record for record in records if _key(record) in keys]


def coverage(collection: Collection, study: Study) -> Table:
    """What a study has no finished run for, as it is defined; a run that diverged or collapsed is done."""
    found = {
        (cell_key(result.record.recipe, less=RELAXED), result.seed): result.status for result in collection.results
    }
    cells = study.cells
    states = [found.get((cell_key(c.recipe.to_dict(), less=RELAXED), c.recipe.seed), "no run") for c in cells]
    rows = [(state, cell.label) for state, cell in zip(states, cells, strict=True) if state != "finished"]
    records: list[dict[str, Value]] = [
        {"status": state, "run": cell.label, "identity": cell.identity}
        for state, cell in zip(states, cells, strict=True)
    ]
    said = ", ".join(f"{count} {state}" for state, count in Counter(states).most_common())
    note = f"Of the {len(cells)} runs: {said}. A run at another length or precision than the study's counts too."
    title = f"Study {study.name}: runs that are not finished"
    return Table("coverage", title, ("status", "run"), rows, records, (note,))


def _key(record: RunRecord) -> str | None:
    try:
        return cell_key(record.recipe, less=RELAXED)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
