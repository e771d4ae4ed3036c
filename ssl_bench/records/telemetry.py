"""The layer statistics of a run: small parquet parts while it runs, one parquet file when it has finished."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ssl_bench.records.storage import atomic_file, naming, one_line, sync
from ssl_bench.runtime.console import say

_FILE, _FOLDER = "telemetry.parquet", "telemetry"
DAMAGED = ".damaged"  # at the end of the name of a file that was set aside
WRITE_EVERY = 5.0  # seconds; while blocks come faster, several share a part
_ROWS_PER_GROUP = 1 << 17  # fixed, so that the finished file depends on the rows alone


class TelemetryStore:
    """Appends blocks of telemetry to a run directory; a block's steps come after those of the block before.

    Blocks are kept in memory for up to `WRITE_EVERY` seconds, and then written as one part. What a killed run loses
    thereby lies after its last checkpoint, and is recorded again when it goes on from there.

    Parts are named after their first step, so the order of their names is the order of their rows. Once
    ``telemetry.parquet`` exists it holds everything, and parts beside it are leftovers of a crash.

    Args:
        run_dir: the run's directory; the sub-folder for the parts is made with the first block.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder, self._whole = run_dir / _FOLDER, run_dir / _FILE
        self._unsynced: list[Path] = []
        self._blocks: list[pa.Table] = []  # not written yet
        self._written = time.monotonic()
        self._last_step = -1
        self._schema: pa.Schema | None = None

    def append(self, columns: Mapping[str, Any]) -> None:
        """Takes one block, and writes it and those before if the last part is older than `WRITE_EVERY`.

        Args:
            columns: 1-d columns of equal length by name: tensors on the CPU, arrays or lists; "step" (the number of
                steps completed, as in the metrics) is one of them. Strings are dictionary-encoded. Rows need not be
                sorted by step.

        Raises:
            ValueError: no step column, columns of different lengths or other columns than before, or a step that an
                earlier block had.
            OSError: the disk is full or not writable, in one line.
        """
        if "step" not in columns:
            raise ValueError(f"telemetry: columns must have 'step' among them, got {', '.join(columns) or 'none'}")
        arrays = {}
        for name, column in columns.items():
            array = pa.array(column.numpy() if hasattr(column, "numpy") else column)
            arrays[name] = array.dictionary_encode() if pa.types.is_string(array.type) else array
        arrays["step"] = arrays["step"].cast(pa.int64())
        table = pa.table(arrays).sort_by("step").combine_chunks()  # a stable sort: rows of one step keep their order
        if table.num_rows == 0:
            return
        first = table["step"][0].as_py()
        if first <= self._last_step:
            raise ValueError(f"telemetry: the first step must be > {self._last_step}, the last recorded, got {first}")
        if self._schema is not None and table.schema != self._schema:
            raise ValueError(f"telemetry: columns must be {_line(self._schema)}, got {_line(table.schema)}")
        self._blocks.append(table)
        self._schema, self._last_step = table.schema, table["step"][-1].as_py()
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes the blocks that are still in memory as one part."""
        if not self._blocks:
            return
        table = pa.concat_tables(self._blocks).unify_dictionaries().combine_chunks()
        with naming(f"{self._folder}: making the folder"):
            self._folder.mkdir(exist_ok=True)
        path = self._folder / f"part-{table['step'][0].as_py():08d}.parquet"
        _write(table, path, synced=False)  # waits for no disk: rows after the last checkpoint are dropped anyway
        self._unsynced.append(path)
        self._blocks, self._written = [], time.monotonic()

    def sync(self) -> None:
        """Writes what there is and makes it survive a power failure; called before a checkpoint, which relies on it."""
        self.write()
        if self._unsynced:
            for path in (*self._unsynced, self._folder, self._folder.parent):
                sync(path)
            self._unsynced.clear()

    def truncate_to(self, step: int) -> None:
        """Drops every row after a step: unread, where a part's name says that all of it comes later.

        After a power failure such parts may hold anything, as nobody waited for the disk. A part from before that
        cannot be read is set aside (`DAMAGED`), with a line.
        """
        if self._whole.exists():  # killed after the parts were joined but before the results: it becomes a part again
            for path in self._parts():
                path.unlink()
            self._folder.mkdir(exist_ok=True)
            os.replace(self._whole, self._folder / "part-00000000.parquet")
        self._blocks, self._schema, self._last_step = [], None, -1
        for path in reversed(self._parts()):
            if _first_step(path) > step:
                path.unlink()
                continue
            before = _read_or_set_aside(path)
            if before is None:
                continue
            table = before.filter(pc.less_equal(before["step"], step))
            if table.num_rows == 0:
                path.unlink()
                continue
            if table.num_rows < before.num_rows:
                _write(table, path, synced=True)
            self._schema, self._last_step = table.schema.remove_metadata(), table["step"][-1].as_py()
            break
        if self._folder.is_dir():
            sync(self._folder)

    def consolidate(self) -> None:
        """Joins the parts into ``telemetry.parquet`` and deletes them.

        The file is the same, bit for bit, however the rows were spread over the parts. A part that cannot be read is
        set aside, with a line.
        """
        self.write()
        parts = self._parts()
        if not self._whole.exists():
            parts = [path for path in parts if _read_or_set_aside(path) is not None]
        if parts and not self._whole.exists():
            table = read_telemetry(self._folder.parent)
            schema = table.schema
            with atomic_file(self._whole) as file, pq.ParquetWriter(file, schema, **_options(schema)) as writer:
                for batch in table.to_batches(max_chunksize=_ROWS_PER_GROUP):
                    # Dictionaries in the order of first appearance, not in that of the parts that the rows came from.
                    columns = [
                        one.cast(one.type.value_type).dictionary_encode() if pa.types.is_dictionary(one.type) else one
                        for one in batch.columns
                    ]
                    writer.write_table(pa.table(columns, schema.names), row_group_size=_ROWS_PER_GROUP)
        for path in parts:
            path.unlink()
        self._unsynced.clear()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet"))


def _first_step(path: Path) -> int:
    """The first step of a part, by its name."""
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else 0


def _read_or_set_aside(path: Path) -> pa.Table | None:
    """A part's rows; None where it cannot be read, which is said, and the file renamed."""
    try:
        table = pq.read_table(path)
        if "step" not in table.column_names or table.num_rows == 0:
            raise ValueError("no rows with a step")
    except (pa.ArrowException, OSError, ValueError) as error:
        say(f"telemetry: {path} is damaged, and set aside as {path.name}{DAMAGED}: {one_line(error)}")
        os.replace(path, path.with_name(path.name + DAMAGED))
        return None
    return table


def read_telemetry(run_dir: str | Path) -> pa.Table:
    """A run's telemetry, whether it is running, crashed or finished; without any, a table of no columns.

    Returns:
        rows by ascending step; within a step in the layers' order. String columns are dictionary-encoded.

    Raises:
        ValueError: a file is damaged; its name and what is wrong, in one line.
    """
    whole, folder = Path(run_dir) / _FILE, Path(run_dir) / _FOLDER
    for attempt in (1, 2):
        paths = [whole] if whole.exists() else sorted(folder.glob("part-*.parquet"))
        if not paths:
            break
        try:
            return ds.dataset(list(map(str, paths))).to_table().unify_dictionaries().combine_chunks()
        except FileNotFoundError:
            if attempt == 2:  # at first it only means that the parts have just been joined
                raise
        except (pa.ArrowException, OSError) as error:
            damaged = next((path for path in paths if str(path) in str(error)), run_dir)
            raise ValueError(f"telemetry: {damaged} is damaged: {one_line(error)}") from error
    return pa.table({})


def _options(schema: pa.Schema) -> dict[str, Any]:
    """How the columns are written: measured values seldom repeat, so a dictionary of them only costs space."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    others = [field.name for field in schema if not pa.types.is_floating(field.type)]
    return {"compression": "zstd", "use_dictionary": others, "use_byte_stream_split": floats}


def _write(table: pa.Table, path: Path, *, synced: bool) -> None:
    with atomic_file(path, synced=synced) as file:
        pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP, **_options(table.schema))


def _line(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
