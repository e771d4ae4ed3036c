"""Prints how far every method is from itself: on 2 and 3 processes, in chunks, replayed. float64, worst relative error.

    python benchmarks/invariance.py [--json FILE]

Each number compares the scalars, all gradients, parameters and buffers after two optimizer steps, relative to each
tensor's largest entry. "fixed" = batch norm by fixed statistics, because it sees a chunk; the other columns have it by
the batch (of a chunk) over all processes. A replay stands for a CUDA graph, on the CPU by the tests' tape; the suite
replays whole batches on one process only.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "methods"), str(ROOT)]

COLUMNS = {
    "2 chunks, fixed": "chunks",
    "W = 2": (2, "whole"),
    "W = 3": (3, "whole"),
    "W = 2, 2 chunks": (2, "chunked"),
    "W = 3, 2 chunks": (3, "chunked"),
    "replayed": "replay",
}


def worker() -> dict[str, Any]:
    """All methods' states at this number of processes."""
    from test_invariance import cases

    from ssl_bench.training.check_method import states

    return {name: states(case) for name, case in cases().items()}


def replay_distance(case: Any) -> float:
    """Seven steps plainly, and with all but the first four of them replayed."""
    from tape import TapeRecorder

    from ssl_bench.training.check_method import distance, train
    from ssl_bench.training.gradient import compute_gradient
    from ssl_bench.training.graphs import GraphedGradient

    def graphed(task: Any) -> GraphedGradient:
        return GraphedGradient(compute_gradient, task, _refuse, TapeRecorder())

    return distance(train(case.build(), steps=7), train(case.build(), steps=7, gradient=graphed))[0]


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


def measure() -> list[dict[str, Any]]:
    """One row a method."""
    from test_invariance import cases
    from torchrun import torchrun

    from ssl_bench.training.check_method import distance

    alone, several = worker(), {}
    for world_size in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            several[world_size] = torchrun(worker, world_size, Path(folder), timeout=1200)
    rows = []
    for name, case in cases().items():
        row: dict[str, Any] = {"method": name}
        for column, what in COLUMNS.items():
            if what == "chunks":
                pair = alone[name]["whole, fixed statistics"], alone[name]["chunked, fixed statistics"]
                row[column] = distance(*pair)[0]
            elif what == "replay":
                row[column] = replay_distance(case)
            else:
                world_size, how = what
                row[column] = max(distance(alone[name][how], rank[name][how])[0] for rank in several[world_size])
        rows.append(row)
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    rows = measure()
    print("| method | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['method']} | " + " | ".join(f"{row[column]:.1e}" for column in COLUMNS) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
