"""The optimizer benchmark still runs, at a tiny size."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "optimizers.py"


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_quick_run_writes_every_figure(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_optimizers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "out" / "figures.json")])
    result = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {"ours LARS", "ours LAMB", "ours TVLARS paper", "timm lars", "timm lamb", "torch SGD"} <= result[
        "steps"
    ].keys()
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in result["steps"].values())
    assert result["packages"]["torch"]
    assert result["threads"] >= 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in result["steps"])
