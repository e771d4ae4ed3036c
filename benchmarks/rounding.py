"""How far rounding alone moves a gradient: the same batch in another order, in float32 and in float64.

    python benchmarks/rounding.py --json benchmarks/results/rounding-cpu.json     # a minute on two cores
    python benchmarks/rounding.py --quick                                         # seconds, tiny: that it runs

Barlow Twins on ResNet-18 with the ImageNet stem, with its ReLUs and with softplus in their place. The loss does not
depend on the order of the pairs, so any difference is rounding: of sums taken in another order, and of what a network
makes of it. This is why two correct runs on different numbers of processes part after some steps.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.methods import BarlowTwins
from ssl_bench.models.backbone import create_backbone
from ssl_bench.records.provenance import code_version, hardware, package_versions


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


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="pairs of images")
    parser.add_argument("--quick", action="store_true", help="tiny")
    parser.add_argument("--json", type=Path, help="file for the record")
    options = parser.parse_args(arguments)
    batch, projector = (8, (16, 16)) if options.quick else (options.batch, (2048, 2048, 4096))
    rows = measure(batch, projector)
    if options.json:
        record = {"batch": batch, "projector": projector, "rows": rows, "code": code_version()}
        record |= {"hardware": hardware(), "packages": package_versions()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
