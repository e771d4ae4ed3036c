"""Evaluation: ours beside lightly's and plain torch's kNN, and beside linear heads trained one at a time.

    python benchmarks/evaluation.py --json benchmarks/results/evaluation-cpu.json     # about three minutes
    python benchmarks/evaluation.py --quick                                           # seconds: does it still run?

Four cases, each measured at the size it prints, without extrapolation:

- knn: the classes of 10,000 queries by a vote of their 200 nearest among 50,000 features of 512 dimensions.
- probe: one epoch of every head of `linear-cached-v1`'s grid, ours all at once, torch's (nn.Linear, autograd,
  torch.optim.SGD) one after the other, on the same features; with 10 classes and with 200.
- protocols: all of knn-v1 and linear-cached-v1 on given features, at CIFAR-10's size; with --tiny-imagenet at its too.
- features: ResNet18's features of 10,000 images in bf16, and beside it a Barlow Twins training step (forward, backward
  and SGD, two views) on a batch that is already on the device, both in images per second.

The contestants of a case take turns, so that noise on the machine hits all of them alike: compare ratios. On a shared
machine CPU seconds (summed over threads; only a single thread's do not count waiting) say more than wall time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.eval import KNN, LinearCached, Probe, extract_features, knn_predict
from ssl_bench.eval.linear import fit
from ssl_bench.methods import METHODS
from ssl_bench.models.backbone import create_backbone
from ssl_bench.records.provenance import hardware, package_versions

DIM = 512
Row = dict[str, object]


def make_features(n: int, classes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, 512) features like a ResNet's, non-negative and clustered by class but overlapping, and (n,) labels."""
    centres = torch.randn(classes, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    noise = torch.randn(n, DIM, generator=generator)
    return (0.3 * centres[labels] + noise).relu().to(device), labels.to(device)


Times = list[tuple[float, float]]  # (wall, CPU) seconds of each turn


def take_turns(contestants: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, Times]:
    """The time of each contestant in each turn; ``warm_up`` adds a first turn that is not counted."""
    times: dict[str, Times] = {name: [] for name in contestants}
    for turn in range(repeats + warm_up):
        for name, run in contestants.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            synchronize()
            if turn >= warm_up:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(case: str, size: str, times: dict[str, Times]) -> list[Row]:
    """One row per contestant, ours first, with the ratios of wall time and of the CPU time of all threads."""
    rows: list[Row] = []
    ours: tuple[float, float] | None = None
    for name, turns in times.items():
        wall, cpu = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
        ours = ours or (wall, cpu)
        row: Row = {"case": case, "size": size, "what": name, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
        row["runs"] = [round(turn[0], 3) for turn in turns]
        if len(times) > 1:
            row["ours_is_faster_by"] = round(wall / ours[0], 2)
            row["ours_takes_less_cpu_by"] = round(cpu / max(ours[1], 1e-9), 2)
        rows.append(row)
    return rows


def torch_knn(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, chunk: int = 512) -> Tensor:
    """The usual way: a matrix product, topk and a weighted count, a chunk of queries at a time."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predictions = []
    for part in queries.split(chunk):
        cosines, indices = (part @ bank.T).topk(k, dim=1)
        scores = torch.zeros(len(part), classes, device=bank.device)
        predictions.append(scores.scatter_add_(1, labels[indices], (cosines / 0.07).exp()).argmax(dim=1))
    return torch.cat(predictions)


def lightly_knn(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, chunk: int = 512) -> Tensor:
    """lightly's function, called as lightly's benchmark does: a chunk of queries at a time, the bank transposed."""
    from lightly.utils.benchmarking import knn_predict as lightly_predict

    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    parts = [lightly_predict(part, bank, labels, classes, k, 0.07)[:, 0] for part in queries.split(chunk)]
    return torch.cat(parts)


def knn_case(n: int, queries: int, k: int, repeats: int, device: torch.device) -> list[Row]:
    bank, labels = make_features(n, 10, 1, device)
    test, _ = make_features(queries, 10, 2, device)
    expected = torch_knn(bank, labels, test, 10, k).cpu()
    agree = (knn_predict(bank, labels, test, (k,))[k] == expected).double().mean().item()
    assert agree > 0.999, f"ours and torch's must agree on 99.9% of queries, got {agree:.2%}"
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
    """One epoch of each head on its own, as a probe is usually written."""
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
        fit(x, y, classes=classes, grid=grid, seeds=list(range(seeds)), epochs=1, batch_size=LinearCached.batch_size)

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
    """Whole protocols, once; there is no other contestant, so there are no ratios."""
    probe = Probe.from_features(*make_features(n, classes, 1, device), *make_features(tests, classes, 2, device))
    probe.features("train"), probe.features("test")  # made once, and not a part of the protocols' time
    rows: list[Row] = []
    for evaluator in evaluators:
        times = take_turns({evaluator.name: lambda e=evaluator: e(probe)}, 1, warm_up=False)
        rows += rows_of("protocols", f"{n} + {tests} features, {classes} classes", times)
    return rows


class Pixels:
    """Random images in memory."""

    def __init__(self, n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
        self.labels = torch.zeros(n, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.images[index.to(self.images.device)] for index in indices)


def feature_case(n: int, batch: int, projector: tuple[int, int, int], repeats: int, device: torch.device) -> list[Row]:
    """Extraction and, for comparison, the training step before it; both in bf16, in images per second."""
    pixels = Pixels(n, device)
    backbone, dim = create_backbone("resnet18", stem="imagenet")
    method = METHODS["barlow_twins"](backbone, dim, projector=projector).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9, fused=True)
    views = [torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last) for _ in "12"]

    def step() -> None:
        method.train()
        with torch.autocast(device.type, torch.bfloat16):
            outputs = method(*views)
        method.loss(**{name: z.float() for name, z in outputs.items()})["loss"].backward()
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

    times = take_turns({"features": extract, "Barlow Twins step": step}, repeats)
    rows: list[Row] = []
    for name, images in (("features", n), ("Barlow Twins step", batch)):
        row = rows_of("features", f"ResNet18, batch {batch}, {images} images", {name: times[name]})[0]
        rows.append(row | {"images_per_second": round(images / statistics.median(turn[0] for turn in times[name]))})
    return rows


def environment() -> Row:
    """The versions and hardware that the numbers depend on."""
    return {
        "hardware": hardware(),
        "packages": package_versions("lightly"),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def describe(row: Row) -> str:
    note = ""
    if "ours_is_faster_by" in row:
        note = f"ours is faster by {row['ours_is_faster_by']}, takes less CPU by {row['ours_takes_less_cpu_by']}"
    elif "images_per_second" in row:
        note = f"{row['images_per_second']} images/s"
    seconds = f"{row['seconds']:9.3f} s {row['cpu_seconds']:9.3f} CPU s"
    return f"{row['case']:10} {row['size']:45} {row['what']:28} {seconds}   {note}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one turn: only checks that it runs")
    parser.add_argument(
        "--tiny-imagenet", action="store_true", help="also run both protocols at its size (minutes more)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median is reported, >= 1")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device, repeats = torch.device(options.device), 1 if options.quick else options.repeats
    small = options.quick
    cases: list[Callable[[], list[Row]]] = [
        lambda: knn_case(*((500, 100, 20) if small else (50_000, 10_000, 200)), repeats, device),
        lambda: probe_case(64 if small else 10_000, 10, repeats, device),
        lambda: probe_case(64 if small else 2_500, 200, repeats, device),
        lambda: (
            protocol_case(300, 100, 3, device, (KNN(), Shortened()))
            if small
            else protocol_case(50_000, 10_000, 10, device, (KNN(), LinearCached()))
        ),
        lambda: feature_case(*((32, 16, (8, 8, 16)) if small else (10_000, 512, (2048, 2048, 4096))), repeats, device),
    ]
    if options.tiny_imagenet:
        cases.append(lambda: protocol_case(100_000, 10_000, 200, device, (KNN(), LinearCached())))
    rows: list[Row] = []
    record = {"environment": environment(), "quick": small, "rows": rows}
    for case in cases:
        measured = case()
        print("\n".join(map(describe, measured)), flush=True)
        rows += measured
        if options.json:  # after every case, so that an interrupted run keeps what it has measured
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record | {"load_average_after": os.getloadavg()[0]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
