"""The paper's figures, from the records of runs: light, printable, as SVG and PNG."""

import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_bench.records.reader import RunRecord
from ssl_bench.report.curves import RATIO, Array, Curves, Quantity, load_curves, thin

# Enough for every bend that a page shows, few enough for an SVG of a long run.
POINTS = 600

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 130,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "ssl_bench",  # the same runs give the same file
}

# Distinct in grey and to the colour-blind (Okabe and Ito 2008, without the yellow that paper swallows).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")

LONGEST_NAME = 100  # characters of a file's name without its ending
CHARACTER = 0.075  # inches of a legend's letter, on the safe side

# First layer dark, last layer light; the palest part, which paper swallows, is left out.
DEPTH = LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


@dataclass(frozen=True)
class Plate:
    """One figure of the report, as it was written.

    Attributes:
        name: of its files, ``<name>.svg`` and ``<name>.png``.
        title: what it shows.
        caption: how to read it, and the paper's figures that it stands beside.
    """

    name: str
    title: str
    caption: str


@contextmanager
def style() -> Iterator[None]:
    """The report's look, for the figures made and saved inside."""
    with matplotlib.rc_context(_STYLE):
        yield


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure in the format that its path's suffix names, without a date in it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def depth_colors(n_layers: int) -> list[Any]:
    """One colour for each of the layers, first to last."""
    return [DEPTH(index / max(1, n_layers - 1)) for index in range(n_layers)]


def depth_bar(figure: Figure, axes: Any, n_layers: int) -> None:
    """A colour bar that explains the layers' colours."""
    scale = ScalarMappable(Normalize(1, max(2, n_layers)), DEPTH)
    bar = figure.colorbar(scale, ax=axes, label="layer, from the input", fraction=0.025, pad=0.01, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_layers(axis: Any, curves: Curves, quantity: Quantity, x: Array | None = None) -> None:
    """Every adapted layer's curve of one quantity; says so where nothing was recorded.

    Args:
        axis: matplotlib's.
        curves: of one run.
        quantity: what to draw.
        x: (S,) positions of the telemetry's steps; None = the steps.
    """
    axis.set_ylabel(f"{quantity.meaning} {quantity.symbol}")
    if not curves.has(quantity.column):
        note(axis, "not recorded")
        return
    kept = thin(len(curves.steps), POINTS)
    x = (curves.steps if x is None else x)[kept]
    chosen = curves.adapted()
    matrix = curves.telemetry[quantity.column][kept][:, chosen]
    if quantity.log:
        matrix = np.where(matrix > 0, matrix, np.nan)  # a logarithm has no place for zero
    for column, color in zip(matrix.T, depth_colors(len(chosen)), strict=True):
        if np.isfinite(column).any():
            axis.plot(x, column, color=color, linewidth=0.9, alpha=0.9)
    if quantity.log and np.isfinite(matrix).any():
        axis.set_yscale("log")


def note(axis: Any, text: str) -> None:
    """A remark in the middle of an empty panel."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#777777")


def name_of(*parts: object) -> str:
    """A file name of plain characters."""
    text = "-".join(str(part) for part in parts)
    text = "".join(c if c.isalnum() or c in ".-_" else "-" for c in text.replace("=", "")).strip("-").replace("--", "-")
    if len(text) <= LONGEST_NAME:
        return text
    # A variant of many keys; file systems end at 255 bytes, readers before.
    return f"{text[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def legend_below(figure: Figure, axis: Any = None, handles: list[Line2D] | None = None) -> None:
    """A legend below all panels, of these handles or of an axis's lines: as many columns as fit, long names wrapped."""
    entries = handles if handles is not None else axis.get_legend_handles_labels()[0]
    room = int((figure.get_figwidth() - 0.6) / CHARACTER)
    labels = [textwrap.fill(str(entry.get_label()), max(20, room)) for entry in entries]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, min(3, len(entries), (room + 6) // (longest + 6)))
    figure.legend(entries, labels, loc="outside lower center", ncols=1 if len(entries) > 6 else columns)


def colors_of(names: Iterable[object]) -> list[str]:
    """A colour of the palette for each name."""
    return [PALETTE[index % len(PALETTE)] for index, _ in enumerate(names)]


def said(setting: tuple[str, str, int]) -> str:
    """A setting in words, for titles."""
    return f"{setting[0]}, {setting[1]}, batch size {setting[2]}"


def demo_figure(runs: Mapping[str, RunRecord | str | Path], path: str | Path) -> Path:
    """Loss curves above and trust ratios below, several runs side by side on common axes.

    Args:
        runs: records or folders by the label to print.
        path: of the figure; its suffix names the format, .png or .svg.

    Raises:
        ValueError: no runs, or a run that cannot be read.
    """
    if not runs:
        raise ValueError("demo_figure: got no runs")
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
