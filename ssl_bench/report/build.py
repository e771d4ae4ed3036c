"""``ssl-bench report`` and ``ssl-bench leaderboard``: a folder of runs in, tables, figures, claims and a page out."""

import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import ssl_bench
from ssl_bench.records.reader import Skipped
from ssl_bench.records.storage import one_line
from ssl_bench.report import comparisons, questions, results
from ssl_bench.report.aggregate import Collection, Result
from ssl_bench.report.claims import ERRATA, check_claims
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.claims.ratio import phi_table
from ssl_bench.report.curves import Array, Curves, Layers, load_layers, load_metrics
from ssl_bench.report.figures.drawing import Plate
from ssl_bench.report.figures.plates import Choice, is_cut, write_figures
from ssl_bench.report.leaderboard import answer, read_collection, with_sound_runs
from ssl_bench.report.page import Contents, write_page
from ssl_bench.report.scope import counts, coverage, scope
from ssl_bench.report.tables import Table, markdown, on_one_line
from ssl_bench.study.grid import Study, load_study

# Of layers in memory at a time: those of a whole study do not fit.
_KEPT_BYTES = 64 << 20

Loaded = TypeVar("Loaded")


class Loader:
    """Loads runs' curves: the metrics once, the layers when they are asked for, of which the last few are kept.

    A damaged file costs a run its layers or its curves, not its numbers.

    Attributes:
        problems: the runs that are shown without some of their curves, with the reason.
    """

    def __init__(self) -> None:
        self.problems: list[Skipped] = []
        self._curves: dict[Result, Curves] = {}
        self._layers: dict[Path, Layers] = {}
        self._bytes = 0  # of the kept layers

    def __call__(self, result: Result) -> Curves:
        if result not in self._curves:
            folder = result.record.folder
            metrics: dict[str, Array] = self._guarded(folder, load_metrics, {}, "curves")
            self._curves[result] = Curves(metrics, lambda: self._layers_of(folder))
        return self._curves[result]

    def _layers_of(self, folder: Path) -> Layers:
        found = self._layers.pop(folder, None)
        if found is None:
            found = self._guarded(folder, load_layers, Layers(), "layers")
            self._bytes += found.size
        self._layers[folder] = found  # last in the order of use
        while self._bytes > _KEPT_BYTES and len(self._layers) > 1:
            self._bytes -= self._layers.pop(next(iter(self._layers))).size
        return found

    def _guarded(self, folder: Path, load: Callable[[Path], Loaded], instead: Loaded, what: str) -> Loaded:
        try:
            return load(folder)
        except Exception as error:  # whatever a file of somebody else's makes a reader do
            reason = f"{one_line(error)}; the report shows this run without its {what}"
            if all(problem.reason != reason for problem in self.problems):
                self.problems.append(Skipped(folder, reason))
                print(f"warning: {on_one_line(reason)}", file=sys.stderr)
            return instead


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
        questions.methods(collection),
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


def write_report(runs: str | Path, output: str | Path, *, study: str | None = None, figures: Choice = "auto") -> Path:
    """Writes tables, figures, claims and the web page of a folder of runs.

    Args:
        runs: folder of runs, at any depth.
        output: folder of the report; files of an earlier report there are replaced.
        study: only the runs of this study (a shipped one's name, or a YAML file's path), and what is missing of it;
            None = all runs.
        figures: which are drawn, see ``figures.plates.write_figures``.

    Returns:
        the web page's path.

    Raises:
        ValueError: nothing to report on, or no such study; one line.
        OSError: the report cannot be written.
    """
    grid = None if study is None else load_study(study)
    collection = read_collection(runs, study=grid)
    # From the arguments, because Python calls this too. Without folders above: a report is for others to read.
    words = ["report", str(runs), "-o", str(output), *(["--study", study] if study else [])]
    words += ["--figures", figures] if figures != "auto" else []
    command = shlex.join(["ssl-bench", *(Path(word).name if "/" in word else word for word in words)])

    def write(found: Collection) -> Path:
        return _write(found, Path(runs), Path(output), grid, figures, command)

    return with_sound_runs(collection, write, lambda found: _probe(found, Path(runs)))


def _probe(collection: Collection, root: Path) -> None:
    """All of a report but its files and figures."""
    load = Loader()
    contents = report_of(collection, load, None, root)
    for table in [*contents.tables, *(claim.table for claim in contents.claims)]:
        table.markdown(), table.latex(), table.csv()
    with tempfile.TemporaryDirectory() as folder:
        write_page(contents, Path(folder) / "index.html")


def report_of(collection: Collection, load: Load, study: Study | None, root: Path, command: str = "") -> Contents:
    """What a report says, before its figures; ``command`` is what makes it."""
    is_the_papers = bool(results.matched(collection))
    claims = check_claims(collection, load) if is_the_papers else []
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, ssl_bench {ssl_bench.__version__}"
    header = [("Made", made), ("Runs", root.name or str(root))]
    header += [("Study", study.name)] if study else []
    header += [("Command", command)] if command else []
    tables = all_tables(collection, load, study=study)
    return Contents(collection, answer(collection), header, tables, claims, (), list, load, root)


def _write(
    collection: Collection, root: Path, folder: Path, study: Study | None, figures: Choice, command: str
) -> Path:
    load = Loader()
    contents = report_of(collection, load, study, root, command)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    if (folder / "report.md").exists():
        # An earlier report's table or figure that the new one does not have would look like its own.
        for part, suffixes in {"tables": (".md", ".tex", ".csv"), "figures": (".svg", ".png")}.items():
            for path in (folder / part).glob("*"):
                if path.suffix in suffixes:
                    path.unlink()
    for table in [*contents.tables, *(claim.table for claim in contents.claims if claim.table.rows)]:
        table.write(folder / "tables")
    plates, undrawn = write_figures(collection, load, folder / "figures", choice=figures)
    if is_cut(collection, figures):
        print(f"{len(plates)} figures drawn of this many runs; --figures all draws all", file=sys.stderr)

    def skipped() -> list[str]:
        reasons = [entry.reason for entry in (*collection.skipped, *load.problems, *undrawn)]
        return [on_one_line(reason.replace(f"{root}/", "").replace(f"{folder}/", "")) for reason in reasons]

    contents = replace(contents, plates=plates, skipped=skipped)
    page = write_page(contents, folder / "index.html")
    (folder / "report.md").write_text(_markdown(contents), encoding="utf-8")
    return page


def _markdown(contents: Contents) -> str:
    """The whole report as one Markdown file beside its figures."""
    collection, seen = contents.collection, set[str]()

    def once(table: Table) -> str:
        notes = tuple(note for note in table.notes if note not in seen)
        seen.update(notes)
        return replace(table, notes=notes).markdown()

    made = "; ".join(f"{label}: {markdown(text)}" for label, text in contents.header)
    scoped = "\n".join(f"- {markdown(text)}" for text in scope(collection))
    parts = [f"# ssl_bench report\n\n**{markdown(contents.answer)}**\n\n{counts(collection)}.\n\n{scoped}\n\n{made}\n"]
    parts.append("Tables as CSV and LaTeX are in `tables/`.\n")
    figures = [f"### {markdown(p.title)}\n\n![]({_linked(p)})\n\n{markdown(p.caption)}\n" for p in contents.plates]
    parts += figures[:1]
    parts += [once(table) for table in contents.tables]
    if contents.claims:
        parts.append("## Claims of the paper, checked\n")
    for claim in contents.claims:
        heading = f"### ({claim.letter}) {claim.title}: {claim.verdict}"
        said = (f"The paper: {claim.says}", f"Estimated: {claim.rule}", claim.finding)
        parts.append("\n\n".join([heading, *map(markdown, said)]) + "\n")
        if claim.table.rows:
            parts.append(f"Evidence: [tables/{claim.table.name}.md](tables/{claim.table.name}.md)\n")
    if contents.claims:
        parts.append("## Errata of the paper\n\n" + "\n".join(f"- {markdown(text)}" for text in ERRATA) + "\n")
    parts += ["## Figures\n", *figures[1:]]
    parts.append(
        "## Skipped\n\n" + ("\n".join(f"- {markdown(text)}" for text in contents.skipped()) or "Nothing.") + "\n"
    )
    return "\n".join(parts)


def _linked(plate: Plate) -> str:
    return f"figures/{plate.name}.svg"
