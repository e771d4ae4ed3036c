"""What several processes need so that a run is the same experiment on any number of them.

Every function also works in a single process without a process group, where it costs nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.runtime.sync_batchnorm import SyncBatchNorm

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_verified_shapes: set[tuple[torch.Size, torch.dtype]] = set()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """This process's number in [0, world_size()), 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Gives every process the object that process ``source`` passed (pickled: for the run's own objects only)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def _all_gather(x: Tensor) -> Tensor:
    """(n, ...) of the same shape on every process -> (W * n, ...) in the order of the ranks; no gradient."""
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    # The list form: the one-tensor form's name changes between torch releases.
    dist.all_gather(list(out.chunk(world_size())), x.contiguous())
    return out


def _refuse_uneven(x: Tensor) -> None:
    """Raises on every process if the shapes differ; on a GPU at a shape's first use only (it waits for the device)."""
    key = (x.shape, x.dtype)
    if x.device.type != "cpu" and key in _verified_shapes:
        return
    shape = torch.zeros(1, 8, dtype=torch.int64, device=x.device)
    shape[0, : x.ndim + 1] = torch.tensor([x.ndim, *x.shape], dtype=torch.int64)
    shapes = _all_gather(shape).cpu()
    if not (shapes == shapes[0]).all():
        got = [tuple(row[1 : 1 + int(row[0])].tolist()) for row in shapes]
        raise ValueError(f"gather: x has shapes {got} on ranks 0, 1, ...; every process must hold the same shape")
    _verified_shapes.add(key)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = slice(rank() * x.shape[0], (rank() + 1) * x.shape[0])
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[ctx.rows] * world_size()


def gather(x: Tensor) -> Tensor:
    """Concatenates the processes' rows, differentiably, so that each computes the loss of the global batch.

    The backward pass returns world_size times the local slice of the gradient: each process computes the same global
    loss, its parameters' gradient is W times its own rows' share, and DistributedDataParallel's average over the W
    processes is then exactly the gradient of the global loss. No communication is needed in the backward pass.

    Args:
        x: (n, ...) this process's rows, of the same shape on every process.

    Returns:
        (W * n, ...) the rows of rank 0, then of rank 1, ...; ``x`` itself in a single process.

    Raises:
        ValueError: on every process, if the shapes differ between processes.
    """
    if world_size() == 1:
        return x
    _refuse_uneven(x)
    return _Gather.apply(x)


def gather_rows(local: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenates the processes' rows, of which each may hold another number (evaluation); no gradient.

    Args:
        local: (n, ...) this process's rows; n may be 0, the other sizes and the dtype are the same on every process.
        counts: the number of rows that each rank should hold; None to accept what they hold.

    Returns:
        (sum of n, ...) the rows of rank 0, then of rank 1, ..., on every process.

    Raises:
        ValueError: on every process, if a process holds another number of rows than ``counts`` says.
    """
    local = local.detach()
    held = [local.shape[0]]
    if world_size() > 1:
        held = _all_gather(torch.tensor([local.shape[0]], device=local.device)).tolist()
    if counts is not None and held != list(counts):
        raise ValueError(f"gather_rows: ranks 0, 1, ... hold {held} rows, but {list(counts)} are expected")
    if world_size() == 1:
        return local
    padded = local.new_zeros((max(held), *local.shape[1:]))
    padded[: local.shape[0]] = local
    return torch.cat([rows[:n] for rows, n in zip(_all_gather(padded).chunk(world_size()), held, strict=True)])


def _checksum(x: Tensor) -> Tensor:
    """The sum of the bit patterns modulo 2^64: exact, independent of the order of summation, and defined for NaN."""
    bits = x.detach().contiguous().view(_INTEGER[x.element_size()])
    return bits.sum(dtype=torch.int64)


def assert_equal_parameters(module: nn.Module) -> None:
    """Checks that the parameters are bitwise equal on every process, by one checksum per parameter.

    Costs one read of the parameters, one small collective and one wait for the device.

    Args:
        module: the model, wrapped in DistributedDataParallel or not.

    Raises:
        RuntimeError: on every process, naming the first parameter that differs and the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    names, parameters = zip(*module.named_parameters(), strict=True)
    sums = _all_gather(torch.stack([_checksum(p) for p in parameters])[None]).cpu()  # (W, P)
    differs = sums != sums[0]
    if differs.any():
        first = int(differs.any(dim=0).nonzero()[0])
        ranks = differs[:, first].nonzero().flatten().tolist()
        raise RuntimeError(f"parameter {names[first]} differs between processes: ranks {ranks} from rank 0")


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every batch norm by one over the batch of all processes; nothing changes in a single process.

    Args:
        module: the model, not yet wrapped in DistributedDataParallel. Its children are replaced in place; parameters,
            buffers and the state dict's keys stay the same.

    Returns:
        the module; another one only if ``module`` itself is a batch norm.
    """
    if world_size() == 1:
        return module
    if isinstance(module, _BatchNorm):
        return SyncBatchNorm.of(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child))
    return module
