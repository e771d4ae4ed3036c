"""A run's record as curves: the metrics by step, and each layer's statistics as (step, layer) matrices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_bench.records.reader import RunRecord, read_run
from ssl_bench.records.telemetry import read_telemetry

Array = np.ndarray


@dataclass(frozen=True)
class Quantity:
    """One column of the telemetry, and how it is written.

    Attributes:
        column: its name in telemetry.parquet.
        symbol: mathematics for a figure's axis.
        text: the same in plain characters.
        meaning: what it is; none has a unit.
        log: whether it spans decades.
    """

    column: str
    symbol: str
    text: str
    meaning: str
    log: bool = True


# Columns of `ssl_bench.optim.telemetry`; u is the direction that the ratio divides by: g + beta w, for LAMB Adam's.
W_NORM = Quantity("weight_norm", r"$\|w\|$", "|w|", "weight norm", log=False)
G_NORM = Quantity("grad_norm", r"$\|g\|$", "|g|", "gradient norm")
RATIO = Quantity("raw_ratio", r"$\|w\|\,/\,\|u\|$", "|w| / |u|", "trust ratio")
MOVED = Quantity("relative_step", r"$\|\Delta w\|\,/\,\|w\|$", "|dw| / |w|", "relative step")
PHI = Quantity("phi", r"$\varphi$", "phi", "time factor")
QUANTITIES = (W_NORM, G_NORM, RATIO, MOVED, PHI)  # what the report reads of the telemetry


@dataclass(frozen=True)
class Curves:
    """What a run recorded along its training.

    Attributes:
        metrics: by name, (T,) float64 arrays of equal length; NaN where a line has no such value. "step" (steps
            completed), "samples", "epochs" and "seconds" are the clocks.
        layers: the L tensors that the telemetry follows, in the order of its parameter groups, which within a group
            is the network's.
        steps: (S,) of the telemetry: steps completed, as in the metrics; 1 is the first update.
        telemetry: by column of ``QUANTITIES``, (S, L) float32 matrices; NaN where there is no value.
    """

    metrics: dict[str, Array]
    layers: tuple[str, ...]
    steps: Array
    telemetry: dict[str, Array]

    def metric(self, name: str, clock: str = "step") -> tuple[Array, Array]:
        """One metric where it was measured: the clock's values and the metric's, both (n,), n possibly 0."""
        if name not in self.metrics or clock not in self.metrics:
            return np.empty(0), np.empty(0)
        x, y = self.metrics[clock], self.metrics[name]
        measured = ~np.isnan(x) & ~np.isnan(y)
        return x[measured], y[measured]

    def adapted(self) -> list[int]:
        """Positions of the layers whose step is scaled by a ratio; of all layers where the optimizer has none."""
        if not self.has(RATIO.column):
            return list(range(len(self.layers)))
        return np.flatnonzero(np.isfinite(self.telemetry[RATIO.column]).any(axis=0)).tolist()

    def has(self, column: str) -> bool:
        """Whether the telemetry holds a finite value of a column."""
        return column in self.telemetry and bool(np.isfinite(self.telemetry[column]).any())


def load_curves(run: RunRecord | str | Path, *, telemetry: bool = True) -> Curves:
    """Reads the curves of a run, whatever state it is in.

    Args:
        run: its record or its folder.
        telemetry: whether to read the layers too; False = the curves have no layers.

    Raises:
        ValueError: no run there, or a damaged file, in one line.
    """
    record = run if isinstance(run, RunRecord) else read_run(run)
    names = dict.fromkeys(name for row in record.metrics for name, value in row.items() if _is_number(value))
    metrics = {
        name: np.array([row[name] if _is_number(row.get(name)) else np.nan for row in record.metrics], dtype=float)
        for name in names
    }
    if not telemetry:
        return Curves(metrics, (), np.empty(0, dtype=int), {})
    return Curves(metrics, *_telemetry(record.folder))


def thin(length: int, points: int) -> Array:
    """Indices of at most ``points`` of ``length`` values, evenly spread, the first and the last among them."""
    if length <= points:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, points).round().astype(int))


def short_names(layers: Sequence[str]) -> list[str]:
    """Layer names without what says nothing: ``backbone.layer1.0.conv1.weight`` -> ``layer1.0.conv1``.

    A name that would no longer be unique keeps its full length.
    """
    short = []
    for name in layers:
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod", "backbone")]
        if len(parts) > 1 and parts[-1] == "weight":
            parts = parts[:-1]
        if len(parts) > 1 and parts[-2] == "downsample" and parts[-1] == "0":
            parts = parts[:-1]
        short.append(".".join(parts))
    return [name if short.count(name) == 1 else full for name, full in zip(short, layers, strict=True)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _telemetry(folder: Path) -> tuple[tuple[str, ...], Array, dict[str, Array]]:
    """The telemetry's long table as one matrix for each quantity."""
    table = read_telemetry(folder)
    if "step" not in table.column_names or "layer" not in table.column_names:
        return (), np.empty(0, dtype=int), {}
    steps, row = np.unique(table["step"].to_numpy(), return_inverse=True)
    names = table["layer"].to_pylist()
    layers = tuple(dict.fromkeys(names))  # in order of first appearance
    position = {name: index for index, name in enumerate(layers)}
    column_of = np.array([position[name] for name in names])
    telemetry = {}
    for quantity in QUANTITIES:
        if quantity.column in table.column_names:
            matrix = np.full((len(steps), len(layers)), np.nan, dtype=np.float32)
            matrix[row, column_of] = table[quantity.column].to_numpy()
            telemetry[quantity.column] = matrix
    return layers, steps, telemetry
