"""Features as a picture: the first two principal components of the test images, a panel a method and optimizer."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import BaseModel, BeforeValidator, Field, StrictInt, StrictStr, ValidationError, model_validator

from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import Collection, Result
from ssl_bench.report.figures.drawing import Plate, legend_below, plain
from ssl_bench.report.tables import is_number, name_of, one_line

COLUMNS, PANELS = 4, 12  # of a figure, at most
COLOURED = 10  # classes; those beyond are grey
_COLOURS = [*matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
_COLOURS[7] = "black"  # in place of its grey
_GREY = "#bbbbbb"

LONGEST = 100_000  # characters of a column


def _numbers(text: object) -> object:
    """The whole numbers of a text with spaces between; what is no such text is left to be refused."""
    return [int(word) for word in text.split()] if isinstance(text, str) and len(text) <= LONGEST else text


_Column = BeforeValidator(_numbers)


class Picture(BaseModel):
    """The points of one model's test images, as `ssl_bench.eval.probe.WithPoints` describes them."""

    x: Annotated[list[Annotated[StrictInt, Field(ge=-1000, le=1000)]], _Column, Field(min_length=1)]
    y: Annotated[list[Annotated[StrictInt, Field(ge=-1000, le=1000)]], _Column]
    label: Annotated[list[Annotated[StrictInt, Field(ge=0)]], _Column] = []
    classes: list[StrictStr] = []
    explained: tuple[float, float] | None = None  # percent of the variance along each axis

    @model_validator(mode="after")
    def _of_one_length(self) -> "Picture":
        if len(self.y) != len(self.x) or len(self.label) not in (0, len(self.x)):
            raise ValueError("x, y and label must be of one length")
        return self


class Panel(NamedTuple):
    title: str
    picture: Picture


def features(collection: Collection) -> Iterator[tuple[Plate, Figure]]:
    """A figure for each data set that networks were measured on by an evaluator with points; none without any."""
    for (protocol, dataset), panels in panels_of(collection).items():
        yield _figure(protocol, dataset, panels)


def panels_of(collection: Collection) -> dict[tuple[str, str], list[Panel]]:
    """By protocol and data set: an untrained network, then each problem's optimizers at their best with a picture."""
    best: dict[tuple[str, str], dict[tuple[str, str], tuple[float, Panel, Result]]] = defaultdict(dict)
    for setting, contenders in comparisons.arms(collection).items():
        for arm in contenders:
            cells = sorted(arm.cells, key=lambda cell: cell is not arm.best)  # the best one first
            runs = (result for cell in cells for result in cell.results if result.status == "finished")
            result, pictures = next(((run, p) for run in runs if (p := pictures_of(run, "trained"))), (None, {}))
            if result is None:
                continue
            for protocol, picture in pictures.items():
                where = f"B = {setting.batch_size}, seed {result.seed}"
                panel = Panel(f"{setting.problem}, {arm.optimizer}\n{where}{_share(picture)}", picture)
                found, name = best[protocol, setting.dataset], (setting.problem, arm.optimizer)
                if name not in found or (arm.top1 or 0.0) > found[name][0]:
                    found[name] = (arm.top1 or 0.0, panel, result)
    panels: dict[tuple[str, str], list[Panel]] = {}
    for key, found in best.items():
        untrained = [(pictures_of(result, "untrained").get(key[0]), result) for _, _, result in found.values()]
        start = [Panel(f"untrained\nseed {run.seed}{_share(p)}", p) for p, run in untrained if p is not None]
        panels[key] = start[:1] + [panel for _, panel, _ in found.values()]
    return panels


def pictures_of(result: Result, model: str) -> dict[str, Picture]:
    """The pictures that a run's evaluations recorded, by protocol; one that cannot be read is none."""
    found = {}
    for entry in (result.record.results or {}).get("evaluations", []):
        if entry.get("model", "trained") != model or not isinstance(entry.get("points"), dict):
            continue
        metrics = entry.get("metrics", {})
        shares = [metrics.get(name) for name in ("explained_1", "explained_2")]
        known = all(is_number(share) and 0 <= share <= 100 for share in shares)
        try:
            points = {**entry["points"], "explained": tuple(shares) if known else None}
            found[one_line(entry["protocol"])] = Picture.model_validate(points)
        except ValidationError:
            continue
    return found


def _share(picture: Picture) -> str:
    return "" if picture.explained is None else "; {:.0f}% + {:.0f}%".format(*picture.explained)


def _figure(protocol: str, dataset: str, panels: list[Panel]) -> tuple[Plate, Figure]:
    shown = panels[:PANELS]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.4, 2.5 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in list(axes)[len(shown) :]:
        axis.set_visible(False)
    classes = sorted({label for panel in shown for label in panel.picture.label})
    coloured = {label: _COLOURS[place] for place, label in enumerate(classes[:COLOURED])}
    for axis, panel in zip(figure.axes, shown, strict=False):
        picture = panel.picture
        colours = [coloured.get(label, _GREY) for label in picture.label] or "#555555"
        order = np.argsort([label in coloured for label in picture.label] or [0] * len(picture.x), kind="stable")
        x, y = np.array(picture.x)[order], np.array(picture.y)[order]  # grey points first, under the others
        colours = [colours[place] for place in order] if picture.label else colours
        # As pixels in the SVG, too: a thousand points a panel would make megabytes of it.
        axis.scatter(x, y, s=5, c=colours, alpha=0.75, linewidths=0, rasterized=True)
        axis.set(xlim=(-1050, 1050), ylim=(-1050, 1050), xticks=[], yticks=[], aspect="equal")
        axis.set_title("\n".join(textwrap.fill(plain(line), 34) for line in panel.title.splitlines()), fontsize=7.5)
    names = next((panel.picture.classes for panel in shown if panel.picture.classes), [])
    for label, colour in coloured.items():
        name = plain(names[label]) if label < len(names) else f"class {label}"
        line = Line2D([], [], color=colour, marker="o", linestyle="", markersize=4, label=name)
        figure.axes[0].add_line(line)
    legend_below(figure, figure.axes[0])
    counts = sorted({len(panel.picture.x) for panel in shown})
    size = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    caption = (
        f"n = {size} fixed test images by {protocol}; one run of each method and optimizer, at its best, and the "
        "network that one of them started from. Each network has axes of its own; percent: the share of its features' "
        "variance along them. One colour a class in every panel."
    )
    caption += f" The first {COLOURED} of {len(classes)} classes in colour, the others grey." * (
        len(classes) > COLOURED
    )
    caption += f" The first {PANELS} of {len(panels)} panels." * (len(panels) > PANELS)
    on = protocol.partition("@")[2] or dataset
    return Plate(
        name_of("features", protocol, dataset), f"Features of {on}'s test images, in two dimensions", caption
    ), figure
