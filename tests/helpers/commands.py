"""Runs the real commands in processes of their own, as a user would, on the tiny network and the embedded digits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parents[1] / "ssl_bench"

# Small enough for a second of training; log and telemetry at every step, so that runs can be compared step by step.
TINY = (
    "data=digits", "model.name=tiny_smooth", "model.stem=imagenet", "batch_size=96", "log_every=1", "telemetry.every=1",
    "augment.crop_scale=[0.3,1]", "optimizer=lars", "optimizer.weight_decay=0.05", "param_groups.decay_1d=true",
    "device=cpu", "eval.baseline=false",
)  # fmt: skip
TINY_PRETRAIN = (
    *TINY, "method=tiny_net:TinyTwins", "method.projector=[64,64,64]", "optimizer.lr=5", "param_groups.lr_1d=1e-3",
    "eval.protocols=[knn-v1]",
)  # fmt: skip
# A classifier has no method that would import the network's file; its schedule does.
TINY_CLASSIFY = (*TINY, "optimizer.lr=30", "param_groups.lr_1d=0.1", "schedule=tiny_net:constant_schedule")


def environment(**more: str) -> dict[str, str]:
    """One thread for each process, the tests' folder importable, no GPU."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def script(track: str, words: tuple[str, ...], world_size: int = 1) -> list[str]:
    """The words of a command line that runs a track on so many processes."""
    launch = [sys.executable]
    if world_size > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return [*launch, str(SCRIPTS / f"{track}.py"), *words]


def run(command: list[str], cwd: Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and returns its output and exit code."""
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(**env), check=False
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def results(run_dir: Path) -> dict[str, Any]:
    """A run's results."""
    return json.loads((run_dir / "results.json").read_text())


def fails(capsys: Any, main: Any, words: list[str]) -> str:
    """The one line of a command that must refuse its words."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    return errors[0]
