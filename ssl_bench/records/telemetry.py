"""The layer statistics of a run: small parquet parts while it runs, one parquet file when it has finished."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_bench.records.storage import atomic_file, naming, sync_file, sync_folder

_FILE, _FOLDER = "telemetry.parquet", "telemetry"
_ROWS_PER_GROUP = 1 << 17  # fixed, so that the finished file depends on the rows alone


class TelemetryStore:
    """Appends blocks of telemetry to a run directory; a block's steps come after those of the block before.

    Parts are named by their first step, so that their order is their names' order. Once ``telemetry.parquet`` is there
    it holds everything and parts beside it are leftovers of a crash.

    Args:
        run_dir: the run's directory; the parts' sub-folder is made with the first block.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._unsynced: list[Path] = []
        self._last_step = -1
        self._schema: pa.Schema | None = None

    def append(self, columns: Mapping[str, Any]) -> None:
        """Writes one block as one part.

        Args:
            columns: equally long 1-d columns by name: tensors on the CPU, arrays or lists; "step" (the steps completed,
                as in the metrics) is one of them. Strings are dictionary-encoded. Rows need not be sorted by step.

        Raises:
            ValueError: no step column, columns of different lengths or other columns than before, or a step that an
                earlier block had.
            OSError: the disk is full or not writable, in one line.
        """
        table = _table(columns)
        if table.num_rows == 0:
            return
        steps = table["step"].to_numpy()
        if steps[0] <= self._last_step:
            raise ValueError(f"telemetry: a block starts at step {steps[0]}, but step {self._last_step} is recorded")
        if self._schema is not None and table.schema != self._schema:
            raise ValueError(f"telemetry: columns are {_describe(table.schema)}, before {_describe(self._schema)}")
        folder = self._run_dir / _FOLDER
        with naming(f"{folder}: making the folder"):
            folder.mkdir(exist_ok=True)
        path = folder / f"part-{steps[0]:08d}.parquet"
        _write(table, path, sync=False)
        self._unsynced.append(path)
        self._schema = table.schema
        self._last_step = int(steps[-1])

    def sync(self) -> None:
        """Makes the parts written so far survive a power failure; called before a checkpoint, which relies on them."""
        if self._unsynced:
            for path in self._unsynced:
                sync_file(path)
            sync_folder(self._run_dir / _FOLDER)
            sync_folder(self._run_dir)
            self._unsynced.clear()

    def truncate_to(self, step: int) -> None:
        """Drops every row beyond a step."""
        whole = self._run_dir / _FILE
        if whole.exists():  # killed after the consolidation but before the results: it becomes a part again
            table = pq.read_table(whole)
            for path in self._parts():
                path.unlink()
            self._rewrite(table, step, self._run_dir / _FOLDER / "part-00000000.parquet")
            whole.unlink()
        else:
            for path in reversed(self._parts()):
                table = pq.read_table(path)
                if table["step"][-1].as_py() <= step:
                    break
                self._rewrite(table, step, path)
        parts = self._parts()
        self._last_step = pq.read_table(parts[-1])["step"][-1].as_py() if parts else -1
        self._schema = pq.read_schema(parts[-1]).remove_metadata() if parts else None
        if (self._run_dir / _FOLDER).is_dir():
            sync_folder(self._run_dir / _FOLDER)

    def consolidate(self) -> None:
        """Joins the parts into ``telemetry.parquet`` and deletes them.

        The file is the same, bit for bit, however the rows were spread over the parts.
        """
        parts = self._parts()
        whole = self._run_dir / _FILE
        if parts and not whole.exists():
            schema = pq.read_schema(parts[0])
            with atomic_file(whole) as file, pq.ParquetWriter(file, schema, **_options(schema)) as writer:
                for group in _row_groups(parts):
                    writer.write_table(group, row_group_size=_ROWS_PER_GROUP)
        for path in parts:
            path.unlink()
        self._unsynced.clear()
        if (self._run_dir / _FOLDER).is_dir():
            (self._run_dir / _FOLDER).rmdir()

    def _parts(self) -> list[Path]:
        return sorted((self._run_dir / _FOLDER).glob("part-*.parquet"))

    def _rewrite(self, table: pa.Table, step: int, path: Path) -> None:
        """Replaces a part by its rows up to a step; without any, deletes it."""
        kept = table.slice(0, int(np.searchsorted(table["step"].to_numpy(), step, side="right")))
        if kept.num_rows:
            path.parent.mkdir(exist_ok=True)
            _write(kept, path, sync=True)
        else:
            path.unlink(missing_ok=True)


def read_telemetry(run_dir: str | Path) -> pa.Table:
    """A run's telemetry, whether it is running, crashed or finished; without any, a table of no columns.

    Returns:
        rows by ascending step; within a step in the layers' order. String columns are dictionary-encoded.

    Raises:
        ValueError: a file is damaged; its name and what is wrong, in one line.
    """
    run_dir = Path(run_dir)
    for attempt in (1, 2):
        whole = run_dir / _FILE
        paths = [whole] if whole.exists() else sorted((run_dir / _FOLDER).glob("part-*.parquet"))
        tables = []
        try:
            for path in paths:
                tables.append(pq.read_table(path))
        except FileNotFoundError:
            if attempt == 1:  # the parts have just been joined
                continue
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"telemetry: {path} is damaged: {' '.join(str(error).split())}") from error
        break
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks() if tables else pa.table({})


def _options(schema: pa.Schema) -> dict[str, Any]:
    """How the columns are written: measured values seldom repeat, so a dictionary of them only costs."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    others = [field.name for field in schema if not pa.types.is_floating(field.type)]
    return {"compression": "zstd", "use_dictionary": others, "use_byte_stream_split": floats}


def _write(table: pa.Table, path: Path, *, sync: bool) -> None:
    with atomic_file(path, sync=sync) as file:
        pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP, **_options(table.schema))


def _row_groups(parts: list[Path]) -> Iterator[pa.Table]:
    """The parts' rows in tables of exactly the row-group size, each built in one canonical way."""
    pending: list[pa.Table] = []
    rows = 0
    for path in parts:
        pending.append(pq.read_table(path))
        rows += pending[-1].num_rows
        while rows >= _ROWS_PER_GROUP:
            table = pa.concat_tables(pending)
            yield _canonical(table.slice(0, _ROWS_PER_GROUP))
            pending = [table.slice(_ROWS_PER_GROUP)]
            rows = pending[0].num_rows
    if rows:
        yield _canonical(pa.concat_tables(pending))


def _canonical(table: pa.Table) -> pa.Table:
    """The table with one chunk per column and dictionaries in the order of first appearance."""
    columns = []
    for column in table.columns:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type).combine_chunks().dictionary_encode()
        columns.append(column)
    return pa.table(columns, names=table.column_names).combine_chunks()


def _table(columns: Mapping[str, Any]) -> pa.Table:
    """A block's columns as a table, sorted by step; rows of one step keep their order."""
    if "step" not in columns:
        raise ValueError(f"telemetry: no column 'step' among {', '.join(columns) or 'no columns'}")
    arrays = {}
    for name, column in columns.items():
        array = pa.array(column.numpy() if hasattr(column, "numpy") else column)
        arrays[name] = array.dictionary_encode() if pa.types.is_string(array.type) else array
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"telemetry: columns of different lengths: {lengths}")
    table = pa.table({**arrays, "step": arrays["step"].cast(pa.int64())})
    steps = table["step"].to_numpy()
    if (np.diff(steps) < 0).any():
        table = table.take(np.argsort(steps, kind="stable"))
    return table


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
