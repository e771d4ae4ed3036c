"""A run's record as curves: the metrics by step, and each layer's statistics as (step, layer) matrices."""

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.json import ReadOptions, read_json

from ssl_bench.records.reader import METRICS, RunRecord, iterate_metrics, read_run
from ssl_bench.records.telemetry import read_telemetry
from ssl_bench.report.tables import is_number, on_one_line

Array = np.ndarray

LARGEST = 1e30  # a plot has no place for larger numbers


@dataclass(frozen=True)
class Quantity:
    """One column of the telemetry and its labels.

    Attributes:
        column: its name in telemetry.parquet.
        symbol: TeX mathematics for a figure's axis.
        text: the same in plain characters.
        meaning: what it is; none has a unit.
        log: whether it spans decades and needs a logarithmic axis.
    """

    column: str
    symbol: str
    text: str
    meaning: str
    log: bool = True


# Columns of `ssl_bench.optim.telemetry`; the ratio divides by |u|, u = g + beta w (for LAMB, Adam's direction + decay).
W_NORM = Quantity("weight_norm", r"$\|w\|$", "|w|", "weight norm", log=False)
G_NORM = Quantity("grad_norm", r"$\|g\|$", "|g|", "gradient norm")
RATIO = Quantity("raw_ratio", r"$\|w\|\,/\,\|u\|$", "|w| / |u|", "trust ratio")
MOVED = Quantity("relative_step", r"$\|\Delta w\|\,/\,\|w\|$", "|dw| / |w|", "relative step")
PHI = Quantity("phi", r"$\varphi$", "phi", "time factor")
QUANTITIES = (W_NORM, G_NORM, RATIO, MOVED, PHI)  # the only columns of the telemetry that the report reads


@dataclass(frozen=True)
class Layers:
    """A run's telemetry as matrices.

    Attributes:
        names: of the L tensors, in the order of its parameter groups (within a group: the network's).
        steps: (S,) steps completed, as in the metrics; 1 is the first update.
        values: by column of ``QUANTITIES``, (S, L) float32 matrices; NaN where there is no value.
    """

    names: tuple[str, ...] = ()
    steps: Array = field(default_factory=lambda: np.empty(0, dtype=int))
    values: dict[str, Array] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the matrices."""
        return sum(matrix.nbytes for matrix in self.values.values())


class Curves:
    """What a run recorded during training.

    Args:
        metrics: by name, (T,) float64 arrays of equal length; NaN where a line has no such value. "step" (steps
            completed), "samples", "epochs" and "seconds" are the clocks.
        layers: gives the telemetry; it is asked for only where it is needed, for it is the larger part by far.
    """

    def __init__(self, metrics: dict[str, Array], layers: Callable[[], Layers] = Layers) -> None:
        self.metrics, self._layers = metrics, layers

    @property
    def layers(self) -> tuple[str, ...]:
        """See ``Layers.names``."""
        return self._layers().names

    @property
    def steps(self) -> Array:
        """See ``Layers.steps``."""
        return self._layers().steps

    @property
    def telemetry(self) -> dict[str, Array]:
        """See ``Layers.values``."""
        return self._layers().values

    def metric(self, name: str, clock: str = "step") -> tuple[Array, Array]:
        """One metric where it was measured: the clock's values and the metric's, both (n,), n possibly 0."""
        if name not in self.metrics or clock not in self.metrics:
            return np.empty(0), np.empty(0)
        x, y = self.metrics[clock], self.metrics[name]
        measured = ~np.isnan(x) & ~np.isnan(y)
        return x[measured], y[measured]

    def has(self, *columns: str) -> bool:
        """Whether the telemetry holds a finite value of each of these columns."""
        return all(name in self.telemetry and np.isfinite(self.telemetry[name]).any() for name in columns)

    def adapted(self) -> list[int]:
        """Positions of the layers whose step is scaled by a trust ratio; all layers where the optimizer has none."""
        if not self.has(RATIO.column):
            return list(range(len(self.layers)))
        return np.flatnonzero(np.isfinite(self.telemetry[RATIO.column]).any(axis=0)).tolist()

    def of_adapted(self, quantity: Quantity) -> Array:
        """(S, A) values of one quantity in the A adapted layers."""
        return self.telemetry[quantity.column][:, self.adapted()]

    def phi(self) -> tuple[Array, Array]:
        """TVLARS's phi, which is the same in every layer: steps and values, both (n,); n = 0 for other optimizers."""
        if not self.has(PHI.column):
            return np.empty(0), np.empty(0)
        recorded = self.telemetry[PHI.column]
        rows = np.flatnonzero(np.isfinite(recorded).any(axis=1))
        return self.steps[rows], np.array([row[np.isfinite(row)][0] for row in recorded[rows]])


def load_curves(run: RunRecord | str | Path) -> Curves:
    """Reads the curves of a run, finished or not.

    Args:
        run: its record or its folder.

    Raises:
        ValueError: no run there, or a damaged file; one line.
    """
    folder = run.folder if isinstance(run, RunRecord) else read_run(run, metrics=False).folder
    layers = load_layers(folder)
    return Curves(load_metrics(folder), lambda: layers)


def load_layers(folder: Path) -> Layers:
    """Reads a run's telemetry; that of a run without any is empty.

    Raises:
        ValueError: damaged; one line.
    """
    table = read_telemetry(folder)
    if not {"step", "layer"} <= set(table.column_names):
        return Layers()
    for name, kind in {"step": pa.types.is_integer, "layer": _is_text}.items():
        if not kind(table[name].type) or table[name].null_count:
            raise ValueError(f"telemetry: {folder} is damaged: its column {name!r} is {table[name].type} or has gaps")
    # From the long table (one row for each step and layer) to one matrix for each quantity.
    steps, row = np.unique(table["step"].to_numpy(), return_inverse=True)
    layers_of_rows = table["layer"].combine_chunks().dictionary_encode()
    layers = tuple(layers_of_rows.dictionary.to_pylist())  # in order of first appearance
    column = layers_of_rows.indices.to_numpy()
    matrices = {}
    for quantity in QUANTITIES:
        if quantity.column in table.column_names:
            values = table[quantity.column].cast(pa.float64()).to_numpy()
            matrix = np.full((len(steps), len(layers)), np.nan, dtype=np.float32)
            matrix[row, column] = np.where(np.abs(values) < LARGEST, values, np.nan)
            matrices[quantity.column] = matrix
    return Layers(layers, steps, matrices)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


def load_metrics(folder: Path) -> dict[str, Array]:
    """The numbers of metrics.jsonl by name; NaN where a line has none, or one that no plot has a place for.

    Raises:
        ValueError: damaged; one line.
    """
    metrics = _parsed(folder / METRICS)
    if metrics is None:
        metrics = _read_line_by_line(folder)
    if metrics and (np.diff(metrics["step"]) < 0).any():
        raise ValueError(f"{folder / METRICS}: damaged: its steps do not ascend")
    return metrics


def _parsed(path: Path) -> dict[str, Array] | None:
    """The numbers by Arrow's reader, ten times as fast as Python's; None for a file that it does not read."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    try:
        table = read_json(path, read_options=ReadOptions(use_threads=False))
    except (pa.ArrowException, OSError):  # a run that diverged has the word "nan" among its numbers
        return None
    if "step" not in table.column_names or not pa.types.is_integer(table["step"].type) or table["step"].null_count:
        return None
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = column.cast(pa.float64()).to_numpy()
            found[on_one_line(name)] = np.where(np.abs(values) < LARGEST, values, np.nan)
    return found


def _read_line_by_line(folder: Path) -> dict[str, Array]:
    columns: dict[str, array[float]] = {}
    count = 0
    for row in iterate_metrics(folder):
        for name, value in row.items():
            if is_number(value):
                column = columns.setdefault(name, array("d"))
                column.extend([math.nan] * (count - len(column)))
                column.append(value if -LARGEST < value < LARGEST else math.nan)
        count += 1
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))
    return {on_one_line(name): np.frombuffer(column) for name, column in columns.items()}


def thin(length: int, points: int) -> Array:
    """Indices of at most ``points`` of ``length`` values, evenly spread, the first and the last among them."""
    if length <= points:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, points).round().astype(int))


def rounded(values: Iterable[float]) -> list[float]:
    """Numbers to four significant digits: a curve on the page needs no more."""
    return [float(f"{value:.4g}") for value in values]


def short_names(layers: Sequence[str]) -> list[str]:
    """Layer names without their uninformative parts: ``backbone.layer1.0.conv1.weight`` -> ``layer1.0.conv1``.

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
