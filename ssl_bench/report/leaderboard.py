"""``ssl-bench leaderboard``: the answer and the rankings in the terminal, from little more than the runs' results."""

import sys
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ssl_bench.records.reader import Skipped, find_runs
from ssl_bench.records.storage import one_line
from ssl_bench.report import comparisons, results
from ssl_bench.report.aggregate import Collection, gather
from ssl_bench.report.answer import answer
from ssl_bench.report.scope import counts, members
from ssl_bench.report.tables import Table, on_one_line

if TYPE_CHECKING:
    from ssl_bench.study.grid import Study

# Columns that take more of a terminal's width than they are worth.
_NOT_IN_TERMINAL = frozenset({"protocol", "test set ±", "untrained"})


def read_collection(runs: str | Path, *, study: "Study | None" = None) -> Collection:
    """All runs below a folder, in cells.

    Args:
        runs: the folder.
        study: only the runs of this study; None = all.

    Raises:
        ValueError: no such folder, or no run in it that can be read; one line.
    """
    records, skipped = find_runs(runs)
    if study is not None:
        chosen = members(records, study)
        if records and not chosen:
            reason = f"none of its {len(records)} runs belongs to the study {study.name} (leave out --study for all)"
            raise ValueError(f"{runs}: {reason}")
        records = chosen
    collection = gather(records, skipped)
    if not collection.cells:
        count = len(collection.skipped)
        reason = f"; skipped folders: {count}, e.g. {collection.skipped[0].reason}" if count else ""
        raise ValueError(f"{runs}: no run to report on{reason}")
    return collection


Made = TypeVar("Made")


def with_sound_runs(
    collection: Collection, make: Callable[[Collection], Made], probe: Callable[[Collection], object]
) -> Made:
    """Makes something of all runs; where one of them makes it fail, without that one, which is listed as skipped.

    The schema at the border keeps out what it knows of. What it does not is found by trying every run alone, which
    only a failure costs.
    """
    try:
        return make(collection)
    except OSError:
        raise  # the disk's fault, and no run's
    except Exception:
        sound, left_out = [], list(collection.skipped)
        for result in collection.results:
            folder = result.record.folder
            try:
                probe(gather([result.record]))
                sound.append(result.record)
            except Exception as error:
                left_out.append(Skipped(folder, f"{folder}: the report fails on it: {one_line(error)}"))
        if not sound or len(left_out) == len(collection.skipped):
            raise  # a fault of the report's own
        rest = gather(sound, left_out)
        return make(rest)


def print_leaderboard(runs: str | Path) -> None:
    """Prints the leaderboard and each problem's results in the terminal."""
    from rich.console import Console
    from rich.table import Table as Rich

    def of(found: Collection) -> list[Table]:
        accuracies = (results.results_table(found, problem) for problem in found.problems)
        return [table.pruned() for table in (comparisons.leaderboard(found), *accuracies)]

    collection = read_collection(runs)
    tables, collection = with_sound_runs(collection, lambda found: (of(found), found), of)
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    console.print(answer(collection) + "\n")
    seen = set[str]()
    for table in tables:
        shown = [name not in _NOT_IN_TERMINAL for name in table.columns]
        rich = Rich(title=table.title, title_justify="left")
        for name, right in compress(zip(table.columns, table.numeric(), strict=True), shown):
            rich.add_column(name, justify="right" if right else "left")
        for row in table.rows:
            rich.add_row(*compress(row, shown))
        console.print(rich)
        for note in table.notes:
            if note not in seen:
                console.print(note)
        seen |= set(table.notes)
        console.print()
    console.print(counts(collection))
    for entry in collection.skipped:
        console.print(f"skipped: {on_one_line(entry.reason)}")
