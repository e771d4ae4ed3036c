"""Records that earlier versions wrote, as committed in results/records, are read whole."""

import math
import shutil
from pathlib import Path

import pytest

from ssl_bench.records.reader import read_run
from ssl_bench.records.telemetry import read_telemetry
from ssl_bench.records.writer import Run

RECORDS = Path(__file__).resolve().parents[2] / "results" / "records"
FINISHED = RECORDS / "smoke_cifar10" / "cifar10-barlow_twins-lamb-b512-s0-ce24b050df888b79"
DIVERGED = RECORDS / "short_clf_cifar10" / "cifar10-clf-lamb-b4096-s0-0b82859c0cb745e6"


def test_a_finished_pretraining_says_what_it_said() -> None:
    record = read_run(FINISHED)
    assert record.status == "finished"
    assert record.identity == "ce24b050df888b79"
    assert record.recipe["optimizer"]["target"] == "lamb"
    assert record.provenance["plan"]["steps_per_epoch"] == 97.65625
    assert [row["step"] for row in record.metrics] == [*range(10, 91, 10), 98]
    assert record.metrics[-1]["loss"] == 2353.4478759765625
    assert record.results is not None
    trained = next(entry for entry in record.results["evaluations"] if entry["model"] == "trained")
    assert (trained["protocol"], trained["metrics"]["top1"]) == ("knn-v1", 39.17)
    table = read_telemetry(FINISHED)
    assert (table.num_rows, table["step"][0].as_py(), table["step"][-1].as_py()) == (670, 1, 91)
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["layer"], first["grad_norm"]) == ("backbone.conv1.weight", 7584.30517578125)
    assert math.isnan(first["phi"])


def test_a_diverged_classification_says_what_it_said() -> None:
    record = read_run(DIVERGED)
    assert record.status == "diverged"
    assert record.results is not None
    assert (record.results["step"], record.results["layer"]) == (21, "backbone.conv1.weight")
    assert math.isnan(record.metrics[-1]["loss"])
    assert read_telemetry(DIVERGED)["step"][-1].as_py() == 24


@pytest.mark.parametrize("study", sorted(RECORDS.iterdir()), ids=lambda study: study.name)
def test_every_committed_record_is_read_whole(study: Path) -> None:
    for folder in sorted(study.iterdir()):
        record = read_run(folder)
        assert record.results is not None
        assert record.metrics[-1]["step"] <= record.provenance["plan"]["total_steps"]
        if not (folder / "telemetry.parquet").exists():  # exported without its layers
            continue
        table = read_telemetry(folder)
        assert 1 <= table["step"][0].as_py() <= table["step"][-1].as_py() <= record.metrics[-1]["step"]
        assert str(table.schema.field("layer").type).startswith("dictionary")


def test_an_old_run_can_be_opened_again(tmp_path: Path) -> None:
    shutil.copytree(FINISHED, tmp_path / "run")
    record = read_run(FINISHED)
    with Run.open(tmp_path / "run", record.recipe, record.identity, resume="auto", main_process=True) as run:
        assert run.resumed
        assert run.results == record.results
        run.truncate_to(50)  # as after a checkpoint, were it still there
    assert [row["step"] for row in read_run(tmp_path / "run").metrics] == [10, 20, 30, 40, 50]
    cut, whole = read_telemetry(tmp_path / "run"), read_telemetry(FINISHED)
    assert cut.schema.names == whole.schema.names
    assert repr(cut.to_pylist()) == repr(whole.slice(0, cut.num_rows).to_pylist())
    assert cut["step"][-1].as_py() == 41
