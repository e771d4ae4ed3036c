"""Features of a frozen backbone: every image exactly once, over one or several processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_bench.eval.base import ImageSource, Progress, Transform

Precision = Literal["fp32", "bf16"]


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[nn.Module]:
    """Holds a module in eval mode without gradients and gives every submodule its own mode back, on errors too."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            yield backbone
    finally:
        for module, training in modes:
            module.training = training


def shard(n: int, rank: int, world_size: int) -> slice:
    """The contiguous part of n items that one process takes; the parts cover all items once and differ by at most 1."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def embed(backbone: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """One pass of the backbone, channels last, under bf16 autocast where asked.

    Returns:
        (n, D) float32 features, on the images' device.

    Raises:
        ValueError: if the backbone gives anything but one feature vector per image.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = backbone(images)
    if features.ndim != 2:
        raise ValueError(f"features: the backbone must give (n, D) features, got {tuple(features.shape)}")
    return features.float()


def gather_rows(local: Tensor, counts: list[int], device: torch.device | str) -> Tensor:
    """Concatenates every process's rows in rank order, on every process.

    Args:
        local: (n, D) this process's rows; (0, 0) where it has none.
        counts: the rows that each process must bring, by rank.
        device: where the process group can communicate from ("cpu" for gloo, the GPU for NCCL).

    Returns:
        (sum(counts), D) rows, on the device.

    Raises:
        RuntimeError: on every process alike, if a process brings another number of rows or another D.
    """
    shapes = [torch.empty(2, dtype=torch.int64, device=device) for _ in counts]
    dist.all_gather(shapes, torch.tensor(local.shape, device=device))
    sizes = [tuple(shape.tolist()) for shape in shapes]
    dim = max(size[1] for size in sizes)
    for rank, ((rows, width), expected) in enumerate(zip(sizes, counts, strict=True)):
        if rows != expected or (rows and width != dim):
            raise RuntimeError(
                f"features: process {rank} brought {rows} rows of {width} dimensions, expected {expected} of {dim}"
            )
    padded = torch.zeros(max(counts), dim, device=device, dtype=local.dtype)
    padded[: len(local)] = local.reshape(len(local), dim).to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def extract_features(
    backbone: nn.Module,
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    rank: int = 0,
    world_size: int = 1,
    indices: Tensor | None = None,
    output_device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Tensor:
    """The features of a split, every image exactly once, in order, on every process.

    The batches are those of a single process; each process takes a contiguous run of *whole* batches, so that no
    image meets another batch size than it would alone. The backbone runs in eval mode and is unchanged afterwards.

    Args:
        backbone: uint8-free images (n, 3, H, W) to features (n, D); not a DistributedDataParallel wrapper.
        source: the split; it must already be on the device.
        transform: the test transform (`ssl_bench.augment.views.Normalize`).
        batch_size: images in one pass on one process, >= 1.
        device: where the backbone is.
        precision: "fp32", or "bf16" for autocast. Features are float32 either way.
        rank: this process.
        world_size: the number of processes; above 1 needs an initialised process group.
        indices: (n,) int64 the images wanted; None for all of the split.
        output_device: where the features go; the device itself spares the GPU a synchronisation per batch.
        on_progress: called after each batch with ("features", batches done, batches of this process).

    Returns:
        (N, D) float32 features.

    Raises:
        ValueError: on an unknown precision, a batch size below 1, or a backbone that gives no (n, D) features.
        RuntimeError: if any process has brought another number of features than it had images.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"features: precision must be fp32 or bf16, got {precision!r}")
    if batch_size < 1:
        raise ValueError(f"features: batch_size must be >= 1, got {batch_size}")
    wanted = torch.arange(len(source)) if indices is None else indices
    batches = wanted.split(batch_size)
    shares = [batches[shard(len(batches), r, world_size)] for r in range(world_size)]
    parts = []
    with frozen(backbone):
        for done, images in enumerate(source.batches(shares[rank]), 1):
            parts.append(embed(backbone, transform(images), precision).to(output_device))
            if on_progress is not None:
                on_progress("features", done, len(shares[rank]))
    local = torch.cat(parts) if parts else torch.empty(0, 0, device=output_device)
    counts = [sum(len(batch) for batch in share) for share in shares]
    if world_size > 1:
        return gather_rows(local, counts, device).to(output_device)
    if len(local) != counts[0]:
        raise RuntimeError(f"features: {len(local)} features came of {counts[0]} images")
    return local
