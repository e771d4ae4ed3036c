"""The run directory: claims between real processes, refusals by name, rows without gap or double, whole files only."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_disk import mounted

from ssl_bench import provenance
from ssl_bench.claim import Claim, is_claimed
from ssl_bench.record import (
    InUseError,
    RecordError,
    Run,
    add_evaluations,
    differences,
    find_runs,
    read_run,
    read_telemetry,
)
from ssl_bench.storage import TEMPORARY, atomic_file, jsonable, restored

RECIPE = {
    "track": "pretrain",
    "seed": 0,
    "optimizer": {"name": "lars", "lr": 1.0, "betas": (0.9, 0.999)},
    "run_dir": "a",
}
LAYERS = ["conv1", "conv2", "fc"]


def open_run(folder: Path, **changes: Any) -> Run:
    options: dict[str, Any] = {"recipe": RECIPE, "identity": "id0", "resume": "auto", "main_process": True, **changes}
    return Run.open(folder, **options)


def block(first: int, stop: int) -> dict[str, Any]:
    """Telemetry of three layers in the steps from the one after ``first`` to ``stop``."""
    steps = torch.arange(first + 1, stop + 1).repeat_interleave(len(LAYERS))
    values = torch.sin(steps.float() * 1.7 + torch.arange(len(LAYERS)).repeat(stop - first))
    return {"step": steps, "layer": LAYERS * (stop - first), "ratio": values}


@contextmanager
def other_process(code: str, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that has printed its first line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            yield process
        finally:
            process.kill()


# Claims -------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from ssl_bench.claim import Claim
claim = Claim(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""

# The worker of a data loader, forked while the claim is held, survives its killed parent for a while.
HOLDER_WITH_WORKER = """
import os, sys, time
from pathlib import Path
from ssl_bench.claim import Claim
claim = Claim(Path(sys.argv[1]))
worker = os.fork()
if worker == 0:
    time.sleep(20)
    os._exit(0)
time.sleep(0.2)
print("ready", worker, flush=True)
time.sleep(60)
"""


def test_a_directory_in_use_is_refused_with_the_process_and_free_once_that_is_killed(tmp_path: Path) -> None:
    with other_process(HOLDER, tmp_path) as process:
        assert is_claimed(tmp_path)
        with pytest.raises(InUseError, match=rf"{tmp_path}: in use by process {process.pid} on "):
            open_run(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_claimed(tmp_path)
        open_run(tmp_path).close()


def test_a_forked_worker_does_not_keep_its_dead_parent_s_claim(tmp_path: Path) -> None:
    with other_process(HOLDER_WITH_WORKER, tmp_path) as process:
        assert is_claimed(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_claimed(tmp_path)
        Claim(tmp_path).release()


def test_claims_exclude_each_other_within_a_process_too_and_end_with_close(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            open_run(tmp_path)
        run.close()
        run.close()
        open_run(tmp_path).close()


# Opening ------------------------------------------------------------------------------------------------------------


def begun(folder: Path) -> Path:
    with open_run(folder) as run:
        run.write_provenance({"track": "pretrain", "started": "now", "world_size": 1})
    return folder


def test_a_used_directory_is_refused_under_never(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    with pytest.raises(RecordError, match=r"run_dir .*a: it holds a run; .*resume=auto or choose another run_dir"):
        open_run(tmp_path / "a", resume="never")
    with open_run(tmp_path / "a") as run:  # the refusal gave the claim back
        assert run.resumed
        assert run.results is None
    with pytest.raises(ValueError, match="resume is 'always', allowed are never, auto"):
        open_run(tmp_path / "b", resume="always")


def test_another_recipe_is_refused_with_the_difference_key_by_key(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {**RECIPE, "optimizer": {"name": "lars", "lr": 2.0, "eta": 0.1}, "run_dir": "elsewhere", "workers": 3}
    with pytest.raises(RecordError) as caught:
        open_run(tmp_path, recipe=other, identity="id1")
    assert str(caught.value).endswith(
        "it holds a run of another recipe: optimizer.betas: run has [0.9, 0.999], asked for nothing; "
        "optimizer.eta: run has nothing, asked for 0.1; optimizer.lr: run has 1.0, asked for 2.0"
    )
    with pytest.raises(RecordError, match="identity: run has id0, asked for id1"):
        open_run(tmp_path, identity="id1")
    open_run(tmp_path, recipe=other).close()  # the same identity: only what cannot change the result differs


def test_differences_compare_values_and_ignore_whole_branches() -> None:
    assert differences({"a": 1, "b": {}}, {"a": 1.0, "b": {}}) == []
    assert differences({"x": {"y": 1}, "xz": 1}, {"x": {"y": 2}, "xz": 2}, {"x"}) == ["xz: run has 1, asked for 2"]
    assert differences({"n": None}, {"n": "nan"}) == ['n: run has null, asked for "nan"']


def test_a_foreign_directory_and_a_file_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RecordError, match=r"photos: it holds 'cat\.jpg' and no run\.json"):
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


# Provenance ---------------------------------------------------------------------------------------------------------


def test_run_json_says_what_runs_and_is_kept_while_sessions_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-that-must-not-leak")
    model = torch.nn.Linear(3, 2)
    groups = [
        {"params": [model.weight], "param_names": ["weight"], "weight_decay": 0.1},
        {"params": [model.bias], "param_names": ["bias"], "lr": 0.5, "weight_decay": 0.0},
    ]
    collected = provenance.collect_provenance(
        track="pretrain",
        seeds={"run": 3, "probes": 4},
        world_size=2,
        param_groups=torch.optim.SGD(groups, lr=2.0).param_groups,
        device="cpu",
    )
    for step in (0, 7):
        with open_run(tmp_path) as run:
            run.write_provenance({**collected, "world_size": 2 + step}, step=step)
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert record["format"] == 1
    assert record["identity"] == "id0"
    assert record["recipe"] == jsonable(RECIPE)
    assert record["world_size"] == 2
    assert record["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["packages"].keys() >= {"python", "numpy", "torchvision", "timm", "accelerate"}
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gib"] > 0
    assert record["seeds"] == {"run": 3, "probes": 4}
    assert record["track"] == "pretrain"
    first, second = record["param_groups"]
    assert (first["lr"], first["weight_decay"], first["tensors"], first["elements"]) == (2.0, 0.1, 1, 6)
    assert (second["lr"], second["weight_decay"], second["param_names"]) == (0.5, 0.0, ["bias"])
    assert "must-not-leak" not in text
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(session["step"], session["world_size"]) for session in sessions] == [(0, 2), (7, 9)]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_package_s_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ssl_bench"
    package.mkdir()
    (package / "__init__.py").write_text("1")
    monkeypatch.setattr("ssl_bench.__file__", str(package / "__init__.py"))
    assert provenance.code_version()["commit"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "readme").touch()
    git(tmp_path, "add", "readme")
    git(tmp_path, "commit", "-qm", "m")
    assert provenance.code_version()["commit"] is None  # it lies in somebody's checkout and is no part of it
    git(tmp_path, "add", "ssl_bench")
    git(tmp_path, "commit", "-qm", "m")
    assert provenance.code_version() == {
        "version": "0.1.0",
        "commit": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
    }
    (package / "__init__.py").write_text("2")
    assert provenance.code_version()["dirty"] is True


# Metrics ------------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_rows_are_valid_json_also_when_not_finite_and_come_back_as_floats(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_provenance({})
        run.log({"step": torch.tensor(1), "loss": float("nan"), "lr": np.float32(0.5), "max": -math.inf})
        assert lines(tmp_path) == ['{"step": 1, "loss": "nan", "lr": 0.5, "max": "-inf"}']  # visible before the close
        with pytest.raises(ValueError, match="a row of step 1 after one of step 1"):
            run.log({"step": 1})
        with pytest.raises(ValueError, match="record: loss is a Tensor, which JSON cannot hold"):
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
        with pytest.raises(ValueError, match="a row of step 10 after one of step 10"):
            run.log({"step": 10})
        run.log({"step": 15, "loss": 1 / 15})
    assert lines(tmp_path) == [json.dumps({"step": step, "loss": 1 / step}) for step in (5, 10, 15)]
    for _ in range(2):  # killed before its first checkpoint
        with open_run(tmp_path) as run:
            run.truncate_to(None)
            run.log({"step": 0})
            run.log({"step": 5})
        assert lines(tmp_path) == ['{"step": 0}', '{"step": 5}']


def test_metrics_damaged_in_the_middle_are_an_error_that_names_the_line(tmp_path: Path) -> None:
    with open_run(begun(tmp_path)) as run:
        run.truncate_to(0)
        for step in (1, 2, 3):
            run.log({"step": step})
        path = tmp_path / "metrics.jsonl"
        path.write_text(path.read_text().replace('{"step": 2}', '{"st###'))
        for read in (lambda: read_run(tmp_path), lambda: run.truncate_to(3)):
            with pytest.raises(RecordError, match=r"metrics\.jsonl: damaged: line 2 of 3"):
                read()


def fill(run: Run) -> None:
    for step in range(1, 100_000):
        run.log({"step": step, "text": "x" * 100})


def test_a_full_disk_leaves_only_whole_rows(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk, open_run(disk / "run") as run:
        run.write_provenance({})
        with pytest.raises(OSError, match=r"metrics\.jsonl: writing: No space left on device$"):
            fill(run)
        with pytest.raises(OSError, match=r"part-00000001\.parquet: writing: No space left on device$"):
            run.log_telemetry(block(0, 10_000))
        with pytest.raises(OSError, match=r"results\.json: writing: No space left on device$"):
            run.write_results({"status": "finished", "text": "x" * 100_000})
        rows = read_run(disk / "run").metrics
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert not [path for path in disk.rglob("*") if path.name.startswith(TEMPORARY)]
        assert not (disk / "run" / "results.json").exists()


# Telemetry ----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("ssl_bench.telemetry_store._ROWS_PER_GROUP", 64)  # several row groups
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
        with pytest.raises(ValueError, match="a block starts at step 3, but step 3 is recorded"):
            run.log_telemetry(block(2, 4))
        with pytest.raises(ValueError, match=r"columns are .*phi.*, before .*ratio: float"):
            run.log_telemetry({"phi" if name == "ratio" else name: column for name, column in block(3, 4).items()})
        with pytest.raises(ValueError, match="different lengths"):
            run.log_telemetry({"step": [5], "ratio": [1.0, 2.0]})
        with pytest.raises(ValueError, match="no column 'step' among ratio"):
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


# Results and reading ------------------------------------------------------------------------------------------------


def ended(folder: Path, status: str = "finished", evaluations: list[dict[str, Any]] | None = None) -> Path:
    with open_run(folder) as run:
        run.write_provenance({})
        run.finish({"status": status, "evaluations": evaluations or []})
    return folder


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
    with pytest.raises(ValueError, match="an evaluation names no protocol; it has top1"):
        add_evaluations(tmp_path, [{"top1": 1.0}])
    begun(tmp_path / "b")
    with pytest.raises(RecordError, match=r"b: the run has not ended"):
        add_evaluations(tmp_path / "b", added)


def test_results_need_a_known_status(tmp_path: Path) -> None:
    with (
        open_run(tmp_path) as run,
        pytest.raises(ValueError, match="'done', allowed are finished, diverged, collapsed"),
    ):
        run.write_results({"status": "done"})


def test_the_status_of_every_kind_of_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        run.write_provenance({})
        assert read_run(tmp_path / "a").status == "running"
    assert read_run(tmp_path / "a").status == "interrupted"
    for status in ("finished", "diverged", "collapsed"):
        record = read_run(ended(tmp_path / status, status))
        assert record.status == status
        assert record.recipe == jsonable(RECIPE)
        assert record.identity == "id0"


def test_find_runs_lists_the_sound_and_the_skipped_with_the_reason(tmp_path: Path) -> None:
    ended(tmp_path / "study" / "cell1")
    begun(tmp_path / "cell2")
    (tmp_path / "cell2" / "checkpoints").mkdir()
    for name, text in (
        ("torn", '{"format": 1, "rec'),
        ("old", '{"format": 0}'),
        ("other", "[1]"),
        ("bare", '{"format": 1}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    ended(tmp_path / "results")
    (tmp_path / "results" / "results.json").write_text('{"format": 1, "status": "great", "evaluations": []}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    found, skipped = find_runs(tmp_path)
    assert [record.folder.name for record in found] == ["cell2", "cell1"]
    reasons = {entry.folder.name: entry.reason for entry in skipped}
    assert reasons.keys() == {"torn", "old", "other", "bare", "results", "foreign"}
    assert "run.json: damaged:" in reasons["torn"]
    assert "its format is 0, this version reads 1" in reasons["old"]
    assert "not written by ssl_bench" in reasons["other"]
    assert "no 'identity'" in reasons["bare"]
    assert "status 'great'" in reasons["results"]
    assert "not a run directory" in reasons["foreign"]
    assert not any("\n" in reason for reason in reasons.values())
    with pytest.raises(RecordError, match="no such folder"):
        find_runs(tmp_path / "absent")


# Atomic writes ------------------------------------------------------------------------------------------------------


def test_an_atomic_file_keeps_the_old_contents_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_jsonable_and_restored_are_inverse_for_numbers() -> None:
    value = {"a": [1, 2.5, math.inf, -math.inf], "b": {"c": None, "d": True, "e": "text"}}
    assert restored(json.loads(json.dumps(jsonable(value), allow_nan=False))) == value
    assert jsonable({"p": Path("x"), "s": {2, 1}, 3: np.int64(4)}) == {"p": "x", "s": [1, 2], "3": 4}


# A run in miniature: it logs every step, checkpoints every third, and is killed wherever it is.
MINIATURE = """
import sys, time
from pathlib import Path
import torch
from ssl_bench.checkpoint import Checkpoints
from ssl_bench.record import Run
torch.set_num_threads(1)
folder, tick = Path(sys.argv[1]), lambda: None
def step_once(x, k):
    return torch.cos(x * 1.1 + k)
def once():
    with Run.open(folder, {"seed": 1}, "id", resume="auto", main_process=True) as run:
        if run.results is not None:
            return
        checkpoints = Checkpoints(folder / "checkpoints")
        step, x = None, torch.ones(1000)
        latest = checkpoints.load_latest()
        if latest is not None:
            step, state, _ = latest
            x = state["x"]
        run.truncate_to(step)
        step = step or 0
        run.write_provenance({}, step=step)
        pending = []
        while step < 36:
            tick()
            x = step_once(x, step)
            step += 1
            pending.append((step, float(x.sum())))
            run.log({"step": step, "loss": float(x.mean())})
            if step % 3 == 0:
                ks, sums = zip(*pending)
                run.log_telemetry({"step": list(ks), "layer": ["x"] * len(ks), "sum": list(sums)})
                pending = []
                run.sync()
                checkpoints.save(step, {"x": x}, {})
        run.finish({"status": "finished", "sum": float(x.sum()), "evaluations": []})
"""

# The whole run once, then a second one that is killed a moment after some steps, 0 to 8 of them, until it has ended.
# Each is forked from a parent that never ran anything itself: threads do not survive a fork.
KILLED = (
    MINIATURE
    + """
import os, random, signal
def forked(path):
    global folder, tick
    steps, end = os.pipe()
    child = os.fork()
    if child == 0:
        folder, tick = path, lambda: os.write(end, b".")
        once()
        os._exit(0)
    os.close(end)
    return child, steps
def ended(child):
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
    return os.WIFEXITED(status)
random, kills = random.Random(1), 0
assert ended(forked(Path(sys.argv[1]))[0])
while True:
    child, steps = forked(Path(sys.argv[2]))
    if kills < 25:
        for _ in range(random.randint(0, 8)):
            os.read(steps, 1)
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
    if ended(child):
        break
    kills += 1
print(kills)
"""
)


def test_a_run_killed_again_and_again_records_the_same_as_one_never_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(whole), str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2, "too few kills for the test to mean anything"
    for name in ("metrics.jsonl", "telemetry.parquet", "results.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (killed / "telemetry").exists()
    sessions = [json.loads(line) for line in (killed / "sessions.jsonl").read_text().splitlines()]
    assert any(session["step"] > 0 for session in sessions), "no kill came after a checkpoint"
    assert sorted(session["step"] for session in sessions) == [session["step"] for session in sessions]
