"""Time a training step: bare compute, ours end to end, and peers doing the same work, in one run.

    python benchmarks/throughput.py --json benchmarks/results/throughput-cpu.json

Bare is forward, backward and optimizer step on one batch that is augmented and on the device already: the least that
training can take. Ours is the suite's loop, with data, augmentation, telemetry and logging every 10 steps. The peers
load PIL images through a DataLoader: lightly's transforms, loss and LARS for Barlow Twins, torchvision's transforms and
torch's SGD for classification. The contestants take turns; medians count. An image is two views in pretraining.
Needs the extra `bench`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_bench.augment import PadCropFlipRotate, SSLView
from ssl_bench.classifier import Classifier
from ssl_bench.gradient import full_batch
from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import LARS, Telemetry, build_groups
from ssl_bench.pipeline import Pipeline
from ssl_bench.provenance import hardware, package_versions
from ssl_bench.sampling import VIEW1, VIEW2
from ssl_bench.sources import ResidentSource
from ssl_bench.train import Rhythm, Trainer

STATS: dict[str, Any] = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
Steps = Callable[[int], None]  # runs so many training steps


class NoRecord:
    """Takes what the loop hands over and forgets it."""

    def log(self, row: dict[str, float]) -> None:
        """One line of the metrics."""

    def log_telemetry(self, columns: dict[str, Any]) -> None:
        """One block of layer statistics."""


def build_task(track: str, sizes: argparse.Namespace) -> nn.Module:
    """The network of a track: ResNet-18 with the ImageNet stem, and the projector or a classifier's head."""
    classifier = Classifier.create("resnet18", 10, stem="imagenet", init="torchvision", seed=0)
    if track == "classify":
        return classifier
    return BarlowTwins(classifier.backbone, 512, projector=sizes.projector)


def ours(track: str, sizes: argparse.Namespace, *, end_to_end: bool, telemetry: int = 10) -> Steps:
    """Our loop, or with ``end_to_end=False`` the bare compute of its step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    device = accelerator.device
    task = build_task(track, sizes).to(device, memory_format=torch.channels_last)
    optimizer = LARS(build_groups(task, lr=0.1, weight_decay=5e-4, lr_1d=1e-3), lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    images = torch.randint(0, 256, (sizes.images, 3, sizes.pixels, sizes.pixels), dtype=torch.uint8)
    source = ResidentSource(images, torch.arange(sizes.images) % 10).to(device)
    options = {**STATS, "dtype": torch.bfloat16}
    view = [SSLView(sizes.pixels, solarize_p=p, **options) for p in (0.0, 0.2)]
    pipeline = Pipeline(
        source, view if track == "pretrain" else [PadCropFlipRotate(**options)],
        (VIEW1, VIEW2)[: 2 if track == "pretrain" else 1], seed=0, batch_size=sizes.batch, chunk_size=None,
        rank=0, world_size=1, device=device, with_labels=track == "classify",
    )  # fmt: skip
    model, wrapped = accelerator.prepare(task, optimizer)
    if not end_to_end:
        views = next(pipeline.batches(0, 1)).views(0)

        def bare(steps: int) -> None:
            for _ in range(steps):
                model(*views)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return bare
    trainer = Trainer(
        model=model, optimizer=wrapped, schedule=lambda _step: 1.0, gradient=full_batch, pipeline=pipeline,
        rhythm=Rhythm(0, log=10, checkpoint=0, check_equal=0), accelerator=accelerator, record=NoRecord(),
        telemetry=Telemetry(optimizer, every=telemetry), save=lambda _step, _state: None, interrupted=lambda: False,
        progress=lambda _step, _row: None,
    )  # fmt: skip

    def run(steps: int) -> None:
        trainer.rhythm.total = trainer.step + steps
        trainer.run()

    return run


class PilImages(Dataset):
    """Random PIL images under a transform, as a peer's data set gives them."""

    def __init__(self, sizes: argparse.Namespace, transform: Callable[[Image.Image], Any]):
        shape = (sizes.images, sizes.pixels, sizes.pixels, 3)
        self.arrays = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.arrays[index])), index % 10


def forever(images: PilImages, sizes: argparse.Namespace) -> Iterator[Any]:
    """A DataLoader's batches without end."""
    workers = sizes.workers
    loader = DataLoader(
        images, sizes.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return chain.from_iterable(repeat(loader))


def peer(sizes: argparse.Namespace, images: PilImages, task: nn.Module, optimizer: Any, loss: Any, bf16: bool) -> Steps:
    """A plain loop over a DataLoader; ``loss(task, inputs, labels)`` gives the scalar to differentiate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.to(device)
    batches = forever(images, sizes)

    def run(steps: int) -> None:
        for _ in range(steps):
            inputs, labels = next(batches)
            inputs = [x.to(device) for x in inputs] if isinstance(inputs, list) else inputs.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                value = loss(task, inputs, labels.to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return run


def lightly_twins(sizes: argparse.Namespace, *, bf16: bool) -> Steps:
    """Barlow Twins of lightly's parts: transforms, loss and LARS, on the same network."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from lightly.utils.lars import LARS as LightlyLARS

    views = [kind(input_size=sizes.pixels, gaussian_blur=0.0) for kind in (BYOLView1Transform, BYOLView2Transform)]
    task = build_task("pretrain", sizes)
    criterion = BarlowTwinsLoss()

    def loss(model: Any, inputs: list[Tensor], _labels: Tensor) -> Tensor:
        z1, z2 = (model.embed(x) for x in inputs)
        return criterion(z1.float(), z2.float())

    optimizer = LightlyLARS(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return peer(sizes, PilImages(sizes, BYOLTransform(*views)), task, optimizer, loss, bf16)


def torchvision_classifier(sizes: argparse.Namespace, *, bf16: bool) -> Steps:
    """Classification as torchvision's users write it, with torch's SGD."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(sizes.pixels, padding=4), v2.RandomHorizontalFlip(), v2.RandomRotation(15),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(STATS["mean"], STATS["std"]),
        ]
    )  # fmt: skip
    task = build_task("classify", sizes)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images = PilImages(sizes, transform)
    return peer(sizes, images, task, optimizer, lambda model, x, y: model(x, y)["loss"], bf16)


def contestants(track: str, sizes: argparse.Namespace) -> dict[str, Steps]:
    """Everything that runs against each other on one track; the first is the bare compute, the second ours."""
    made = {
        "bare compute, bf16": ours(track, sizes, end_to_end=False),
        "ssl_bench end to end, bf16": ours(track, sizes, end_to_end=True),
        "ssl_bench, no telemetry, bf16": ours(track, sizes, end_to_end=True, telemetry=0),
    }
    for bf16 in (True, False):
        label = "bf16" if bf16 else "fp32"
        if track == "pretrain":
            made[f"lightly end to end, {label}"] = lightly_twins(sizes, bf16=bf16)
        else:
            made[f"torchvision + SGD end to end, {label}"] = torchvision_classifier(sizes, bf16=bf16)
    return made


def measure(track: str, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """Median images/s of every contestant over interleaved turns, and its time over the bare compute's."""
    runs = contestants(track, sizes)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(sizes.turns + 1):  # the first one warms up
        for name, steps in runs.items():
            started = time.perf_counter()
            steps(sizes.steps)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / sizes.steps)
    bare, mine = list(runs)[:2]
    rows = []
    for name, values in seconds.items():
        # Turn by turn, so that a change of the machine's load meets both sides of a ratio.
        over_bare = statistics.median(a / b for a, b in zip(values, seconds[bare], strict=True))
        over_ours = statistics.median(a / b for a, b in zip(values, seconds[mine], strict=True))
        rate = sizes.batch / statistics.median(values)
        rows.append(
            {"track": track, "what": name, "images_per_second": round(rate, 1), "time_over_bare": round(over_bare, 3),
             "time_over_ours": round(over_ours, 3), "seconds_per_step": [round(value, 4) for value in values]}
        )  # fmt: skip
        print(
            f"{track:9} {name:40} {rate:8.0f} images/s   {over_bare:5.2f} x bare   {over_ours:5.2f} x ours", flush=True
        )
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures both tracks and prints, and with --json writes, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=512, help="images per step")
    parser.add_argument("--pixels", type=int, default=32, help="side of an image")
    parser.add_argument("--projector", type=int, nargs="+", default=[2048, 2048, 4096], help="widths")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns that count, after one to warm up")
    parser.add_argument("--workers", type=int, default=2, help="the peers' loading processes")
    parser.add_argument("--images", type=int, default=10_000, help="images in the data set")
    parser.add_argument("--tracks", nargs="+", default=["pretrain", "classify"])
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    sizes = parser.parse_args(arguments)
    if sizes.quick:
        sizes.batch, sizes.projector, sizes.steps, sizes.turns, sizes.workers, sizes.images = 8, [16, 16], 1, 1, 0, 32
    sizes.projector = tuple(sizes.projector)
    rows = [row for track in sizes.tracks for row in measure(track, sizes)]
    if sizes.json:
        load = os.getloadavg()[0]
        settings = {name: value for name, value in vars(sizes).items() if name != "json"}
        head = {"hardware": hardware(), "packages": package_versions(), "threads": torch.get_num_threads()}
        sizes.json.write_text(
            json.dumps({**head, "load_average": load, "sizes": settings, "rows": rows}, indent=1) + "\n"
        )
    return rows


if __name__ == "__main__":
    main()
