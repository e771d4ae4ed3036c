"""The benchmark runs, so that it cannot rot; no time is asserted."""

import importlib.util
import json
from pathlib import Path


def test_quick_run_writes_every_case(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "new" / "out.json")])
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert {row["case"] for row in record["rows"]} == {"knn", "probe", "protocols", "features"}
    assert all(row["seconds"] >= 0 and len(row["runs"]) == 1 for row in record["rows"])
    assert record["quick"] is True
    assert record["environment"]["packages"]["torch"]
