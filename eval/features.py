"""Features of a frozen backbone: every image exactly once, over one or several processes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]
Progress = Callable[[str, int, int], None]  # (what is being done, done, total)
Transform = Callable[[Tensor], Tensor]  # uint8 (n, 3, H, W) -> normalised (n, 3, H, W)


class ImageSource(Protocol):
    """One split of a data set; `ssl_bench.data` has such classes, and anybody may write one."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""

    def __len__(self) -> int: ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each (n,) int64 tensor of indices, the uint8 (n, 3, H, W) images on the device, in order."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Holds a module in eval mode and gives every submodule its own mode back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def shard(n: int, rank: int, world_size: int) -> slice:
    """The contiguous part of n items that one process takes; parts cover all items once, sizes differ by at most 1."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def embed(backbone: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """One pass of the backbone, channels last, in bf16 autocast if asked.

    Returns:
        (n, D) float32 features, on the images' device.

    Raises:
        ValueError: if the backbone does not return one feature vector per image.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = backbone(images)
    if features.ndim != 2:
        raise ValueError(f"the backbone must return (n, D) features, got {tuple(features.shape)}")
    return features.float()


def gather_rows(local: Tensor, counts: list[int], device: torch.device | str) -> Tensor:
    """Concatenates the rows of all processes in rank order, on every process.

    Args:
        local: (n, D) this process's rows; (0, 0) if it has none.
        counts: the number of rows that each process must bring, by rank.
        device: where the process group communicates ("cpu" for gloo, the GPU for NCCL).

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
            raise RuntimeError(f"process {rank} must bring {expected} rows of {dim} dimensions, got {rows} of {width}")
    # all_gather needs equal shapes, so the shorter parts are padded.
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
    output_device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Tensor:
    """The features of a split in order, on every process. The backbone runs in eval mode and is unchanged afterwards.

    Args:
        source: the split; its images must already be on the device.
        output_device: where the features go; the GPU itself spares it a synchronisation per batch.
        on_progress: called after each batch with ("features", batches done, batches of this process).
        backbone, transform, batch_size, device, precision, rank, world_size: see `ssl_bench.eval.Probe`.

    Returns:
        (N, D) float32 features.

    Raises:
        ValueError: on an unknown precision, a batch size below 1, or a backbone that does not return (n, D) features.
        RuntimeError: if a process ends up with another number of features than it has images.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    # Each process takes whole batches of the single-process run: an image in a batch of another size can get other
    # rounding, and then the number of processes would change the result.
    batches = torch.arange(len(source)).split(batch_size)
    shares = [batches[shard(len(batches), r, world_size)] for r in range(world_size)]
    parts = []
    with eval_mode(backbone), torch.no_grad():
        for done, images in enumerate(source.batches(shares[rank]), 1):
            parts.append(embed(backbone, transform(images), precision).to(output_device))
            if on_progress is not None:
                on_progress("features", done, len(shares[rank]))
    local = torch.cat(parts) if parts else torch.empty(0, 0, device=output_device)
    counts = [sum(len(batch) for batch in share) for share in shares]
    if world_size > 1:
        return gather_rows(local, counts, device).to(output_device)
    if len(local) != counts[0]:
        raise RuntimeError(f"{counts[0]} images must give as many features, got {len(local)}")
    return local
