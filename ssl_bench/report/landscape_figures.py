"""Figures of what `ssl-bench analyze` measured: sharpness along training, gradient noise against the batch size."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.analysis import MEASURES, Analyzed, Measure, analyzed, measured_how
from ssl_bench.report.comparisons import Setting
from ssl_bench.report.figures import Plate, colors_of, depth_colors, legend_below, name_of, note, said
from ssl_bench.report.gradient_noise import NoiseCurve, noise_curves
from ssl_bench.report.tables import number

# A measure whose values differ by more than this factor is drawn on a logarithmic axis.
_DECADES = 30


def landscape_figures(collection: Collection) -> Iterator[tuple[Plate, Figure]]:
    """A figure of sharpness and one of gradient noise for each setting that has a run with an analysis."""
    by_setting: dict[Setting, list[Analyzed]] = defaultdict(list)
    for run in analyzed(collection):
        by_setting[run.cell.setting].append(run)
    for setting, runs in by_setting.items():
        yield from _sharpness(setting, [run for run in runs if run.analysis.sharpness])
    for setting, runs in by_setting.items():
        yield from _gradient_noise(setting, list(noise_curves(runs)))


def _sharpness(setting: Setting, runs: Sequence[Analyzed]) -> Iterator[tuple[Plate, Figure]]:
    """One row for each measure, one column for each learning rate, one line for each run in its optimizer's colour."""
    if not runs:
        return
    rates = sorted({run.cell.lr for run in runs})
    arms = dict.fromkeys(run.cell.arm for run in runs)
    colors = dict(zip(arms, colors_of(arms), strict=True))
    figure = Figure(figsize=(max(5.0, 2.6 * len(rates) + 1.2), 8.4), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(rates), sharex=True, sharey="row", squeeze=False)
    for row, measure in zip(axes, MEASURES, strict=True):
        row[0].set_ylabel(measure.symbol)
        for axis, rate in zip(row, rates, strict=True):
            for run in runs:
                if run.cell.lr == rate:
                    _draw_measure(axis, run, measure, colors[run.cell.arm])
        values = [found[0] for run in runs for each in run.analysis.sharpness if (found := measure.of(each))]
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
    handles = [Line2D([], [], color=color, marker="o", markersize=4, label=name) for name, color in colors.items()]
    legend_below(figure, handles=handles)
    caption = (
        f"At the kept weights of each run, on one fixed augmented batch ({measured_how(runs)}). Bars: the "
        "eigenvalue's residual and the "
        "trace's standard error; SAM has none. The second row is blind to the scale of weights before batch norm. "
        "The paper has no such figure."
    )
    yield Plate(name_of("sharpness", *setting), f"Sharpness along training: {said(setting)}", caption), figure


def _draw_measure(axis: Any, run: Analyzed, measure: Measure, color: str) -> None:
    points = [(run.epoch(row["step"]), *found) for row in run.analysis.sharpness if (found := measure.of(row))]
    if points:
        x, y, errors = zip(*points, strict=True)
        bars = None if None in errors else errors
        axis.errorbar(x, y, bars, color=color, marker="o", markersize=3.5, capsize=2.5, elinewidth=0.9)


def _gradient_noise(setting: Setting, curves: Sequence[NoiseCurve]) -> Iterator[tuple[Plate, Figure]]:
    """One column for each optimizer, one row for each learning rate, one line for each kept step of the first seed."""
    if not curves:
        return
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
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_yscale("log")
    for axis, arm in zip(axes[0], arms, strict=True):
        optimizer, _, variant = arm.partition(" (")
        axis.set_title(optimizer + (f"\n{textwrap.fill(f'({variant}', 34)}" if variant else ""))
    for axis in axes[-1]:
        axis.set_xlabel("batch size B (images)")
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: number(value))
    how = measured_how((curve.run for curve in curves), "noise_images")
    caption = (
        f"The gradient's variance about the mean of batches of one size ({how} for each); dashed: falling "
        "as 1 / B from the smallest B "
        "on, as theorem 1 has it. One run for each optimizer and learning rate. The paper has no such figure."
    )
    yield Plate(name_of("gradient-noise", *setting), f"Gradient noise: {said(setting)}", caption), figure


def _draw_noise(axis: Any, curves: Sequence[NoiseCurve]) -> None:
    """One run's curves, dark to light along training, each with its line of 1 / B."""
    if not curves:
        note(axis, "not measured")
        return
    for color, curve in zip(depth_colors(len(curves)), curves, strict=True):
        x, y = zip(*((row["batch_size"], row["squared_error"]) for row in curve.rows), strict=True)
        label = f"epoch {curve.run.epoch(curve.step):.3g}"
        axis.plot(x, y, color=color, marker="o", markersize=3.5, label=label)
        axis.plot(x, [y[0] * x[0] / size for size in x], color=color, linestyle="--", linewidth=0.8)
    axis.legend(fontsize=7)
