"""One self-contained web page: tables, claims, and behind every cell its runs' curves, recipe and provenance."""

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import Cell, Collection, Result
from ssl_bench.report.claims import ERRATA
from ssl_bench.report.claims.evidence import Claim, Load
from ssl_bench.report.curves import QUANTITIES, Curves, Quantity, rounded, thin
from ssl_bench.report.figures.drawing import LINES, PALETTE, Plate, looks_of
from ssl_bench.report.figures.sharpness import claim_charts, tables_of
from ssl_bench.report.scope import counts, planned, scope
from ssl_bench.report.tables import Table, number, points

# Points of a curve in the page: enough at a few hundred pixels, and a thousand runs stay at some megabytes.
METRIC_POINTS, LAYER_POINTS = 120, 60
FEWEST_POINTS = 24  # of a metric, where the study has many runs
MANY_RUNS = 200
EMBEDDED_BYTES = 3_000_000  # of figures in the page; the others are links to their files

LABELS = {
    "loss": "training loss",
    "test_top1": "test top-1 (%)",
    "test_top5": "test top-5 (%)",
    "test_loss": "test loss",
    "top1": "training top-1 (%)",
    "top5": "training top-5 (%)",
    "online_top1": "online monitor (%), not a result",
    "lr": "learning rate",
    "images_per_second": "images per second",
    **{quantity.column: f"{quantity.meaning} {quantity.text}" for quantity in QUANTITIES},
}
# Short names for the page's list of sections; other tables appear by their title.
SHORT = {
    "table1": "Table 1",
    "table1-wide": "Table 1, wide",
    "comparisons": "Pairs",
    "sensitivity": "Learning rates",
    "profiles": "Profiles",
    "variance": "Variance",
    "phi": "φ",
    "methods": "Methods",
    "aggregates": "All settings",
    "time-to-target": "Time to target",
    "lr-scaling": "lr and B",
    "critical-batch": "Critical batch",
    "early-ranking": "Early ranks",
}
# Metrics that another curve or the clocks show already.
_UNSHOWN = frozenset({"step", "samples", "epochs", "seconds", "lr_multiplier", "skipped_steps"})


@dataclass(frozen=True)
class Contents:
    """All that a report says, for its page and its Markdown file.

    Attributes:
        collection: the runs.
        answer: the first sentence.
        header: what made the report: label and text.
        tables: in the order of the page.
        claims: checked; empty where the runs are not the paper's.
        plates: the figures' texts; the files are in ``figures/`` beside the page.
        skipped: tells what could not be used, one reason each; asked for last, when all runs have been read.
        load: a run's curves.
        root: the folder of runs; runs are named by their path below it.
    """

    collection: Collection
    answer: str
    header: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    claims: Sequence[Claim]
    plates: Sequence[Plate]
    skipped: Callable[[], list[str]]
    load: Load
    root: Path


def write_page(contents: Contents, path: Path) -> Path:
    """Writes the page.

    Args:
        contents: of the report.
        path: of the HTML file.
    """
    collection = contents.collection
    charts, seen = claim_charts(collection), set[str]()
    head = {
        "answer": contents.answer,
        "counts": counts(collection),
        "scope": scope(collection),
        "header": contents.header,
        "overview": _overview(collection),
        "looks": _looks(collection),
        "labels": LABELS,
        "tables": [_table(table, seen) for table in contents.tables],
        "claims": [
            {**vars(claim), "table": _table(claim.table, seen), "charts": charts.get(claim.letter, [])}
            for claim in contents.claims
        ],
        "errata": ERRATA if contents.claims else [],
        "profiles": {"gaps": comparisons.GAPS, "shares": comparisons.profiles(collection)},
        "effort": _effort(collection),
        "figures": _figures(contents.plates, path.parent / "figures"),
    }
    assets = files("ssl_bench.report") / "assets"
    page, style, script = ((assets / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    page = page.replace("{{title}}", "ssl_bench report").replace("{{style}}", style).replace("{{script}}", script)
    before, after = page.split("{{data}}")
    shared: dict[str, int] = {}  # provenance that runs have in common, once
    # Written cell by cell: the curves of a thousand runs as one text would be held several times over.
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}{_json(head)[:-1]},")
        file.write('"cells":{')
        for index, cell in enumerate(collection.cells):
            file.write(f"{',' if index else ''}{_json(cell.key)}:{_json(_cell(cell, contents, shared))}")
        file.write(f'}},"shared":[{",".join(shared)}],"skipped":{_json(contents.skipped())}}}{after}')
    return path


def _json(value: Any) -> str:
    text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")  # so that no text of a record ends the script element


def _looks(collection: Collection) -> dict[str, dict[str, Any]]:
    """The colour of each optimizer and arm as a number of the palette, and its line as SVG's dashes."""
    dashes = dict(zip(LINES, ("", "6 3", "7 3 2 3", "2 3"), strict=True))
    named = dict.fromkeys((cell.optimizer, cell.arm) for cell in collection.cells)
    looks = looks_of((optimizer, optimizer) for optimizer, _ in named) | looks_of(named)
    return {name: {"color": PALETTE.index(look.color), "dash": dashes[look.line]} for name, look in looks.items()}


def _overview(collection: Collection) -> list[dict[str, Any]]:
    """The best accuracy of each optimizer against the batch size: a chart for each problem and data set."""
    charts: dict[tuple[str, str], dict[str, dict[str, list[Any]]]] = {}
    for setting, contenders in comparisons.arms(collection).items():
        for arm in comparisons.best_arms(contenders):
            lines = charts.setdefault((setting.problem, setting.dataset), {})
            line = lines.setdefault(arm.optimizer, {"x": [], "y": [], "low": [], "high": [], "lost": []})
            ends = (arm.best.interval(arm.protocol) if arm.best else None) or (arm.top1, arm.top1)
            runs = (
                run
                for other in contenders
                if other.optimizer == arm.optimizer
                for cell in other.cells
                for run in cell.results
            )
            for name, value in zip(
                line, (setting.batch_size, arm.top1, *ends, any(run.lost for run in runs)), strict=True
            ):
                line[name].append(value)
    return [
        {"title": f"{problem}, {dataset}", "series": [{"name": name, **line} for name, line in lines.items()]}
        for (problem, dataset), lines in charts.items()
    ]


def _figures(plates: Sequence[Plate], folder: Path) -> list[dict[str, str]]:
    """Titles, captions and file names; the pictures themselves as long as the page stays small, then links alone."""
    found, size = [], 0
    for plate in plates:
        entry = {"title": plate.title, "caption": plate.caption, "link": f"figures/{plate.name}.svg"}
        file = folder / f"{plate.name}.svg"
        if file.is_file() and size + file.stat().st_size <= EMBEDDED_BYTES:
            size += file.stat().st_size
            entry["image"] = f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"
        found.append(entry)
    return found


def _table(table: Table, seen: set[str]) -> dict[str, Any]:
    """A table for the page; a note that stands under an earlier one is not repeated."""
    notes = [note for note in table.notes if note not in seen]
    seen |= set(notes)
    printed = {name: value for name, value in vars(table).items() if name != "records"}
    keys = table.keys or [""] * len(table.rows)
    short = SHORT.get(table.name, table.title)
    return printed | {"notes": notes, "short": short, "numeric": table.numeric(), "keys": keys}


def _effort(collection: Collection) -> list[dict[str, Any]]:
    """The best-of-k curves of settings in which some arm has several trials."""
    found = []
    for setting, arms in comparisons.arms(collection).items():
        curves = {arm.name: comparisons.best_of_k(arm.trials) for arm in arms if len(arm.trials) > 1}
        if curves:
            found.append({"title": str(setting), "curves": curves})
    return found


def _cell(cell: Cell, contents: Contents, shared: dict[str, int]) -> dict[str, Any]:
    protocols = contents.collection.protocols(cell.problem)
    measured = [name for protocol in protocols for name in (f"{protocol} top-1 %", "untrained")]
    columns = ["seed", "status", *measured, "folder"]
    total = len(contents.collection.results)
    points = max(FEWEST_POINTS, min(METRIC_POINTS, METRIC_POINTS * MANY_RUNS // total))
    runs: list[dict[str, Any]] = []
    for result in cell.results:
        # A run's layers are its largest part: of a large study those of each cell's first run are enough.
        layers = total <= MANY_RUNS or not any(run["layers"] for run in runs)
        runs.append(_run(result, cell, contents.load(result), shared, points, layers=layers))
    return {
        "title": f"{cell.arm}: {cell.setting}, lr {number(cell.lr)}",
        "arm": cell.arm,
        "recipe": {name: value for name, value in cell.recipe.items() if name not in ("seed", "run_dir")},
        "runs_table": {"columns": columns, "rows": [_row(result, protocols, contents.root) for result in cell.results]},
        "runs": runs,
    }


def _row(result: Result, protocols: Sequence[str], root: Path) -> list[str]:
    folder, status = result.record.folder, result.status
    if status == "diverged":
        ended = result.record.results or {}
        status += f" at step {ended.get('step', '?')}" + (f", first in {ended['layer']}" if ended.get("layer") else "")
    row = [str(result.seed), status]
    for protocol in protocols:
        trained, untrained = result.scores.get(protocol), result.untrained.get(protocol)
        row.append(points(trained.top1 if trained and result.status == "finished" else None))
        row.append(points(untrained.top1 if untrained else None))
    return [*row, str(folder.relative_to(root) if folder.is_relative_to(root) else folder)]


def _run(
    result: Result, cell: Cell, curves: Curves, shared: dict[str, int], points: int, *, layers: bool
) -> dict[str, Any]:
    head = result.record.provenance
    shown = {name: value for name, value in head.items() if name not in ("recipe", "format", "argv", "param_groups")}
    groups = [{name: group[name] for name in group if name != "param_names"} for group in head.get("param_groups", [])]
    shown |= {"param_groups": groups, "results": _without_points(result.record.results)}
    order = {name: rank for rank, name in enumerate(LABELS)}
    metrics = sorted(curves.metrics.keys() - _UNSHOWN, key=lambda name: (order.get(name, len(order)), name))
    return {
        "seed": result.seed,
        "images_per_step": images_per_step(curves, cell.batch_size),
        "steps_per_epoch": planned(result, "steps_per_epoch") or 1,
        "provenance": {name: shared.setdefault(_json(value), len(shared)) for name, value in shown.items()},
        "metrics": {name: _metric(curves, name, points) for name in metrics},
        "layers": {q.column: _layers(curves, q) for q in QUANTITIES if layers and curves.has(q.column)},
        "analysis": tables_of(result),
    }


def _without_points(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """A run's results without the thousands of numbers of their pictures, which the figures show."""
    if results is None:
        return None
    entries = results.get("evaluations", [])
    return {**results, "evaluations": [{name: one[name] for name in one if name != "points"} for one in entries]}


def images_per_step(curves: Curves, batch_size: int) -> float:
    """On average: fewer than the batch size where epochs end with a short batch."""
    steps, seen = curves.metric("samples")
    return float(seen[-1] / steps[-1]) if len(steps) and steps[-1] > 0 else float(batch_size)


def _metric(curves: Curves, name: str, points: int) -> dict[str, list[float]]:
    steps, values = curves.metric(name)
    seconds = curves.metrics.get("seconds", curves.metrics["step"])[~np.isnan(curves.metrics[name])]
    kept = thin(len(steps), points)
    return {"step": steps[kept].tolist(), "seconds": rounded(seconds[kept]), "y": rounded(values[kept])}


def _layers(curves: Curves, quantity: Quantity) -> dict[str, list[float]]:
    """Smallest, median and largest value over the adapted layers, along the steps."""
    matrix = curves.of_adapted(quantity)
    usable = np.flatnonzero(np.isfinite(matrix).any(axis=1))
    kept = usable[thin(len(usable), LAYER_POINTS)]
    steps, clock = curves.steps[kept], curves.metrics
    has_clock = "seconds" in clock and len(clock["step"]) > 0
    seconds = np.interp(steps, clock["step"], clock["seconds"]) if has_clock else np.full(len(steps), np.nan)
    rows = matrix[kept]
    low, median, high = np.nanmin(rows, axis=1), np.nanmedian(rows, axis=1), np.nanmax(rows, axis=1)
    curve = {"seconds": seconds, "low": low, "y": median, "high": high}
    return {"step": steps.tolist(), **{name: rounded(values) for name, values in curve.items()}}


def _plain(value: Any) -> Any:
    """The value with JSON's types only: null for a number that is not finite, text for anything unknown."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)
