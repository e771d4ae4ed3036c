"""How far rounding alone moves a gradient: the same batch in another order, in float32 and in float64.

    python benchmarks/rounding.py --json benchmarks/results/rounding-cpu.json     # a minute on two cores
    python benchmarks/rounding.py --quick                                         # seconds, tiny: that it runs

Barlow Twins on ResNet-18 with the ImageNet stem, with its ReLUs and with softplus in their place. The loss does not
depend on the order of the pairs, so any difference is rounding: of sums taken in another order, and of what a network
makes of it. This is why two correct runs on different numbers of processes part after some steps.

Then the two ways in which batch norm is computed on the CPU, by torch's kernel (one process) and by plain operations
(several processes), here on one process each: the gradient's error against float64 on batches of 64
digits, and the processor time of forward and backward, taken in turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.data.dataset import load_dataset
from ssl_bench.methods import BarlowTwins
from ssl_bench.models.backbone import create_backbone
from ssl_bench.records.provenance import code_version, hardware, package_versions
from ssl_bench.runtime.sync_batchnorm import SyncBatchNorm

WAYS = ("torch's kernel", "operations")


def network(activation: Callable[[], nn.Module], projector: tuple[int, ...]) -> BarlowTwins:
    """The method on a ResNet-18 with another activation."""
    torch.manual_seed(0)
    backbone, features = create_backbone("resnet18", stem="imagenet", seed=0)
    method = BarlowTwins(backbone, features, projector=projector)
    for parent in list(method.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, activation())
    return method


def gradient(method: BarlowTwins, views: list[Tensor]) -> Tensor:
    """All parameters' gradient as one vector, in float64."""
    loss = method.loss(**method(*views))["loss"]
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(method.parameters()))])


def measure(batch: int, projector: tuple[int, ...]) -> list[dict[str, Any]]:
    """|g - g'| / |g| for a batch and the same batch permuted."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, batch, 3, 32, 32, generator=generator)
    order = torch.randperm(batch, generator=generator)
    rows = []
    for name, activation in (("relu", nn.ReLU), ("softplus", nn.Softplus)):
        for dtype in (torch.float32, torch.float64):
            method = network(activation, projector).to(dtype)
            views = [view.to(dtype) for view in images]
            g = gradient(method, views)
            moved = gradient(method, [view[order] for view in views])
            share = float((g - moved).norm() / g.norm())
            rows.append({"activation": name, "dtype": str(dtype).removeprefix("torch."), "relative_change": share})
            print(f"{name:10} {rows[-1]['dtype']:8} |g - g permuted| / |g| = {share:.2e}", flush=True)
    return rows


class ByOperations(SyncBatchNorm):
    """The synchronised batch norm's operations on one process, where a run has torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (n, C, ...)."""
        return self._by_operations(x, None)[0]


def convert(module: nn.Module) -> None:
    """Replaces the batch norms in place."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, ByOperations.of(child))
        else:
            convert(child)


def batch_norms(batches: int, batch: int, projector: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each of the two ways, |g - g in float64| / |g| of some batches and the processor time beside torch's."""
    images = load_dataset("digits").train
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            return _batch_norms(images, batches, batch, projector)
        finally:
            dist.destroy_process_group()


def _batch_norms(images: Any, batches: int, batch: int, projector: tuple[int, ...]) -> list[dict[str, Any]]:
    exact, ways = network(nn.ReLU, projector).double(), {name: network(nn.ReLU, projector) for name in WAYS}
    convert(ways[WAYS[1]])
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(batches + 1):
        generator = torch.Generator().manual_seed(number)
        chosen = next(iter(images.batches([torch.randperm(len(images), generator=generator)[:batch]]))).double()
        chosen = (chosen - chosen.mean()) / chosen.std()
        noise = torch.randn(2, *chosen.shape, dtype=torch.float64, generator=generator)
        views = [chosen + 0.1 * one for one in noise]
        g = gradient(exact, views)
        for name, method in ways.items():
            start = time.process_time()
            found = gradient(method, [view.float() for view in views])
            if number:  # the first is a warm-up
                seconds[name].append(time.process_time() - start)
                errors[name].append(float((found - g).norm() / g.norm()))
    rows = []
    for name in WAYS:
        ratios = [one / torch_s for one, torch_s in zip(seconds[name], seconds[WAYS[0]], strict=True)]
        row = {"batch_norm": name, "batch": batch, "median_error": statistics.median(errors[name])}
        rows.append(row | {"errors": errors[name], "time_over_torch": statistics.median(ratios), "ratios": ratios})
        print(
            f"{name:14} error against float64: median {row['median_error']:.1e}, worst {max(errors[name]):.1e}; ",
            end="",
        )
        print(f"{rows[-1]['time_over_torch']:.2f} times the processor time of torch's", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="pairs of images")
    parser.add_argument("--quick", action="store_true", help="tiny")
    parser.add_argument("--json", type=Path, help="file for the record")
    options = parser.parse_args(arguments)
    batch, projector = (8, (16, 16)) if options.quick else (options.batch, (2048, 2048, 4096))
    rows = measure(batch, projector)
    norms = batch_norms(1, 8, projector) if options.quick else batch_norms(9, 64, projector)
    if options.json:
        record = {"batch": batch, "projector": projector, "rows": rows, "batch_norm": norms, "code": code_version()}
        record |= {"hardware": hardware(), "packages": package_versions()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
