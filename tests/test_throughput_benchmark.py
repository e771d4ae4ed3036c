"""The throughput benchmark runs, at a size that measures nothing."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "throughput.py"


def test_every_contestant_runs_and_is_recorded(tmp_path, capsys):
    rows = runpy.run_path(str(SCRIPT))["main"](["--quick", "--json", str(tmp_path / "out.json")])
    assert len(rows) == 10
    assert {row["track"] for row in rows} == {"pretrain", "classify"}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [row["time_over_bare"] for row in rows if row["what"].startswith("bare")] == [1.0, 1.0]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert "lightly end to end" in capsys.readouterr().out
