"""``ssl-bench report`` and ``ssl-bench leaderboard``: a folder of runs in, tables, figures, claims and a page out."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from pathlib import Path

from ssl_bench.records.reader import find_runs
from ssl_bench.report import comparisons, questions, results
from ssl_bench.report.aggregate import Collection, Result, gather
from ssl_bench.report.claims import ERRATA, check_claims
from ssl_bench.report.claims.evidence import Claim, Load
from ssl_bench.report.claims.ratio import phi_table
from ssl_bench.report.curves import Curves, load_curves
from ssl_bench.report.figures.drawing import Plate
from ssl_bench.report.figures.plates import write_figures
from ssl_bench.report.page import counts, write_page
from ssl_bench.report.scope import coverage, members, scope
from ssl_bench.report.tables import Table
from ssl_bench.study.grid import Study, load_study

# Runs whose layers are in memory at a time: those of a whole study do not fit.
_KEPT_RUNS = 48

# Columns that take more of a terminal's width than they are worth.
_NOT_IN_TERMINAL = frozenset({"protocol", "test set ±", "untrained"})


def caching_loader() -> Load:
    """A function that reads runs' curves and keeps the last few.

    A damaged telemetry file costs a run its layers, not its numbers; one warning says so.
    """
    warned: set[Path] = set()

    @lru_cache(maxsize=_KEPT_RUNS)
    def load(result: Result) -> Curves:
        try:
            return load_curves(result.record)
        except ValueError as error:
            if result.record.folder not in warned:
                warned.add(result.record.folder)
                print(f"warning: {error}; the report shows this run without its layers", file=sys.stderr)
            return load_curves(result.record, telemetry=False)

    return load


def read_collection(runs: str | Path, *, study: Study | None = None) -> Collection:
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


def all_tables(collection: Collection, load: Load, *, study: Study | None) -> list[Table]:
    """Every table of the report that has rows, without the columns that have no value in any of them.

    Args:
        collection: the runs.
        load: a run's curves.
        study: the study that the runs belong to; its missing runs are listed, and for table1 the paper's numbers too.
    """
    complete = study is not None and study.name.startswith("table1")
    tables = [
        comparisons.leaderboard(collection),
        results.table1_long(collection, complete=complete),
        results.table1_wide(collection),
        *(results.results_table(collection, problem) for problem in collection.problems),
        comparisons.comparisons(collection),
        questions.aggregates(collection),
        comparisons.profile_table(collection),
        questions.time_to_target(collection, load),
        comparisons.sensitivity(collection),
        questions.rate_scaling(collection),
        questions.critical_batches(collection, load),
        questions.early_ranking(collection, load),
        comparisons.variances(collection),
        phi_table(collection, load),
        *([coverage(collection, study)] if study is not None else []),
    ]
    return [table.pruned() for table in tables if table.rows]


def write_report(runs: str | Path, output: str | Path, *, study: str | None = None) -> Path:
    """Writes tables, figures, claims and the web page of a folder of runs.

    Args:
        runs: folder of runs, at any depth.
        output: folder of the report; files of an earlier report there are replaced.
        study: only the runs of this study (a shipped one's name, or a YAML file's path), and what is missing of it;
            None = all runs.

    Returns:
        the web page's path.

    Raises:
        ValueError: nothing to report on, or no such study; one line.
        OSError: the report cannot be written.
    """
    root, folder = Path(runs), Path(output)
    grid = None if study is None else load_study(study)
    collection = read_collection(root, study=grid)

    load = caching_loader()
    tables = all_tables(collection, load, study=grid)
    claims = check_claims(collection, load)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    if (folder / "report.md").exists():
        # An earlier report's table or figure that the new one does not have would look like its own.
        for part, suffixes in {"tables": (".md", ".tex", ".csv"), "figures": (".svg", ".png")}.items():
            for path in (folder / part).glob("*"):
                if path.suffix in suffixes:
                    path.unlink()
    for table in [*tables, *(claim.table for claim in claims if claim.table.rows)]:
        table.write(folder / "tables")
    plates = write_figures(collection, load, folder / "figures")
    (folder / "report.md").write_text(_markdown(collection, tables, claims, plates, root), encoding="utf-8")
    return write_page(collection, tables, claims, load, folder / "index.html", root=root)


def print_leaderboard(runs: str | Path) -> None:
    """Prints the leaderboard and each problem's results in the terminal."""
    from rich.console import Console
    from rich.table import Table as Rich

    collection = read_collection(runs)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    accuracies = (results.results_table(collection, problem) for problem in collection.problems)
    for table in (comparisons.leaderboard(collection), *accuracies):
        shown = [name not in _NOT_IN_TERMINAL for name in table.columns]
        rich = Rich(title=table.title, title_justify="left")
        for name, right in compress(zip(table.columns, table.numeric(), strict=True), shown):
            rich.add_column(name, justify="right" if right else "left")
        for row in table.rows:
            rich.add_row(*compress(row, shown))
        console.print(rich)
        for note in table.notes:
            console.print(note)
        console.print()
    console.print(counts(collection))
    for entry in collection.skipped:
        console.print(f"skipped: {entry.reason}", markup=False)


def _markdown(
    collection: Collection, tables: Sequence[Table], claims: Sequence[Claim], plates: Sequence[Plate], root: Path
) -> str:
    """The whole report as one Markdown file beside its figures."""
    scoped = "\n".join(f"- {text}" for text in scope(collection))
    parts = [f"# ssl_bench report\n\n{counts(collection)}.\n\n{scoped}\n\nTables as CSV and LaTeX are in `tables/`.\n"]
    parts += [table.markdown() for table in tables]
    parts.append("## Claims of the paper, checked\n")
    for claim in claims:
        heading = f"### ({claim.letter}) {claim.title}: {claim.verdict}"
        parts.append(f"{heading}\n\nThe paper: {claim.says}\n\nEstimated: {claim.rule}\n\n{claim.finding}\n")
        if claim.table.rows:
            parts.append(f"Evidence: [tables/{claim.table.name}.md](tables/{claim.table.name}.md)\n")
    parts.append("## Errata of the paper\n\n" + "\n".join(f"- {text}" for text in ERRATA) + "\n")
    parts.append("## Figures\n")
    parts += [f"### {p.title}\n\n![{p.title}](figures/{p.name}.svg)\n\n{p.caption}\n" for p in plates]
    reasons = [f"- {entry.reason.replace(f'{root}/', '')}" for entry in collection.skipped]
    parts.append("## Skipped folders\n\n" + ("\n".join(reasons) or "None.") + "\n")
    return "\n".join(parts)
