"""Whether the gradient's squared error falls as 1 / B: claim (d), on what `ssl-bench analyze` measured."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.analysis import Analyzed, Row, analyzed, measured_how, measured_on
from ssl_bench.report.evidence import Claim, record_for, verdict_of, where
from ssl_bench.report.tables import Table, Value, number

# Slope of log E|g_B - E g_B|^2 over log B: -1 in theory, and this close to it in a measurement.
SLOPE_TOLERANCE = 0.15

SAYS = "Theorem 1: the batch gradient's error is at most σ²/B (stated for its mean, which is 0; its square is meant)."
NOTES = (
    "Error: E|g_B - E g_B|², the variance of the gradient summed over all parameters, about the mean of batches "
    "of that size, which are disjoint parts of one shuffled set. It is not taken about the whole set's gradient: with "
    "batch norm in train mode, and with a loss that is no mean over images (Barlow Twins, SimCLR, VICReg), the "
    "expected gradient itself depends on B, and the theorem's assumption of independent terms does not hold.",
    "Noise scale: B_simple = B × error / |E g|², the batch size at which the noise is as large as the gradient "
    "(McCandlish et al. 2018), in images; a dash where the unbiased estimate of |E g|² is not above 0.",
)


@dataclass(frozen=True)
class NoiseCurve:
    """The squared error against the batch size at one step of one run.

    Attributes:
        run: the run.
        step: steps completed.
        rows: two or more, by ascending batch size; every error is above 0.
    """

    run: Analyzed
    step: float
    rows: tuple[Row, ...]

    @property
    def slope(self) -> float:
        """Of log error over log B, by least squares."""
        x, y = np.log([(row["batch_size"], row["squared_error"]) for row in self.rows]).T
        return float(np.polyfit(x, y, 1)[0])


def noise_curves(runs: Sequence[Analyzed]) -> Iterator[NoiseCurve]:
    """Every step that has the error of two batch sizes or more."""
    for run in runs:
        by_step: dict[float, dict[float, Row]] = defaultdict(dict)
        for row in run.analysis.gradient_noise:
            if row["batch_size"] > 0 and row.get("squared_error", 0) > 0:
                by_step[row["step"]][row["batch_size"]] = row
        for step, rows in by_step.items():
            if len(rows) > 1:
                yield NoiseCurve(run, step, tuple(rows.values()))


def noise_scale(row: Row) -> float | None:
    """B_simple = B tr(Cov g_B) / |E g|^2 (McCandlish et al. 2018, eq. 2.9), in images; None unless |E g|^2 > 0."""
    squared = row.get("gradient_squared", 0.0)
    return row["batch_size"] * row["squared_error"] / squared if squared > 0 else None


def check_gradient_noise(collection: Collection) -> Claim:
    """(d): whether the squared error of the batch gradient falls as 1 / B.

    Args:
        collection: the runs; those without an analysis say nothing.
    """
    curves = list(noise_curves(list(analyzed(collection))))
    fits = [abs(curve.slope + 1) <= SLOPE_TOLERANCE for curve in curves]
    finding = "No run has gradient noise of two batch sizes in its analysis.json (ssl-bench analyze RUN)."
    if curves:
        how = measured_how((curve.run for curve in curves), "noise_images")
        slopes = [curve.slope for curve in curves]
        finding = (
            f"The slope of log E|g_B - E g_B|² over log B, -1 in theory, is within {SLOPE_TOLERANCE:g} of it in "
            f"{sum(fits)} of {len(fits)} measurements ({min(slopes):.2f} to {max(slopes):.2f}). Measured as the "
            f"variance of the gradients of disjoint batches of one size about their mean, with {how} for each size."
        )
    return Claim("d", "Theorem 1: noise and batch size", SAYS, verdict_of(fits), finding, _table(curves))


def _table(curves: Sequence[NoiseCurve]) -> Table:
    rows, records = [], []
    for curve in curves:
        run, least, largest = curve.run, curve.rows[0], curve.rows[-1]
        names = (*where(run.cell), number(run.cell.lr), run.cell.arm, str(run.result.seed), f"{curve.step:g}")
        sizes = ", ".join(number(row["batch_size"]) for row in curve.rows)
        errors = [f"{row['squared_error']:.3g}" for row in (least, largest)]
        scales = [noise_scale(row) for row in (least, largest)]
        shown = ["–" if scale is None else number(float(f"{scale:.3g}")) for scale in scales]
        on = measured_on(run.analysis.settings, "noise_images")
        rows.append((*names, sizes, *errors, f"{curve.slope:.3f}", *shown, on))
        record: dict[str, Value] = record_for(run.cell, run.result.seed) | {"step": curve.step}
        record |= {"points": len(curve.rows), "slope": curve.slope}
        for end, row, scale in zip(("least", "largest"), (least, largest), scales, strict=True):
            record |= {f"{end}_batch_size": row["batch_size"], f"{end}_squared_error": row["squared_error"]}
            record |= {f"{end}_noise_scale": scale}
        record |= {name: run.analysis.settings.get(name) for name in ("batch_norm", "noise_images")}
        records.append(record)
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "step", "B measured", "error, least B")
    columns = (*columns, "error, largest B", "slope", "B_simple, least B", "largest B", "batch norm, images")
    return Table("claim-d", "Gradient noise against the batch size", columns, rows, records, NOTES)
