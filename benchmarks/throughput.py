"""Time a training step: bare compute, ours end to end, and peers doing the same work, in one run.

    python benchmarks/throughput.py --json benchmarks/results/throughput-cpu.json     # six minutes on two cores
    python benchmarks/throughput.py --sweep pixels --json FILE    # as images grow; batch, projector, method
    python benchmarks/throughput.py --quick                       # seconds, tiny: that it runs

Bare is forward, backward and optimizer step on one batch that is augmented and on the device already: the least that
training can take with our network; the same with torch's convolutions everywhere is what everybody else's network
takes at least. Ours is the suite's loop, with data, augmentation, telemetry and logging every 10 steps. The peers
load PIL images through a DataLoader: lightly's transforms, loss and LARS for Barlow Twins, torchvision's transforms and
torch's SGD for classification. The contestants take turns; medians count. An image is two views in pretraining.
Needs the extra `bench` for lightly; a peer that is not installed is left out. The TVLARS paper's own code is timed from
a checkout: `git clone https://github.com/KhoiDOO/tvlars && git -C tvlars checkout 89c3291`, then --authors tvlars.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from steps import QUICK, Sizes, Steps, bare, build_trainer, end_to_end, synchronize
from throughput_peers import authors_twins, lightly_twins, torchvision_classifier

from ssl_bench.methods import METHODS
from ssl_bench.recipe.command import leave
from ssl_bench.records.provenance import code_version, hardware, package_versions

GRAPHS_READY = 15  # steps after which a run on a GPU has recorded and checked its CUDA graphs

# As work grows, or from method to method. 16,384 images of 32 x 32 take some 14 GiB as one batch.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "batch": (512, 1024, 2048, 4096, 8192, 16384),
    "pixels": (32, 48, 64, 96),
    "projector": (1024, 2048, 4096, 8192),
    "method": tuple(METHODS),
}


def contestants(track: str, sizes: Sizes, *, peers: bool) -> dict[str, Steps]:
    """What runs against each other on one track; the first is the bare compute, the second ours."""
    made = {
        "bare compute, bf16": bare(build_trainer(track, sizes, every=0)),
        "ssl_bench end to end, bf16": end_to_end(build_trainer(track, sizes)),
    }
    if not peers:
        return made
    made["bare compute with torch's convolutions, bf16"] = bare(build_trainer(track, sizes, every=0, plain=True))
    without = build_trainer(track, sizes, every=0)
    made["ssl_bench, no telemetry, bf16"] = end_to_end(without)
    builders = {"lightly": lightly_twins} if track == "pretrain" else {"torchvision + SGD": torchvision_classifier}
    if track == "pretrain" and sizes.authors:
        builders["the authors' code"] = authors_twins
    for name, build in builders.items():
        for bf16 in (True, False):
            try:
                made[f"{name} end to end, {'bf16' if bf16 else 'fp32'}"] = build(sizes, bf16=bf16)
            except ImportError as error:
                print(f"{track:9} {name}: left out ({error})", flush=True)
    return made


def race(runs: dict[str, Steps], *, steps: int, turns: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant in each of the turns, which they take one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first one warms up
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            run(steps if turn else max(steps, GRAPHS_READY * torch.cuda.is_available()))
            synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def table(track: str, sizes: Sizes, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Prints and returns the median images/s of every contestant, and its time over the first's and the second's."""
    first, second = list(seconds)[:2]
    rows = []
    for name, values in seconds.items():
        # Turn by turn, so that a change of the machine's load meets both sides of a ratio.
        over_bare = statistics.median(a / b for a, b in zip(values, seconds[first], strict=True))
        over_ours = statistics.median(a / b for a, b in zip(values, seconds[second], strict=True))
        rate = sizes.batch / statistics.median(values)
        rows.append(
            {"track": track, "what": name, "images_per_second": round(rate, 1), "time_over_bare": round(over_bare, 3),
             "time_over_ours": round(over_ours, 3), "seconds_per_step": [round(value, 5) for value in values]}
        )  # fmt: skip
        print(
            f"{track:9} {name:44} {rate:8.0f} images/s   {over_bare:5.2f} x bare   {over_ours:5.2f} x ours", flush=True
        )
    return rows


def measure(track: str, sizes: Sizes, *, peers: bool = True) -> list[dict[str, Any]]:
    """All contestants of one track against each other."""
    return table(track, sizes, race(contestants(track, sizes, peers=peers), steps=sizes.steps, turns=sizes.turns))


def sweep(track: str, sizes: Sizes, name: str, values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Bare and ours as one size grows; a turn has about the same number of images all along."""
    if name in ("projector", "method") and track == "classify":
        return  # it has none
    for value in values:
        grown = replace(sizes, **{name: (value,) * 3 if name == "projector" else value})
        grown = replace(grown, steps=max(1, round(sizes.steps * sizes.batch / grown.batch)))
        print(f"{name} = {value}", flush=True)
        for row in measure(track, grown, peers=False):
            yield {name: value} | row


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Sizes]:
    """The command line: options, and the sizes among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--pixels", type=int, help="side of an image")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], help="of the ResNet-18")
    parser.add_argument("--projector", type=int, nargs="+", help="widths")
    parser.add_argument(
        "--chunk", type=int, help="images in memory at a time, ours end to end; the whole batch if left out"
    )
    parser.add_argument("--steps", type=int, help="steps of a turn")
    parser.add_argument("--turns", type=int, help="turns that count, after one to warm up")
    parser.add_argument("--workers", type=int, help="the peers' loading processes")
    parser.add_argument("--images", type=int, help="images in the data set, at most")
    parser.add_argument("--data-path", help="CIFAR-10's folder of parquet files; random images if left out")
    parser.add_argument("--authors", help="a checkout of the paper's code, github.com/KhoiDOO/tvlars, to time it too")
    parser.add_argument("--tracks", nargs="+", default=["pretrain", "classify"], choices=["pretrain", "classify"])
    parser.add_argument("--sweep", choices=SWEEPS, help="time bare and ours as this grows, instead of the peers")
    parser.add_argument("--method", help="of the pretraining track, by its name")
    parser.add_argument("--values", nargs="+", help="of the sweep; if left out, those of the script's SWEEPS")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    given = {field.name: getattr(options, field.name) for field in fields(Sizes)}
    if given["projector"]:
        given["projector"] = tuple(given["projector"])
    base = QUICK if options.quick else Sizes()
    return options, replace(base, **{name: value for name, value in given.items() if value is not None})


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures the tracks and prints, and with --json writes after every row, the table."""
    options, sizes = parse(arguments)
    head = {"hardware": hardware(), "packages": package_versions(), "code": code_version()}
    # Not the folders' names, which mean something on this machine alone.
    given = {name: getattr(sizes, name) is not None for name in ("data_path", "authors")}
    head |= {"threads": torch.get_num_threads(), "sizes": asdict(sizes) | {"sweep": options.sweep, **given}}
    rows: list[dict[str, Any]] = []
    for track in options.tracks:
        values = options.values or SWEEPS.get(options.sweep, ())
        if options.sweep != "method":
            values = [int(value) for value in values]
        measured = sweep(track, sizes, options.sweep, values) if options.sweep else measure(track, sizes)
        for row in measured:
            rows.append(row)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                about = {**head, "load_average": os.getloadavg()[0], "rows": rows}
                options.json.write_text(json.dumps(about, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
    leave(0)
