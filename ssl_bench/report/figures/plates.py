"""Which figures a report has, and how they are written; and the demo's figure."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from ssl_bench.records.reader import RunRecord, Skipped
from ssl_bench.records.storage import one_line
from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import Collection
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.curves import RATIO, load_curves, thin
from ssl_bench.report.figures import accuracy, decay
from ssl_bench.report.figures.drawing import (
    PALETTE,
    POINTS,
    Plate,
    depth_bar,
    draw_layers,
    looks_of,
    plain,
    save,
    style,
)
from ssl_bench.report.figures.features import features
from ssl_bench.report.figures.layers import layers
from ssl_bench.report.figures.sharpness import sharpness_figures

Choice = Literal["auto", "all", "none"]

# A figure takes a second or more: of a study with more runs than this, "auto" draws only the first few.
MANY_RUNS, FEW_FIGURES = 200, 6


def write_figures(
    collection: Collection, load: Load, folder: Path, *, choice: Choice = "auto"
) -> tuple[list[Plate], list[Skipped]]:
    """Writes the figures for which the runs have data, as SVG and PNG.

    Args:
        collection: the runs.
        load: a run's curves.
        folder: where the files go.
        choice: "all", "none", or "auto": all of them, or of a study of more than ``MANY_RUNS`` runs the first few.

    Returns:
        the figures, and what could not be drawn, each with the reason.
    """
    plates: list[Plate] = []
    problems: list[Skipped] = []
    most = 0 if choice == "none" else FEW_FIGURES if is_cut(collection, choice) else None
    if most == 0:
        return plates, problems
    with style():
        for kind in _figures(collection, load):
            try:
                for plate, figure in kind():
                    if most is not None and len(plates) >= most:
                        return plates, problems
                    save(figure, folder / f"{plate.name}.png")
                    figure.set_layout_engine("none")  # the layout is done; another would take as long as drawing
                    save(figure, folder / f"{plate.name}.svg")
                    plates.append(plate)
            except OSError:
                raise  # the disk's fault
            except Exception as error:
                name = kind.func.__name__.replace("_", " ")
                problems.append(Skipped(folder, f"a figure of the kind {name!r} could not be drawn: {one_line(error)}"))
    return plates, problems


def is_cut(collection: Collection, choice: Choice) -> bool:
    """Whether only the first few figures are drawn."""
    return choice == "auto" and len(collection.results) > MANY_RUNS


def _figures(collection: Collection, load: Load) -> Iterator[partial[Iterator[tuple[Plate, Figure]]]]:
    grouped = comparisons.arms(collection)
    looks = looks_of((arm.optimizer, arm.name) for arms in grouped.values() for arm in arms)
    yield partial(accuracy.best_by_batch_size, grouped)
    yield partial(accuracy.profiles, collection, accuracy.optimizer_looks(collection))
    yield partial(features, collection)
    for setting, arms in grouped.items():
        yield partial(accuracy.along_training, setting, arms, looks, load)
    for problem, dataset in dict.fromkeys(setting[:2] for setting in grouped):
        here = {setting: arms for setting, arms in grouped.items() if setting[:2] == (problem, dataset)}
        yield partial(accuracy.learning_rates, problem, dataset, here, looks)
        yield partial(decay.decay, problem, dataset, here, load)
    for setting, arms in grouped.items():
        yield partial(accuracy.with_and_without_warmup, setting, arms, looks, load)
    yield partial(decay.phi, collection, load)
    yield partial(sharpness_figures, collection, looks)
    for setting, arms in grouped.items():
        for arm in arms:
            yield partial(layers, setting, arm, load)


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
            top.set_title(plain(label))
            draw_layers(bottom, curves, RATIO)
            bottom.set_xlabel("step")
            if column:
                bottom.set_ylabel("")
        panels[0, 0].set_ylabel("training loss")
        depth_bar(figure, panels[1, :].tolist(), max(len(curves.adapted()) for curves in loaded.values()))
        return save(figure, path)
