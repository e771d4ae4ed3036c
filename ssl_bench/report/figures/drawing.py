"""What all figures share: the look, colours, legends, and how a figure is saved (light, printable, SVG and PNG)."""

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

from ssl_bench.report.curves import Curves, Quantity, thin
from ssl_bench.report.tables import on_one_line

# Points of a curve: enough for every visible bend, few enough for the SVG of a long run.
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

# Distinct in grey and to the colour-blind (Okabe and Ito 2008, without the yellow, which is too pale on paper).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES = ("-", "--", "-.", ":")

CHARACTER = 0.075  # width of a legend's letter in inches, rounded up
LINE = 0.17  # height of a legend's line in inches

# First layer dark, last layer light; the palest part, too pale on paper, is left out.
DEPTH = LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


@dataclass(frozen=True)
class Plate:
    """One figure of the report and its text.

    Attributes:
        name: of its files, ``<name>.svg`` and ``<name>.png``.
        title: what it shows.
        caption: how to read it, and which of the paper's figures it corresponds to.
    """

    name: str
    title: str
    caption: str


@contextmanager
def style() -> Iterator[None]:
    """Applies the report's look to the figures made and saved inside the context."""
    with matplotlib.rc_context(_STYLE):
        yield


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure in the format of its path's suffix, without a date, so that equal figures give equal files."""
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


def draw_layers(axis: Any, curves: Curves, quantity: Quantity) -> None:
    """Draws one quantity of a run against the step, one line for each adapted layer; notes it if not recorded."""
    axis.set_ylabel(f"{quantity.meaning} {quantity.symbol}")
    if not curves.has(quantity.column):
        note(axis, "not recorded")
        return
    kept = thin(len(curves.steps), POINTS)
    matrix = curves.of_adapted(quantity)[kept]
    if quantity.log:
        matrix = np.where(matrix > 0, matrix, np.nan)  # a logarithmic axis has no place for zero
    for column, color in zip(matrix.T, depth_colors(matrix.shape[1]), strict=True):
        if np.isfinite(column).any():
            axis.plot(curves.steps[kept], column, color=color, linewidth=0.9, alpha=0.9)
    if quantity.log and np.isfinite(matrix).any():
        axis.set_yscale("log")


def note(axis: Any, text: str) -> None:
    """A remark in the middle of an empty panel."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#777777")


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same on every figure of a report."""

    color: str
    marker: str
    line: str

    @property
    def style(self) -> dict[str, Any]:
        """Arguments of ``plot``."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "markersize": 4}


def looks_of(arms: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """A look for each arm: the colour is its optimizer's, marker and line tell its variants apart.

    No two of up to 280 are alike.

    Args:
        arms: (optimizer, the arm's name), in the order of the report.
    """
    named = list(dict.fromkeys(arms))
    place = {optimizer: index for index, optimizer in enumerate(dict.fromkeys(optimizer for optimizer, _ in named))}
    looks: dict[str, Look] = {}
    for optimizer, name in named:
        lap, first = divmod(place[optimizer], len(PALETTE))
        colors = PALETTE[first:] + PALETTE[:first]  # the optimizer's own, the others where it has too many variants
        lines = LINES[lap % len(LINES) :] + LINES[: lap % len(LINES)]
        start = place[optimizer] % len(MARKERS)
        markers = MARKERS[start:] + MARKERS[:start]
        every = [Look(color, marker, line) for color in colors for line in lines for marker in markers]
        looks[name] = next((look for look in every if look not in looks.values()), every[0])
    return looks


def plain(text: object) -> str:
    """Text of a record for a figure: without what matplotlib would read as mathematics, or XML not hold."""
    return on_one_line(str(text)).replace("$", r"\$")


def legend_below(
    figure: Figure, axis: Any = None, *, looks: Mapping[str, Look] | None = None, shown: Iterable[str] = ()
) -> None:
    """A legend below all panels, which it makes higher: as many columns as fit, long names wrapped, all names there.

    Args:
        figure: gets the legend.
        axis: its lines are the entries.
        looks: by name, in place of an axis's lines.
        shown: the names among them.
    """
    entries = axis.get_legend_handles_labels()[0] if axis is not None else []
    for name in dict.fromkeys(shown):
        entries.append(Line2D([], [], label=plain(name), **(looks or {})[name].style))
    if not entries:
        return
    room = int((figure.get_figwidth() - 0.6) / CHARACTER)
    labels = [textwrap.fill(str(entry.get_label()), max(20, room)) for entry in entries]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, min(4, len(entries), (room + 6) // (longest + 6)))
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + max(0.0, lines - 2) * LINE)  # or the panels would shrink to nothing
    figure.legend(entries, labels, loc="outside lower center", ncols=columns)
