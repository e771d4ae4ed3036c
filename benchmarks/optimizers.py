"""Time an optimizer's step: ours beside torch's, timm's, lightly's and pytorch-optimizer's, in one run.

    python benchmarks/optimizers.py --json benchmarks/results/optimizers-cpu.json

Same parameters (ResNet-18 and the 2048-2048-4096 projector: 67 tensors, 24.8 M), same gradients. The contestants take
turns, so that other load on the machine hits them alike; compare medians, on a busy machine minima. The floor is the
time of the necessary passes over the parameters at the copying bandwidth measured in the same turns: LARS and TVLARS
read w and g for the norms, read w, g, b and write w, b for the update, 7 passes; LAMB 9 with v.
Needs the extra `bench`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly.utils.lars
import pytorch_optimizer
import timm.optim
import torch
import torchvision
from torch import nn

from ssl_bench.optim import LAMB, LARS, TVLARS, Telemetry, sgd
from ssl_bench.records.provenance import hardware, package_versions

PASSES = {"LARS": 7, "TVLARS": 7, "LAMB": 9, "SGD": 5}
LR, DECAY = 1e-6, 5e-4  # so small a learning rate that the parameters stay what they are


def build(quick: bool) -> nn.Module:
    """ResNet-18 without its head, and the Barlow Twins projector; quick: a tiny stand-in."""
    if quick:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16))
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    layers: list[nn.Module] = [backbone]
    for n_in, n_out in ((512, 2048), (2048, 2048)):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, 4096, bias=False))


def contestants(copies: Callable[[], list[nn.Parameter]], device: torch.device) -> dict[str, tuple[str, Any]]:
    """name -> (kind, step); `copies` makes parameters with gradients of their own where a peer changes them."""
    shared = copies()
    weights = [p for p in shared if p.ndim > 1]
    others = [p for p in shared if p.ndim <= 1]
    groups = lambda: [{"params": weights}, {"params": others, "weight_decay": 0.0}]  # noqa: E731
    lars = {"momentum": 0.9, "weight_decay": DECAY}
    recorded = LARS(shared, LR, **lars)
    Telemetry(recorded)
    made: dict[str, tuple[str, torch.optim.Optimizer]] = {
        "ours LARS": ("LARS", LARS(shared, LR, **lars)),
        "ours LARS, recorded": ("LARS", recorded),
        "ours LARS, not blocked": ("LARS", LARS(shared, LR, fused=False, **lars)),
        "ours TVLARS paper": ("TVLARS", TVLARS(shared, LR, **lars)),
        "ours TVLARS released": ("TVLARS", TVLARS(shared, LR, variant="released", **lars)),
        "ours TVLARS, not blocked": ("TVLARS", TVLARS(shared, LR, fused=False, **lars)),
        "ours LAMB": ("LAMB", LAMB(shared, LR, weight_decay=DECAY)),
        "ours LAMB, not blocked": ("LAMB", LAMB(shared, LR, weight_decay=DECAY, fused=False)),
        "ours SGD (torch fused)": ("SGD", sgd(shared, LR, 0.9, DECAY)),
        "torch SGD": ("SGD", torch.optim.SGD(shared, LR, **lars)),
        "torch SGD foreach": ("SGD", torch.optim.SGD(shared, LR, foreach=True, **lars)),
        "timm lars": ("LARS", timm.optim.Lars(groups(), LR, **lars)),
        "timm lamb": ("LAMB", timm.optim.Lamb(groups(), LR, weight_decay=DECAY, max_grad_norm=None)),
        "lightly LARS": ("LARS", lightly.utils.lars.LARS(groups(), LR, **lars)),
        "pytorch-optimizer LARS": ("LARS", pytorch_optimizer.LARS(copies(), LR, **lars)),
        "pytorch-optimizer Lamb": ("LAMB", pytorch_optimizer.Lamb(copies(), LR, weight_decay=DECAY)),
    }
    steps: dict[str, tuple[str, Any]] = {name: (kind, optimizer.step) for name, (kind, optimizer) in made.items()}
    if device.type == "cuda":
        for name, make in (("LARS", LARS), ("TVLARS", TVLARS), ("LAMB", LAMB)):
            rate = torch.tensor(LR, device=device)
            optimizer = make(shared, rate, weight_decay=DECAY)
            steps[f"ours {name}, compiled"] = (name, torch.compile(optimizer.step))
    return steps


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, with the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def training_step(module: nn.Module, device: torch.device, batch: int) -> Callable[[], None]:
    """Forward and backward of two views in bf16, to see what telemetry's cost is a share of."""
    x = torch.randn(2 * batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    module = module.to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            z = module(x)
        z.float().square().mean().backward()

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contestants in turns and sum the figures up."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    module = build(args.quick).to(device)
    module(torch.randn(2, 3, 32, 32, device=device))  # gives lazy layers their shapes
    shapes = [p.shape for p in module.parameters()] * args.copies
    total = sum(s.numel() for s in shapes)

    def copies() -> list[nn.Parameter]:
        out = []
        for shape in shapes:
            p = nn.Parameter(torch.randn(shape, device=device) * 0.03)
            p.grad = torch.randn(shape, device=device) * 1e-3
            out.append(p)
        return out

    source, target = torch.randn(total, device=device), torch.empty(total, device=device)
    steps = contestants(copies, device)
    times: dict[str, list[float]] = {name: [] for name in ("copy", *steps)}
    for turn in range(args.turns + 2):  # two turns to warm up
        for name, call in (("copy", lambda: target.copy_(source)), *((n, s[1]) for n, s in steps.items())):
            ms = timed(call, device)
            if turn >= 2:
                times[name].append(ms)
    step = training_step(module, device, args.batch)
    step_ms = statistics.median([timed(step, device) for _ in range(4)][1:])
    return summary(args, times, {name: kind for name, (kind, _) in steps.items()}, len(shapes), total, step_ms) | {
        "hardware": hardware(),
        "packages": package_versions("lightly", "pytorch-optimizer", "ssl-bench"),
        "threads": torch.get_num_threads(),
    }


RIVALS = (
    ("ours LARS", "timm lars"),
    ("ours TVLARS paper", "timm lars"),
    ("ours TVLARS released", "timm lars"),
    ("ours LAMB", "timm lamb"),
    ("ours LARS", "lightly LARS"),
    ("ours LARS", "pytorch-optimizer LARS"),
    ("ours LAMB", "pytorch-optimizer Lamb"),
)


def summary(
    args: argparse.Namespace,
    times: dict[str, list[float]],
    kinds: dict[str, str],
    tensors: int,
    parameters: int,
    step_ms: float,
) -> dict[str, Any]:
    """Medians, floors and ratios of the milliseconds in `times`, among them the plain copy's."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = {
        name: {
            "ms": medians[name],
            "ms_min": min(times[name]),
            "ms_max": max(times[name]),
            "floor_ms": PASSES[kind] * medians["copy"] / 2,
            "times_floor": medians[name] / (PASSES[kind] * medians["copy"] / 2),
            "times_floor_of_minima": min(times[name]) / (PASSES[kind] * min(times["copy"]) / 2),
        }
        for name, kind in kinds.items()
    }
    extra_ms = medians["ours LARS, recorded"] - medians["ours LARS"]
    return {
        "benchmark": "optimizer step",
        "command": f"python benchmarks/optimizers.py --turns {args.turns} --copies {args.copies} --batch {args.batch}",
        "tensors": tensors,
        "parameters": parameters,
        "turns": args.turns,
        "bandwidth_GBps": 2 * 4e-9 * parameters / (medians["copy"] / 1e3),
        "steps": rows,
        "faster_than": {f"{ours} vs {theirs}": medians[theirs] / medians[ours] for ours, theirs in RIVALS},
        "telemetry": {
            "batch": args.batch,
            "training_step_ms": step_ms,
            "recorded_step_extra_ms": extra_ms,
            "share_when_every_step": extra_ms / step_ms,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{result['tensors']} tensors, {result['parameters'] / 1e6:.1f} M parameters, "
        f"copy {result['bandwidth_GBps']:.0f} GB/s, median of {result['turns']} turns"
    )
    print(f"{'':26}{'ms':>9}{'floor':>9}{'x floor':>9}{'of minima':>11}")
    for name, row in result["steps"].items():
        print(
            f"{name:26}{row['ms']:9.2f}{row['floor_ms']:9.2f}{row['times_floor']:9.2f}{row['times_floor_of_minima']:11.2f}"
        )
    for pair, ratio in result["faster_than"].items():
        print(f"{pair}: {ratio:.2f} x")
    t = result["telemetry"]
    print(
        f"telemetry: {t['recorded_step_extra_ms']:+.2f} ms a recorded step, {100 * t['share_when_every_step']:.2f}% of "
        f"a training step of batch {t['batch']} ({t['training_step_ms']:.0f} ms)"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--turns", type=int, default=15, help="steps of each contestant, >= 1")
    parser.add_argument("--copies", type=int, default=1, help="how often the model's tensors occur, >= 1: 1x ... 8x")
    parser.add_argument("--batch", type=int, default=64, help="images per training step, for telemetry's share")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few turns, to see that the script works")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.quick:
        args.turns, args.batch = 2, 4
    result = measure(args)
    show(result)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
