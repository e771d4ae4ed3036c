"""Forward and backward of one step: whole, in chunks with the full batch's gradient, or plainly accumulated.

The three functions have one signature. ``model`` may be wrapped in DistributedDataParallel, whose gradients are then
averaged over the processes once per step. Gradients are added to the parameters' ``grad``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ssl_bench.methods.base import Method

Views = Callable[[int], tuple[Tensor, ...]]
Backward = Callable[[Tensor], None]
Autocast = Callable[[], AbstractContextManager]


def full_batch(
    model: nn.Module, views: Views, n_chunks: int, backward: Backward, autocast: Autocast = nullcontext
) -> dict[str, Tensor]:
    """Computes the loss of the whole batch and its gradient in one pass.

    Args:
        model: maps ``views(0)`` to a dict of scalars, among them "loss".
        views: gives this process's inputs of a chunk; here of chunk 0, the batch.
        n_chunks: must be 1.
        backward: computes gradients from the loss (``accelerator.backward``, which scales it under fp16).
        autocast: gives the context of the forward pass; none is needed around a model prepared by accelerate.

    Returns:
        the model's scalars, detached.
    """
    if n_chunks != 1:
        raise ValueError(f"full_batch: n_chunks must be 1, got {n_chunks}")
    with autocast():
        terms = model(*views(0))
    backward(terms["loss"])
    return {name: term.detach() for name, term in terms.items()}


def accumulate(
    model: nn.Module, views: Views, n_chunks: int, backward: Backward, autocast: Autocast = nullcontext
) -> dict[str, Tensor]:
    """Averages loss and gradient over equal chunks: exact for a loss that is a mean over samples, not for SSL losses.

    Args:
        model: maps ``views(chunk)`` to a dict of scalars, each a mean over the chunk, among them "loss".
        views: gives this process's inputs of a chunk; every chunk has the same number of rows.
        n_chunks: the number of chunks, >= 1.
        backward: computes gradients from the loss (``accelerator.backward``, which scales it under fp16).
        autocast: gives the context of the forward pass; none is needed around a model prepared by accelerate.

    Returns:
        the model's scalars, detached, each the mean over the chunks.
    """
    total: dict[str, Tensor] = {}
    for chunk in range(n_chunks):
        with _reduce_gradients(model, last=chunk == n_chunks - 1):
            with autocast():
                terms = model(*views(chunk))
            backward(terms["loss"] / n_chunks)
        for name, term in terms.items():
            share = term.detach() / n_chunks
            total[name] = total[name] + share if name in total else share
    return total


def grad_cache(
    model: nn.Module, views: Views, n_chunks: int, backward: Backward, autocast: Autocast = nullcontext
) -> dict[str, Tensor]:
    """Computes the gradient of the whole batch's loss with one chunk's activations ("GradCache", Gao et al. 2021).

    The first pass embeds every chunk without a graph; the loss of all embeddings gives dL/dz; the second pass embeds
    every chunk again and back-propagates its rows of dL/dz. That is one more forward pass than ``full_batch``, and
    the same gradient, except that batch norm sees a chunk. The second pass repeats the first one exactly (random
    numbers included), and running statistics are updated in the second alone.

    Args:
        model: an ``ssl_bench.methods.Method``, wrapped or not.
        views: gives this process's two views of a chunk, the same ones each time; every chunk has as many rows.
        n_chunks: the number of chunks, >= 1.
        backward: computes gradients from the loss (``accelerator.backward``, which scales it under fp16).
        autocast: gives the context of the forward pass; none is needed around a model prepared by accelerate.

    Returns:
        the method's scalars, detached.
    """
    method = _unwrap(model)
    device = next(method.parameters()).device
    drawn = random_state(device)
    z1, z2 = _embed_without_graph(model, views, n_chunks, autocast)
    terms = method.global_loss(z1.requires_grad_(), z2.requires_grad_())
    backward(terms["loss"])
    terms = {name: term.detach() for name, term in terms.items()}  # frees the loss's graph
    gradients = list(zip(_grad(z1).chunk(n_chunks), _grad(z2).chunk(n_chunks), strict=True))
    set_random_state(device, drawn)
    for chunk in range(n_chunks):
        with _reduce_gradients(model, last=chunk == n_chunks - 1):
            with autocast():
                embeddings = model(*views(chunk), embed_only=True)
            # Not through ``backward``: under fp16 dL/dz carries the scale already.
            torch.autograd.backward(embeddings, gradients[chunk])
    return terms


def _embed_without_graph(model: nn.Module, views: Views, n_chunks: int, autocast: Autocast) -> tuple[Tensor, Tensor]:
    """(z1, z2), each (n, D), of all this process's chunks, in the chunks' order; no running statistic changes."""
    whole: list[Tensor] = []
    with torch.no_grad(), _reduce_gradients(model, last=False), _frozen_statistics(model):
        for chunk in range(n_chunks):
            with autocast():
                parts = model(*views(chunk), embed_only=True)
            n = len(parts[0])
            if not whole:  # allocated once: a final torch.cat would need twice the memory
                whole = [part.new_empty(n_chunks * n, *part.shape[1:]) for part in parts]
            for z, part in zip(whole, parts, strict=True):
                z[chunk * n : (chunk + 1) * n] = part
    return whole[0], whole[1]


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm layers in training mode use the batch's statistics without recording them."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _reduce_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Holds back DistributedDataParallel's all-reduce until the last chunk."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if no_sync is not None and not last else nullcontext()


def _unwrap(model: nn.Module) -> Method:
    """The method inside DistributedDataParallel and torch.compile wrappers."""
    inner: object = model
    while not isinstance(inner, Method):
        wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if wrapped is None:
            raise ValueError(f"grad_cache: model must be a Method, wrapped or not, got {type(model).__name__}")
        inner = wrapped
    return inner


def _grad(z: Tensor) -> Tensor:
    if z.grad is None:
        raise RuntimeError("grad_cache: the loss must depend on the embeddings")
    return z.grad


def random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's global generators, on the CPU and on this device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Back to what `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
