"""Time a training step: bare compute, ours end to end, and peers doing the same work, in one run.

    python benchmarks/throughput.py --json benchmarks/results/throughput-cpu.json     # six minutes on two cores
    python benchmarks/throughput.py --sweep pixels --json FILE    # bare and ours as images grow; or batch, projector
    python benchmarks/throughput.py --quick                       # seconds, tiny: that it runs

Bare is forward, backward and optimizer step on one batch that is augmented and on the device already: the least that
training can take with our network; the same with torch's convolutions everywhere is what everybody else's network
takes at least. Ours is the suite's loop, with data, augmentation, telemetry and logging every 10 steps. The peers
load PIL images through a DataLoader: lightly's transforms, loss and LARS for Barlow Twins, torchvision's transforms and
torch's SGD for classification. The contestants take turns; medians count. An image is two views in pretraining.
Needs the extra `bench` for lightly; a peer that is not installed is left out. The TVLARS paper's own code is timed from
a checkout: `git clone https://github.com/KhoiDOO/tvlars && git -C tvlars checkout 89c3291`, then --authors tvlars.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
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
from ssl_bench.command import leave
from ssl_bench.data import load_dataset
from ssl_bench.gradient import accumulate, full_batch, grad_cache
from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import LARS, Telemetry, build_groups
from ssl_bench.pipeline import Pipeline
from ssl_bench.provenance import code_version, hardware, package_versions
from ssl_bench.sampling import VIEW1, VIEW2
from ssl_bench.small_maps import SmallMapConv2d
from ssl_bench.sources import ResidentSource
from ssl_bench.train import Rhythm, Trainer

STATS: dict[str, Any] = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
Steps = Callable[[int], None]  # runs so many training steps


@dataclass(frozen=True)
class Sizes:
    """What is timed; each field is an option of the command line."""

    batch: int = 512  # images per step
    pixels: int = 32  # side of an image
    projector: tuple[int, ...] = (2048, 2048, 4096)  # widths
    chunk: int | None = None  # images in memory at a time, for ours end to end; None = the whole batch
    steps: int = 4 if not torch.cuda.is_available() else 50  # of a turn
    turns: int = 5  # that count, after one to warm up
    workers: int = 2  # the peers' loading processes
    images: int = 10_000  # in the data set, at most
    data_path: str | None = None  # CIFAR-10's folder of parquet files; None = random images
    authors: str | None = None  # a checkout of github.com/KhoiDOO/tvlars (89c3291); None = leave their code out


QUICK = Sizes(batch=8, projector=(16, 16), steps=1, turns=1, workers=0, images=32)
# As work grows. 16,384 images of 32 x 32 take some 14 GiB as one batch.
SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (512, 1024, 2048, 4096, 8192, 16384),
    "pixels": (32, 48, 64, 96),
    "projector": (1024, 2048, 4096, 8192),
}


class NoRecord:
    """Takes what the loop hands over and forgets it."""

    def log(self, row: dict[str, float]) -> None:
        """One line of the metrics."""

    def log_telemetry(self, columns: dict[str, Any]) -> None:
        """One block of layer statistics."""


def build_task(track: str, sizes: Sizes, *, plain: bool = False) -> nn.Module:
    """The network of a track: ResNet-18 with the ImageNet stem, and the projector or a classifier's head.

    Args:
        track: "pretrain" or "classify".
        sizes: what is timed.
        plain: with torch's convolutions everywhere, as everybody else has them (see `ssl_bench.small_maps`).
    """
    classifier = Classifier.create("resnet18", 10, stem="imagenet", init="torchvision", seed=0)
    for module in classifier.modules():
        if plain and type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d
    if track == "classify":
        return classifier
    return BarlowTwins(classifier.backbone, 512, projector=sizes.projector)


def load_images(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, pixels, pixels) and their labels: random ones, or CIFAR-10's first."""
    if sizes.data_path is None:
        n = max(sizes.images, sizes.batch)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, sizes.pixels, sizes.pixels), dtype=torch.uint8, generator=generator)
        return images, torch.arange(n) % 10
    train = load_dataset("cifar10", path=sizes.data_path, size=sizes.pixels).train
    first = torch.arange(min(max(sizes.images, sizes.batch), len(train)))
    return next(iter(train.batches([first]))), train.labels[first]


def build_trainer(
    track: str,
    sizes: Sizes,
    *,
    telemetry: Callable[..., Telemetry] = Telemetry,
    every: int = 10,
    plain: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> Trainer:
    """The suite's loop as a run builds it, without a run's directory.

    Args:
        track: "pretrain" or "classify".
        sizes: what is timed.
        telemetry: makes the recorder of an optimizer.
        every: steps between its records; 0 = off.
        plain: see `build_task`.
        compile_options: torch.compile's, for the network's parts (and, on a GPU, the views); None = not compiled.
    """
    pretraining = track == "pretrain"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    device = accelerator.device
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as a run sets it
    task = build_task(track, sizes, plain=plain).to(device, memory_format=torch.channels_last)
    optimizer = LARS(build_groups(task, lr=0.1, weight_decay=5e-4, lr_1d=1e-3), lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    options = {**STATS, "dtype": torch.bfloat16}
    compiled = compile_options is not None and device.type == "cuda"
    pipeline = Pipeline(
        ResidentSource(*load_images(sizes)).to(device),
        [SSLView(sizes.pixels, solarize_p=p, compile=compiled, **options) for p in (0.0, 0.2)]
        if pretraining else [PadCropFlipRotate(**options)],
        (VIEW1, VIEW2) if pretraining else (VIEW1,), seed=0, batch_size=sizes.batch, chunk_size=sizes.chunk,
        rank=0, world_size=1, device=device, with_labels=not pretraining,
    )  # fmt: skip
    gradient = full_batch if pipeline.n_chunks == 1 else grad_cache if pretraining else accumulate
    if compile_options is not None:
        for part in task.children():
            part.compile(**compile_options)
    model, wrapped = accelerator.prepare(task, optimizer)
    return Trainer(
        model=model, optimizer=wrapped, schedule=lambda _step: 1.0,
        gradient=partial(gradient, autocast=accelerator.autocast), pipeline=pipeline,
        rhythm=Rhythm(0, log=10, checkpoint=0, check_equal=0), accelerator=accelerator, record=NoRecord(),
        telemetry=telemetry(optimizer, every=every), save=lambda _step, _state: None, interrupted=lambda: False,
        progress=lambda _step, _row: None,
    )  # fmt: skip


def end_to_end(trainer: Trainer) -> Steps:
    """All that a run does in a step."""

    def run(steps: int) -> None:
        trainer.rhythm.total = trainer.step + steps
        trainer.run()

    return run


def bare(trainer: Trainer) -> Steps:
    """Forward, backward and optimizer step on one batch that is augmented and on the device already."""
    views = next(iter(trainer.pipeline.batches(0, 1))).views(0)
    model, optimizer = trainer.model, trainer.optimizer.optimizer

    def run(steps: int) -> None:
        for _ in range(steps):
            model(*views)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


class PilImages(Dataset):
    """PIL images under a transform, as a peer's data set gives them."""

    def __init__(self, sizes: Sizes, transform: Callable[[Image.Image], Any]):
        images, labels = load_images(sizes)
        self.arrays, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def forever(images: PilImages, sizes: Sizes) -> Iterator[Any]:
    """A DataLoader's batches without end."""
    workers = sizes.workers
    loader = DataLoader(
        images, sizes.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return chain.from_iterable(repeat(loader))


def peer(sizes: Sizes, images: PilImages, task: nn.Module, optimizer: Any, loss: Any, bf16: bool) -> Steps:
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


def lightly_twins(sizes: Sizes, *, bf16: bool) -> Steps:
    """Barlow Twins of lightly's parts: transforms, loss and LARS, on the same network."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from lightly.utils.lars import LARS as LightlyLARS

    views = [kind(input_size=sizes.pixels, gaussian_blur=0.0) for kind in (BYOLView1Transform, BYOLView2Transform)]
    task = build_task("pretrain", sizes, plain=True)
    criterion = BarlowTwinsLoss()

    def loss(model: Any, inputs: list[Tensor], _labels: Tensor) -> Tensor:
        z1, z2 = (model.embed(x) for x in inputs)
        return criterion(z1.float(), z2.float())

    optimizer = LightlyLARS(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return peer(sizes, PilImages(sizes, BYOLTransform(*views)), task, optimizer, loss, bf16)


def authors_twins(sizes: Sizes, *, bf16: bool) -> Steps:
    """Barlow Twins of the TVLARS paper's own parts, imported from their repository: views, network and loss, TVLARS.

    They always blur view 1, as their code stands.
    """
    sys.path.insert(0, str(sizes.authors))
    from dataset.cl import CLTransform  # type: ignore[import-not-found]
    from model.bt import BarlowTwins as TheirTwins  # type: ignore[import-not-found]
    from opt.tvlars import TVLARS as TheirTVLARS  # type: ignore[import-not-found]

    if not torch.distributed.is_initialized():  # their loss reduces over the processes
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    options = argparse.Namespace(
        bs=sizes.batch, model="resnet18", projector="-".join(map(str, sizes.projector)), btlmbda=0.0051
    )
    task = TheirTwins(options)
    optimizer = TheirTVLARS(task.parameters(), lr=0.1, weight_decay_filter=True, lars_adaptation_filter=True)
    optimizer.step = partial(optimizer.step, 1)  # an argument that it takes and does not use
    images = PilImages(sizes, CLTransform(sizes.pixels))
    return peer(sizes, images, task, optimizer, lambda model, views, _labels: model(*views), bf16)


def torchvision_classifier(sizes: Sizes, *, bf16: bool) -> Steps:
    """Classification as torchvision's users write it, with torch's SGD."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(sizes.pixels, padding=4), v2.RandomHorizontalFlip(), v2.RandomRotation(15),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(STATS["mean"], STATS["std"]),
        ]
    )  # fmt: skip
    task = build_task("classify", sizes, plain=True)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images = PilImages(sizes, transform)
    return peer(sizes, images, task, optimizer, lambda model, x, y: model(x, y)["loss"], bf16)


def contestants(track: str, sizes: Sizes, *, peers: bool) -> dict[str, Steps]:
    """What runs against each other on one track; the first is the bare compute, the second ours."""
    made = {
        "bare compute, bf16": bare(build_trainer(track, sizes, every=0)),
        "ssl_bench end to end, bf16": end_to_end(build_trainer(track, sizes)),
    }
    if not peers:
        return made
    made["bare compute with torch's convolutions, bf16"] = bare(build_trainer(track, sizes, every=0, plain=True))
    without = build_trainer(track, sizes, every=0)
    made["ssl_bench, no telemetry, bf16"] = end_to_end(without)
    builders = {"lightly": lightly_twins} if track == "pretrain" else {"torchvision + SGD": torchvision_classifier}
    if track == "pretrain" and sizes.authors:
        builders["the authors' code"] = authors_twins
    for name, build in builders.items():
        for bf16 in (True, False):
            try:
                made[f"{name} end to end, {'bf16' if bf16 else 'fp32'}"] = build(sizes, bf16=bf16)
            except ImportError as error:
                print(f"{track:9} {name}: left out ({error})", flush=True)
    return made


def race(runs: dict[str, Steps], *, steps: int, turns: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant in each of the turns, which they take one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first one warms up
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            run(steps)
            synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(track: str, sizes: Sizes, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Prints and returns the median images/s of every contestant, and its time over the first's and the second's."""
    first, second = list(seconds)[:2]
    rows = []
    for name, values in seconds.items():
        # Turn by turn, so that a change of the machine's load meets both sides of a ratio.
        over_bare = statistics.median(a / b for a, b in zip(values, seconds[first], strict=True))
        over_ours = statistics.median(a / b for a, b in zip(values, seconds[second], strict=True))
        rate = sizes.batch / statistics.median(values)
        rows.append(
            {"track": track, "what": name, "images_per_second": round(rate, 1), "time_over_bare": round(over_bare, 3),
             "time_over_ours": round(over_ours, 3), "seconds_per_step": [round(value, 5) for value in values]}
        )  # fmt: skip
        print(
            f"{track:9} {name:44} {rate:8.0f} images/s   {over_bare:5.2f} x bare   {over_ours:5.2f} x ours", flush=True
        )
    return rows


def measure(track: str, sizes: Sizes, *, peers: bool = True) -> list[dict[str, Any]]:
    """All contestants of one track against each other."""
    return table(track, sizes, race(contestants(track, sizes, peers=peers), steps=sizes.steps, turns=sizes.turns))


def sweep(track: str, sizes: Sizes, name: str, values: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Bare and ours as one size grows; a turn has about the same number of images all along."""
    if name == "projector" and track == "classify":
        return  # it has none
    for value in values:
        grown = replace(sizes, **{name: (value,) * 3 if name == "projector" else value})
        grown = replace(grown, steps=max(1, round(sizes.steps * sizes.batch / grown.batch)))
        print(f"{name} = {value}", flush=True)
        for row in measure(track, grown, peers=False):
            yield {name: value} | row


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Sizes]:
    """The command line: options, and the sizes among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--pixels", type=int, help="side of an image")
    parser.add_argument("--projector", type=int, nargs="+", help="widths")
    parser.add_argument(
        "--chunk", type=int, help="images in memory at a time, ours end to end; the whole batch if left out"
    )
    parser.add_argument("--steps", type=int, help="steps of a turn")
    parser.add_argument("--turns", type=int, help="turns that count, after one to warm up")
    parser.add_argument("--workers", type=int, help="the peers' loading processes")
    parser.add_argument("--images", type=int, help="images in the data set, at most")
    parser.add_argument("--data-path", help="CIFAR-10's folder of parquet files; random images if left out")
    parser.add_argument("--authors", help="a checkout of the paper's code, github.com/KhoiDOO/tvlars, to time it too")
    parser.add_argument("--tracks", nargs="+", default=["pretrain", "classify"], choices=["pretrain", "classify"])
    parser.add_argument("--sweep", choices=SWEEPS, help="time bare and ours as this grows, instead of the peers")
    parser.add_argument("--values", type=int, nargs="+", help="of the sweep; if left out, those of the script's SWEEPS")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    given = {field.name: getattr(options, field.name) for field in fields(Sizes)}
    if given["projector"]:
        given["projector"] = tuple(given["projector"])
    base = QUICK if options.quick else Sizes()
    return options, replace(base, **{name: value for name, value in given.items() if value is not None})


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures the tracks and prints, and with --json writes after every row, the table."""
    options, sizes = parse(arguments)
    head = {"hardware": hardware(), "packages": package_versions(), "code": code_version()}
    # Not the folders' names, which mean something on this machine alone.
    given = {name: getattr(sizes, name) is not None for name in ("data_path", "authors")}
    head |= {"threads": torch.get_num_threads(), "sizes": asdict(sizes) | {"sweep": options.sweep, **given}}
    rows: list[dict[str, Any]] = []
    for track in options.tracks:
        values = options.values or SWEEPS.get(options.sweep, ())
        measured = sweep(track, sizes, options.sweep, values) if options.sweep else measure(track, sizes)
        for row in measured:
            rows.append(row)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                about = {**head, "load_average": os.getloadavg()[0], "rows": rows}
                options.json.write_text(json.dumps(about, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
    leave(0)
