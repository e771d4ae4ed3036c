"""A study as a SLURM job array."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from waiting import wait_for

from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import load_study
from ssl_bench.study.run import study_main
from ssl_bench.study.slurm import _parameters

START_SLURM = "SSL_BENCH_START_SLURM"  # environment variable, explained in CONTRIBUTING.md


@pytest.fixture
def slurm() -> None:
    """A real one-node cluster, or a skip."""
    pytest.importorskip("submitit")
    if shutil.which("sinfo") and subprocess.run(["sinfo", "-h"], capture_output=True, check=False).returncode == 0:
        return
    if not (script := os.environ.get(START_SLURM)):
        pytest.skip(f"no SLURM runs here, and {START_SLURM} names no script that starts one")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"SLURM does not start: {done.stderr[-200:]}")


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_slurm_runs_an_array_and_a_preempted_cell_goes_on(tmp_path: Path) -> None:
    """Two real runs of digits as a job array; one is preempted on the way, and continues from its checkpoint."""
    content = {
        "base": {"data": "digits", "model.stem": "imagenet", "batch_size": 32, "log_every": 1, "eval.baseline": False,
                 "eval.test_every_epochs": 0},
        "blocks": [{"track": "classify", "axes": [{"steps": [5, 400], "optimizer.lr": [1, 1]}]}],
    }  # fmt: skip
    path, runs = tmp_path / "array.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(content))
    parameters = {"timeout_min": "30", "cpus_per_task": "1", "partition": "main", "gpus_per_node": "0"}
    assert study_main(path, runs=runs, launcher="slurm", slurm=parameters) == 0
    store, (short, long) = CellStore(runs), load_study(path).cells
    metrics = store.folder(long) / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, 240)
        assert store.state(long).status == "running"
        task = next(folder.name.split("_submitted")[0] for folder in (store.notes / "slurm").glob("*_1_submitted.pkl"))
        # What SLURM does ahead of a preemption; submitit's handler answers it.
        subprocess.run(["scancel", "--signal=USR2", task], check=True)
        wait_for(lambda: store.state(long).status == "interrupted", 60)
        # A requeued job starts after two minutes by SLURM's own rule; a user may bring that forward.
        wait_for(lambda: "PENDING" in queue(task), 60)
        subprocess.run(["scontrol", "update", f"jobid={task}", "starttime=now"], check=False)
        wait_for(lambda: store.state(long).ended and store.state(short).ended, 400)
    finally:
        subprocess.run(["scancel", "--name=ssl-bench-array"], check=False)
    assert store.state(short).ended
    sessions = [json.loads(line) for line in (store.folder(long) / "sessions.jsonl").read_text().splitlines()]
    assert len(sessions) == 2
    assert sessions[0]["step"] == 0
    assert sessions[1]["step"] > 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))
    assert study_main(path, runs=runs, launcher="slurm") == 0  # nothing left to submit


def queue(task: str) -> str:
    return subprocess.run(["squeue", "-h", "-j", task, "-o", "%T"], capture_output=True, text=True, check=False).stdout


def test_slurms_parameters_are_told_apart() -> None:
    assert _parameters({"timeout_min": "90", "mem_gb": "1.5", "partition": "gpu"}) == {
        "timeout_min": 90,
        "cpus_per_task": 4,
        "gpus_per_node": 1,
        "mem_gb": 1.5,
        "slurm_additional_parameters": {"partition": "gpu"},
    }
    assert _parameters({"gpus_per_node": "4"})["gpus_per_node"] == 4
    assert "gpus_per_node" not in _parameters({"gpus_per_node": "0"})
    assert "gpus_per_node" not in _parameters({"gres": "gpu:a100:2"})
    with pytest.raises(ValueError, match="timeout_min must be a number, got 'a day'"):
        _parameters({"timeout_min": "a day"})
