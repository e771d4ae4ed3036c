"""A run directory's record: refusals by name, rows without gap or double, results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import RECIPE, begun, block, ended, open_run
from tiny_disk import mounted

from ssl_bench.recipe.identity import differences
from ssl_bench.records.reader import RecordError, read_run
from ssl_bench.records.storage import TEMPORARY
from ssl_bench.records.writer import Run, add_evaluations

# Opening --------------------------------------------------------------------------------------------------------------


def test_a_used_directory_is_refused_under_never(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    with pytest.raises(RecordError, match=r"run_dir .*a: it holds a run; .*resume=auto or choose another run_dir"):
        open_run(tmp_path / "a", resume="never")
    with open_run(tmp_path / "a") as run:  # the refusal gave the claim back
        assert run.resumed
        assert run.results is None
    with pytest.raises(ValueError, match="resume must be never or auto, got 'always'"):
        open_run(tmp_path / "b", resume="always")


def test_another_recipe_is_refused_with_the_difference_key_by_key(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {**RECIPE, "optimizer": {"name": "lars", "lr": 2.0, "eta": 0.1}, "run_dir": "elsewhere"}
    with pytest.raises(RecordError) as caught:
        open_run(tmp_path, recipe=other, identity="id1", differences=differences)
    assert str(caught.value).endswith(
        "it holds a run of another recipe: optimizer.betas: the run has [0.9, 0.999], asked for nothing; "
        "optimizer.eta: the run has nothing, asked for 0.1; optimizer.lr: the run has 1.0, asked for 2.0"
    )
    with pytest.raises(RecordError, match="identity: the run has id0, asked for id1"):
        open_run(tmp_path, identity="id1")
    open_run(tmp_path, recipe=other).close()  # the same identity: only what cannot change the result differs


def test_differences_compare_values_and_ignore_what_cannot_change_a_result() -> None:
    assert differences({"a": 1, "b": {}}, {"a": 1.0, "b": {}}) == []
    assert differences({"data": {"workers": 1}, "x": 1}, {"data": {"workers": 2}, "x": 2}) == [
        "x: the run has 1, asked for 2"
    ]
    assert differences({"n": None}, {"n": "nan"}) == ['n: the run has null, asked for "nan"']
    assert differences({}, {"loss_scale": 1.0}) == []  # a record from before the key, at the value it then had


def test_a_foreign_directory_and_a_file_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RecordError, match=r"photos must be a run's directory, .*, got 'cat\.jpg' and no run\.json"):
        open_run(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    for path in ("photos/cat.jpg", "photos/cat.jpg/run"):
        with pytest.raises(OSError, match=rf"run_dir {tmp_path / path}: making the directory: (File ex|Not a dir)"):
            open_run(tmp_path / path)


def test_an_unwritable_directory_is_one_line_that_names_it(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        for folder in (disk, disk / "new"):
            with pytest.raises(OSError, match=rf"{folder}.*: Read-only file system$"):
                open_run(folder)


def test_opening_cleans_what_dead_writers_left(tmp_path: Path) -> None:
    begun(tmp_path)
    litter = [tmp_path / f"{TEMPORARY}9-results.json", tmp_path / "telemetry" / f"{TEMPORARY}9-part", tmp_path]
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "checkpoints" / f"{TEMPORARY}9-step-00000001").mkdir(parents=True)
    for path in litter[:2]:
        path.touch()
    open_run(tmp_path).close()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(TEMPORARY)]


def test_a_run_killed_before_run_json_starts_afresh(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with open_run(tmp_path, resume="never") as run:
        assert not run.resumed


def test_other_processes_write_nothing_but_know_the_results(tmp_path: Path) -> None:
    with open_run(tmp_path, main_process=False) as run:
        run.write_provenance({})
        run.truncate_to(0)
        run.log({"step": 1})
        run.log_telemetry(block(0, 1))
        run.sync()
        run.write_results({"status": "nonsense"})
        run.finish({"status": "nonsense"})
    assert list(tmp_path.iterdir()) == []
    with open_run(tmp_path) as run:
        run.write_provenance({})
        run.finish({"status": "diverged", "evaluations": []})
    results = open_run(tmp_path, main_process=False).results
    assert results is not None
    assert results["status"] == "diverged"


# Metrics --------------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_rows_are_valid_json_also_when_not_finite_and_come_back_as_floats(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_provenance({})
        run.log({"step": torch.tensor(1), "loss": float("nan"), "lr": np.float32(0.5), "max": -math.inf})
        assert lines(tmp_path) == ['{"step": 1, "loss": "nan", "lr": 0.5, "max": "-inf"}']  # visible before the close
        with pytest.raises(ValueError, match="step must be > 1, the last recorded, got 1"):
            run.log({"step": 1})
        with pytest.raises(ValueError, match="record: loss must be a value that JSON can hold, got a Tensor"):
            run.log({"step": 2, "loss": torch.ones(2)})
        run.log({"step": 2, "loss": math.inf})
    first, second = read_run(tmp_path).metrics
    assert math.isnan(first["loss"])
    assert first["max"] == -math.inf
    assert second == {"step": 2, "loss": math.inf}


def test_a_resumed_run_goes_on_without_gap_or_double_line(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_provenance({})
        for step in (5, 10, 15):
            run.log({"step": step, "loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')  # killed while it wrote
    assert [row["step"] for row in read_run(tmp_path).metrics] == [5, 10, 15]
    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError, match="truncate_to"):
            run.log({"step": 20})
        with pytest.raises(RuntimeError, match="truncate_to"):
            run.log_telemetry(block(0, 1))
        run.truncate_to(10)
        with pytest.raises(ValueError, match="step must be > 10, the last recorded, got 10"):
            run.log({"step": 10})
        run.log({"step": 15, "loss": 1 / 15})
    assert lines(tmp_path) == [json.dumps({"step": step, "loss": 1 / step}) for step in (5, 10, 15)]
    for _ in range(2):  # killed before its first checkpoint
        with open_run(tmp_path) as run:
            run.truncate_to(None)
            run.log({"step": 0})
            run.log({"step": 5})
        assert lines(tmp_path) == ['{"step": 0}', '{"step": 5}']


def fill(run: Run) -> None:
    for step in range(1, 100_000):
        run.log({"step": step, "text": "x" * 100})


def test_a_full_disk_leaves_only_whole_rows(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk, open_run(disk / "run") as run:
        run.write_provenance({})
        with pytest.raises(OSError, match=r"metrics\.jsonl: writing: No space left on device$"):
            fill(run)
        run.log_telemetry(block(0, 10_000))
        with pytest.raises(OSError, match=r"part-00000001\.parquet: writing: No space left on device$"):
            run.sync()
        with pytest.raises(OSError, match=r"results\.json: writing: No space left on device$"):
            run.write_results({"status": "finished", "text": "x" * 100_000})
        rows = read_run(disk / "run").metrics
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert not [path for path in disk.rglob("*") if path.name.startswith(TEMPORARY)]
        assert not (disk / "run" / "results.json").exists()


# Results --------------------------------------------------------------------------------------------------------------


def test_evaluations_of_the_same_protocol_and_seed_are_replaced_and_others_kept(tmp_path: Path) -> None:
    ended(
        tmp_path, evaluations=[{"protocol": "knn-v1", "top1": 1.0}, {"protocol": "linear-v1", "seed": 0, "top1": 2.0}]
    )
    added = [{"protocol": "linear-v1", "seed": seed, "top1": 3.0 + seed} for seed in (0, 1)]
    add_evaluations(tmp_path, added)
    add_evaluations(tmp_path, added)
    results = read_run(tmp_path).results
    assert results is not None
    assert [(entry["protocol"], entry.get("seed"), entry["top1"]) for entry in results["evaluations"]] == [
        ("knn-v1", None, 1.0),
        ("linear-v1", 0, 3.0),
        ("linear-v1", 1, 4.0),
    ]
    with pytest.raises(ValueError, match="an evaluation must name its protocol, got top1"):
        add_evaluations(tmp_path, [{"top1": 1.0}])
    begun(tmp_path / "b")
    with pytest.raises(RecordError, match=r"b: the run has not ended"):
        add_evaluations(tmp_path / "b", added)


def test_results_need_a_known_status(tmp_path: Path) -> None:
    with (
        open_run(tmp_path) as run,
        pytest.raises(ValueError, match="status must be finished or diverged or collapsed or at chance, got 'done'"),
    ):
        run.write_results({"status": "done"})
