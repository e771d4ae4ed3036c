"""The benchmark of large folders makes records that the real commands read, at a tiny size; no time is asserted."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_bench.report.leaderboard import read_collection

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("benchmark_scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_records_are_runs(scale, tmp_path):
    scale.write_telemetry(tmp_path / "telemetry.parquet")
    rng = np.random.default_rng(0)
    for index, recipe in enumerate(scale.recipes(12)):
        scale.write_run(tmp_path / "many" / str(index), recipe, 20, tmp_path / "telemetry.parquet", rng)
    collection = read_collection(tmp_path / "many")
    assert (len(collection.results), collection.skipped) == (12, ())
    assert [cell.optimizer for cell in collection.cells] == ["LARS", "LAMB", "TVLARS"]


def test_a_command_is_timed_in_a_process_of_its_own(scale, tmp_path, capsys):
    row = scale.timed("--help", ["--help"], tmp_path)
    assert row["what"] == "--help"
    assert row["seconds"] > 0
    assert 1 < row["peak_mib"] < 10_000
    assert "MiB" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="failed"):
        scale.timed("none", ["leaderboard", "none"], tmp_path)


def test_its_record_names_the_goals(scale):
    rows = {row["what"]: row for row in json.loads((SCRIPT.parent / "results" / "scale.json").read_text())["rows"]}
    assert set(scale.GOALS) <= set(rows)
    assert all((rows[what]["goal_seconds"], rows[what]["goal_mib"]) == goal for what, goal in scale.GOALS.items())
    assert sys.executable
