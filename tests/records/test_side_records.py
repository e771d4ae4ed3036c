"""Telemetry, metrics and sessions never decide whether a run's checkpoints and results can be used."""

import json
import os
from pathlib import Path

import pytest
from made_run import begun, block, open_run

from ssl_bench.records.reader import read_results
from ssl_bench.records.telemetry import TelemetryStore, read_telemetry


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "telemetry").iterdir())


def interrupted(folder: Path) -> None:
    """A run with three parts of ten steps, of which a checkpoint covers two."""
    with open_run(begun(folder)) as run:
        run.truncate_to(None)
        for first in (0, 10, 20):
            run.log_telemetry(block(first, first + 10))
            run.sync()
    assert parts(folder) == ["part-00000001.parquet", "part-00000011.parquet", "part-00000021.parquet"]


def test_parts_after_the_checkpoint_are_dropped_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path)
    os.truncate(tmp_path / "telemetry/part-00000021.parquet", 0)
    with open_run(tmp_path) as run:
        run.truncate_to(20)
        run.log_telemetry(block(20, 30))
        run.finish({"status": "finished"})
    assert read_telemetry(tmp_path)["step"].to_pylist() == block(0, 30)["step"].tolist()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [0, 50])
def test_an_unreadable_earlier_part_is_set_aside_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    interrupted(tmp_path)
    for damaged in ("part-00000001.parquet", "part-00000011.parquet"):
        os.truncate(tmp_path / "telemetry" / damaged, size)
    with open_run(tmp_path) as run:
        run.truncate_to(20)
        run.log_telemetry(block(20, 30))
        run.finish({"status": "finished"})
    said = capsys.readouterr().err
    assert [said.count(f"part-000000{n}1.parquet is damaged, and set aside") for n in (0, 1)] == [1, 1]
    assert parts(tmp_path) == ["part-00000001.parquet.damaged", "part-00000011.parquet.damaged"]
    assert read_telemetry(tmp_path)["step"].to_pylist() == block(20, 30)["step"].tolist()
    assert read_results(tmp_path) is not None


def test_the_results_are_there_before_the_telemetry_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_self: TelemetryStore) -> None:
        assert read_results(tmp_path) is not None
        raise OSError("No space left on device")

    with open_run(begun(tmp_path)) as run:
        run.truncate_to(None)
        run.log_telemetry(block(0, 10))
        with monkeypatch.context() as patch:
            patch.setattr(TelemetryStore, "consolidate", full)
            run.finish({"status": "finished"})
    assert "the telemetry stays in parts: No space left on device" in capsys.readouterr().err
    assert read_telemetry(tmp_path).num_rows == 30
    with open_run(tmp_path) as run:  # the next start finds an ended run, and joins them
        assert run.results is not None
        run.tidy()
    assert (tmp_path / "telemetry.parquet").exists()
    assert not (tmp_path / "telemetry").exists()
    assert read_telemetry(tmp_path).num_rows == 30


def test_blocks_are_written_by_time_and_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("ssl_bench.records.telemetry.time.monotonic", lambda: clock[0])
    with open_run(begun(tmp_path)) as run:
        run.truncate_to(None)
        for first in range(4):  # a killed run loses these four, which it records again after its last checkpoint
            run.log_telemetry(block(first, first + 1))
        assert not (tmp_path / "telemetry").exists()
        clock[0] += 6
        run.log_telemetry(block(4, 5))
        assert parts(tmp_path) == ["part-00000001.parquet"]
        run.log_telemetry(block(5, 6))
        assert read_telemetry(tmp_path)["step"].to_pylist() == block(0, 5)["step"].tolist()
        run.sync()
        assert read_telemetry(tmp_path)["step"].to_pylist() == block(0, 6)["step"].tolist()


def test_metrics_that_were_cut_short_are_counted_as_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run(begun(tmp_path)) as run:
        run.truncate_to(None)
        for step in (2, 4, 6):
            run.log({"step": step})
        assert run.position == run.rows_until(6) == {"metrics_rows": 3, "metrics_step": 6}
        assert run.rows_until(5) == {"metrics_rows": 2, "metrics_step": 4}
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 4}', '{"st###'))
    with open_run(tmp_path) as run:
        assert run.rows_until(6) == {"metrics_rows": 1, "metrics_step": 2}
        run.truncate_to(2)
        assert "metrics.jsonl: damaged: line 2 of 3" in capsys.readouterr().err
        run.log({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_a_session_line_that_was_cut_short_is_taken_back(tmp_path: Path) -> None:
    begun(tmp_path)
    with open(tmp_path / "sessions.jsonl", "a") as file:
        file.write('{"step": 3, "star')
    with open_run(tmp_path) as run:
        run.write_provenance({"started": "later"}, step=5)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [session["step"] for session in sessions] == [0, 5]
