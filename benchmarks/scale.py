"""Folders of many runs, long runs and large studies: how long the commands that read them take, and how much memory.

    python benchmarks/scale.py [--quick] [--keep FOLDER] [--only study]

Makes three folders of invented records and times the real commands on them, each in a process of its own:
``report`` and ``leaderboard`` of 2,000 runs (200 lines of metrics, 20 recorded steps of 21 layers each),
``leaderboard`` of one run with a million lines, ``study status`` and ``study --dry-run`` of 1,000 cells, half of them
ended. Writes ``benchmarks/results/scale.json``: wall and CPU seconds, and the largest resident memory; with ``--only``
the rows of that command alone are measured anew.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_bench.recipe.compose import compose
from ssl_bench.recipe.schema import Plugin, Recipe
from ssl_bench.study.grid import load_study

GOALS = {  # seconds, MiB
    "report, 2,000 runs": (20, 400),
    "leaderboard, 1,000,000 lines": (2, 300),
    "study status, 1,000 cells": (1, None),
    "study --dry-run, 1,000 cells": (5, None),
}
LAYERS = [f"backbone.layer{index}.conv.weight" for index in range(21)]


def recipes(count: int) -> Iterator[Recipe]:
    """Five seeds each of LARS, LAMB and TVLARS in six values of lambda, at four batch sizes and up to 14 rates."""
    made = 0
    base = compose("classify", ["data=cifar10", "model.stem=cifar", "epochs=10"])
    arms: list[tuple[str, dict[str, float]]] = [("lars", {}), ("lamb", {})]
    arms += [("tvlars", {"decay": decay}) for decay in (1e-2, 5e-3, 1e-3, 1e-4, 1e-5, 1e-6)]
    while made < count:
        for rate in range(1, 15):
            for batch_size in (512, 1024, 4096, 16384):
                for name, options in arms:
                    for seed in range(5):
                        if made == count:
                            return
                        optimizer = Plugin(name, {"lr": float(rate), "weight_decay": 5e-4, **options})
                        yield replace(base, optimizer=optimizer, batch_size=batch_size, seed=seed)
                        made += 1


def write_run(folder: Path, recipe: Recipe, lines: int, telemetry: Path | None, rng: np.random.Generator) -> None:
    """One run's record with invented numbers."""
    folder.mkdir(parents=True)
    per_epoch = 50_000 / recipe.batch_size
    about = {
        "format": 1,
        "identity": recipe.identity(),
        "recipe": recipe.to_dict(),
        "track": "classify",
        "started": "2026-01-31T12:00:00+00:00",
        "code": {"version": "0.1.0", "commit": "0123abc", "dirty": False},
        "packages": {f"package{index}": "1.2.3" for index in range(20)},
        "hardware": {"cpu": "an imaginary one", "cores": 2, "gpus": []},
        "plan": {"total_steps": lines, "steps_per_epoch": per_epoch, "optimizer": {}, "schedule": {}},
        "param_groups": [{"lr": 1.0, "weight_decay": 5e-4, "param_names": LAYERS}],
    }
    (folder / "run.json").write_text(json.dumps(about))
    top1 = 75 + recipe.optimizer.options["lr"] / 10 + float(rng.normal(0, 0.5))
    loss = 2.4 - 1.8 * np.linspace(0, 1, lines) + 0.02 * rng.standard_normal(lines)
    with open(folder / "metrics.jsonl", "w") as file:
        for step, value in enumerate(loss.tolist(), start=1):
            row: dict[str, Any] = {"step": step, "samples": step * recipe.batch_size, "epochs": step / per_epoch}
            row |= {"seconds": 0.2 * step, "lr": 1.0, "lr_multiplier": 1.0, "loss": value, "images_per_second": 2560.5}
            if step % 10 == 0:
                row |= {"test_top1": top1 * (1 - math.exp(-4 * step / lines)), "test_loss": value}
            file.write(json.dumps(row) + "\n")
    score = {"protocol": "test-v1", "model": "trained", "metrics": {"top1": top1}, "n_test": 10_000, "chance": 10.0}
    ended = {"format": 1, "status": "finished", "step": lines, "evaluations": [score]}
    (folder / "results.json").write_text(json.dumps(ended))
    if telemetry is not None:
        os.link(telemetry, folder / "telemetry.parquet")


def write_telemetry(path: Path) -> None:
    """20 recorded steps of every layer."""
    steps = np.repeat(np.arange(1, 201, 10), len(LAYERS))
    columns: dict[str, Any] = {"step": steps, "layer": LAYERS * 20}
    for name in ("weight_norm", "grad_norm", "raw_ratio", "relative_step"):
        columns[name] = np.random.default_rng(0).uniform(0.1, 10, len(steps)).astype(np.float32)
    pq.write_table(pa.table(columns), path)


def write_study(folder: Path, cells: int, rng: np.random.Generator) -> Path:
    """A study's file, and a run directory of every second cell."""
    path = folder / "large.yaml"
    seeds = list(range(cells // 20))
    rates = [round(0.1 * rate, 1) for rate in range(1, 11)]
    text = f"base: {{data: digits, steps: 30}}\nseeds: {seeds}\nblocks:\n  - track: classify\n    axes:\n"
    path.write_text(text + f"      - {{optimizer: [lars, lamb]}}\n      - {{optimizer.lr: {rates}}}\n")
    for cell in load_study(path).cells[::2]:
        write_run(folder / "runs" / "large" / cell.name, cell.recipe, 30, None, rng)
    return path


def timed(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Runs a command; its wall and CPU seconds and its largest resident memory."""
    # A child of its own, because the largest memory of a process's children never falls.
    code = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))"
    )
    command = [sys.executable, "-m", "ssl_bench", *arguments]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    returncode, cpu, memory = json.loads(done.stdout.splitlines()[-1])
    if returncode not in (0, 1):  # 1: a study's status says that cells are left
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr}")
    row = {"what": name, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mib": round(memory)}
    row["load"] = round(os.getloadavg()[0], 1)
    print(f"{name:40} {seconds:7.2f} s wall {cpu:7.2f} s CPU {memory:7.0f} MiB")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny folders: does it run?")
    parser.add_argument("--keep", type=Path, help="make the folders here and keep them; what is there is used")
    parser.add_argument("--only", choices=("report", "leaderboard", "study", "--help"), help="this command alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    arguments = parser.parse_args()
    runs, lines, cells = (20, 1_000, 40) if arguments.quick else (2_000, 1_000_000, 1_000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SSL_BENCH_CACHE"] = str(folder / "cache")
        if arguments.only in (None, "study") and not (folder / "large.yaml").exists():
            write_study(folder, cells, rng)
        if arguments.only in (None, "report", "leaderboard") and not (folder / "long").exists():
            write_telemetry(folder / "telemetry.parquet")
            for index, recipe in enumerate(recipes(runs)):
                write_run(folder / "many" / f"{index:05d}", recipe, 200, folder / "telemetry.parquet", rng)
            write_run(folder / "long" / "run", next(recipes(1)), lines, None, rng)
        (folder / "cache" / "recipes.json").unlink(missing_ok=True)
        commands = {
            f"report, {runs:,} runs": ["report", "many", "-o", "out"],
            f"leaderboard, {runs:,} runs": ["leaderboard", "many"],
            f"leaderboard, {lines:,} lines": ["leaderboard", "long"],
            f"report, {lines:,} lines": ["report", "long", "-o", "out-long"],
            f"study status, {cells:,} cells, first time": ["study", "status", "large.yaml"],
            f"study status, {cells:,} cells": ["study", "status", "large.yaml"],
            f"study --dry-run, {cells:,} cells": ["study", "large.yaml", "--dry-run"],
            "--help": ["--help"],  # what starting a process takes
        }
        chosen = {name: words for name, words in commands.items() if arguments.only in (None, words[0])}
        rows = {name: timed(name, words, folder) for name, words in chosen.items()}
    for name, row in rows.items():
        row["goal_seconds"], row["goal_mib"] = GOALS.get(name, (None, None))
    if arguments.only and arguments.output.exists():
        earlier = {row["what"]: row for row in json.loads(arguments.output.read_text())["rows"]}
        rows = {name: (earlier | rows)[name] for name in commands if name in earlier | rows}
    record = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    record |= {
        "python": platform.python_version(),
        "peak_of_this_process_mib": _own_memory(),
        "rows": list(rows.values()),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def _own_memory() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
