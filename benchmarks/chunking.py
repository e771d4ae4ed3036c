"""Large batches in little memory: what chunk_size and recompute=blocks save in memory and cost in time.

    python benchmarks/chunking.py --json benchmarks/results/chunking-cpu.json     # some minutes on two cores
    python benchmarks/chunking.py --kinds recomputed --plain-batch 512 --json benchmarks/results/recompute-cpu.json
    python benchmarks/chunking.py --quick                                         # seconds, tiny: that it runs

Barlow Twins on a ResNet-18 (ImageNet stem) with the 2048-2048-4096 projector and LARS, float32, 32x32 images whose
views are made anew in each pass. Each memory figure is the peak resident memory of a process of its own, interpreter,
images and optimizer included. Times are medians over interleaved steps of both kinds in one process, by the wall clock
and as the processor time of all its threads, which other work on the machine disturbs less.

Then the CIFAR stem at B = 16,384 in bf16, whole: the most that torch's allocator for GPUs holds at a time, counted on
the null GPU (null_gpu/), whose kernels do nothing; left out where that cannot be built.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 6  # GiB at the largest batch
TIME_LIMIT = 4 / 3  # of the plain step: one more forward pass
GPU_LIMIT = 30  # GiB of a whole CIFAR-stem step with recompute=blocks
KINDS = ("plain", "chunked", "recomputed")


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


def stepper(sizes: Sizes, *, recompute: bool = False) -> Callable[[int, int], float]:
    """Builds images, network and optimizer; returns step(batch, chunk), which takes one step and gives its loss."""
    import torch

    from ssl_bench.augment.views import SSLView, take
    from ssl_bench.methods import BarlowTwins
    from ssl_bench.models.backbone import create_backbone
    from ssl_bench.optim import LARS
    from ssl_bench.runtime import seeds
    from ssl_bench.training.gradient import compute_gradient
    from ssl_bench.training.memory.recompute import recompute_blocks

    torch.manual_seed(0)
    images = torch.randint(0, 256, (sizes.batch, 3, sizes.pixels, sizes.pixels), dtype=torch.uint8)
    backbone, features = create_backbone("resnet18", stem="imagenet")
    model = BarlowTwins(backbone, features, projector=sizes.projector).to(memory_format=torch.channels_last)
    if recompute:
        recompute_blocks(model)
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


def measure_memory(sizes: Sizes, batch: int, chunk: int, recompute: int) -> dict[str, Any]:
    """The peak of this process over one step, after a small one that allocates the optimizer's state."""
    step = stepper(sizes, recompute=bool(recompute))
    step(sizes.chunk, sizes.chunk)
    start = time.perf_counter()
    loss = step(batch, chunk)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kind = "recomputed" if recompute else "plain" if batch == chunk else "chunked"
    return {"kind": kind, "batch": batch, "chunk": chunk, "peak_gib": peak / 2**30, "seconds": seconds, "loss": loss}


def count_gpu_memory(sizes: Sizes, batch: int, recompute: int) -> dict[str, Any]:
    """The most that torch's allocator for GPUs holds in a whole step of the CIFAR stem, bf16."""
    import torch

    from ssl_bench.methods import BarlowTwins
    from ssl_bench.models.backbone import create_backbone
    from ssl_bench.training.gradient import compute_gradient
    from ssl_bench.training.memory.recompute import recompute_blocks

    backbone, features = create_backbone("resnet18", stem="cifar")
    model = BarlowTwins(backbone, features, projector=sizes.projector).cuda().to(memory_format=torch.channels_last)
    if recompute:
        recompute_blocks(model)
    shape, layout = (batch, 3, sizes.pixels, sizes.pixels), torch.channels_last
    views = tuple(torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=layout) for _ in range(2))
    forward = model.forward

    def cast(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return forward(*inputs)

    model.forward = cast
    compute_gradient(model, lambda _: views, 1, torch.Tensor.backward)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"kind": KINDS[2 * recompute], "batch": batch, "counted_gib": peak}


def null_gpu(folder: Path) -> dict[str, str] | None:
    """The environment of a process with a null GPU; None where there is none."""
    sys.path.insert(0, str(Path(__file__).parent))
    from null_gpu import build

    return None if build.obstacle() else build.build(folder)


def measure_time(sizes: Sizes, *kinds: int) -> dict[str, Any]:
    """Medians of plain steps and of some other `KINDS` of one batch, taken in turns."""
    step, again = stepper(sizes), stepper(sizes, recompute=True)
    every = (step, sizes.plain_batch), (step, sizes.chunk), (again, sizes.plain_batch)
    ways = {KINDS[kind]: every[kind] for kind in (0, *kinds)}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(sizes.repeats + 1):
        for name, (take, chunk) in ways.items():
            start = time.perf_counter(), time.process_time()
            take(sizes.plain_batch, chunk)
            if repeat:  # the first is a warm-up
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    result: dict[str, Any] = {"batch": sizes.plain_batch, "chunk": sizes.chunk}
    for clock, seconds in (("wall", wall), ("processor", processor)):
        result[clock] = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
        for name in list(ways)[1:]:
            ratios = [other / plain for plain, other in zip(seconds["plain"], seconds[name], strict=True)]
            result[clock][name] = {"ratio": statistics.median(ratios), "ratios": ratios}
    return result


def measure(sizes: Sizes, kind: str, *numbers: int) -> dict[str, Any]:
    """One measurement, in this process."""
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "memory": measure_memory,
        "time": measure_time,
        "gpu": count_gpu_memory,
    }
    return kinds[kind](sizes, *numbers)


def measure_in_own_process(
    sizes: Sizes, kind: str, *numbers: int, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """One measurement in a process whose memory is its own: runs this file again and reads what it prints."""
    command = [sys.executable, __file__, "--plain-batch", str(sizes.plain_batch), "--measure", kind, *map(str, numbers)]
    env = (environment or os.environ) | {"OMP_WAIT_POLICY": "passive"}  # threads that wait count no processor time
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def report(sizes: Sizes, take: Callable[..., dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    """Takes all measurements of these kinds beside the plain step's, and prints them."""
    plain, chunk = sizes.plain_batch, sizes.chunk
    cases = [(plain, plain, 0)]
    cases += [(plain, chunk, 0), (sizes.batch, chunk, 0)] if "chunked" in kinds else []
    cases += [(plain, plain, 1)] if "recomputed" in kinds else []
    memory = []
    for case in cases:
        memory.append(row := take(sizes, "memory", *case))
        print(
            f"B = {row['batch']:6d} {row['kind']:10s} peak {row['peak_gib']:6.2f} GiB {row['seconds']:7.1f} s",
            flush=True,
        )
    timing = take(sizes, "time", *(KINDS.index(name) for name in kinds))
    for name in kinds:
        wall, processor = (timing[clock][name]["ratio"] for clock in ("wall", "processor"))
        print(
            f"{name} / plain: {wall:.3f} by the wall clock, {processor:.3f} in processor time; limit {TIME_LIMIT:.3f}"
        )
    counted = take is not measure and "recomputed" in kinds
    return {
        "sizes": asdict(sizes),
        "limits": {"peak_gib": MEMORY_LIMIT, "ratio": TIME_LIMIT, "counted_gib": GPU_LIMIT},
        "memory": memory,
        "time": timing,
        "gpu_memory": count_on_null_gpu(sizes) if counted else [],
    }


def count_on_null_gpu(sizes: Sizes) -> list[dict[str, Any]]:
    """`count_gpu_memory`, plain and recomputed; nothing where there is no null GPU."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = null_gpu(Path(folder))
        for recompute in (0, 1) if environment else ():
            rows.append(row := measure_in_own_process(sizes, "gpu", sizes.batch, recompute, environment=environment))
            print(f"B = {row['batch']:6d} {row['kind']:10s} {row['counted_gib']:6.2f} GiB by the allocator's count")
    return rows


def main() -> None:
    """Parses the arguments; measures one thing with ``--measure``, else everything, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes in one process: that it runs, not how well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, with hardware and versions")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:], help="beside the plain step; all")
    parser.add_argument("--plain-batch", type=int, default=Sizes.plain_batch, help="images of the compared steps")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = replace(Sizes(), plain_batch=arguments.plain_batch)
    if arguments.measure:
        kind, *numbers = arguments.measure
        print(json.dumps(measure(sizes, kind, *map(int, numbers))))
        return
    take = measure if arguments.quick else measure_in_own_process
    results = report(QUICK if arguments.quick else sizes, take, arguments.kinds)
    if arguments.json:
        from ssl_bench.records.provenance import code_version, hardware, package_versions, torch_settings

        about = {"hardware": hardware(), "packages": package_versions(), "torch": torch_settings()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"code": code_version(), **about, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
