"""The report's figures, after the paper's figures 1 to 69, and the demo's."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssl_bench.records.reader import RunRecord
from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import Collection, Setting, lookup
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.comparisons import Arm
from ssl_bench.report.curves import G_NORM, MOVED, RATIO, W_NORM, Array, Curves, load_curves, short_names, thin
from ssl_bench.report.figures.drawing import (
    PALETTE,
    POINTS,
    Plate,
    colors_of,
    depth_bar,
    depth_colors,
    draw_layers,
    legend_below,
    note,
    save,
    style,
)
from ssl_bench.report.figures.sharpness import sharpness_figures
from ssl_bench.report.tables import name_of

CLOCKS = {"step": "step", "samples": "samples seen", "epochs": "epoch", "seconds": "training time (s)"}
LEGEND_LAYERS = 40  # more names than this cannot be read beside a figure


def write_figures(collection: Collection, load: Load, folder: Path) -> list[Plate]:
    """Writes every figure for which the runs have data, as SVG and PNG.

    Args:
        collection: the runs.
        load: a run's curves.
        folder: where the files go.
    """
    plates = []
    with style():
        for plate, figure in _figures(collection, load):
            save(figure, folder / f"{plate.name}.png")
            figure.set_layout_engine("none")  # the layout is done; computing it again would take as long as drawing
            save(figure, folder / f"{plate.name}.svg")
            plates.append(plate)
    return plates


def _figures(collection: Collection, load: Load) -> Iterator[tuple[Plate, Figure]]:
    grouped = comparisons.arms(collection)
    for setting, arms in grouped.items():
        yield from _accuracy(setting, arms, load)
    for problem, dataset in dict.fromkeys(setting[:2] for setting in grouped):
        here = {setting: arms for setting, arms in grouped.items() if setting[:2] == (problem, dataset)}
        yield _learning_rates(problem, dataset, here)
        yield from _decay(problem, dataset, here)
    yield from _effort(collection, grouped)
    yield from _phi(collection, load)
    yield from sharpness_figures(collection)
    for setting, arms in grouped.items():
        for arm in arms:
            yield from _layers(setting, arm, load)


# Accuracy against steps, samples, epochs and wall time ----------------------------------------------------------------


def _accuracy(setting: Setting, arms: list[Arm], load: Load) -> Iterator[tuple[Plate, Figure]]:
    """Figures 1 and 60-63: accuracy along training, against four clocks; one line for each optimizer."""
    measured = {arm.name: _mean_curves(arm, load) for arm in arms}
    if not any(measured.values()):
        return
    colors = colors_of(measured)
    figure = Figure(figsize=(8.4, 6.0), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True).flat
    for axis, (clock, label) in zip(axes, CLOCKS.items(), strict=True):
        axis.set_xlabel(label)
        for name, curves in measured.items():
            if clock in curves:
                x, mean, low, high = curves[clock]
                axis.plot(x, mean, color=colors[name], label=name, marker="o" if len(x) == 1 else None)
                axis.fill_between(x, low, high, color=colors[name], alpha=0.18, linewidth=0)
    for axis in (axes[0], axes[2]):
        axis.set_ylabel("top-1 accuracy (%)")
    legend_below(figure, axes[0])
    online = "the online monitor's accuracy, which is not a result"
    what = "test accuracy" if setting.problem == "classification" else online
    caption = (
        f"Each optimizer at its best learning rate: {what}; the mean over seeds, the band from the lowest to the "
        "highest. Paper: figures 1, 60-63."
    )
    yield Plate(name_of("accuracy", *setting), f"Accuracy along training: {setting}", caption), figure


def _mean_curves(arm: Arm, load: Load) -> dict[str, tuple[Array, Array, Array, Array]]:
    """By clock (x, mean, lowest, highest) over the finished seeds of an arm's best cell."""
    if arm.best is None:
        return {}
    runs = [load(result) for result in arm.best.results if result.status == "finished"]
    metric = "test_top1" if arm.setting.problem == "classification" else "online_top1"
    curves = {}
    for clock in CLOCKS:
        pairs = [pair for pair in (run.metric(metric, clock) for run in runs) if len(pair[0])]
        if pairs:
            # Runs may have logged different numbers of lines: the mean ends with the shortest.
            length = min(len(x) for x, _ in pairs)
            y = np.array([values[:length] for _, values in pairs])
            x = np.mean([positions[:length] for positions, _ in pairs], axis=0)
            curves[clock] = (x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))
    return curves


# The learning rate, and lambda ---------------------------------------------------------------------------------------


def _learning_rates(problem: str, dataset: str, here: dict[Setting, list[Arm]]) -> tuple[Plate, Figure]:
    """Figure 5: the last accuracy against the learning rate, one panel for each batch size."""
    columns = min(3, len(here))
    rows = math.ceil(len(here) / columns)
    figure = Figure(figsize=(2.9 * columns + 1.2, 2.5 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colors = colors_of(dict.fromkeys(arm.name for arms in here.values() for arm in arms))
    for axis in axes.flat[len(here) :]:
        axis.set_visible(False)
    for axis, (setting, arms) in zip(axes.flat, here.items(), strict=False):
        axis.set_title(f"batch size {setting.batch_size}")
        for arm in arms:
            cells = sorted(arm.cells, key=lambda cell: cell.lr)
            shown = [(cell.lr, cell.summary(arm.protocol)) for cell in cells if cell.summary(arm.protocol).n]
            axis.errorbar(
                [lr for lr, _ in shown], [s.mean for _, s in shown], [s.sd or 0.0 for _, s in shown],
                color=colors[arm.name], marker="o", markersize=4, capsize=2,
            )  # fmt: skip
            failed = [cell.lr for cell in cells if not cell.summary(arm.protocol).n and cell.statuses["diverged"]]
            axis.plot(failed, [0.03] * len(failed), "x", color=colors[arm.name], transform=axis.get_xaxis_transform())
    for row in axes:
        row[0].set_ylabel("top-1 accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    legend_below(figure, colors=colors)
    caption = "Mean and sample deviation over seeds at the last epoch; × on the axis: diverged. Paper: figure 5."
    title = f"Accuracy against the learning rate: {problem}, {dataset}"
    return Plate(name_of("learning-rate", problem, dataset), title, caption), figure


def _decay(problem: str, dataset: str, here: dict[Setting, list[Arm]]) -> Iterator[tuple[Plate, Figure]]:
    """Figures 4 and 64-69: TVLARS's accuracy against lambda, one line for each batch size."""
    lines: dict[int, dict[float, float]] = defaultdict(dict)
    for setting, arms in here.items():
        for arm in arms:
            decay = lookup(arm.cells[0].recipe, "optimizer.decay")
            if arm.optimizer == "TVLARS" and arm.top1 is not None and isinstance(decay, float):
                line = lines[setting.batch_size]
                line[decay] = max(arm.top1, line.get(decay, 0.0))
    if max(map(len, lines.values()), default=0) < 2:
        return
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for color, (batch_size, values) in zip(depth_colors(len(lines)), sorted(lines.items()), strict=True):
        decays, accuracies = zip(*sorted(values.items()), strict=True)
        axis.plot(decays, accuracies, "o-", color=color, label=f"B = {batch_size}", markersize=4)
    axis.set(xscale="log", xlabel="λ", ylabel="top-1 accuracy (%)")
    axis.legend()
    caption = "TVLARS at its best learning rate (and variant) for each λ. Paper: figures 4, 64-69."
    yield Plate(name_of("lambda", problem, dataset), f"Accuracy against λ: {problem}, {dataset}", caption), figure


# Tuning effort, profiles, phi ----------------------------------------------------------------------------------------


def _effort(collection: Collection, grouped: dict[Setting, list[Arm]]) -> Iterator[tuple[Plate, Figure]]:
    """Performance profiles, where optimizers meet in some setting."""
    found = comparisons.profiles(collection)
    if not found:
        return
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for name, color in colors_of(found).items():
        axis.step(comparisons.GAPS, [100 * share for share in found[name]], where="post", color=color, label=name)
    axis.set(xlabel="points behind the best optimizer", ylabel="share of settings (%)", ylim=(-2, 102))
    axis.legend()
    caption = f"Over problems, data sets and batch sizes ({len(grouped)}), each optimizer at its best learning rate."
    yield Plate("profiles", "Performance profiles", caption), figure


def _phi(collection: Collection, load: Load) -> Iterator[tuple[Plate, Figure]]:
    """Figure 3: phi against the step, one line for each distinct course."""
    courses: dict[tuple[str, int], tuple[Array, Array]] = {}
    for cell in collection.cells:
        key = (cell.variant, cell.batch_size)
        if cell.optimizer == "TVLARS" and key not in courses:
            steps, phi = load(cell.results[0]).phi()
            if len(phi):
                courses[key] = (steps, phi)
    if not courses:
        return
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for color, ((variant, batch_size), (steps, phi)) in zip(depth_colors(len(courses)), courses.items(), strict=True):
        kept = thin(len(steps), 300)
        label = ", ".join(filter(None, (f"B = {batch_size}", variant)))
        axis.plot(steps[kept], phi[kept], color=color, label=label)
    axis.set(xlabel="step", ylabel="time factor φ", ylim=(0, None))
    if len(courses) <= 16:
        axis.legend()
    yield Plate("phi", "TVLARS's time factor φ", "As recorded in the runs. Paper: figure 3."), figure


# Layers --------------------------------------------------------------------------------------------------------------


def _layers(setting: Setting, arm: Arm, load: Load) -> Iterator[tuple[Plate, Figure]]:
    """Figures 2 and 6-59: each layer's norms and ratio, and the loss; one column for each learning rate."""
    columns = []
    for cell in arm.cells:  # of each the first seed with layers
        found = next((result for result in cell.results if load(result).has(W_NORM.column)), None)
        if found:
            columns.append((cell, found, load(found)))
    if not columns:
        return
    figure = Figure(figsize=(2.6 * len(columns) + 2.6, 9.0), layout="constrained")
    axes = figure.subplots(5, len(columns), sharex=True, sharey="row", squeeze=False)
    for index, (cell, result, curves) in enumerate(columns):
        for axis, quantity in zip(axes[:-1, index], (W_NORM, G_NORM, RATIO, MOVED), strict=True):
            draw_layers(axis, curves, quantity)
        _draw_losses(axes[-1, index], curves)
        axes[0, index].set_title(f"lr {cell.lr:g}, seed {result.seed}")
        axes[-1, index].set_xlabel("step")
        for axis in axes[:, index] if index else ():
            axis.set_ylabel("")
    # The layers' names at the right, in their colours; evenly spaced ones where there are too many to read.
    curves = columns[0][2]
    names = short_names([curves.layers[index] for index in curves.adapted()])
    colors, shown = depth_colors(len(names)), thin(len(names), LEGEND_LAYERS)
    handles = [Line2D([], [], color=colors[index], label=names[index]) for index in shown]
    title = "layers" if len(shown) == len(names) else f"{len(shown)} of {len(names)} layers"
    figure.legend(handles=handles, loc="outside right upper", title=title, alignment="left", fontsize=7.5)
    caption = (
        "One run for each learning rate. u is the ratio's denominator: g + βw, for LAMB Adam's direction with decay. "
        "Paper: figures 2, 6-59."
    )
    yield Plate(name_of("layers", *setting, arm.name), f"Layers: {arm.name}, {setting}", caption), figure


def _draw_losses(axis: Any, curves: Curves) -> None:
    axis.set_ylabel("loss")
    for name, label, color in (("loss", "training", "#999999"), ("test_loss", "test", PALETTE[1])):
        x, y = curves.metric(name)
        kept = thin(len(x), 300)
        if len(x):
            axis.plot(x[kept], y[kept], color=color, label=label, marker="o" if len(x) == 1 else None)
    if axis.lines:
        axis.legend()
    else:
        note(axis, "not recorded")


def demo_figure(runs: Mapping[str, RunRecord | str | Path], path: str | Path) -> Path:
    """Loss curves above and trust ratios below, several runs side by side on common axes.

    Args:
        runs: records or folders by the label to print.
        path: of the figure; its suffix names the format, .png or .svg.

    Raises:
        ValueError: no runs, or a run that cannot be read.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got no runs")
    loaded = {label: load_curves(run) for label, run in runs.items()}
    with style():
        figure = Figure(figsize=(2.0 + 2.7 * len(loaded), 5.0), layout="constrained")
        panels = figure.subplots(2, len(loaded), sharex=True, sharey="row", squeeze=False)
        for column, (label, curves) in enumerate(loaded.items()):
            top, bottom = panels[:, column]
            steps, loss = curves.metric("loss")
            kept = thin(len(steps), POINTS)
            top.plot(steps[kept], loss[kept], color=PALETTE[column % len(PALETTE)])
            top.set_title(label)
            draw_layers(bottom, curves, RATIO)
            bottom.set_xlabel("step")
            if column:
                bottom.set_ylabel("")
        panels[0, 0].set_ylabel("training loss")
        depth_bar(figure, panels[1, :].tolist(), max(len(curves.adapted()) for curves in loaded.values()))
        return save(figure, path)
