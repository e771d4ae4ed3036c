"""`recompute=blocks`: a network's blocks keep their inputs alone and are computed again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by torch's non-reentrant checkpoint. The second pass
repeats the first: batch norm takes the whole batch's statistics again and records nothing (synchronised, it keeps them,
so that no collective is repeated), and random numbers are drawn anew from the same place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ssl_bench.methods.base import Method
from ssl_bench.runtime.sync_batchnorm import keep_statistics, reuse_statistics
from ssl_bench.training.sample_random import numbers_from_here

_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Method)  # whose parts are called one after the other


def recompute_blocks(method: Method) -> None:
    """Makes a method compute its blocks, and a ResNet's stem, again in the backward pass.

    Args:
        method: whose batch norms are synchronised already, and which is not compiled.
    """
    for block in blocks(method).values():
        _replace_forward(block, _recomputed, block)
    for network in method.modules():
        if isinstance(network, ResNet) and _is_free(network.conv1) and _is_free(network.bn1):
            _replace_forward(network.conv1, _left_to_the_norm, network.conv1)
            _replace_forward(network.bn1, _recomputed_stem, network)


def _replace_forward(module: nn.Module, function: Callable[..., Any], owner: nn.Module) -> None:
    """A bound method as the module's own forward: a copy of the network is bound to the copy's parts."""
    setattr(module, "forward", MethodType(function, owner))  # noqa: B010 - for the type checker not assignable


def recomputed(method: nn.Module) -> list[str]:
    """The names of what `recompute_blocks` has found; that of a ResNet's stem is its first convolution's."""
    return [name for name, module in method.named_modules() if _has(module, _recomputed, _left_to_the_norm)]


def _has(module: nn.Module, *functions: Callable[..., Any]) -> bool:
    return getattr(module.forward, "__func__", None) in functions


def blocks(method: Method) -> dict[str, nn.Module]:
    """A network's trainable blocks by name: ResNet's and ConvNeXt's residual blocks, transformer blocks, the projector.

    A block is one of a row (nn.Sequential, nn.ModuleList, nn.ModuleDict, or the method's own parts) that has at least
    two layers with a matrix of weights and no block inside. Where there is no row inside a part of the method, parts of
    one class count as one (timm's RegNet); else the part itself is the block.
    """
    found: list[nn.Module] = []
    for part in method.children():
        inside = list(_blocks(part, method, siblings=False))
        if inside == [part] and (others := [block for block in _blocks(part, method, siblings=True) if block != part]):
            inside = others
        found += inside
    chosen = set(found)
    return {name: module for name, module in method.named_modules() if module in chosen}


def _blocks(module: nn.Module, parent: nn.Module, *, siblings: bool) -> Iterator[nn.Module]:
    inside = [block for child in module.children() for block in _blocks(child, module, siblings=siblings)]
    alike = siblings and sum(type(other) is type(module) for other in parent.children()) > 1
    if inside:
        yield from inside
    elif (isinstance(parent, _ROWS) or alike) and _is_block(module):
        yield module


def _is_block(module: nn.Module) -> bool:
    layers = sum(any(p.ndim > 1 for p in layer.parameters(recurse=False)) for layer in module.modules())
    return layers > 1 and (_is_free(module) or _has(module, _recomputed))


def _is_free(module: nn.Module) -> bool:
    """Whether there is something to train, and no forward from somebody else."""
    return any(p.requires_grad for p in module.parameters()) and "forward" not in vars(module)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass, of which the inputs alone are kept."""
    return _twice(block, partial(type(block).forward, block), *args, **kwargs)


def _left_to_the_norm(_: nn.Module, x: Tensor) -> Tensor:
    """A ResNet's first convolution, whose output would be the largest that is kept: batch norm computes it."""
    return x


def _recomputed_stem(network: Any, x: Tensor) -> Tensor:
    """A ResNet's first convolution and batch norm."""
    first, second = layers = nn.ModuleList((network.conv1, network.bn1))
    result: Tensor = _twice(layers, lambda x: type(second).forward(second, type(first).forward(first, x)), x)
    return result


def _twice(layers: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward pass of some layers, which is repeated in the backward pass; without a graph it is taken once."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    kept: Any = None
    numbers = numbers_from_here()

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal kept
        if kept is not None:  # torch sees to it that the inputs are still what they were
            with numbers() if numbers else nullcontext(), _spare_statistics(layers), reuse_statistics(kept):
                return forward(*args, **kwargs)
        before = _versions(layers, args, kwargs)
        with keep_statistics(layers) as kept:
            outputs = forward(*args, **kwargs)
        for was, now in zip(before, _versions(layers, args, kwargs), strict=True):
            if was != now:
                kind = type(layers).__name__
                raise ValueError(
                    f"recompute must be none for this network, got blocks: a {kind} changes its {now[0]} in place"
                )
        return outputs

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _versions(layers: nn.Module, *inputs: Any) -> list[tuple[str, int, int]]:
    """Name, identity and version of inputs and buffers, but not of batch norm's, which are kept by other means."""
    states = {
        f"buffer {name}": buffer
        for layer in layers.modules()
        if not isinstance(layer, _NormBase)
        for name, buffer in layer.named_buffers(recurse=False)
    }
    found = [("input", x) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return [(name, id(tensor), tensor._version) for name, tensor in [*found, *states.items()]]


@contextmanager
def _spare_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms record their running statistics in copies, which are dropped.

    (To record none would not do: the second pass must save as many tensors as the first, running statistics included.)
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _NormBase)]
    own = [dict(layer._buffers) for layer in layers]
    try:
        for layer in layers:
            layer._buffers.update({k: None if b is None else b.clone() for k, b in layer._buffers.items()})
        yield
    finally:
        for layer, buffers in zip(layers, own, strict=True):
            layer._buffers.update(buffers)
