"""Augmentation alone: two Barlow Twins views of each image, ours beside kornia, torchvision v2 and lightly.

    python benchmarks/augmentation.py --json benchmarks/results/augmentation-cpu.json     # about five minutes
    OMP_NUM_THREADS=1 python benchmarks/augmentation.py --clock cpu --workers 0           # one core, on a busy machine
    python benchmarks/augmentation.py --quick                                             # seconds: does it still run?

All get the same work: random resized crop, flip, colour jitter, greyscale, blur (view 1: always, view 2: 0.1), solarize
(view 2: 0.2), normalise. An image is two views. Ours and kornia take the batch as one uint8 tensor on the device; the
libraries that work sample by sample run in as many DataLoader workers as torch has threads (as lightly's users do), and
pass ready float batches. The libraries take turns, so that a noisy machine is equally unkind to all: compare ratios.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.augment.views import SSLView
from ssl_bench.records.provenance import hardware, package_versions

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VIEWS: tuple[dict[str, Any], ...] = (
    {"blur_p": 1.0, "solarize_p": 0.0},
    {"blur_p": 0.1, "solarize_p": 0.2},
)  # Barlow Twins
TURN = 0.5  # seconds
Pass = Callable[[], int]  # augments a number of images and returns it


def make_images(n: int, size: int, device: torch.device) -> Tensor:
    """(n, 3, size, size) uint8, smooth as photographs are."""
    noise = torch.randn(n, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(noise, (size, size), mode="bicubic", align_corners=False)
    return smooth.mul(60).add(128).clamp(0, 255).byte().to(device)


def ours(images: Tensor, dtype: torch.dtype) -> Pass:
    size = images.shape[-1]
    views = [SSLView(size, **view, mean=MEAN, std=STD, dtype=dtype) for view in VIEWS]
    generator = torch.Generator().manual_seed(0)

    def run() -> int:
        for view in views:
            view(images, view.draw(len(images), generator))
        return len(images)

    return run


def kornia(images: Tensor) -> Pass:
    import kornia.augmentation as K

    size = images.shape[-1]
    kernel = SSLView(size, mean=MEAN, std=STD).blur_kernel
    views = [
        nn.Sequential(
            K.RandomResizedCrop((size, size), resample="bicubic", cropping_mode="resample"),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=view["blur_p"]),
            K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=view["solarize_p"]),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        ).to(images.device)
        for view in VIEWS
    ]

    def run() -> int:
        for view in views:
            view(images.float() / 255)
        return len(images)

    return run


class Samples(torch.utils.data.Dataset):
    """Each image with a per-sample transform for each view."""

    def __init__(self, images: list, transforms: list) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [transform(self.images[index]) for transform in self.transforms]


def loaded(images: list, transforms: list, batch: int, workers: int) -> Pass:
    """One epoch of a DataLoader whose workers stay alive between epochs."""
    samples = Samples(images, transforms)
    loader = torch.utils.data.DataLoader(samples, batch, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(views[0]) for views in loader)


def torchvision(images: Tensor, batch: int, workers: int) -> Pass:
    from torchvision.transforms import v2 as T

    size = images.shape[-1]
    kernel = SSLView(size, mean=MEAN, std=STD).blur_kernel
    transforms = [
        T.Compose(
            [
                T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([T.GaussianBlur(kernel, (0.1, 2.0))], p=view["blur_p"]),
                T.RandomSolarize(128, p=view["solarize_p"]),
                T.ToDtype(torch.float32, scale=True),
                T.Normalize(MEAN, STD),
            ]
        )
        for view in VIEWS
    ]
    return loaded(list(images.cpu()), transforms, batch, workers)


def lightly(images: Tensor, batch: int, workers: int) -> Pass:
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
    from torchvision.transforms.v2.functional import to_pil_image

    size, normalize = images.shape[-1], {"mean": list(MEAN), "std": list(STD)}
    transforms = [view(input_size=size, normalize=normalize) for view in (BYOLView1Transform, BYOLView2Transform)]
    return loaded([to_pil_image(image) for image in images.cpu()], transforms, batch, workers)


def measure(
    passes: dict[str, Pass], repeats: int, clock: Callable[[], float], synchronize: Callable[[], None], seconds: float
) -> dict[str, list[float]]:
    """Images a second of each library in each of the repeats, the libraries taking turns; the first turn is dropped.

    A turn is as many passes as fill ``seconds``: one alone would be over before sleeping threads and caches are back.
    """
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            synchronize()
            start, images = clock(), 0
            while images == 0 or clock() - start < seconds:
                images += run()
                synchronize()
            if turn > 0:
                rates[name].append(images / (clock() - start))
    return rates


def case(size: int, batch: int, options: argparse.Namespace) -> list[dict]:
    """One row for each library; a library that is not installed has no rates."""
    device, workers = torch.device(options.device), options.workers
    images = make_images(batch, size, device)
    builders = {
        "ssl_bench bf16": lambda: ours(images, torch.bfloat16),
        "ssl_bench fp32": lambda: ours(images, torch.float32),
        "kornia": lambda: kornia(images),
        "torchvision v2": lambda: torchvision(images[:512], min(batch, 128), workers),
        "lightly": lambda: lightly(images[:512], min(batch, 128), workers),
    }
    passes, rows = {}, []
    for name, build in builders.items():
        try:
            passes[name] = build()
        except ImportError as error:
            rows.append({"library": name, "size": size, "batch": batch, "skipped": str(error)})
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    rates = measure(passes, options.repeats, clock, synchronize, 0.0 if options.quick else TURN)
    best = statistics.median(rates["ssl_bench bf16"])
    for name, values in rates.items():
        median = statistics.median(values)
        row = {"library": name, "size": size, "batch": batch, "images_per_second": round(median)}
        rows.append(row | {"runs": [round(value) for value in values], "ours_is_faster_by": round(best / median, 2)})
    return rows


def environment() -> dict:
    """What the figures depend on."""
    return {
        "hardware": hardware(),
        "packages": package_versions("kornia", "lightly", "pillow"),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),  # "passive" spares a shared machine torch's spinning
        "load_average": os.getloadavg()[0],
    }


def describe(row: dict) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return f"{row['images_per_second']:9,}   {row['ours_is_faster_by']:.2f}x"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96], help="image sides, pixels, at batch 512")
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 4096], help="batch sizes, images, at 32 pixels")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count, for each library")
    parser.add_argument(
        "--workers", type=int, default=torch.get_num_threads(), help="of per-sample libraries; 0 = none"
    )
    clocks = "cpu: of this process, for a busy machine; give each library one core (OMP_NUM_THREADS=1, --workers 0)"
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=clocks)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where ours and kornia work")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    parser.add_argument("--quick", action="store_true", help="eight images of 32 pixels, one turn, no workers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(arguments)
    before = environment()
    cases = dict.fromkeys([(size, 512) for size in options.sizes] + [(32, batch) for batch in options.batches])
    if options.quick:
        cases, options.repeats, options.workers = {(32, 8): None}, 1, 0
    if options.clock == "cpu" and (options.workers > 0 or torch.get_num_threads() > 1 or options.device != "cpu"):
        raise SystemExit("--clock cpu: needs OMP_NUM_THREADS=1, --workers 0 and --device cpu")
    rows = []
    print(f"{'library':16} {'size':>5} {'batch':>6} {'images/s':>9}   ours is faster by")
    for size, batch in cases:
        for row in case(size, batch, options):
            rows.append(row)
            print(f"{row['library']:16} {size:5} {batch:6} {describe(row)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"device": options.device, "clock": options.clock, "workers": options.workers}
        record = {"benchmark": "augmentation, two views", **settings, **before, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
