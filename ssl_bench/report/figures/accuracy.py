"""Accuracy against batch size, time, learning rate and warm-up: after the paper's figures 1, 5 and 60-63."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ssl_bench.report import comparisons
from ssl_bench.report.aggregate import LOST, Cell, Collection, Setting
from ssl_bench.report.claims.evidence import Load, is_warm
from ssl_bench.report.comparisons import Arm
from ssl_bench.report.curves import Array
from ssl_bench.report.figures.drawing import Look, Plate, legend_below, looks_of, plain
from ssl_bench.report.questions import metric_of
from ssl_bench.report.tables import name_of, number

CLOCKS = {"step": "step", "samples": "samples seen", "epochs": "epoch", "seconds": "training time (s)"}
Grouped = Mapping[Setting, Sequence[Arm]]
Looks = Mapping[str, Look]


def best_by_batch_size(grouped: Grouped) -> Iterator[tuple[Plate, Figure]]:
    """The report's first picture: each optimizer's best accuracy against the batch size, a panel a problem and data."""
    panels: dict[tuple[str, str], list[list[Arm]]] = defaultdict(list)
    for (problem, dataset, _), arms in grouped.items():
        if any(arm.top1 is not None for arm in arms):
            panels[problem, dataset].append(comparisons.best_arms(arms))
    if not panels:
        return
    looks = looks_of((arm.optimizer, arm.optimizer) for arms in grouped.values() for arm in arms)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.6, 3.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    for axis, ((problem, dataset), settings) in zip(figure.axes, panels.items(), strict=False):
        axis.set_title(plain(f"{problem}, {dataset}"))
        axis.set(xscale="log", xlabel="batch size", ylabel="best top-1 (%)")
        sizes = sorted({arms[0].setting.batch_size for arms in settings})
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: number(value))
        lines: dict[str, list[Arm]] = defaultdict(list)
        for arms in settings:
            for arm in arms:
                lines[arm.optimizer].append(arm)
        for place, (name, arms) in enumerate(lines.items()):
            arms.sort(key=lambda arm: arm.setting.batch_size)
            aside = 1.03 ** (place - (len(lines) - 1) / 2)  # so that no bar hides another
            x, y = [aside * arm.setting.batch_size for arm in arms], [arm.top1 or 0.0 for arm in arms]
            ends = [arm.best.interval(arm.protocol) if arm.best else None for arm in arms]
            bars = [[max(0.0, m - e[0]) if e else 0.0 for m, e in zip(y, ends, strict=True)]]
            bars += [[max(0.0, e[1] - m) if e else 0.0 for m, e in zip(y, ends, strict=True)]]
            axis.errorbar(x, y, bars, capsize=3, elinewidth=0.9, **looks[name].style)
            lost = [
                (at, value)
                for at, value, arm in zip(x, y, arms, strict=True)
                if any(run.lost for cell in arm.cells for run in cell.results)
            ]
            axis.plot(*(zip(*lost, strict=True) if lost else ((), ())), "x", color="black", markersize=8, zorder=5)
    legend_below(figure, looks=looks, shown=(arm.optimizer for arms in grouped.values() for arm in arms))
    caption = (
        "Each optimizer at the best of its variants and learning rates; bars: Student's 95% interval over seeds, "
        f"none for n = 1; ×: a run of the optimizer {LOST} there."
    )
    yield Plate("best-accuracy", "Best accuracy against the batch size", caption), figure


def along_training(setting: Setting, arms: Sequence[Arm], looks: Looks, load: Load) -> Iterator[tuple[Plate, Figure]]:
    """Accuracy along training, against four clocks; one line for each arm at its best learning rate."""
    measured = {arm.name: mean_curves(arm.best, load) for arm in arms if arm.best}
    if not any(measured.values()):
        return
    figure = Figure(figsize=(8.4, 6.0), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True).flat
    for axis, (clock, label) in zip(axes, CLOCKS.items(), strict=True):
        axis.set_xlabel(label)
        for name, curves in measured.items():
            if clock in curves:
                x, mean, low, high = curves[clock]
                axis.plot(x, mean, markevery=max(1, len(x) // 8), **looks[name].style)
                axis.fill_between(x, low, high, color=looks[name].color, alpha=0.15, linewidth=0)
    for axis in (axes[0], axes[2]):
        axis.set_ylabel("top-1 accuracy (%)")
    legend_below(figure, looks=looks, shown=[name for name, curves in measured.items() if curves])
    online = "the online monitor's accuracy, which is not a result"
    what = "test accuracy" if setting.problem == "classification" else online
    caption = (
        f"Each optimizer at its best learning rate: {what}; the mean over finished seeds, the band from the lowest "
        "to the highest."
    )
    yield Plate(name_of("accuracy", *setting), f"Accuracy along training: {setting}", caption), figure


def mean_curves(cell: Cell, load: Load) -> dict[str, tuple[Array, Array, Array, Array]]:
    """By clock (x, mean, lowest, highest) of the logged accuracy over a cell's finished seeds."""
    runs = [load(result) for result in cell.results if result.status == "finished"]
    curves = {}
    for clock in CLOCKS:
        pairs = [pair for pair in (run.metric(metric_of(cell.problem), clock) for run in runs) if len(pair[0])]
        if pairs:
            # Runs may have logged different numbers of lines: the mean ends with the shortest.
            length = min(len(x) for x, _ in pairs)
            y = np.array([values[:length] for _, values in pairs])
            x = np.mean([positions[:length] for positions, _ in pairs], axis=0)
            curves[clock] = (x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))
    return curves


def with_and_without_warmup(
    setting: Setting, arms: Sequence[Arm], looks: Looks, load: Load
) -> Iterator[tuple[Plate, Figure]]:
    """Figures 1 and 60-63: LARS with and without its warm-up along training, one panel for each learning rate."""
    cells = [cell for arm in arms if arm.optimizer in ("LARS", "LAMB", "LAMBC") for cell in arm.cells]
    both = sorted({c.lr for c in cells if is_warm(c)} & {c.lr for c in cells if not is_warm(c)})
    measured = {lr: [(c, m) for c in cells if c.lr == lr and (m := mean_curves(c, load))] for lr in both}
    measured = {lr: found for lr, found in measured.items() if {is_warm(c) for c, _ in found} == {True, False}}
    if not measured:
        return
    figure = Figure(figsize=(3.4 * len(measured) + 0.8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axis, (lr, found) in zip(axes, measured.items(), strict=True):
        axis.set(title=f"lr {number(lr)}", xlabel="epoch")
        for cell, curves in found:
            x, mean, low, high = curves.get("epochs", curves[next(iter(curves))])
            axis.plot(x, mean, markevery=max(1, len(x) // 8), **looks[cell.arm].style)
            axis.fill_between(x, low, high, color=looks[cell.arm].color, alpha=0.15, linewidth=0)
    axes[0].set_ylabel("top-1 accuracy (%)")
    legend_below(figure, looks=looks, shown=[cell.arm for found in measured.values() for cell, _ in found])
    caption = (
        "Every learning rate that ran with and without a warm-up; mean and range over seeds. Paper: figures 1, 60-63."
    )
    yield Plate(name_of("warmup", *setting), f"With and without a warm-up: {setting}", caption), figure


def learning_rates(problem: str, dataset: str, here: Grouped, looks: Looks) -> Iterator[tuple[Plate, Figure]]:
    """Figure 5: the last accuracy against the learning rate, one panel for each batch size."""
    columns = min(3, len(here))
    rows = math.ceil(len(here) / columns)
    figure = Figure(figsize=(2.9 * columns + 1.2, 2.5 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(here) :]:
        axis.set_visible(False)
    for axis, (setting, arms) in zip(axes.flat, here.items(), strict=False):
        axis.set_title(f"batch size {setting.batch_size}")
        for arm in arms:
            cells = sorted(arm.cells, key=lambda cell: cell.lr)
            shown = [(cell.lr, cell.summary(arm.protocol)) for cell in cells if cell.finished(arm.protocol)]
            axis.errorbar(
                [lr for lr, _ in shown], [s.mean for _, s in shown], [s.sd or 0.0 for _, s in shown], capsize=2,
                **looks[arm.name].style,
            )  # fmt: skip
            failed = [cell.lr for cell in cells if cell.failed]
            color = looks[arm.name].color
            axis.plot(failed, [0.03] * len(failed), "x", color=color, transform=axis.get_xaxis_transform())
    for row in axes:
        row[0].set_ylabel("top-1 accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    legend_below(figure, looks=looks, shown=[arm.name for arms in here.values() for arm in arms])
    caption = (
        "Mean and sample deviation over seeds at the last epoch, lost seeds at chance; × on the axis: every seed "
        f"{LOST}. Paper: figure 5."
    )
    title = f"Accuracy against the learning rate: {problem}, {dataset}"
    yield Plate(name_of("learning-rate", problem, dataset), title, caption), figure


def profiles(collection: Collection, looks: Looks) -> Iterator[tuple[Plate, Figure]]:
    """Performance profiles, where optimizers meet in some setting."""
    found = comparisons.profiles(collection)
    if not found:
        return
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for name, shares in found.items():
        style = looks[name].style | {"markevery": 8}
        axis.step(comparisons.GAPS, [100 * share for share in shares], where="post", **style)
    axis.set(xlabel="points behind the best optimizer", ylabel="share of settings (%)", ylim=(-2, 102))
    legend_below(figure, looks=looks, shown=found)
    caption = "Over problems, data sets and batch sizes, each optimizer by its expected best at equal tuning."
    yield Plate("profiles", "Performance profiles", caption), figure


def optimizer_looks(collection: Collection) -> dict[str, Look]:
    """The looks of optimizers without their variants."""
    return looks_of((cell.optimizer, cell.optimizer) for cell in collection.cells)
