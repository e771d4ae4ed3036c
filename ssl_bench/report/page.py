"""One self-contained web page: tables, claims, and behind every cell its runs' curves, recipe and provenance."""

import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import Cell, Collection, Result
from ssl_bench.report.claims import ERRATA
from ssl_bench.report.claims.evidence import Claim, Load
from ssl_bench.report.curves import QUANTITIES, Curves, Quantity, rounded, thin
from ssl_bench.report.figures.sharpness import claim_charts, tables_of
from ssl_bench.report.scope import scope
from ssl_bench.report.tables import Table, number, points

# Points of a curve in the page: enough at a few hundred pixels, and a thousand runs stay at some megabytes.
METRIC_POINTS, LAYER_POINTS = 120, 60

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
}
# Metrics that another curve or the clocks show already.
_UNSHOWN = frozenset({"step", "samples", "epochs", "seconds", "lr_multiplier", "skipped_steps"})


def write_page(
    collection: Collection, tables: Sequence[Table], claims: Sequence[Claim], load: Load, path: Path, *, root: Path
) -> Path:
    """Writes the page.

    Args:
        collection: the runs.
        tables: in the order of the page.
        claims: checked.
        load: a run's curves.
        path: of the HTML file.
        root: the folder of runs; the page names runs by their path below it.
    """
    charts = claim_charts(collection)
    content = {
        "counts": counts(collection),
        "scope": scope(collection),
        "labels": LABELS,
        "tables": [_table(table) for table in tables],
        "claims": [
            {**vars(claim), "table": _table(claim.table), "charts": charts.get(claim.letter, [])} for claim in claims
        ],
        "errata": ERRATA,
        "skipped": [entry.reason.replace(f"{root}/", "") for entry in collection.skipped],
        "profiles": {"gaps": comparisons.GAPS, "shares": comparisons.profiles(collection)},
        "effort": _effort(collection),
        "cells": {cell.key: _cell(cell, collection, load, root) for cell in collection.cells},
    }
    text = json.dumps(_plain(content), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    assets = files("ssl_bench.report") / "assets"
    page, style, script = ((assets / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    parts = {
        "title": html.escape("ssl_bench report"),
        "style": style,
        "script": script,
        "data": text.replace("<", "\\u003c"),  # so that no text of a record ends the script element
    }
    for name, part in parts.items():
        page = page.replace("{{" + name + "}}", part)
    path.write_text(page, encoding="utf-8")
    return path


def counts(collection: Collection) -> str:
    """One line on the number of runs and recipes."""
    statuses = Counter(result.status for result in collection.results)
    states = ", ".join(f"{count} {word}" for word, count in statuses.most_common())
    skipped = f"; skipped folders: {len(collection.skipped)}" if collection.skipped else ""
    return f"runs: {len(collection.results)}, of recipes (seeds aside): {len(collection.cells)} ({states}){skipped}"


def _table(table: Table) -> dict[str, Any]:
    printed = {name: value for name, value in vars(table).items() if name != "records"}
    keys = table.keys or [""] * len(table.rows)
    return printed | {"short": SHORT.get(table.name, table.title), "numeric": table.numeric(), "keys": keys}


def _effort(collection: Collection) -> list[dict[str, Any]]:
    """The best-of-k curves of settings in which some arm has several trials."""
    found = []
    for setting, arms in comparisons.arms(collection).items():
        curves = {arm.name: comparisons.best_of_k(arm.trials) for arm in arms if len(arm.trials) > 1}
        if curves:
            found.append({"title": str(setting), "curves": curves})
    return found


def _cell(cell: Cell, collection: Collection, load: Load, root: Path) -> dict[str, Any]:
    protocols = collection.protocols(cell.problem)
    measured = [name for protocol in protocols for name in (f"{protocol} top-1 %", "untrained")]
    columns = ["seed", "status", *measured, "folder"]
    return {
        "title": f"{cell.arm}: {cell.setting}, lr {number(cell.lr)}",
        "recipe": {name: value for name, value in cell.recipe.items() if name not in ("seed", "run_dir")},
        "runs_table": {"columns": columns, "rows": [_row(result, protocols, root) for result in cell.results]},
        "runs": [_run(result, cell, load(result)) for result in cell.results],
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


def _run(result: Result, cell: Cell, curves: Curves) -> dict[str, Any]:
    head = result.record.provenance
    shown = {name: value for name, value in head.items() if name not in ("recipe", "format", "argv", "param_groups")}
    groups = [{name: group[name] for name in group if name != "param_names"} for group in head.get("param_groups", [])]
    order = {name: rank for rank, name in enumerate(LABELS)}
    metrics = sorted(curves.metrics.keys() - _UNSHOWN, key=lambda name: (order.get(name, len(order)), name))
    return {
        "seed": result.seed,
        "images_per_step": images_per_step(curves, cell.batch_size),
        "steps_per_epoch": head.get("plan", {}).get("steps_per_epoch") or 1,
        "provenance": {**shown, "param_groups": groups, "results": result.record.results},
        "metrics": {name: _metric(curves, name) for name in metrics},
        "layers": {q.column: _layers(curves, q) for q in QUANTITIES if curves.has(q.column)},
        "analysis": tables_of(result),
    }


def images_per_step(curves: Curves, batch_size: int) -> float:
    """On average: fewer than the batch size where epochs end with a short batch."""
    steps, seen = curves.metric("samples")
    return float(seen[-1] / steps[-1]) if len(steps) else float(batch_size)


def _metric(curves: Curves, name: str) -> dict[str, list[float]]:
    steps, values = curves.metric(name)
    seconds = curves.metrics.get("seconds", curves.metrics["step"])[~np.isnan(curves.metrics[name])]
    kept = thin(len(steps), METRIC_POINTS)
    return {"step": steps[kept].tolist(), "seconds": rounded(seconds[kept]), "y": rounded(values[kept])}


def _layers(curves: Curves, quantity: Quantity) -> dict[str, list[float]]:
    """Smallest, median and largest value over the adapted layers, along the steps."""
    matrix = curves.of_adapted(quantity)
    usable = np.flatnonzero(np.isfinite(matrix).any(axis=1))
    kept = usable[thin(len(usable), LAYER_POINTS)]
    steps, clock = curves.steps[kept], curves.metrics
    has_clock = "seconds" in clock and len(clock["step"]) > 0
    seconds = np.interp(steps, clock["step"], clock["seconds"]) if has_clock else np.full(len(steps), np.nan)
    rows = [matrix[index][np.isfinite(matrix[index])] for index in kept]
    low, median, high = np.array([np.quantile(row, (0, 0.5, 1)) for row in rows]).T
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
