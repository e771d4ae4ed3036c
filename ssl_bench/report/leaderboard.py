"""The answer, which optimizer is best and how sure that is; ``ssl-bench leaderboard`` prints it with the ranks."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ssl_bench.records.reader import Skipped, find_runs
from ssl_bench.records.storage import one_line
from ssl_bench.report import comparisons, results
from ssl_bench.report.aggregate import Collection, Setting, gather
from ssl_bench.report.comparisons import Arm, arms, at_equal_tuning, at_their_best, best_arms, ranks
from ssl_bench.report.scope import counts, members
from ssl_bench.report.tables import Table, between, on_one_line

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


def answer(collection: Collection) -> str:
    """Who is best in how many settings, and in how many nobody can be told; one sentence or two."""
    compared = {setting: best_arms(contenders) for setting, contenders in arms(collection).items()}
    compared = {setting: found for setting, found in compared.items() if len(found) > 1}
    if not compared:
        return "Nothing is compared yet: no two optimizers have ended in one setting."
    families = {setting: at_their_best(found) for setting, found in compared.items()}
    places = {setting: ranks(found, families[setting]) for setting, found in compared.items()}
    leaders = {setting: [name for name, place in each.items() if place[0] == 1] for setting, each in places.items()}
    decided = sum(one.decided for family in families.values() for one in family)
    total = sum(map(len, families.values()))
    counts = sorted({len(arm.best.top1(arm.protocol)) for found in compared.values() for arm in found if arm.best})
    seeds = f"n = {counts[0]}" + (f" to {counts[-1]}" if counts[-1] > counts[0] else "") if counts else "n = 0"
    how = f"95% confidence, Holm's correction: {decided} of {total} comparisons decided; {seeds} per optimizer"
    if len(compared) == 1:
        ((setting, found),) = compared.items()
        return _of_one(setting, found, leaders[setting], how) + _at_equal_tuning(collection, {setting: found})
    names = {arm.name: arm.optimizer for found in compared.values() for arm in found}
    best = Counter(names[each[0]] for each in leaders.values() if len(each) == 1)
    won = ", ".join(f"{name} in {count}" for name, count in best.most_common())
    open_ = len(compared) - best.total()
    if not best:
        text = f"In none of {len(compared)} settings is one optimizer decidedly the best"
    else:
        text = f"Of {len(compared)} settings, decidedly the best is {won}"
        text += f"; in the other {open_} the leaders cannot be told apart" if open_ else ""
    return f"{text} ({how})." + _at_equal_tuning(collection, compared)


def _of_one(setting: Setting, found: Sequence[Arm], leaders: Sequence[str], how: str) -> str:
    ordered = sorted(found, key=lambda arm: arm.top1 or 0.0, reverse=True)
    first, others = ordered[0], [arm for arm in ordered[1:] if arm.name in leaders]
    ends = first.best.interval(first.protocol) if first.best else None
    score = f"{first.top1:.2f}%" + (f" (95%: {between(ends)})" if ends else "")
    if not others:
        rest = ", ".join(f"{arm.optimizer} ({arm.top1:.2f}%)" for arm in ordered[1:])
        return f"{first.optimizer} is decidedly the best in {setting}: {score}, ahead of {rest} ({how})."
    equal = ", ".join(f"{arm.optimizer} ({arm.top1:.2f}%)" for arm in others)
    told = f"{first.optimizer} has {score}, and {equal} cannot be told from it"
    return f"No optimizer is decidedly the best in {setting}: {told} ({how})."


def _at_equal_tuning(collection: Collection, compared: dict[Setting, list[Arm]]) -> str:
    """Where another optimizer leads once every one has the same number of trials; empty where none does."""
    grouped, other = arms(collection), []
    for setting, found in compared.items():
        _, equal = at_equal_tuning(grouped[setting])
        first = max(found, key=lambda arm: arm.top1 or 0.0).optimizer
        best = max(equal, key=lambda name: equal[name])
        if equal[best] > equal[first]:
            other.append(f"{best} instead of {first}")
    if not other:
        return ""
    with_equal = " With equally many trials for every optimizer the highest expected accuracy"
    if len(compared) == 1:
        return f"{with_equal} is that of {other[0]}."
    told = ", ".join(f"{text} in {count} of {len(compared)}" for text, count in Counter(other).most_common())
    return f"{with_equal} is another one's: {told} settings."


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
