"""Loading photographs: this suite's loader beside torchvision's ImageFolder and torch's DataLoader.

    python benchmarks/loading.py --json benchmarks/results/loading-cpu.json     # about four minutes
    python benchmarks/loading.py --quick                                        # seconds: does it still run?

The images are made, not photographed: 1/f noise, whose power falls with frequency as that of natural images does, as
JPEGs of varying sizes around 500 x 375 (`make_images`). Three cases:

- decode: every JPEG to a square of `--size` pixels, once. Ours: `load_dataset` into an empty cache, from class folders
  and from WebDataset shards: find the files, decode (Pillow), resize the shorter side and crop the centre, per-channel
  statistics, digests, write. torchvision's: ImageFolder, Resize (antialiased bilinear), CenterCrop, PILToTensor, in as
  many DataLoader workers as there are cores; it writes nothing.
- epoch: one view of every image: random resized crop (bicubic, antialiased), horizontal flip, normalise; no colour on
  either side, which ours computes on the device and the others in the workers. Ours: `Pipeline` over the streamed cache
  (decoded and resized before, so its crops are taken from a square of `--size` pixels), views made batch by batch on
  this CPU. torchvision's: ImageFolder decodes every file again and crops from its full size, in the workers. "rows
  alone" is what ours asks of the host where a GPU makes the views.
- decoders: JPEG bytes in memory to RGB pixels, on one thread and on all cores: Pillow (which ours uses),
  torchvision.io.decode_jpeg, and PyTurboJPEG with the system's libturbojpeg, if they can be imported; and how far the
  pixels of each are from Pillow's. PyTurboJPEG would be worth a dependency if it were 10% faster than torchvision's.

The contestants of a case take turns and medians count: compare ratios. All files fit the page cache here; from a disk
that must be read, decoding once also turns small files all over the disk into rows of one file.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from ssl_bench.augment.views import SSLView
from ssl_bench.data.dataset import Dataset, load_dataset
from ssl_bench.data.decode import decode
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.records.provenance import hardware, package_versions
from ssl_bench.runtime.launcher import usable_cores

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SCALE = (0.2, 1.0)
WORTH = 1.1  # times torchvision's speed from which another decoder would be worth a dependency
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is timed; each field is an option of the command line."""

    images: int = 600
    size: int = 224  # side of the decoded images and of the views
    batch: int = 64
    turns: int = 5  # that count, after one to warm up
    workers: int = usable_cores()  # DataLoader workers, reading threads, and torch's threads


QUICK = Sizes(images=8, size=32, batch=4, turns=1, workers=0)


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """1/f noise in colour: the spectrum's amplitude falls as 1 / frequency, mostly alike in the three channels."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(x, y), 1 / max(width, height))
    noise = rng.standard_normal((4, *frequency.shape)) + 1j * rng.standard_normal((4, *frequency.shape))
    planes = np.fft.irfft2(noise / frequency, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 50 * (planes[0] + 0.4 * planes[1:])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def make_images(folder: Path, count: int) -> Row:
    """Writes train/<class>/<image>.jpg, ten classes; the sizes are log-normal around 500 x 375, a quarter upright.

    Returns:
        what was made, for the record.
    """
    rng = np.random.default_rng(0)
    pixels, sizes = [], []
    for number in range(count):
        scale = float(np.exp(0.25 * rng.standard_normal()))
        sides = (max(64, round(500 * scale)), max(48, round(375 * scale)))
        width, height = sides[::-1] if number % 4 == 0 else sides
        path = folder / "train" / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(width, height, rng).save(path, quality=92)
        pixels.append(width * height)
        sizes.append(path.stat().st_size)
    return {
        "kind": "1/f noise in colour, JPEG of quality 92, 4:2:0; a quarter upright",
        "count": count,
        "mean_pixels": round(statistics.mean(pixels)),
        "mean_kb": round(statistics.mean(sizes) / 1000, 1),
    }


def make_shards(images: Path, folder: Path, per_shard: int = 250) -> None:
    """The same images, in the same order, as WebDataset shards."""
    paths = sorted((images / "train").glob("*/*.jpg"))
    folder.mkdir()
    for start in range(0, len(paths), per_shard):
        with tarfile.open(folder / f"train-{start // per_shard:06d}.tar", "w") as shard:
            for path in paths[start : start + per_shard]:
                shard.add(path, f"{path.stem}.jpg")
                label = path.parent.name.removeprefix("class").encode()
                entry = tarfile.TarInfo(f"{path.stem}.cls")
                entry.size = len(label)
                shard.addfile(entry, io.BytesIO(label))


def take_turns(contestants: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """The seconds of each contestant in each turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            took = run()
            if turn:
                seconds[name].append(took)
    return seconds


def rows_of(case: str, images: int, seconds: dict[str, list[float]], peer: str) -> list[Row]:
    """One row for each contestant: images a second by the median turn, and the median of its speed over the peer's."""
    rows = []
    for name, turns in seconds.items():
        ratio = statistics.median(other / own for own, other in zip(turns, seconds[peer], strict=True))
        row = {
            "case": case,
            "what": name,
            "images": images,
            "images_per_second": round(images / statistics.median(turns)),
        }
        rows.append(row | {"times_torchvision": round(ratio, 2), "seconds": [round(turn, 4) for turn in turns]})
    return rows


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def image_folder(images: Path, transform: Any, sizes: Sizes, *, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
    return DataLoader(
        ImageFolder(str(images / "train"), transform),
        sizes.batch,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=sizes.workers,
        persistent_workers=sizes.workers > 0,
    )


def read(loader: DataLoader[Any]) -> None:
    for _ in loader:
        pass


def squares(sizes: Sizes) -> Any:
    """torchvision's transform for the same work as `decode`: the shorter side to `size`, the centre's square."""
    resize = v2.Resize(sizes.size, InterpolationMode.BILINEAR, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(sizes.size), v2.PILToTensor()])


def decode_case(images: Path, shards: Path, sizes: Sizes, scratch: Path) -> list[Row]:
    def ours(name: str, path: Path) -> Callable[[], float]:
        def run() -> float:
            cache = Path(tempfile.mkdtemp(dir=scratch))
            took = timed(lambda: load_dataset(name, path=path, size=sizes.size, cache_dir=cache, test=False))
            shutil.rmtree(cache)
            return took

        return run

    loader = image_folder(images, squares(sizes), sizes, shuffle=False, drop_last=False)
    contestants = {
        "ssl_bench, folder": ours("folder", images),
        "ssl_bench, shards": ours("webdataset", shards),
        "torchvision": lambda: timed(lambda: read(loader)),
    }
    return rows_of("decode", sizes.images, take_turns(contestants, sizes.turns), "torchvision")


def epoch_case(folder: Dataset, shards: Dataset, images: Path, sizes: Sizes) -> list[Row]:
    steps = sizes.images // sizes.batch
    view = SSLView(sizes.size, crop_scale=CROP_SCALE, jitter_p=0.0, gray_p=0.0, mean=MEAN, std=STD)

    def ours(data: Dataset, make_views: bool) -> Callable[[], float]:
        device = torch.device("cpu")
        pipeline = Pipeline(
            data.train, [view], seed=0, batch_size=sizes.batch, chunk_size=None, rank=0, world_size=1, device=device
        )
        first = iter(range(0, 10**9, steps))  # every turn has batches of its own

        def run() -> None:
            start = next(first)
            for batch in pipeline.batches(start, start + steps):
                if make_views:
                    batch.views(0)

        return lambda: timed(run)

    crop = v2.RandomResizedCrop(sizes.size, CROP_SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *to_float])
    loader = image_folder(images, transform, sizes, shuffle=True, drop_last=True)
    contestants = {
        "ssl_bench, folder": ours(folder, True),
        "ssl_bench, shards": ours(shards, True),
        "ssl_bench, rows alone": ours(folder, False),
        "torchvision": lambda: timed(lambda: read(loader)),
    }
    return rows_of("epoch", steps * sizes.batch, take_turns(contestants, sizes.turns), "torchvision")


def _decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """JPEG bytes to (H, W, 3) uint8, by name: those that are here."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def by_torchvision(raw: bytes) -> np.ndarray:
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    found: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow": lambda raw: decode(raw, None),
        "torchvision": by_torchvision,
    }
    try:
        from turbojpeg import TJPF_RGB, TurboJPEG  # type: ignore[import-not-found, import-untyped, unused-ignore]

        turbo = TurboJPEG()
        found["PyTurboJPEG"] = lambda raw: turbo.decode(raw, pixel_format=TJPF_RGB)
    except (ImportError, RuntimeError) as error:  # the package, or the system's library
        print(f"  PyTurboJPEG: skipped ({error})")
    return found


def decoder_case(raws: Sequence[bytes], sizes: Sizes) -> list[Row]:
    decoders = _decoders()
    rows = []
    reference = [decode(raw, None).astype(np.int16) for raw in raws]
    off = {
        name: [np.abs(by(raw) - want) for raw, want in zip(raws, reference, strict=True)]
        for name, by in decoders.items()
    }
    for threads in sorted({1, max(1, sizes.workers)}):
        with ThreadPoolExecutor(threads) as pool:

            def all_of(by: Callable[[bytes], np.ndarray], threads: int = threads, pool: Any = pool) -> float:
                return timed(lambda: list(map(by, raws) if threads == 1 else pool.map(by, raws)))

            contestants = {name: (lambda by=by: all_of(by)) for name, by in decoders.items()}
            for row in rows_of("decoders", len(raws), take_turns(contestants, sizes.turns), "torchvision"):
                away = off[row["what"]]
                largest = max(int(each.max()) for each in away)
                equal = statistics.mean(float((each == 0).mean()) for each in away)
                rows.append(row | {"threads": threads, "largest_difference": largest, "equal_values": round(equal, 6)})
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Whether PyTurboJPEG is worth a dependency, by the rule in this file's first lines."""
    found = {row["threads"]: row["times_torchvision"] for row in rows if row["what"] == "PyTurboJPEG"}
    if not found:
        return "PyTurboJPEG: not measured"
    speeds = ", ".join(f"{ratio} times torchvision's speed on {threads} threads" for threads, ratio in found.items())
    return f"PyTurboJPEG: {'worth a dependency' if min(found.values()) >= WORTH else 'not used'} ({speeds})"


def environment() -> Row:
    """The versions and hardware that the numbers depend on."""
    return {
        "hardware": hardware(),
        "packages": package_versions("pillow", "PyTurboJPEG"),
        "pillow_libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "load_average": os.getloadavg()[0],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one turn: only checks that it runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    for name in vars(Sizes()):
        parser.add_argument(f"--{name}", type=int, default=None)
    options = parser.parse_args(arguments)
    given = {name: value for name in vars(Sizes()) if (value := getattr(options, name)) is not None}
    sizes = Sizes(**{**vars(QUICK if options.quick else Sizes()), **given})
    if sizes.workers:
        torch.set_num_threads(sizes.workers)
    record: Row = {"environment": environment(), "sizes": vars(sizes), "quick": options.quick}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ssl_bench-loading-") as name:
        scratch = Path(name)
        images, shards = scratch / "images", scratch / "shards"
        record["images"] = make_images(images, sizes.images)
        make_shards(images, shards)
        print(
            "{count} images made, of {mean_pixels} pixels and {mean_kb} kB on average".format(**record["images"]),
            flush=True,
        )
        folder, sharded = (
            load_dataset(kind, path=path, size=sizes.size, resident=False, workers=max(1, sizes.workers), test=False,
                         cache_dir=scratch / "cache")
            for kind, path in (("folder", images), ("webdataset", shards))
        )  # fmt: skip
        ours, same = (next(data.train.batches([torch.arange(sizes.images)])) for data in (folder, sharded))
        assert torch.equal(ours, same), "folder and shards must give the same images"
        theirs = torch.stack([image for image, _ in ImageFolder(str(images / "train"), squares(sizes))])  # type: ignore[misc]
        record["decoded_mean_difference"] = round((ours.float() - theirs).abs().mean().item(), 2)  # of 255 grey levels
        raws = [path.read_bytes() for path in sorted((images / "train").glob("*/*.jpg"))][:200]
        for case in (
            lambda: decode_case(images, shards, sizes, scratch),
            lambda: epoch_case(folder, sharded, images, sizes),
            lambda: decoder_case(raws, sizes),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision 0.29 says that its decoders will move to torchcodec
                measured = case()
            for row in measured:
                threads = f", {row['threads']} threads" if "threads" in row else ""
                speed = f"{row['images_per_second']:8} images/s {row['times_torchvision']:7.2f} times torchvision"
                print(f"{row['case']:9} {row['what'] + threads:28} {speed}", flush=True)
            rows += measured
    record |= {"rows": rows, "verdict": verdict(rows), "load_average_after": os.getloadavg()[0]}
    print(record["verdict"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
