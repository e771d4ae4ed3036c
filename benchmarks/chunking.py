"""Exact large batches in little memory: what GradCache saves in memory and costs in time.

    python benchmarks/chunking.py --json benchmarks/results/chunking-cpu.json     # some minutes on two cores
    python benchmarks/chunking.py --quick                                         # seconds, tiny: that it runs

Barlow Twins on a ResNet-18 (ImageNet stem) with the 2048-2048-4096 projector and LARS, float32, 32x32 images whose
views are made anew in each pass. Each memory figure is the peak resident memory of a process of its own, interpreter,
images and optimizer included. Times are medians over interleaved steps of both kinds in one process, by the wall clock
and as the processor time of all its threads, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 6  # GiB at the largest batch
TIME_LIMIT = 4 / 3  # of the plain step: one more forward pass


@dataclass(frozen=True)
class Sizes:
    """What is measured: images at a time, and the network."""

    batch: int = 16384  # the batch to fit
    plain_batch: int = 2048  # the batch of the comparison, which the plain step can hold
    chunk: int = 512
    repeats: int = 3
    projector: tuple[int, ...] = (2048, 2048, 4096)
    pixels: int = 32


QUICK = Sizes(batch=32, plain_batch=16, chunk=8, repeats=1, projector=(32, 64))


def stepper(sizes: Sizes) -> Callable[[int, int], float]:
    """Builds images, network and optimizer; returns step(batch, chunk), which takes one step and gives its loss."""
    import torch

    from ssl_bench.augment.views import SSLView, take
    from ssl_bench.methods import BarlowTwins
    from ssl_bench.models.backbone import create_backbone
    from ssl_bench.optim import LARS
    from ssl_bench.runtime import seeds
    from ssl_bench.training.gradient import compute_gradient

    torch.manual_seed(0)
    images = torch.randint(0, 256, (sizes.batch, 3, sizes.pixels, sizes.pixels), dtype=torch.uint8)
    backbone, features = create_backbone("resnet18", stem="imagenet")
    model = BarlowTwins(backbone, features, projector=sizes.projector).to(memory_format=torch.channels_last)
    optimizer = LARS(model.parameters(), lr=0.1)
    statistics_ = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    augmentations = [SSLView(sizes.pixels, **statistics_), SSLView(sizes.pixels, solarize_p=0.2, **statistics_)]

    def step(batch: int, chunk: int) -> float:
        params = [
            view.draw(batch, seeds.generator(0, stream))
            for view, stream in zip(augmentations, (seeds.VIEW1, seeds.VIEW2), strict=True)
        ]

        def views(index: int) -> tuple[torch.Tensor, ...]:
            rows = slice(index * chunk, (index + 1) * chunk)
            return tuple(view(images[rows], take(p, rows)) for view, p in zip(augmentations, params, strict=True))

        loss = compute_gradient(model, views, batch // chunk, lambda value: value.backward())["loss"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def measure_memory(sizes: Sizes, batch: int, chunk: int) -> dict[str, Any]:
    """The peak of this process over one step, after a small one that allocates the optimizer's state."""
    step = stepper(sizes)
    step(sizes.chunk, sizes.chunk)
    start = time.perf_counter()
    loss = step(batch, chunk)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"batch": batch, "chunk": chunk, "peak_gib": peak / 2**30, "seconds": seconds, "loss": loss}


def measure_time(sizes: Sizes) -> dict[str, Any]:
    """Medians of plain and chunked steps of one batch, taken in turns."""
    step = stepper(sizes)
    wall: dict[str, list[float]] = {"plain": [], "chunked": []}
    processor: dict[str, list[float]] = {"plain": [], "chunked": []}
    for repeat in range(sizes.repeats + 1):
        for name, chunk in (("plain", sizes.plain_batch), ("chunked", sizes.chunk)):
            start = time.perf_counter(), time.process_time()
            step(sizes.plain_batch, chunk)
            if repeat:  # the first is a warm-up
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    result: dict[str, Any] = {"batch": sizes.plain_batch, "chunk": sizes.chunk}
    for clock, seconds in (("wall", wall), ("processor", processor)):
        ratios = [chunked / plain for plain, chunked in zip(seconds["plain"], seconds["chunked"], strict=True)]
        medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
        result[clock] = medians | {"ratio": statistics.median(ratios), "ratios": ratios}
    return result


def measure(sizes: Sizes, kind: str, *numbers: int) -> dict[str, Any]:
    """One measurement, in this process."""
    return measure_time(sizes) if kind == "time" else measure_memory(sizes, *numbers)


def measure_in_own_process(_: Sizes, kind: str, *numbers: int) -> dict[str, Any]:
    """One measurement in a process whose memory is its own: runs this file again and reads what it prints."""
    command = [sys.executable, __file__, "--measure", kind, *map(str, numbers)]
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that wait count no processor time
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def report(sizes: Sizes, take: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Takes all measurements and prints them."""
    cases = [(sizes.plain_batch, sizes.plain_batch), (sizes.plain_batch, sizes.chunk), (sizes.batch, sizes.chunk)]
    memory = []
    for batch, chunk in cases:
        memory.append(take(sizes, "memory", batch, chunk))
        kind = "plain" if batch == chunk else f"chunks of {chunk}"
        print(f"B = {batch:6d} {kind:14s} peak {memory[-1]['peak_gib']:6.2f} GiB  {memory[-1]['seconds']:7.1f} s")
    timing = take(sizes, "time")
    wall, processor = timing["wall"]["ratio"], timing["processor"]["ratio"]
    print(f"chunked / plain: {wall:.3f} by the wall clock, {processor:.3f} in processor time; limit {TIME_LIMIT:.3f}")
    return {
        "sizes": asdict(sizes),
        "limits": {"peak_gib": MEMORY_LIMIT, "ratio": TIME_LIMIT},
        "memory": memory,
        "time": timing,
    }


def main() -> None:
    """Parses the arguments; measures one thing with ``--measure``, else everything, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes in one process: that it runs, not how well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, with hardware and versions")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, *numbers = arguments.measure
        print(json.dumps(measure(Sizes(), kind, *map(int, numbers))))
        return
    results = report(QUICK, measure) if arguments.quick else report(Sizes(), measure_in_own_process)
    if arguments.json:
        from ssl_bench.records.provenance import code_version, hardware, package_versions, torch_settings

        about = {"hardware": hardware(), "packages": package_versions(), "torch": torch_settings()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"code": code_version(), **about, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
