"""What `ssl-bench analyze` measured of a run: its ``analysis.json``, and its numbers with their uncertainty."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.records.reader import plain_json
from ssl_bench.report.aggregate import Cell, Collection, Result
from ssl_bench.report.curves import LARGEST
from ssl_bench.report.scope import planned
from ssl_bench.report.tables import is_number

Row = Mapping[str, float]


@dataclass(frozen=True)
class Measure:
    """One measure of sharpness, with its labels for tables and figures.

    Attributes:
        column: of a row of ``sharpness``.
        text: plain characters.
        symbol: for a figure's axis.
        error: the column that holds its uncertainty; empty where there is none.
        times_weights: whether it is multiplied by the squared norm of the weights.
    """

    column: str
    text: str
    symbol: str
    error: str = ""
    times_weights: bool = False

    def of(self, row: Row) -> tuple[float, float | None] | None:
        """Value and uncertainty in a row; None where it was not measured."""
        if self.column not in row or (self.times_weights and "weight_norm" not in row):
            return None
        factor = row["weight_norm"] ** 2 if self.times_weights else 1.0
        error = row.get(self.error)
        return factor * row[self.column], None if error is None else factor * error

    def along(self, run: "Analyzed") -> list[tuple[float, float, float | None]]:
        """(epoch, value, uncertainty) at each step of a run where it was measured."""
        return [(run.epoch(row["step"]), *found) for row in run.analysis.sharpness if (found := self.of(row))]


TOP = Measure("top_eigenvalue", "top eigenvalue", r"top eigenvalue $\lambda_1$", "top_eigenvalue_residual")
SCALED = Measure(
    "top_eigenvalue", "top eigenvalue × |w|²", r"$\lambda_1\,\|w\|^2$", "top_eigenvalue_residual", times_weights=True
)
TRACE = Measure("trace", "trace", "Hessian trace", "trace_standard_error")
SAM = Measure("sam", "SAM", "SAM sharpness (loss)")
MEASURES = (TOP, SCALED, TRACE, SAM)


@dataclass(frozen=True)
class Analysis:
    """The usable contents of an ``analysis.json``.

    Attributes:
        settings: how it was measured; empty where the file does not say.
        sharpness: rows by ascending step: "step" and numbers by name.
        gradient_noise: rows by ascending step and batch size: "step", "batch_size" and numbers by name.
        about: when, where and with what it was measured.
    """

    settings: Mapping[str, Any]
    sharpness: tuple[Row, ...]
    gradient_noise: tuple[Row, ...]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Analyzed:
    """A run with its analysis."""

    cell: Cell
    result: Result
    analysis: Analysis

    @property
    def name(self) -> str:
        """The optimizer and the seed, for a legend."""
        return f"{self.cell.arm}, seed {self.result.seed}"

    def epoch(self, step: float) -> float:
        """A step as epochs of training; the step itself where the record does not say how long an epoch is."""
        return step / (planned(self.result, "steps_per_epoch") or 1.0)


@dataclass(frozen=True)
class NoiseCurve:
    """The gradient's squared error against the batch size, at one step of one run.

    Attributes:
        run: the run.
        step: steps completed.
        rows: two or more, by ascending batch size; every error is above 0.
    """

    run: Analyzed
    step: float
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The epoch, for a legend."""
        return f"epoch {self.run.epoch(self.step):.3g}"

    @property
    def points(self) -> tuple[list[float], list[float]]:
        """Batch sizes and squared errors."""
        return [row["batch_size"] for row in self.rows], [row["squared_error"] for row in self.rows]

    @property
    def inverse(self) -> list[float]:
        """Errors that fall as 1 / B from the smallest batch's on."""
        sizes, errors = self.points
        return [errors[0] * sizes[0] / size for size in sizes]

    @property
    def slope(self) -> float:
        """Of log error over log B, by least squares."""
        x, y = np.log(self.points)
        return float(np.polyfit(x, y, 1)[0])


def read_analysis(folder: Path) -> Analysis | None:
    """A run's analysis; None where there is none, or nothing usable in it."""
    try:
        found = plain_json(folder / "analysis.json")
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    sharpness = _rows(found.pop("sharpness", None), ("step",))
    noise = _rows(found.pop("gradient_noise", None), ("step", "batch_size"))
    settings = found.pop("settings", None)
    if not sharpness and not noise:
        return None
    return Analysis(settings if isinstance(settings, dict) else {}, sharpness, noise, found)


@cache
def analysis_of(result: Result) -> Analysis | None:
    """That of a run of the report, read once: claims, tables, figures and the page all ask for it."""
    return read_analysis(result.record.folder)


def analyzed(collection: Collection) -> Iterator[Analyzed]:
    """The runs that have an analysis, in the tables' order."""
    for cell in collection.cells:
        for result in cell.results:
            analysis = analysis_of(result)
            if analysis is not None:
                yield Analyzed(cell, result, analysis)


def noise_curves(runs: Iterable[Analyzed]) -> Iterator[NoiseCurve]:
    """Every step at which the error of two batch sizes or more was measured."""
    for run in runs:
        by_step: dict[float, dict[float, Row]] = defaultdict(dict)
        for row in run.analysis.gradient_noise:
            if row["batch_size"] > 0 and row.get("squared_error", 0) > 0:
                by_step[row["step"]][row["batch_size"]] = row
        for step, rows in by_step.items():
            if len(rows) > 1:
                yield NoiseCurve(run, step, tuple(rows.values()))


def measured_on(settings: Mapping[str, Any], images: str = "images") -> str:
    """Batch norm's mode and the number of images, for a table.

    Args:
        settings: of an analysis.
        images: the setting that counts them, "images" or "noise_images".
    """
    if "batch_norm" not in settings or images not in settings:
        return "not recorded"
    return f"{settings['batch_norm']}, {settings[images]}"


def measured_how(runs: Iterable[Analyzed], images: str = "images") -> str:
    """The same for several runs as a phrase: "batch norm in train mode, 512 images"; joined by "or" if they differ."""
    settings = [run.analysis.settings for run in runs]
    parts = [
        f"batch norm in {found.get('batch_norm', 'an unknown')} mode, {found.get(images, '?')} images"
        for found in settings
    ]
    return " or ".join(dict.fromkeys(parts))


def uncertain(value: float, error: float | None) -> str:
    """A number with its uncertainty, and no digits beyond the uncertainty's first: "12.3 ± 0.4"."""
    if error is None:
        return f"{value:.4g}"
    if not (error > 0 and 1e-4 <= abs(value) < 1e6):
        return f"{value:.4g} ± {error:.1g}"
    last, first = math.floor(math.log10(error)), math.floor(math.log10(abs(value)))
    decimals = max(0, min(-last, 4 - first))  # five digits at most
    return f"{value:.{decimals}f} ± {f'{error:.{decimals}f}' if -last <= decimals else f'{error:.1g}'}"


def _rows(found: object, keys: Sequence[str]) -> tuple[Row, ...]:
    """Entries that have these keys and at least one more number; values that are no finite numbers are left out."""
    rows = []
    for entry in found if isinstance(found, list) else ():
        items = entry.items() if isinstance(entry, dict) else ()
        row = {name: value for name, value in items if is_number(value) and -LARGEST < value < LARGEST}
        if set(keys) < row.keys():
            rows.append(row)
    return tuple(sorted(rows, key=lambda row: [row[key] for key in keys]))
