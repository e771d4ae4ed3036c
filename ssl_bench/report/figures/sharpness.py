"""Sharpness along training and gradient noise against the batch size: as figures, and for the web page."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ssl_bench.report.aggregate import Collection, Result, Setting
from ssl_bench.report.claims.analysis import (
    MEASURES,
    Analyzed,
    NoiseCurve,
    analysis_of,
    analyzed,
    measured_how,
    noise_curves,
)
from ssl_bench.report.curves import rounded
from ssl_bench.report.figures.drawing import Look, Plate, depth_colors, legend_below, note, plain
from ssl_bench.report.tables import name_of, number

Chart = dict[str, Any]  # {"title", "x": the axis's label, "log": both axes logarithmic, "series": [...]}
Group = dict[str, Any]  # {"title", "names": of the legend, by colour, "charts": [Chart, ...]}

# A measure whose values differ by more than this factor is drawn on a logarithmic axis.
_DECADES = 30
_GREY = 6  # the page's last colour


def sharpness_figures(collection: Collection, looks: Mapping[str, Look]) -> Iterator[tuple[Plate, Figure]]:
    """A figure of sharpness and one of gradient noise for each setting that has a run with an analysis.

    Args:
        collection: the runs.
        looks: of every arm, the same as on the other figures.
    """
    by_setting: dict[Setting, list[Analyzed]] = defaultdict(list)
    for run in analyzed(collection):
        by_setting[run.cell.setting].append(run)
    for setting, runs in by_setting.items():
        sharp = [run for run in runs if run.analysis.sharpness]
        if sharp:
            yield _sharpness_figure(setting, sharp, looks)
    for setting, runs in by_setting.items():
        noisy = list(noise_curves(runs))
        if noisy:
            yield _noise_figure(setting, noisy)


def _sharpness_figure(setting: Setting, runs: Sequence[Analyzed], looks: Mapping[str, Look]) -> tuple[Plate, Figure]:
    """One row for each measure, one column for each learning rate, one line for each run in its optimizer's colour."""
    rates = sorted({run.cell.lr for run in runs})
    figure = Figure(figsize=(max(5.0, 2.6 * len(rates) + 1.2), 8.4), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(rates), sharex=True, sharey="row", squeeze=False)
    for row, measure in zip(axes, MEASURES, strict=True):
        row[0].set_ylabel(measure.symbol)
        values: list[float] = []
        for run in runs:
            points = measure.along(run)
            if points:
                x, y, errors = zip(*points, strict=True)
                bars = None if None in errors else errors
                style = looks[run.cell.arm].style | {"capsize": 2.5, "elinewidth": 0.9}
                row[rates.index(run.cell.lr)].errorbar(x, y, bars, **style)
                values += y
        if not values:
            note(row[0], "not measured")
        elif min(values) > 0 and max(values) > _DECADES * min(values):
            row[0].set_yscale("log")
        else:
            row[0].ticklabel_format(axis="y", scilimits=(-3, 4))
    for axis, rate in zip(axes[0], rates, strict=True):
        axis.set_title(f"lr {number(rate)}")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    legend_below(figure, looks=looks, shown=[run.cell.arm for run in runs])
    caption = (
        f"At the kept weights of each run, on one fixed augmented batch ({measured_how(runs)}). Bars: the eigenvalue's "
        "residual and the trace's standard error; SAM has none. The second row is blind to the scale of weights before "
        "batch norm. The paper has no such figure."
    )
    return Plate(name_of("sharpness", *setting), f"Sharpness along training: {setting}", caption), figure


def _noise_figure(setting: Setting, curves: Sequence[NoiseCurve]) -> tuple[Plate, Figure]:
    """One column for each optimizer, one row for each learning rate, one line for each kept step of the first seed."""
    rates = sorted({curve.run.cell.lr for curve in curves})
    arms = list(dict.fromkeys(curve.run.cell.arm for curve in curves))
    figure = Figure(figsize=(max(5.0, 2.5 * len(arms) + 1.8), 2.2 * len(rates) + 1.0), layout="constrained")
    axes = figure.subplots(len(rates), len(arms), sharex=True, sharey=True, squeeze=False)
    for row, rate in zip(axes, rates, strict=True):
        row[0].set_ylabel(f"lr {number(rate)}\n" + r"$E\,|g_B - E g_B|^2$")
        for axis, arm in zip(row, arms, strict=True):
            here = [curve for curve in curves if (curve.run.cell.lr, curve.run.cell.arm) == (rate, arm)]
            _draw_noise(axis, [curve for curve in here if curve.run is here[0].run])
    sizes = sorted({each["batch_size"] for curve in curves for each in curve.rows})
    axes[0, 0].set(xscale="log", yscale="log")  # of all panels, which share their axes
    for axis, arm in zip(axes[0], arms, strict=True):
        optimizer, _, variant = arm.partition(" (")
        axis.set_title(plain(optimizer) + (f"\n{textwrap.fill(plain(f'({variant}'), 34)}" if variant else ""))
    for axis in axes[-1]:
        axis.set_xlabel("batch size B (images)")
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: number(value))
    how = measured_how((curve.run for curve in curves), "noise_images")
    caption = (
        f"The gradient's variance about the mean of batches of one size ({how} for each); dashed: falling as 1 / B "
        "from the smallest B on, as theorem 1 has it. One run for each optimizer and learning rate. The paper has no "
        "such figure."
    )
    return Plate(name_of("gradient-noise", *setting), f"Gradient noise: {setting}", caption), figure


def _draw_noise(axis: Any, curves: Sequence[NoiseCurve]) -> None:
    """One run's curves, dark to light along training, each with its line of 1 / B."""
    if not curves:
        note(axis, "not measured")
        return
    for color, curve in zip(depth_colors(len(curves)), curves, strict=True):
        sizes, errors = curve.points
        axis.plot(sizes, errors, color=color, marker="o", markersize=3.5, label=curve.label)
        axis.plot(sizes, curve.inverse, color=color, linestyle="--", linewidth=0.8)
    axis.legend(fontsize=7)


# For the web page ----------------------------------------------------------------------------------------------------


def claim_charts(collection: Collection) -> dict[str, list[Group]]:
    """The charts of claims (f) and (g), in groups of one setting and learning rate; empty where none is measured."""
    groups: dict[str, list[Analyzed]] = defaultdict(list)
    for run in sorted(analyzed(collection), key=lambda run: (run.cell.setting, run.cell.lr)):
        groups[f"{run.cell.setting}, lr {number(run.cell.lr)}"].append(run)
    sharp = {title: [run for run in runs if run.analysis.sharpness] for title, runs in groups.items()}
    noisy = {title: list(noise_curves(runs)) for title, runs in groups.items()}
    return {
        "f": [_sharpness_charts(title, runs) for title, runs in sharp.items() if runs],
        "g": [_noise_charts(title, curves) for title, curves in noisy.items() if curves],
    }


def tables_of(result: Result) -> dict[str, Any] | None:
    """A run's analysis for its cell's detail: settings, and the rows as printed tables; None where there is none."""
    analysis = analysis_of(result)
    if analysis is None:
        return None
    tables = []
    for title, rows in (("Sharpness", analysis.sharpness), ("Gradient noise", analysis.gradient_noise)):
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            printed = [[f"{row[name]:.5g}" if name in row else "–" for name in columns] for row in rows]
            tables.append({"title": title, "columns": columns, "rows": printed})
    return {"settings": {**analysis.about, "settings": analysis.settings}, "tables": tables}


def _sharpness_charts(title: str, runs: Sequence[Analyzed]) -> Group:
    """One chart for each measure, one line for each run in its optimizer's colour, with a band of its uncertainty."""
    names = list(dict.fromkeys(run.cell.arm for run in runs))
    charts = []
    for measure in MEASURES:
        series: list[dict[str, Any]] = []
        for run in runs:
            points = measure.along(run)
            if points:
                x, y, errors = zip(*points, strict=True)
                line = {"name": run.name, "color": names.index(run.cell.arm), "x": rounded(x), "y": rounded(y)}
                if None not in errors:
                    line["low"] = rounded(value - error for value, error in zip(y, errors, strict=True))
                    line["high"] = rounded(value + error for value, error in zip(y, errors, strict=True))
                series.append(line)
        charts.append({"title": measure.text, "x": "epoch", "log": False, "series": series})
    return {"title": f"{title}; {measured_how(runs)}", "names": names, "charts": charts}


def _noise_charts(title: str, curves: Sequence[NoiseCurve]) -> Group:
    """One chart for each run, one line for each step, and the line of 1 / B through its first one's smallest B."""
    by_run: dict[str, list[NoiseCurve]] = defaultdict(list)
    for curve in curves:
        by_run[curve.run.name].append(curve)
    charts = []
    for name, own in by_run.items():
        series = []
        for index, curve in enumerate(own):
            sizes, errors = curve.points
            series.append({"name": curve.label, "color": index % _GREY, "x": sizes, "y": rounded(errors)})
        series.append({"name": "1 / B", "color": _GREY, "x": own[0].points[0], "y": rounded(own[0].inverse)})
        charts.append({"title": name, "x": "batch size B (images)", "log": True, "series": series})
    names = [curve.label for curve in max(by_run.values(), key=len)][:_GREY]
    names += [""] * (_GREY - len(names)) + ["falling as 1 / B"]
    how = measured_how((curve.run for curve in curves), "noise_images")
    return {"title": f"E|g_B - E g_B|² against B: {title}; {how} for each size", "names": names, "charts": charts}
