"""TVLARS's lambda and phi: after the paper's figures 3, 4 and 64-69."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from matplotlib.figure import Figure

from ssl_bench.report.aggregate import Cell, Collection
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.curves import Array, thin
from ssl_bench.report.figures.accuracy import Grouped, mean_curves
from ssl_bench.report.figures.drawing import Plate, depth_colors, legend_below, looks_of, note, plain
from ssl_bench.report.recipes import lookup
from ssl_bench.report.tables import is_number, name_of, number

Grid = Mapping[tuple[float, int], list[Cell]]  # TVLARS's cells by lambda and batch size


def decay(problem: str, dataset: str, here: Grouped, load: Load) -> Iterator[tuple[Plate, Figure]]:
    """The best accuracy against lambda; all curves on one plate of lambda x B (figure 4); a plate a lambda (64-69)."""
    grid: dict[tuple[float, int], list[Cell]] = defaultdict(list)
    best: dict[int, dict[float, float]] = defaultdict(dict)
    for setting, arms in here.items():
        for arm in arms:
            value = lookup(arm.cells[0].recipe, "optimizer.decay")
            if arm.optimizer == "TVLARS" and arm.top1 is not None and is_number(value) and value > 0:
                line = best[setting.batch_size]
                line[value] = max(arm.top1, line.get(value, 0.0))
                grid[value, setting.batch_size] += arm.cells
    if max(map(len, best.values()), default=0) < 2:
        return
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for color, (batch_size, values) in zip(depth_colors(len(best)), sorted(best.items()), strict=True):
        decays, accuracies = zip(*sorted(values.items()), strict=True)
        axis.plot(decays, accuracies, "o-", color=color, label=f"B = {batch_size}", markersize=4)
    axis.set(xscale="log", xlabel="λ", ylabel="top-1 accuracy (%)")
    legend_below(figure, axis)
    caption = "TVLARS at its best learning rate (and variant) for each λ, the last accuracy."
    yield Plate(name_of("lambda", problem, dataset), f"Accuracy against λ: {problem}, {dataset}", caption), figure
    lambdas, sizes = sorted({value for value, _ in grid}, reverse=True), sorted({size for _, size in grid})
    title = f"TVLARS along training, λ by batch size: {problem}, {dataset}"
    name = name_of("lambda-by-batch-size", problem, dataset)
    yield from _plate(name, title, "Paper: figure 4.", grid, lambdas, sizes, load)
    for value in lambdas:
        title = f"TVLARS along training at λ = {number(value)}: {problem}, {dataset}"
        name = name_of("lambda-curves", number(value), problem, dataset)
        yield from _plate(name, title, "Paper: figures 64-69.", grid, [value], sizes, load)


def _plate(
    name: str, title: str, paper: str, grid: Grid, lambdas: list[float], sizes: list[int], load: Load
) -> Iterator[tuple[Plate, Figure]]:
    """Accuracy along training, one line for each learning rate; one lambda: a row of batch sizes, else a matrix."""
    measured = {
        (value, size): [(cell, curves) for cell in grid[value, size] if (curves := mean_curves(cell, load))]
        for value in lambdas
        for size in sizes
        if (value, size) in grid
    }
    if not any(measured.values()):
        return
    single = len(lambdas) == 1
    shape = (1, len(sizes)) if single else (len(sizes), len(lambdas))
    figure = Figure(figsize=(2.3 * shape[1] + 1.0, 2.1 * shape[0] + 0.8), layout="constrained")
    axes = figure.subplots(*shape, sharey="row", squeeze=False)
    rates = sorted(
        {f"lr {number(cell.lr)}" for found in measured.values() for cell, _ in found}, key=lambda t: float(t[3:] or 0)
    )
    looks = looks_of((rate, rate) for rate in rates)
    for row, size in enumerate(sizes):
        for column, value in enumerate(lambdas):
            axis = axes[0, row] if single else axes[row, column]
            axis.set_title(f"B = {size}" if single else f"B = {size}, λ = {number(value)}")
            for cell, curves in measured.get((value, size), []):
                x, mean, *_ = curves.get("epochs", curves[next(iter(curves))])
                axis.plot(x, mean, markevery=max(1, len(x) // 6), **looks[f"lr {number(cell.lr)}"].style)
            if not axis.lines:
                note(axis, "no run")
    for axis in axes[:, 0]:
        axis.set_ylabel("top-1 (%)")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    legend_below(figure, looks=looks, shown=rates)
    caption = f"Mean over finished seeds, one line for each learning rate. {paper}"
    yield Plate(name, title, caption), figure


def phi(collection: Collection, load: Load) -> Iterator[tuple[Plate, Figure]]:
    """Figure 3: phi against the step, one line for each distinct course."""
    courses: dict[tuple[str, int], tuple[Array, Array]] = {}
    for cell in collection.cells:
        key = (cell.variant, cell.batch_size)
        if cell.optimizer == "TVLARS" and key not in courses:
            steps, values = load(cell.results[0]).phi()
            if len(values):
                courses[key] = (steps, values)
    if not courses:
        return
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for color, ((variant, batch_size), (steps, values)) in zip(
        depth_colors(len(courses)), courses.items(), strict=True
    ):
        kept = thin(len(steps), 300)
        label = ", ".join(filter(None, (f"B = {batch_size}", plain(variant))))
        axis.plot(steps[kept], values[kept], color=color, label=label)
    axis.set(xlabel="step", ylabel="time factor φ", ylim=(0, None))
    legend_below(figure, axis)
    yield Plate("phi", "TVLARS's time factor φ", "As recorded in the runs. Paper: figure 3."), figure
