"""``ssl-bench report`` and ``ssl-bench leaderboard``: from a folder of runs to everything that can be said of them."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ssl_bench.records.reader import RunRecord, find_runs
from ssl_bench.report import comparisons, results
from ssl_bench.report.aggregate import Collection, Result, gather
from ssl_bench.report.claims import ERRATA, check_claims
from ssl_bench.report.curves import Curves, load_curves
from ssl_bench.report.evidence import Claim
from ssl_bench.report.figure_groups import write_figures
from ssl_bench.report.figures import Plate
from ssl_bench.report.membership import coverage, members
from ssl_bench.report.page import counts, write_page
from ssl_bench.report.scope import scope
from ssl_bench.report.tables import Table
from ssl_bench.study.grid import Study, load_study

# Runs whose layers are in memory at a time.
_KEPT_RUNS = 48

# A column of these tables takes too much of a terminal's width to be worth it.
_NOT_IN_TERMINAL = frozenset({"protocol"})


class Loader:
    """Reads runs' curves, and keeps the last few: a study's layers do not fit into memory at once.

    A damaged telemetry file costs a run its layers, not its numbers; that is said once.
    """

    def __init__(self) -> None:
        self._warned: set[Path] = set()
        self._load = lru_cache(maxsize=_KEPT_RUNS)(self._read)

    def __call__(self, result: Result) -> Curves:
        return self._load(_ByFolder(result.record))

    def _read(self, run: "_ByFolder") -> Curves:
        try:
            return load_curves(run.record)
        except ValueError as error:
            if run.record.folder not in self._warned:
                self._warned.add(run.record.folder)
                print(f"warning: {error}; the report shows this run without its layers", file=sys.stderr)
            return load_curves(run.record, telemetry=False)


class _ByFolder:
    """A record that hashes by its folder, for the cache."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def __hash__(self) -> int:
        return hash(self.record.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByFolder) and other.record.folder == self.record.folder


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
            told = f"none of its {len(records)} runs is one of study {study.name}; without --study all are reported"
            raise ValueError(f"{runs}: {told}")
        records = chosen
    collection = gather(records, skipped)
    if not collection.cells:
        count = len(collection.skipped)
        passed = f"; passed over: {count}, e.g. {collection.skipped[0].reason}" if count else ""
        raise ValueError(f"{runs}: no run to report on{passed}")
    return collection


def all_tables(collection: Collection, *, study: Study | None) -> list[Table]:
    """Every table of the report that has rows.

    Args:
        collection: the runs.
        study: the study that the runs are of; its missing runs are listed, and for table1 the paper's numbers too.
    """
    complete = study is not None and study.name.startswith("table1")
    problems = dict.fromkeys(cell.problem for cell in collection.cells)
    tables = [
        comparisons.leaderboard(collection),
        results.table1_long(collection, complete=complete),
        results.table1_wide(collection),
        *(results.results_table(collection, problem) for problem in problems),
        comparisons.comparisons(collection),
        comparisons.sensitivity(collection),
        comparisons.profile_table(collection),
        comparisons.variances(collection),
        *([coverage(collection, study)] if study is not None else []),
    ]
    return [table for table in tables if table.rows]


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

    load = Loader()
    tables = all_tables(collection, study=grid)
    claims = check_claims(collection, load)
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    _write_tables(tables, folder / "tables")
    _write_tables([claim.table for claim in claims if claim.table.rows], folder / "tables")
    plates = write_figures(collection, load, folder / "figures")
    (folder / "report.md").write_text(_markdown(collection, tables, claims, plates, root), encoding="utf-8")
    return write_page(collection, tables, claims, load, folder / "index.html", root=root)


def print_leaderboard(runs: str | Path) -> None:
    """Prints the leaderboard and each problem's results in the terminal."""
    from rich.console import Console
    from rich.table import Table as Rich

    collection = read_collection(runs)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    problems = dict.fromkeys(cell.problem for cell in collection.cells)
    for table in (comparisons.leaderboard(collection), *(results.results_table(collection, p) for p in problems)):
        shown = [index for index, name in enumerate(table.columns) if name not in _NOT_IN_TERMINAL]
        rich = Rich(title=table.title, title_justify="left")
        for index in shown:
            rich.add_column(table.columns[index], justify="right" if table.numeric()[index] else "left")
        for row in table.rows:
            rich.add_row(*(row[index] for index in shown))
        console.print(rich)
        for note in table.notes:
            console.print(note)
        console.print()
    console.print(counts(collection))
    for entry in collection.skipped:
        console.print(f"passed over: {entry.reason}", markup=False)


def _clear(folder: Path) -> None:
    """Removes an earlier report's tables and figures: one that the new report does not have would look like its own."""
    if (folder / "report.md").exists():
        for part, endings in {"tables": (".md", ".tex", ".csv"), "figures": (".svg", ".png")}.items():
            for path in (folder / part).glob("*"):
                if path.suffix in endings:
                    path.unlink()


def _write_tables(tables: Sequence[Table], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        (folder / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        (folder / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
        if table.records:
            (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")


def _markdown(
    collection: Collection, tables: Sequence[Table], claims: Sequence[Claim], plates: Sequence[Plate], root: Path
) -> str:
    """The whole report as one Markdown file beside its figures."""
    scoped = "\n".join(f"- {text}" for text in scope(collection))
    parts = [f"# ssl_bench report\n\n{counts(collection)}.\n\n{scoped}\n\nTables as CSV and LaTeX are in `tables/`.\n"]
    parts += [table.markdown() for table in tables]
    parts.append("## Claims of the paper, checked\n")
    for claim in claims:
        parts.append(
            f"### ({claim.letter}) {claim.title}: {claim.verdict}\n\nThe paper: {claim.says}\n\n{claim.finding}\n"
        )
        if claim.table.rows:
            parts.append(f"Evidence: [tables/{claim.table.name}.md](tables/{claim.table.name}.md)\n")
    parts.append("## Errata of the paper\n\n" + "\n".join(f"- {text}" for text in ERRATA) + "\n")
    parts.append("## Figures\n")
    parts += [f"### {p.title}\n\n![{p.title}](figures/{p.name}.svg)\n\n{p.caption}\n" for p in plates]
    reasons = [f"- {entry.reason.replace(f'{root}/', '')}" for entry in collection.skipped]
    parts.append("## Folders passed over\n\n" + ("\n".join(reasons) or "None.") + "\n")
    return "\n".join(parts)
