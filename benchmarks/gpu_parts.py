"""The parts of `gpu.py` that are measured in a process of their own: the step's variants, memory, the views' kernels.

PYTHONPATH=. python benchmarks/gpu_parts.py ablation --json FILE      # or memory, views; --tiny on the CPU
"""

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

PEAK_TFLOPS = 790  # dense bf16, measured on an H200 and on an H100 by one large matrix product


def ablation(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The plain step against compiled and captured ones, their speed and share of the peak; after each track, all."""
    from steps import QUICK, Sizes
    from throughput import race

    tiny, seconds = options.tiny, options.seconds
    sizes = replace(QUICK if tiny else Sizes(), stem=options.stem, turns=1 if tiny else 3)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for number, track in enumerate(("pretrain", "classify"), 1):
        flops, ready, warm = step_flops(track, sizes), {}, {}
        known = variants(track, sizes, tiny)
        if unknown := set(options.variants or ()) - set(known):
            raise ValueError(f"--variants must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
        for name, make in known.items():
            if options.variants and name not in options.variants:
                continue
            mark = time.monotonic()
            if ready and mark - started > 0.4 * number * seconds:  # the rest is for the race
                rows.append({"track": track, "what": name, "status": "skipped: no time left"})
                continue
            try:
                run = make()
                run(2 if tiny else 10)  # compiles, records
            except Exception as error:  # an experiment may fail; that is its result
                rows.append({"track": track, "what": name, "status": f"{type(error).__name__}: {error}"[:300]})
                continue
            ready[name], warm[name] = run, time.monotonic() - mark
        measured = race(ready, steps=sizes.steps, turns=sizes.turns)
        for name, values in measured.items():
            step = sorted(values)[len(values) // 2]
            rate = flops / step / 1e12
            rows.append(
                {"track": track, "what": name, "status": "measured", "images_per_second": round(sizes.batch / step, 1),
                 "ms_per_step": 1e3 * step, "first_steps_seconds": round(warm[name], 1), "gflop_per_step": flops / 1e9,
                 "tflop_per_second": rate, "share_of_peak": rate / PEAK_TFLOPS}
            )  # fmt: skip
        yield rows


def variants(track: str, sizes: Any, tiny: bool) -> dict[str, Callable[[], Callable[[int], None]]]:
    """What the ablation compares. Without a GPU there are no graphs, and compilation stops before the compiler."""
    import torch
    from steps import bare, build_trainer, end_to_end

    default: dict[str, Any] = {"backend": "aot_eager"} if tiny else {"mode": "default"}

    def compiled(**how: Any) -> Callable[[int], None]:
        trainer = build_trainer(track, sizes, every=0)
        for child in trainer.module.children():
            child.compile(**how)
        step = bare(trainer)

        def run(steps: int) -> None:
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                step(1)

        return run

    made: dict[str, Callable[[], Callable[[int], None]]] = {
        "bare": lambda: bare(build_trainer(track, sizes, every=0)),
        "end to end, plain steps": lambda: end_to_end(build_trainer(track, sizes, graphs=False)),
        "bare, compiled": lambda: compiled(**default),
        "end to end, plain steps, compile=true": lambda: end_to_end(
            build_trainer(track, sizes, compile_options=default, graphs=False)
        ),
    }
    if torch.cuda.is_available():
        made = {
            "end to end": lambda: end_to_end(build_trainer(track, sizes)),
            "end to end, compile=true": lambda: end_to_end(build_trainer(track, sizes, compile_options=default)),
            **made,
            "bare, forward and backward as one CUDA graph": lambda: graphed(track, sizes, whole=False),
            "bare, the whole step as one CUDA graph": lambda: graphed(track, sizes, whole=True),
            "bare, compiled with reduce-overhead": lambda: compiled(mode="reduce-overhead"),
        }
    return made


def graphed(track: str, sizes: Any, *, whole: bool) -> Callable[[int], None]:
    """The bare step replayed: the passes as a run replays them, or all of it, which is an experiment and not a mode."""
    import torch
    from steps import bare, build_trainer

    trainer = build_trainer(track, sizes, every=0)
    views = tuple(view.clone() for view in next(iter(trainer.pipeline.batches(0, 1))).views(0))
    if not whole:

        def run(steps: int) -> None:
            for _ in range(steps):
                trainer.gradient(trainer.model, lambda _: views, 1, trainer.accelerator.backward)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad(set_to_none=True)

        run(10)  # records
        return run
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        bare(trainer)(3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = trainer.module.loss(**trainer.model(*views))["loss"]
        loss.backward()
        trainer.optimizer.step()

    def replay(steps: int, _keep: Any = (loss, trainer, views)) -> None:
        for _ in range(steps):
            graph.replay()

    return replay


def step_flops(track: str, sizes: Any) -> int:
    """Floating-point operations of a step's forward and backward, as torch counts them."""
    from steps import bare, build_trainer
    from torch.utils.flop_counter import FlopCounterMode

    step = bare(build_trainer(track, sizes, every=0, plain=True))  # on a GPU all convolutions are torch's
    with FlopCounterMode(display=False) as counter:
        step(1)
    return counter.get_total_flops()


def memory(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Peak memory and time of a Barlow Twins step at B = 16,384, in chunks and whole; after each, all so far."""
    import torch
    from steps import QUICK, Sizes, build_trainer, end_to_end, synchronize

    cuda = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for chunk in (4, None) if options.tiny else (512, 2048, 8192, None):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        whole = QUICK if options.tiny else replace(Sizes(), batch=16384, images=50_000)
        sizes = replace(whole, stem=options.stem, chunk=chunk)
        row: dict[str, Any] = {"batch": sizes.batch, "chunk": chunk}
        try:
            step = end_to_end(build_trainer("pretrain", sizes))
            step(1)
            synchronize()
            started = time.perf_counter()
            step(1)
            synchronize()
            row["seconds_per_step"] = time.perf_counter() - started
        except torch.OutOfMemoryError as error:
            row["status"] = f"out of memory: {error}"[:300]
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:  # of the whole process so far
            row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(row)
        yield rows


def views(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What the views of a step ask of the device, by kernels of their own and by the plain program; after each, all."""
    import torch
    from steps import QUICK, Sizes, build_trainer, synchronize
    from torch.profiler import ProfilerActivity, profile

    cuda, steps, rows = torch.cuda.is_available(), 10, []
    sizes = QUICK if options.tiny else Sizes()
    for track in ("pretrain", "classify"):
        pipeline = build_trainer(track, sizes, every=0, graphs=False).pipeline
        for own in (True, False):
            for view in pipeline.views:
                view._has_kernel = own  # type: ignore[attr-defined]
            batches = pipeline.batches(0, 2 * steps + 2)
            for _ in range(steps):
                next(batches).views(0)
            synchronize()
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
                for _ in range(steps):
                    next(batches).views(0)
                synchronize()
            events = [
                (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count) for e in profiler.key_averages()
            ]
            milliseconds, launches = (sum(values) / steps for values in zip(*events, strict=True))
            row = {"track": track, "own_kernels": own, "ms_per_step": milliseconds / 1e3, "launches_per_step": launches}
            rows.append(row)
            yield rows


OWN: dict[str, Callable[[argparse.Namespace], Iterator[list[dict[str, Any]]]]] = {
    "ablation": ablation,
    "memory": memory,
    "views": views,
}


def main() -> None:
    """Measures a part; writes the JSON after each of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=OWN)
    parser.add_argument("--json", type=Path, required=True, help="where to keep the result")
    parser.add_argument("--seconds", type=float, default=60, help="about how long")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet", help="of the ResNet-18")
    parser.add_argument("--variants", nargs="+", help="only these of the ablation, e.g. bare 'end to end'")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, tiny sizes: shows that it runs")
    options = parser.parse_args()
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for rows in OWN[options.part](options):
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
