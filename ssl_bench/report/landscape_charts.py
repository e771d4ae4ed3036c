"""What `ssl-bench analyze` measured, as the web page draws and lists it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ssl_bench.report.aggregate import Collection, Result
from ssl_bench.report.analysis import MEASURES, Analyzed, Measure, Row, analyzed, measured_how, read_analysis
from ssl_bench.report.gradient_noise import NoiseCurve, noise_curves
from ssl_bench.report.tables import number

Chart = dict[str, Any]  # {"title", "x": the axis's label, "log": both axes logarithmic, "series": [...]}
Group = dict[str, Any]  # {"title", "names": of the legend, by colour, "charts": [Chart, ...]}

_GREY = 6  # the page's last colour


def claim_charts(collection: Collection) -> dict[str, list[Group]]:
    """The charts of claims (c) and (d), in groups of one setting and learning rate; nothing where none is measured."""
    groups: dict[str, list[Analyzed]] = defaultdict(list)
    for run in sorted(analyzed(collection), key=lambda run: (run.cell.setting, run.cell.lr)):
        problem, dataset, batch_size = run.cell.setting
        groups[f"{problem}, {dataset}, batch size {batch_size}, lr {number(run.cell.lr)}"].append(run)
    sharp = {title: [run for run in runs if run.analysis.sharpness] for title, runs in groups.items()}
    noisy = {title: list(noise_curves(runs)) for title, runs in groups.items()}
    return {
        "c": [_sharpness(title, runs) for title, runs in sharp.items() if runs],
        "d": [_noise(title, curves) for title, curves in noisy.items() if curves],
    }


def tables_of(result: Result) -> dict[str, Any] | None:
    """A run's analysis for its cell's detail: settings, and the rows as printed tables; None where there is none."""
    analysis = read_analysis(result.record.folder)
    if analysis is None:
        return None
    lists = {"Sharpness": analysis.sharpness, "Gradient noise": analysis.gradient_noise}
    return {
        "settings": {**analysis.about, "settings": analysis.settings},
        "tables": [{"title": title, **_printed(rows)} for title, rows in lists.items() if rows],
    }


def _sharpness(title: str, runs: Sequence[Analyzed]) -> Group:
    """One chart for each measure, one line for each run in its optimizer's colour."""
    names = list(dict.fromkeys(run.cell.arm for run in runs))
    charts = []
    for measure in MEASURES:
        lines = [_line(run, measure, names.index(run.cell.arm)) for run in runs]
        charts.append({"title": measure.text, "x": "epoch", "log": False, "series": [line for line in lines if line]})
    return {"title": f"{title}; {measured_how(runs)}", "names": names, "charts": charts}


def _line(run: Analyzed, measure: Measure, color: int) -> dict[str, Any] | None:
    """A run's measure along its epochs, with a band of the uncertainty where there is one."""
    points = [(run.epoch(row["step"]), *found) for row in run.analysis.sharpness if (found := measure.of(row))]
    if not points:
        return None
    line: dict[str, Any] = {"name": f"{run.cell.arm}, seed {run.result.seed}", "color": color}
    line |= {"x": _short(x for x, _, _ in points), "y": _short(y for _, y, _ in points)}
    if all(error is not None for _, _, error in points):
        line["low"] = _short(y - (error or 0.0) for _, y, error in points)
        line["high"] = _short(y + (error or 0.0) for _, y, error in points)
    return line


def _noise(title: str, curves: Sequence[NoiseCurve]) -> Group:
    """One chart for each run, one line for each step, and the line of 1 / B through its first one's smallest B."""
    by_run: dict[str, list[NoiseCurve]] = defaultdict(list)
    for curve in curves:
        by_run[f"{curve.run.cell.arm}, seed {curve.run.result.seed}"].append(curve)
    charts = []
    for name, own in by_run.items():
        series = [
            {
                "name": f"epoch {curve.run.epoch(curve.step):.3g}",
                "color": index % _GREY,
                "x": [row["batch_size"] for row in curve.rows],
                "y": _short(row["squared_error"] for row in curve.rows),
            }
            for index, curve in enumerate(own)
        ]
        sizes = [row["batch_size"] for row in own[0].rows]
        fall = [own[0].rows[0]["squared_error"] * sizes[0] / size for size in sizes]
        series.append({"name": "1 / B", "color": _GREY, "x": sizes, "y": _short(fall)})
        charts.append({"title": name, "x": "batch size B (images)", "log": True, "series": series})
    most = max(by_run.values(), key=len)
    names = [f"epoch {curve.run.epoch(curve.step):.3g}" for curve in most][:_GREY]
    names += [""] * (_GREY - len(names)) + ["falling as 1 / B"]
    how = measured_how((curve.run for curve in curves), "noise_images")
    return {"title": f"E|g_B - E g_B|² against B: {title}; {how} for each size", "names": names, "charts": charts}


def _printed(rows: Sequence[Row]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {
        "columns": columns,
        "rows": [[f"{row[name]:.5g}" if name in row else "–" for name in columns] for row in rows],
    }


def _short(values: Iterable[float]) -> list[float]:
    """Numbers of four digits: a curve needs no more."""
    return [float(f"{value:.4g}") for value in values]
