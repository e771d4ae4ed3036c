"""Prints how far every method is from itself: on 2 and 3 processes, in chunks, replayed. float64, worst relative error.

    python benchmarks/invariance.py [--json FILE]
    python benchmarks/invariance.py --loss-times [--quick] [--json FILE]     # instead: what sharing the loss saves

Each number compares the scalars, all gradients, parameters and buffers after two optimizer steps, relative to each
tensor's largest entry. "fixed" = batch norm by fixed statistics, because it sees a chunk; the other columns have it by
the batch (of a chunk) over all processes. A replay stands for a CUDA graph, on the CPU by the tests' tape; the suite
replays whole batches on one process only. "recomputed" = recompute=blocks beside the plain step, on 1 to 3 processes.

With --loss-times, forward and backward of the loss alone on two processes with one thread each, float32: whole on each
from gathered rows, and shared (``sharded_loss``), in turns. Processor seconds of a process, communication included, and
their quotient; medians over turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
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
    "recomputed": "recomputed",
}


# (N, D) of the embeddings: SimCLR's similarities, and both forms of the off-diagonal sum.
LOSSES = {"simclr": [(1024, 1024)], "supcon": [(2048, 128)], "barlow_twins": [(2048, 1024), (512, 2048)]}
LOSSES["vicreg"] = LOSSES["barlow_twins"]
TURNS = 7


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
            elif what == "recomputed":
                row[column] = max(
                    distance(one[name]["whole"], one[name][what])[0] for one in [alone, *several[2], *several[3]]
                )
            elif what == "replay":
                row[column] = replay_distance(case)
            else:
                world_size, how = what
                row[column] = max(distance(alone[name][how], rank[name][how])[0] for rank in several[world_size])
        rows.append(row)
    return rows


def loss_times(shrink: int = 1, turns: int = TURNS) -> list[dict[str, Any]]:
    """One row a loss and size, on one of several processes."""
    import torch
    from torch import nn

    from ssl_bench.methods import METHODS
    from ssl_bench.runtime.distributed import rank, world_size
    from ssl_bench.training.gradient import global_loss, shards

    rows = []
    for name, n, d in [(name, n // shrink, d // shrink) for name, sizes in LOSSES.items() for n, d in sizes]:
        shared, whole = (METHODS[name](nn.Identity(), 4, projector=(4,)) for _ in range(2))
        whole.loss = whole.loss  # an own loss of this one object: it is not shared
        assert (shards(shared), shards(whole)) == (True, False)
        generator = torch.Generator().manual_seed(rank())
        outputs = {key: torch.randn(n // world_size(), d, generator=generator) for key in ("z1", "z2")}
        if name == "supcon":
            outputs["labels"] = torch.arange(n // world_size()) % 10
        seconds: dict[str, list[float]] = {"whole": [], "shared": []}
        for turn in range(turns + 1):
            for what, method in (("whole", whole), ("shared", shared)):
                leaves = {key: z.clone().requires_grad_(z.is_floating_point()) for key, z in outputs.items()}
                start = time.process_time()
                global_loss(method, leaves)["loss"].backward()
                if turn:  # the first is a warm-up
                    seconds[what].append(time.process_time() - start)
        ratios = [b / a for a, b in zip(seconds["whole"], seconds["shared"], strict=True)]
        rows.append({"method": name, "n": n, "d": d, **seconds, "shared_over_whole": statistics.median(ratios)})
    return rows


def loss_times_quick() -> list[dict[str, Any]]:
    """The same, tiny."""
    return loss_times(shrink=64, turns=1)


def print_loss_times(quick: bool) -> dict[str, Any]:
    """Measures on two processes and prints the first one's times."""
    from torchrun import torchrun

    from ssl_bench.records.provenance import code_version, hardware, package_versions

    with tempfile.TemporaryDirectory() as folder:
        ranks = torchrun(loss_times_quick if quick else loss_times, 2, Path(folder), timeout=1200)
    print("| loss | N x D | whole (s) | shared (s) | shared / whole |\n|---|---|---:|---:|---:|")
    for row in ranks[0]:
        whole, shared = (statistics.median(row[what]) for what in ("whole", "shared"))
        size = f"{row['n']} x {row['d']}"
        print(f"| {row['method']} | {size} | {whole:.3f} | {shared:.3f} | {row['shared_over_whole']:.2f} |")
    return {"hardware": hardware(), "packages": package_versions(), "code": code_version(), "ranks": ranks}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--loss-times", action="store_true", help="time the loss on two processes, whole and shared")
    parser.add_argument("--quick", action="store_true", help="of --loss-times, tiny: that it runs")
    options = parser.parse_args()
    if options.quick and not options.loss_times:
        parser.error("--quick must come with --loss-times, got it alone")
    if options.loss_times:
        record = print_loss_times(options.quick)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        return
    rows = measure()
    print("| method | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['method']} | " + " | ".join(f"{row[column]:.1e}" for column in COLUMNS) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
