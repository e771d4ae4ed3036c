"""Everything that needs a GPU, in one call of under ten minutes; the JSON is written after each part.

    PYTHONPATH=. python benchmarks/gpu.py --data-path FOLDER --json benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --tiny                  # on the CPU, a minute, measures nothing: that it still runs

FOLDER holds CIFAR-10 as parquet files. Every part is its own process with a time limit: if it fails, hangs or is late,
only its own numbers are lost, and its entry says so. The parts: both accuracies by the suite's own commands
(classification for 100 epochs, Barlow Twins for 30, seed 0), throughput.py, compilation and CUDA graphs against the
plain step with the share of the card's peak, memory at B = 16,384, the views' kernels, optimizers.py.
"""

import argparse
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEAK_TFLOPS = 790  # dense bf16, measured on an H200 and on an H100 by one large matrix product
LOG_TAIL = 2000  # characters of a failed part's output

TRAIN = ("data=cifar10", "batch_size=512", "precision=bf16", "eval.precision=bf16", "seed=0")
TRAIN += ("optimizer=lars", "optimizer.lr=2")
TINY_TRAIN = ("data=digits", "batch_size=32", "steps=2", "device=cpu", "eval.baseline=false")


@dataclass(frozen=True)
class Part:
    """One measurement."""

    seconds: float  # its budget
    command: list[str]
    result: Callable[[], Any]  # reads what the command left


def parts(options: argparse.Namespace, work: Path) -> dict[str, Part]:
    """What is measured, what matters most first; a training command is a user's own."""

    def script(name: str, seconds: float, *words: str) -> Part:
        out = work / f"{name}.json"
        return Part(
            seconds, [sys.executable, str(HERE / f"{name}.py"), *words, "--json", str(out)], lambda: read_json(out)
        )

    def own(name: str, seconds: float) -> Part:
        out = work / f"{name}.json"
        command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds), "--json", str(out)]
        command += ["--stem", options.stem, *(["--variants", *options.variants] if options.variants else [])]
        return Part(seconds, command + ["--tiny"] * options.tiny, lambda: read_json(out))

    def trained(track: str, seconds: float, *words: str) -> Part:
        run_dir = work / track
        base = TINY_TRAIN if options.tiny else (*TRAIN, f"data.path={options.data_path}", *words)
        if options.tiny and track == "pretrain":
            base += ("method.projector=[32,32]", "eval.protocols=[]")
        command = [
            sys.executable,
            str(ROOT / "ssl_bench" / f"{track}.py"),
            *base,
            f"model.stem={options.stem}",
            *options.set,
            f"run_dir={run_dir}",
        ]
        return Part(seconds, command, lambda: read_run(run_dir))

    quick = ["--quick"] * options.tiny
    workers = str(min(16, os.cpu_count() or 1))
    less = ["--stem", options.stem]
    less += ["--tracks", "classify"] if options.tiny else ["--workers", workers, "--turns", "3"]
    return {
        "classify": trained("classify", 80, "epochs=100", "eval.test_every_epochs=10"),
        "pretrain": trained("pretrain", 90, "epochs=30", "eval.protocols=[knn-v1,linear-cached-v1]"),
        "throughput": script("throughput", 110, *quick, *less),
        "ablation": own("ablation", 190),
        "memory": own("memory", 50),
        "views": own("views", 30),
        "optimizers": script("optimizers", 50, *quick, *(("--device", "cpu") if options.tiny else ())),
    }


def read_json(path: Path) -> Any:
    """A file's content, None where it has none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's accuracies and speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_second"] for line in lines)
    results = read_json(run_dir / "results.json") or {"status": "not finished"}
    return {
        "status": results["status"],
        "steps": lines[-1]["step"],
        "training_seconds": lines[-1]["seconds"],
        "images_per_second": rates[len(rates) // 2],
        "evaluations": [
            {"protocol": entry["protocol"], "model": entry["model"], **entry["metrics"], "n_test": entry["n_test"]}
            for entry in results.get("evaluations", [])
        ],
    }


def run_part(part: Part, left: float, log: Path, hide: Callable[[str], str]) -> dict[str, Any]:
    """Runs one part for at most its budget and what is left of the call's; its entry of the record."""
    limit = min(part.seconds, left)
    entry: dict[str, Any] = {"command": hide(" ".join(part.command)), "limit": round(limit)}
    if limit < min(5, part.seconds):
        return entry | {"status": "skipped: no time left"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            part.command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "done" if process.wait(limit) == 0 else f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its loading processes too
                process.wait()
    entry |= {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if status != "done":
        entry["log"] = hide(log.read_text(errors="replace")[-LOG_TAIL:])
    try:
        entry["result"] = part.result()
    except (OSError, ValueError, LookupError) as error:  # nothing, or not all of it, was left behind
        entry["result"] = hide(f"{type(error).__name__}: {error}")
    return entry


# What runs in a process of its own ------------------------------------------------------------------------------------


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


# The call -------------------------------------------------------------------------------------------------------------


def show(name: str, entry: dict[str, Any]) -> None:
    """Prints a part's numbers."""
    print(f"== {name}: {entry['status']}, {entry.get('seconds', 0):.0f} s", flush=True)
    if entry["status"].startswith("failed"):
        print(entry["log"])
    result = entry.get("result")
    rows = result.get("rows", [result]) if isinstance(result, dict) else result
    if name == "optimizers" and isinstance(result, dict):
        rows = [{"what": what, "ms": row["ms"], "floor": row["floor_ms"]} for what, row in result["steps"].items()]
    for row in rows if isinstance(rows, list) else [rows]:
        print("  ", json.dumps(row), flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the parts one after the other; prints, and with --json writes after each, what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", help="CIFAR-10's folder of parquet files")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--parts", nargs="+", help="only these; all if left out")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet", help="of the ResNet-18")
    parser.add_argument("--variants", nargs="+", help="only these of the ablation, e.g. bare 'end to end'")
    parser.add_argument("--set", nargs="+", default=[], help="key=value for both training commands, e.g. compile=true")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, tiny sizes: shows that it runs")
    parser.add_argument("--part", choices=OWN, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.part:
        for rows in OWN[options.part](options):
            options.json.write_text(json.dumps(rows))
        return {}
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny shows on the CPU that the script runs")
    if not options.tiny and options.data_path is None:
        parser.error("--data-path must be the folder of CIFAR-10's parquet files, got nothing")
    return measure(options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, and what they ran on."""
    from ssl_bench.records.provenance import code_version, hardware, now, package_versions

    started = time.monotonic()
    record: dict[str, Any] = {"started": now(), "hardware": hardware(), "packages": package_versions()}
    record |= {"code": code_version(), "peak_tflops": PEAK_TFLOPS, "stem": options.stem, "tiny": options.tiny}
    record["parts"] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chosen = parts(options, work)
        unknown = set(options.parts or ()) - set(chosen)
        if unknown:
            raise ValueError(f"--parts must be among {', '.join(chosen)}, got {', '.join(sorted(unknown))}")
        names = {str(work): "WORK", sys.executable: "python", f"{ROOT}/": ""}
        if options.data_path:
            names[options.data_path] = "FOLDER"

        def hide(text: str) -> str:
            """Without this machine's paths."""
            for path, name in names.items():
                text = text.replace(path, name)
            return text

        for name, part in chosen.items():
            if options.parts and name not in options.parts:
                continue
            left = 60 * options.minutes - (time.monotonic() - started)
            record["parts"][name] = run_part(part, left, work / f"{name}.log", hide)
            record["seconds"] = round(time.monotonic() - started, 1)
            show(name, record["parts"][name])
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
