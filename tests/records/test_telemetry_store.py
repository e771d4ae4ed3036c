"""Telemetry: parts while a run goes on, one file that does not depend on them after it."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_run import LAYERS, block, open_run

from ssl_bench.records.telemetry import read_telemetry


@pytest.fixture(autouse=True)
def _every_block_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_bench.records.telemetry.WRITE_EVERY", -1.0)


def test_telemetry_reads_the_same_while_running_and_after(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_provenance({})
        assert read_telemetry(tmp_path).num_rows == 0
        run.log_telemetry(block(0, 3))
        run.log_telemetry(block(3, 4))
        running = read_telemetry(tmp_path)
        assert running["step"].to_pylist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
        assert running["layer"].to_pylist() == LAYERS * 4
        assert str(running.schema.field("layer").type).startswith("dictionary")
        assert np.array_equal(running["ratio"].to_numpy(), block(0, 4)["ratio"].numpy())
        run.finish({"status": "finished"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".lock", "results.json", "run.json", "sessions.jsonl", "telemetry.parquet"]
    )
    assert read_telemetry(tmp_path).equals(running)


def test_a_block_in_layer_order_is_sorted_by_step_stably(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log_telemetry({"layer": ["a", "a", "b", "b"], "step": [0, 1, 0, 1], "norm": np.float32([1, 2, 3, 4])})
        table = read_telemetry(tmp_path)
        assert table["layer"].to_pylist() == ["a", "b", "a", "b"]
        assert table["norm"].to_pylist() == [1, 3, 2, 4]


def test_the_finished_file_does_not_depend_on_the_parts_also_where_a_part_lacks_a_layer(tmp_path: Path) -> None:
    for name, size in (("few", 10), ("many", 1)):
        with open_run(tmp_path / name) as run:
            for first in range(0, 20, size):
                columns = block(first, first + size)
                # The first layer has no gradient, and so no row, in odd steps: the parts' dictionaries differ.
                kept = (columns["step"] % 2 == 0) | (torch.arange(len(columns["step"])) % len(LAYERS) > 0)
                layers = [layer for layer, keep in zip(columns["layer"], kept.tolist(), strict=True) if keep]
                run.log_telemetry({"step": columns["step"][kept], "layer": layers, "ratio": columns["ratio"][kept]})
            before = read_telemetry(tmp_path / name).to_pylist()
            run.finish({"status": "finished"})
        assert read_telemetry(tmp_path / name).to_pylist() == before
    contents = [(tmp_path / name / "telemetry.parquet").read_bytes() for name in ("few", "many")]
    assert contents[0] == contents[1]


def test_the_finished_file_is_bitwise_the_same_through_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_bench.records.telemetry._ROWS_PER_GROUP", 64)  # several row groups
    results = {"status": "finished", "evaluations": []}
    with open_run(tmp_path / "whole") as run:
        run.write_provenance({})
        run.log_telemetry(block(0, 100))
        run.finish(results)
    with open_run(tmp_path / "broken") as run:
        run.write_provenance({})
        for first in range(0, 70, 7):
            run.log_telemetry(block(first, first + 7))
    with open_run(tmp_path / "broken") as run:
        run.truncate_to(40)  # in the middle of a part
        assert read_telemetry(tmp_path / "broken")["step"].to_pylist() == block(0, 40)["step"].tolist()
        run.log_telemetry(block(40, 90))
        run.log_telemetry(block(90, 100))
        run.finish(results)
    contents = [(tmp_path / name / "telemetry.parquet").read_bytes() for name in ("whole", "broken")]
    assert contents[0] == contents[1]
    assert pq.ParquetFile(tmp_path / "whole" / "telemetry.parquet").num_row_groups == 5
    # Killed after joining the parts and before the results: the run goes on from its last checkpoint.
    for left_over in (False, True):
        (tmp_path / "broken" / "results.json").unlink()
        if left_over:  # the parts were not deleted any more
            (tmp_path / "broken" / "telemetry").mkdir(exist_ok=True)
            (tmp_path / "broken" / "telemetry" / "part-00000003.parquet").write_bytes(b"anything")
        with open_run(tmp_path / "broken") as run:
            run.truncate_to(93)
            run.log_telemetry(block(93, 100))
            run.finish(results)
        assert (tmp_path / "broken" / "telemetry.parquet").read_bytes() == contents[0]


def test_telemetry_refuses_a_double_step_and_other_columns(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log_telemetry(block(0, 3))
        with pytest.raises(ValueError, match="the first step must be > 3, the last recorded, got 3"):
            run.log_telemetry(block(2, 4))
        with pytest.raises(ValueError, match=r"columns must be .*ratio: float.*, got .*phi"):
            run.log_telemetry({"phi" if name == "ratio" else name: column for name, column in block(3, 4).items()})
        with pytest.raises(ValueError, match="ratio expected length 1 but got length 2"):
            run.log_telemetry({"step": [5], "ratio": [1.0, 2.0]})
        with pytest.raises(ValueError, match="columns must have 'step' among them, got ratio"):
            run.log_telemetry({"ratio": [1.0]})
        run.truncate_to(None)
        assert read_telemetry(tmp_path).num_rows == 0
        run.log_telemetry(block(0, 1))


def test_damaged_telemetry_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log_telemetry(block(0, 3))
        os.truncate(tmp_path / "telemetry" / "part-00000001.parquet", 50)
        with pytest.raises(ValueError, match=r"part-00000001\.parquet is damaged"):
            read_telemetry(tmp_path)
