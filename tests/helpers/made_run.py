"""Run directories made for tests: opened, begun, ended, with telemetry that is known."""

from pathlib import Path
from typing import Any

import torch

from ssl_bench.records.writer import Run

RECIPE = {
    "track": "pretrain",
    "seed": 0,
    "optimizer": {"name": "lars", "lr": 1.0, "betas": (0.9, 0.999)},
    "run_dir": "a",
}
LAYERS = ["conv1", "conv2", "fc"]


def open_run(folder: Path, **changes: Any) -> Run:
    """A run directory, opened as the main process of a run that may go on; `changes` go to `Run.open`."""
    options: dict[str, Any] = {"recipe": RECIPE, "identity": "id0", "resume": "auto", "main_process": True, **changes}
    return Run.open(folder, **options)


def begun(folder: Path) -> Path:
    """A run directory whose run has started and not ended."""
    with open_run(folder) as run:
        run.write_provenance({"track": "pretrain", "started": "now", "world_size": 1})
    return folder


def ended(folder: Path, status: str = "finished", evaluations: list[dict[str, Any]] | None = None) -> Path:
    """A run directory whose run has ended."""
    with open_run(folder) as run:
        run.write_provenance({})
        run.finish({"status": status, "evaluations": evaluations or []})
    return folder


def block(first: int, stop: int) -> dict[str, Any]:
    """Telemetry of three layers in the steps from the one after ``first`` to ``stop``."""
    steps = torch.arange(first + 1, stop + 1).repeat_interleave(len(LAYERS))
    values = torch.sin(steps.float() * 1.7 + torch.arange(len(LAYERS)).repeat(stop - first))
    return {"step": steps, "layer": LAYERS * (stop - first), "ratio": values}
