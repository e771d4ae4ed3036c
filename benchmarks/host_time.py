"""What a training step on a GPU asks of the host, measured without a GPU: kernels started, waits, and the host's time.

    python benchmarks/host_time.py --json benchmarks/results/host-time.json       # a minute
    python benchmarks/host_time.py --quick                                        # seconds, tiny: that it runs

For developers. The code for GPUs runs on the null GPU of `null_gpu/`, a CUDA runtime whose kernels do nothing, so the
time of a step is the time that one thread of the host takes to start its kernels; a GPU cannot go faster. (A real
driver takes some 2 microseconds more per kernel, which is not included, and neither is anything that the GPU
computes.) It also counts how often the host waits for the device between two lines of the log, which should be never.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from null_gpu import build

COUNTS = ("kernels", "waits", "copies", "replays", "captured", "refused")


def counts() -> dict[str, int]:
    """What the null GPU has counted since its start."""
    values = (ctypes.c_long * len(COUNTS))()
    ctypes.CDLL(None).null_gpu_counts(values)
    return dict(zip(COUNTS, values, strict=True))


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of the table; in a process with a null GPU."""
    import torch
    from steps import QUICK, Sizes, bare, build_trainer, end_to_end

    if torch.cuda.get_device_name() != "null GPU":
        raise RuntimeError("this process has no null GPU")
    torch.set_num_threads(1)  # as a run on a GPU has it
    steps, turns = (10, 1) if quick else (50, 5)  # layer statistics come every 10
    whole = replace(QUICK if quick else Sizes(), images=64 if quick else 2048)
    parts = replace(whole, chunk=whole.batch // 4)
    for track in ("pretrain", "classify"):
        contestants = {
            "bare": lambda track=track: bare(build_trainer(track, whole, every=0)),
            "plain steps": lambda track=track: end_to_end(silent(build_trainer(track, whole, graphs=False))),
            "CUDA graphs": lambda track=track: end_to_end(silent(build_trainer(track, whole))),
            "4 chunks, plain": lambda track=track: end_to_end(silent(build_trainer(track, parts, graphs=False))),
            "4 chunks, graphed views": lambda track=track: end_to_end(silent(build_trainer(track, parts))),
        }
        for what, make in contestants.items():
            run = make()
            run(10)  # cuDNN's plans, and the graphs' recording
            # A turn ends with a line of the log, which waits: what a turn twice as long has besides is the steps' own.
            once, twice = counted(run, steps), counted(run, 2 * steps)
            own = {name: (twice[name] - once[name]) / steps for name in ("kernels", "copies", "replays", "waits")}
            seconds = []
            for _ in range(turns):
                started = time.perf_counter()
                run(steps)
                seconds.append((time.perf_counter() - started) / steps)
            yield {
                "track": track, "batch": whole.batch, "what": what, **own, "host_ms": 1e3 * statistics.median(seconds),
                "refused_in_capture": counts()["refused"],
            }  # fmt: skip


def counted(run: Callable[[int], None], steps: int) -> dict[str, int]:
    """What so many steps add to the counts."""
    before = counts()
    run(steps)
    return {name: value - before[name] for name, value in counts().items()}


def silent(trainer: Any) -> Any:
    """The trainer, logging at the end of a turn only."""
    trainer.rhythm.log = 10**9
    return trainer


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Builds the null GPU, measures in a process that has it, prints, and with --json writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        options.child.write_text(json.dumps(list(measure(options.quick))))
        return []
    if reason := build.obstacle():
        parser.error(f"the null GPU cannot be built here: {reason}")
    from ssl_bench.records.provenance import code_version, hardware, package_versions

    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--child", str(rows_file), *(["--quick"] if options.quick else [])]
        subprocess.run(command, check=True, env=build.build(Path(folder)))
        rows: list[dict[str, Any]] = json.loads(rows_file.read_text())
    print(f"{'track':9} {'what':24} {'kernels':>8} {'replays':>8} {'waits':>6} {'host ms':>8}")
    for row in rows:
        numbers = f"{row['kernels']:8.1f} {row['replays']:8.1f} {row['waits']:6.1f} {row['host_ms']:8.2f}"
        print(f"{row['track']:9} {row['what']:24} {numbers}")
    if options.json:
        record = {"hardware": hardware(), "packages": package_versions(), "code": code_version(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
