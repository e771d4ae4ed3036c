"""Everything that needs a GPU, in one call of under ten minutes; the JSON is written after each part.

    PYTHONPATH=. python benchmarks/gpu.py --data-path FOLDER --json benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --tiny                  # on the CPU, a minute, measures nothing: that it still runs

FOLDER holds CIFAR-10 as parquet files. Every part is its own process with a time limit: if it fails, hangs or is late,
only its own numbers are lost, and its entry says so. The parts: both accuracies by the suite's own commands
(classification for 100 epochs, Barlow Twins for 30, seed 0), throughput.py, compilation and CUDA graphs against the
plain step with the share of the card's peak, memory at B = 16,384, the views' kernels, optimizers.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts import PEAK_TFLOPS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
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
        command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--seconds", str(seconds), "--json", str(out)]
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
    options = parser.parse_args(arguments)
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
