"""Each layer's norms and ratio along training, and the loss: after the paper's figures 2 and 6-59."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssl_bench.report.aggregate import Setting
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.comparisons import Arm
from ssl_bench.report.curves import G_NORM, MOVED, RATIO, W_NORM, Curves, short_names, thin
from ssl_bench.report.figures.drawing import PALETTE, Plate, depth_colors, draw_layers, note, plain
from ssl_bench.report.tables import name_of

LEGEND_LAYERS = 40  # more names than this cannot be read beside a figure


def layers(setting: Setting, arm: Arm, load: Load) -> Iterator[tuple[Plate, Figure]]:
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
    handles = [Line2D([], [], color=colors[index], label=plain(names[index])) for index in shown]
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
