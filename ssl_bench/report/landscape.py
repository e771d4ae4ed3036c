"""Claims about the loss surface and the gradient's noise, which need measurements beside a run's record.

A run's ``analysis.json`` holds them if somebody made them:

    {"sharpness": [{"step": 0, "top_eigenvalue": 1.0, "trace": 1.0, "sam": 0.1}, ...],
     "gradient_noise": [{"step": 0, "batch_size": 512, "squared_error": 0.1}, ...]}
"""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.evidence import Claim, is_number, record_for, verdict_of, warm_and_cold, where
from ssl_bench.report.tables import Table, number

# Slope of log E|g_B - g|^2 over log B: -1 in theory, and this close to it in a measurement.
SLOPE_TOLERANCE = 0.15


def read_analysis(folder: Path) -> dict[str, list[dict[str, float]]]:
    """A run's analysis.json: its lists of rows that are numbers; nothing where it is missing or damaged."""
    try:
        found = json.loads((folder / "analysis.json").read_text())
    except (OSError, ValueError):
        return {}
    rows: dict[str, list[dict[str, float]]] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, list):
            rows[name] = sorted(filter(_is_row, value), key=lambda row: row["step"])
    return rows


def check_sharpness(collection: Collection) -> Claim:
    """(c): whether training ends in sharper minima with a warm-up than without."""
    says = (
        "Warm-up traps LARS in sharp minimizers, and TVLARS avoids them (sections 3.3 and 4). The paper measures none."
    )
    rows, records, sharper = [], [], []
    measured = {
        (cell.key, result.seed): found
        for cell in collection.cells
        for result in cell.results
        if (found := read_analysis(result.record.folder).get("sharpness"))
    }
    for cell in collection.cells:
        for result in cell.results:
            for row in measured.get((cell.key, result.seed), []):
                names = (*where(cell), number(cell.lr), cell.arm, str(result.seed), f"{row['step']:g}")
                values = [row.get(name) for name in ("top_eigenvalue", "trace", "sam")]
                rows.append((*names, *("–" if value is None else f"{value:.4g}" for value in values)))
                records.append(record_for(cell, result.seed) | dict(row))
    for warm, cold, seed in warm_and_cold(collection):
        pair = [measured.get((cell.key, seed)) for cell in (warm, cold)]
        ends = [found[-1].get("top_eigenvalue") for found in pair if found]
        if len(ends) == 2 and None not in ends:
            sharper.append(ends[0] > ends[1])  # type: ignore[operator]
    finding = "No run has sharpness in its analysis.json."
    if rows:
        finding = "Sharpness is measured, but in no pair of one learning rate and seed with and without warm-up."
    if sharper:
        finding = (
            "At the last measured step the top Hessian eigenvalue is larger with warm-up than without in "
            f"{sum(sharper)} of {len(sharper)} pairs of one learning rate and seed."
        )
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "step", "top eigenvalue", "trace", "SAM")
    table = Table("claim-c", "Sharpness along training", columns, rows, records)
    return Claim("c", "Warm-up and sharp minima", says, verdict_of(sharper), finding, table)


def check_gradient_noise(collection: Collection) -> Claim:
    """(d): whether the squared error of the batch gradient falls as 1 / B."""
    says = (
        "Theorem 1: the batch gradient's error is at most σ²/B (stated for its mean, which is 0; its square is meant)."
    )
    rows, records, fits = [], [], []
    for cell in collection.cells:
        for result in cell.results:
            by_step: dict[float, list[tuple[float, float]]] = defaultdict(list)
            for row in read_analysis(result.record.folder).get("gradient_noise", []):
                if row.get("batch_size", 0) > 0 and row.get("squared_error", 0) > 0:
                    by_step[row["step"]].append((math.log(row["batch_size"]), math.log(row["squared_error"])))
            for step, pairs in by_step.items():
                if len({size for size, _ in pairs}) < 2:
                    continue
                slope = _slope(pairs)
                fits.append(abs(slope + 1) <= SLOPE_TOLERANCE)
                names = (*where(cell), number(cell.lr), cell.arm, str(result.seed), f"{step:g}")
                rows.append((*names, str(len(pairs)), f"{slope:.3f}"))
                records.append(record_for(cell, result.seed) | {"step": step, "points": len(pairs), "slope": slope})
    finding = "No run has gradient noise in its analysis.json."
    if rows:
        finding = (
            f"The slope of log E|g_B - g|² over log B, -1 in theory, is within {SLOPE_TOLERANCE:g} of it in "
            f"{sum(fits)} of {len(fits)} measurements."
        )
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "step", "batch sizes", "slope")
    table = Table("claim-d", "Gradient noise against the batch size", columns, rows, records)
    return Claim("d", "Theorem 1: noise and batch size", says, verdict_of(fits), finding, table)


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through points, by least squares."""
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and "step" in value and all(map(is_number, value.values()))
