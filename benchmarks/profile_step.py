"""Where a training step's time goes: torch's profiler over some steps of the suite's own loop.

    python benchmarks/profile_step.py --json benchmarks/results/profile-cpu.json     # a minute on two cores
    python benchmarks/profile_step.py --quick                                        # seconds, tiny: that it runs

The parts are: data (which images, and copying them), augmentation (parameters drawn and applied), forward, loss,
backward, optimizer, telemetry (the extra norms that a recorded step takes count as the optimizer's), watching (logged
scalars, the search for NaN), other (whatever is left of the wall clock: the profiler's own cost too). On a GPU a part's
time is that of the kernels it started; copies and kernels of two streams overlap, so shares are of their sum, and
"busy" is that sum over the wall clock. Without a profiler a step is faster: for speed ask throughput.py.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from steps import QUICK, Sizes, build_trainer, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ssl_bench.augment.views import Labels
from ssl_bench.optim import Telemetry
from ssl_bench.records.provenance import code_version, hardware, package_versions
from ssl_bench.training.loop import Trainer

PARTS = ("data", "augmentation", "forward", "loss", "backward", "optimizer", "telemetry", "watching")
PREFIX = "step: "  # of the parts' names among the profiler's events
ENGINE = "autograd::engine::evaluate_function"  # what runs a backward's operations, on a GPU in a thread of its own


def part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time booked to a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return call


class BookedTelemetry(Telemetry):
    """Telemetry that books its time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("_start", "_finish", "columns"):  # before they are registered as the optimizer's hooks
            setattr(self, name, part("telemetry", getattr(self, name)))
        super().__init__(*args, **kwargs)


class BookedAugmentation:
    """An augmentation that books its time."""

    def __init__(self, augmentation: Any) -> None:
        self.draw = part("augmentation", augmentation.draw)
        self.apply = part("augmentation", augmentation)

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.apply(*args)


def book(trainer: Trainer) -> None:
    """Makes every part of the loop's step book its time."""
    trainer.pipeline.views = [
        view if isinstance(view, Labels) else BookedAugmentation(view) for view in trainer.pipeline.views
    ]
    batches = trainer.pipeline.batches

    def booked_batches(start: int, stop: int) -> Iterator[Any]:
        iterator = batches(start, stop)
        get = part("data", lambda: next(iterator, None))
        while (batch := get()) is not None:
            yield batch

    trainer.pipeline.batches = booked_batches  # type: ignore[method-assign]
    module: Any = trainer.module
    module.loss = part("loss", module.loss)
    module.forward = part("forward", module.forward)
    gradient = trainer.gradient

    def booked_gradient(model: Any, views: Any, n_chunks: int, backward: Any, context: Any) -> Any:
        return gradient(model, views, n_chunks, part("backward", backward), context)

    trainer.gradient = booked_gradient
    trainer._take_step = part("optimizer", trainer._take_step)  # type: ignore[method-assign]
    trainer.guard.look = part("watching", trainer.guard.look)  # type: ignore[method-assign]
    trainer.meter.add = part("watching", trainer.meter.add)  # type: ignore[method-assign]
    trainer._begin_line = part("watching", trainer._begin_line)  # type: ignore[method-assign]
    trainer._end_line = part("watching", trainer._end_line)  # type: ignore[method-assign]


def booked_ms(events: Any, device: str) -> dict[str, float]:
    """Milliseconds of each part over all steps, what is nested in it and booked to another part taken off."""
    total: dict[str, float] = defaultdict(float)

    def spent(event: Any) -> float:
        return (event.device_time_total if device == "cuda" else event.cpu_time_total) / 1e3

    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # the ranges' shadows on the GPU's timeline
        outer = enclosing(event)
        if event.name.startswith(PREFIX):
            total[event.name.removeprefix(PREFIX)] += spent(event)
            if outer is not None:
                total[outer] -= spent(event)
        elif device == "cuda" and outer is None and event.name.startswith(ENGINE):
            total["backward"] += spent(event)
    return {name: total[name] for name in PARTS}


def enclosing(event: Any) -> str | None:
    """The part that an event is nested in."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(PREFIX):
        parent = parent.cpu_parent
    return None if parent is None else parent.name.removeprefix(PREFIX)


def measure(track: str, sizes: Sizes, top: int) -> dict[str, Any]:
    """The shares of a step's parts on one track, and the operations that take longest."""
    trainer = build_trainer(track, sizes, telemetry=BookedTelemetry)
    trainer.rhythm.total = 2  # warms up
    trainer.run()
    book(trainer)
    device = trainer.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    trainer.rhythm.total += sizes.steps
    synchronize()
    with profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        trainer.run()
        synchronize()
        wall_ms = 1e3 * (time.perf_counter() - started)
    parts = booked_ms(profiler.events(), device)
    averages = profiler.key_averages()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # On a GPU the kernels' own events; on the CPU the operations.
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    own = [(row.key, getattr(row, key) / 1e3) for row in averages if row.device_type == wanted]
    own = sorted((row for row in own if not row[0].startswith(PREFIX)), key=lambda row: -row[1])
    # What a GPU's share is a share of: the time of all its kernels and copies.
    whole = sum(ms for _, ms in own) if device == "cuda" else wall_ms
    parts["other"] = whole - sum(parts.values())
    return {
        "track": track,
        "steps": sizes.steps,
        "wall_ms_per_step": wall_ms / sizes.steps,
        "busy": whole / wall_ms,
        "parts": {name: {"ms_per_step": ms / sizes.steps, "share": ms / whole} for name, ms in parts.items()},
        "operations": [{"name": name, "ms_per_step": ms / sizes.steps, "share": ms / whole} for name, ms in own[:top]],
    }


def show(result: dict[str, Any]) -> None:
    """Prints one track's table."""
    print(f"{result['track']}: {result['wall_ms_per_step']:.1f} ms per step under the profiler", end="")
    print(f", GPU busy {100 * result['busy']:.0f}% of it" if torch.cuda.is_available() else "")
    for name, row in result["parts"].items():
        print(f"  {name:14}{row['ms_per_step']:10.2f} ms {100 * row['share']:6.1f}%")
    print("  the longest operations, by their own time:")
    for row in result["operations"]:
        print(f"    {row['name'][:60]:60}{row['ms_per_step']:10.2f} ms {100 * row['share']:6.1f}%")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Profiles the tracks; prints, and with --json writes, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet", help="of the ResNet-18")
    parser.add_argument("--steps", type=int, default=10, help="steps under the profiler; one in ten is recorded")
    parser.add_argument("--top", type=int, default=12, help="operations to list")
    parser.add_argument("--tracks", nargs="+", default=["pretrain", "classify"], choices=["pretrain", "classify"])
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else replace(Sizes(), steps=options.steps, stem=options.stem)
    if options.batch:
        sizes = replace(sizes, batch=options.batch)
    results = []
    for track in options.tracks:
        results.append(measure(track, sizes, options.top))
        show(results[-1])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"hardware": hardware(), "packages": package_versions(), "code": code_version()}
        about |= {"threads": torch.get_num_threads(), "batch": sizes.batch, "stem": sizes.stem, "results": results}
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
