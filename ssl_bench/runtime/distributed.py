"""Collectives that make a run the same experiment on any number of processes.

Every function also works in a single process without a process group, where it costs nothing.

How the gradient is split, to which all backward passes here and in `ssl_bench.methods.parts` keep: every process
back-propagates the same loss L of the global batch, and its rows get the gradient of the sum of these W equal losses,
W dL/d(rows). Carried through the network that is W times its rows' part of the parameters' gradient, and
DistributedDataParallel's average over the W processes is dL/d(parameters) exactly. So the backward pass of a sum over
processes is a sum over processes. Where all of them go on to compute the same from a tensor, that would add up W equal
gradients, and W times one's own is the same without communication.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.runtime.sync_batchnorm import SyncBatchNorm, gather_rows

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_verified_shapes: set[tuple[torch.Size, torch.dtype]] = set()


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in [0, world_size()), 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Returns, on every process, the object that process ``source`` passed. It is pickled: our own objects only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_objects(value: Any) -> list[Any]:
    """Returns, on every process, what each process passed, by rank. It is pickled: our own objects only."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def refuse_uneven(x: Tensor) -> None:
    """Checks that a tensor has one shape on all processes.

    Raises:
        ValueError: on every process, if it has not.
    """
    key = (x.shape, x.dtype)
    # Reading the shapes back waits for the device, so on a GPU each shape is checked at its first use only.
    if x.device.type != "cpu" and key in _verified_shapes:
        return
    shape = torch.zeros(1, 8, dtype=torch.int64, device=x.device)
    shape[0, : x.ndim + 1] = torch.tensor([x.ndim, *x.shape], dtype=torch.int64)
    shapes = gather_rows(shape).cpu()
    if not (shapes == shapes[0]).all():
        got = [tuple(row[1 : 1 + int(row[0])].tolist()) for row in shapes]
        raise ValueError(f"gather: x must have one shape on all processes, got shapes {got} on ranks 0, 1, ...")
    _verified_shapes.add(key)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = slice(rank() * x.shape[0], (rank() + 1) * x.shape[0])
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[ctx.rows] * world_size()


def gather(x: Tensor) -> Tensor:
    """Concatenates the processes' rows, differentiably, so that each process computes the loss of the global batch.

    The backward pass returns world_size times the local slice of the gradient, without communication, because every
    process goes on to compute the same (see above). What is used otherwise on each takes `gather_share`.

    Args:
        x: (n, ...) this process's rows, of the same shape on every process.

    Returns:
        (W * n, ...) the rows of rank 0, then of rank 1, ...; ``x`` itself in a single process.

    Raises:
        ValueError: on every process, if the shapes differ between processes.
    """
    if world_size() == 1:
        return x
    refuse_uneven(x)
    return _Gather.apply(x)


class _GatherShare(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)[ctx.rows]


def gather_share(x: Tensor) -> Tensor:
    """`gather` for what each process goes on to use in its own way: the gradients of all are added up.

    Args:
        x: (n, ...) of the same shape on every process, which is not checked.
    """
    return x if world_size() == 1 else _GatherShare.apply(x)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def total(x: Tensor) -> Tensor:
    """Sums a tensor over the processes, differentiably: every process gets the sum.

    Args:
        x: of the same shape on every process, which is not checked.
    """
    return x if world_size() == 1 else _Total.apply(x)


def _summed(x: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out)
    return out


def average(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their means over the processes: one collective, DistributedDataParallel's rounding.

    Args:
        tensors: of the same shapes and one dtype on every process, which is not checked.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors]).div_(world_size())
    dist.all_reduce(flat)
    parts = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(list(tensors), [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])


def everywhere(holds: bool, device: torch.device) -> bool:
    """Whether something holds on all processes; waits for the device where there are several."""
    if world_size() == 1:
        return holds
    failures = torch.tensor(0.0 if holds else 1.0, device=device)
    dist.all_reduce(failures)
    return failures.item() == 0


def assert_equal_parameters(module: nn.Module) -> None:
    """Checks that the parameters are bitwise equal on every process, by one checksum per parameter.

    Costs one read of the parameters, one small collective and one wait for the device. A checksum is the sum of the
    bit patterns modulo 2^64: exact, independent of the order of summation, and defined for NaN.

    Args:
        module: the model, wrapped in DistributedDataParallel or not.

    Raises:
        RuntimeError: on every process, naming the first parameter that differs and the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    names, parameters = zip(*module.named_parameters(), strict=True)
    bits = [p.detach().contiguous().view(_INTEGER[p.element_size()]) for p in parameters]
    sums = gather_rows(torch.stack([b.sum(dtype=torch.int64) for b in bits])[None]).cpu()  # (W, P)
    differs = sums != sums[0]
    if differs.any():
        first = int(differs.any(dim=0).nonzero()[0])
        ranks = differs[:, first].nonzero().flatten().tolist()
        raise RuntimeError(f"parameter {names[first]} differs between processes: ranks {ranks} from rank 0")


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every batch norm by one over the batch of all processes; changes nothing in a single process.

    Args:
        module: the model, not yet wrapped in DistributedDataParallel. Its children are replaced in place; parameters,
            buffers and the state dict's keys stay the same.

    Returns:
        ``module`` itself, or its replacement if it is a batch norm.
    """
    if world_size() == 1:
        return module
    if isinstance(module, _BatchNorm):
        return SyncBatchNorm.of(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child))
    return module
