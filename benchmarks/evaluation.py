"""Evaluation: ours beside lightly's and plain torch's kNN, and beside linear heads trained one at a time.

    python benchmarks/evaluation.py --json benchmarks/results/evaluation-cpu.json     # about ten minutes
    python benchmarks/evaluation.py --quick                                           # seconds: does it still run?

Four cases, each measured at the size it prints, nothing extrapolated:

- knn: the classes of 10,000 queries by a vote of their 200 nearest among 50,000 features of 512 dimensions.
- probe: one epoch of every head of `linear-cached-v1`'s grid, ours all at once, torch's (nn.Linear, autograd,
  torch.optim.SGD) one after the other, on the same features; with 10 classes and with 200.
- protocols: knn-v1 and linear-cached-v1 whole, features given, at CIFAR-10's size and at Tiny ImageNet's.
- features: ResNet18's features of 10,000 images in bf16, and beside it a Barlow Twins training step (forward, backward
  and SGD, two views) with the batch already there, both in images a second.

The contestants of a case take turns, so that a noisy machine is equally unkind to all: compare ratios.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.backbone import create_backbone
from ssl_bench.eval import KNN, LinearCached, extract_features, knn_predict
from ssl_bench.eval.linear import fit
from ssl_bench.methods import METHODS

DIM = 512
Row = dict[str, object]


def make_features(n: int, classes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, 512) features like a ResNet's, non-negative and clustered by class but overlapping, and (n,) labels."""
    centres = torch.randn(classes, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    noise = torch.randn(n, DIM, generator=generator)
    return (0.3 * centres[labels] + noise).relu().to(device), labels.to(device)


def take_turns(contestants: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, list]:
    """Seconds of each contestant in each of the turns; a first turn is run and dropped where asked."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + warm_up):
        for name, run in contestants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(case: str, size: str, seconds: dict[str, list[float]]) -> list[Row]:
    """One row for each contestant, the first of them ours."""
    ours = statistics.median(next(iter(seconds.values())))
    return [
        {
            "case": case,
            "size": size,
            "what": name,
            "seconds": round(statistics.median(runs), 3),
            "runs": [round(run, 3) for run in runs],
            "ours_is_faster_by": round(statistics.median(runs) / ours, 2),
        }
        for name, runs in seconds.items()
    ]


def torch_knn(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, chunk: int = 512) -> Tensor:
    """The plain way: a product, topk and a weighted count, a chunk of queries at a time."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predictions = []
    for part in queries.split(chunk):
        cosines, indices = (part @ bank.T).topk(k, dim=1)
        scores = torch.zeros(len(part), classes, device=bank.device)
        predictions.append(scores.scatter_add_(1, labels[indices], (cosines / 0.07).exp()).argmax(dim=1))
    return torch.cat(predictions)


def lightly_knn(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, chunk: int = 512) -> Tensor:
    """lightly's function as lightly's own benchmark calls it: a chunk of queries at a time, the bank transposed."""
    from lightly.utils.benchmarking import knn_predict as lightly_predict

    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    parts = [lightly_predict(part, bank, labels, classes, k, 0.07)[:, 0] for part in queries.split(chunk)]
    return torch.cat(parts)


def knn_case(n: int, queries: int, k: int, repeats: int, device: torch.device) -> list[Row]:
    bank, labels = make_features(n, 10, 1, device)
    test, _ = make_features(queries, 10, 2, device)
    expected = torch_knn(bank, labels, test, 10, k).cpu()
    agree = (knn_predict(bank, labels, test, (k,))[k] == expected).double().mean().item()
    assert agree > 0.999, f"ours and torch's agree on {agree:.2%} only"
    contestants: dict[str, Callable[[], object]] = {
        f"ssl_bench, k = {k}": lambda: knn_predict(bank, labels, test, (k,)),
        "torch mm + topk": lambda: torch_knn(bank, labels, test, 10, k),
    }
    try:
        lightly_knn(bank, labels, test[:64], 10, k)
        contestants["lightly knn_predict"] = lambda: lightly_knn(bank, labels, test, 10, k)
    except ImportError as error:
        print(f"  lightly: skipped ({error})")
    return rows_of("knn", f"{n} x {DIM} bank, {queries} queries", take_turns(contestants, repeats))


def one_at_a_time(x: Tensor, y: Tensor, classes: int, grid: list[tuple[float, float]], seeds: int) -> None:
    """One epoch of each head by itself, as a probe is usually written."""
    for _ in range(seeds):
        for lr, weight_decay in grid:
            head = nn.Linear(DIM, classes, device=x.device)
            optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
            for index in torch.randperm(len(x), device=x.device).split(LinearCached.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(head(x[index]), y[index]).backward()
                optimizer.step()


def probe_case(n: int, classes: int, repeats: int, device: torch.device) -> list[Row]:
    x, y = make_features(n, classes, 1, device)
    grid = [(lr, weight_decay) for lr in LinearCached.lrs for weight_decay in LinearCached.weight_decays]
    seeds = LinearCached.probe_seeds

    def ours() -> None:
        fit(
            x,
            y,
            classes=classes,
            lrs=[lr for lr, _ in grid],
            weight_decays=[weight_decay for _, weight_decay in grid],
            seeds=list(range(seeds)),
            epochs=1,
            batch_size=LinearCached.batch_size,
        )

    heads = seeds * len(grid)
    contestants: dict[str, Callable[[], object]] = {
        f"ssl_bench, {heads} heads at once": ours,
        f"torch, {heads} heads in turn": lambda: one_at_a_time(x, y, classes, grid, seeds),
    }
    return rows_of("probe", f"1 epoch of {n} x {DIM}, {classes} classes", take_turns(contestants, repeats))


class Shortened(LinearCached):
    """For --quick."""

    name = "linear-cached, shortened"
    epochs = min_steps = 2


def protocol_case(
    n: int, tests: int, classes: int, device: torch.device, evaluators: tuple[KNN | LinearCached, ...]
) -> list[Row]:
    """Whole protocols, once; no other contestant, so no ratio means anything here."""
    train_x, train_y = make_features(n, classes, 1, device)
    test_x, test_y = make_features(tests, classes, 2, device)
    contestants: dict[str, Callable[[], object]] = {
        evaluator.name: lambda evaluator=evaluator: evaluator(train_x, train_y, test_x, test_y)
        for evaluator in evaluators
    }
    rows = rows_of("protocols", f"{n} + {tests} features, {classes} classes", take_turns(contestants, 1, False))
    return [{key: value for key, value in row.items() if key != "ours_is_faster_by"} for row in rows]


class Pixels:
    """Random images, resident."""

    def __init__(self, n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
        self.labels = torch.zeros(n, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.images[index.to(self.images.device)] for index in indices)


def feature_case(n: int, batch: int, repeats: int, device: torch.device) -> list[Row]:
    """Extraction and, for scale, the step of the training that it follows; both in bf16, images a second."""
    pixels = Pixels(n, device)
    backbone, dim = create_backbone("resnet18", stem="imagenet")
    method = METHODS["barlow_twins"](backbone, dim).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9, fused=True)
    views = [torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last) for _ in "12"]

    def step() -> None:
        method.train()
        with torch.autocast(device.type, torch.bfloat16):
            loss = method(*views)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def extract() -> None:
        extract_features(
            backbone,
            pixels,
            lambda images: images.float() / 128 - 1,
            batch_size=batch,
            device=device,
            precision="bf16",
            output_device=device,
        )

    seconds = take_turns({"features": extract, "Barlow Twins step": step}, repeats)
    return [
        {
            "case": "features",
            "size": f"ResNet18, 32 pixels, batch {batch}, {images} images",
            "what": name,
            "seconds": round(statistics.median(seconds[name]), 3),
            "runs": [round(run, 3) for run in seconds[name]],
            "images_per_second": round(images / statistics.median(seconds[name])),
        }
        for name, images in (("features", n), ("Barlow Twins step", batch))
    ]


def environment() -> Row:
    """What the figures depend on."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    packages = ("torch", "faiss-gpu", "faiss-cpu", "lightly", "timm", "numpy")
    return {
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "cpu": models[0].split(": ")[1] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn: only to see that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="turns whose median is kept, >= 1")
    parser.add_argument("--json", type=Path, help="write the figures here; without it they are only printed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device, repeats = torch.device(options.device), 1 if options.quick else options.repeats
    record: dict[str, object] = {"environment": environment(), "quick": options.quick}
    small = options.quick
    cases: list[Callable[[], list[Row]]] = [
        lambda: knn_case(*((500, 100, 20) if small else (50_000, 10_000, 200)), repeats, device),
        lambda: probe_case(512 if small else 10_000, 10, repeats, device),
        lambda: probe_case(512 if small else 2_500, 200, repeats, device),
        lambda: (
            protocol_case(300, 100, 3, device, (KNN(), Shortened()))
            if small
            else protocol_case(50_000, 10_000, 10, device, (KNN(), LinearCached()))
        ),
        lambda: feature_case(*((64, 16) if small else (10_000, 512)), repeats, device),
    ]
    if not small:
        cases.append(lambda: protocol_case(100_000, 10_000, 200, device, (KNN(), LinearCached())))
    rows: list[Row] = []
    for case in cases:
        for row in case():
            ratio = row.get("ours_is_faster_by")
            rate = row.get("images_per_second")
            note = f"ours is faster by {ratio}" if ratio else f"{rate} images/s" if rate else ""
            print(f"{row['case']:10} {row['size']:55} {row['what']:28} {row['seconds']:9.3f} s   {note}", flush=True)
            rows.append(row)
    record["rows"] = rows
    record["load_average_after"] = os.getloadavg()[0]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
