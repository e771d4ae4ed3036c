"""Forward and backward of one step: one path for whole and chunked batches, one process and several.

The network's outputs become leaves of the loss's own graph ("GradCache", Gao et al. 2021), which gathers them to the
global batch, or in which the processes share the work (``sharded_loss``); the loss's gradient with respect to them is
then carried through the network. With chunks, a first pass without a graph makes the outputs, and each chunk is
embedded again for its backward pass. How the gradient is split over processes: `ssl_bench.runtime.distributed`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from ssl_bench.methods.base import Method
from ssl_bench.methods.parts.share import WHOLE, Share
from ssl_bench.runtime.distributed import gather, gather_share, rank, refuse_uneven, total, world_size
from ssl_bench.runtime.tf32 import tf32_products

Views = Callable[[int], tuple[Tensor, ...]]
Backward = Callable[[Tensor], None]
Context = Callable[[int], AbstractContextManager]
Terms = dict[str, Tensor]


def plain(_chunk: int) -> AbstractContextManager:
    """No context around a forward pass."""
    return nullcontext()


def compute_gradient(
    model: nn.Module,
    views: Views,
    n_chunks: int,
    backward: Backward,
    context: Context = plain,
    *,
    tf32: bool = False,
) -> Terms:
    """Computes the loss of the global batch, and adds its gradient to the parameters' ``grad``.

    With ``n_chunks`` > 1 the memory is that of one chunk and the gradient the same, except that batch norm sees a
    chunk; it costs one more forward pass. The second pass repeats the first exactly (random numbers included), and
    running statistics are updated in the second alone. A method with ``per_sample`` needs one pass only.

    Args:
        model: an `ssl_bench.methods.Method`, wrapped or not; DistributedDataParallel averages its gradients over the
            processes, once.
        views: gives this process's inputs of a chunk, the same ones each time; every chunk has as many rows.
        n_chunks: >= 1.
        backward: computes gradients from the loss (``accelerator.backward``, which scales it under fp16).
        context: what surrounds the forward pass of a chunk: autocast, and the chunk's random numbers.
        tf32: let a GPU multiply the loss's float32 matrices in TF32 (more digits than bfloat16 outputs have).

    Returns:
        the method's scalars, detached; with ``per_sample`` the mean over this process's rows.

    Raises:
        ValueError: the method breaks its contract: outputs that are not one row an image, or differ between chunks, or
            a loss that reaches a trainable parameter.
    """
    method = unwrap(model)
    if method.per_sample:
        return _accumulate(model, method, views, n_chunks, backward, context, tf32)
    if n_chunks == 1:
        outputs = _forward(model, views, 0, context)
        leaves = _leaves(outputs)
        terms = _loss(method, leaves, backward, tf32)
        _carry(outputs, _gradients(method, leaves, 1)[0])
        return terms
    device = next(method.parameters()).device
    drawn = random_state(device)
    leaves = _leaves(_outputs_without_graph(model, method, views, n_chunks, context))
    terms = _loss(method, leaves, backward, tf32)
    gradients = _gradients(method, leaves, n_chunks)
    set_random_state(device, drawn)
    for chunk in range(n_chunks):
        with _reduce_gradients(model, last=chunk == n_chunks - 1):
            _carry(_forward(model, views, chunk, context), gradients[chunk])
    return terms


def global_loss(method: Method, outputs: Mapping[str, Tensor]) -> Terms:
    """The method's loss of the global batch, in float32 and without autocast.

    Args:
        method: not wrapped.
        outputs: (n, ...) this process's outputs, in any floating-point type.

    Returns:
        what ``method.loss`` returns, and "z_std", the mean over dimensions of the standard deviation of z / |z| of the
        output ``method.spread_of``: 1 / sqrt(D) if the embeddings spread evenly, 0 if they have collapsed to a point.

    Raises:
        ValueError: the global batch is a single image, or ``loss`` does not return a scalar by the name of "loss".
    """
    rows = {name: _full_precision(output) for name, output in outputs.items()}
    with torch.autocast(next(iter(rows.values())).device.type, enabled=False):
        sharded = world_size() > 1 and shards(method)
        share, loss = WHOLE, method.loss
        if sharded:
            share = Share(world_size(), rank(), total, gather_share)
            loss = partial(method.sharded_loss, share)
            for output in rows.values():
                refuse_uneven(output)
        elif not method.per_sample:
            rows = {name: gather(output) for name, output in rows.items()}
        n = share.processes * len(next(iter(rows.values())))
        if n < 2 and not method.per_sample:
            raise ValueError(f"{_name(method)}: the global batch must have >= 2 images, got {n}")
        terms = loss(**rows)
        if not isinstance(terms, dict) or not isinstance(terms.get("loss"), Tensor) or terms["loss"].ndim:
            raise ValueError(f"{_name(method)}: loss must return a dict with the scalar 'loss', got {_shown(terms)}")
        if method.spread_of in rows:
            with torch.no_grad():
                terms["z_std"] = _spread(F.normalize(rows[method.spread_of].flatten(1)), share)
    return terms


def shards(method: Method) -> bool:
    """Whether several processes compute the method's loss together, each for its own rows (``sharded_loss``).

    Not if a subclass, or this one object, has a ``loss`` of its own: then that is the loss, and gets all rows.
    """
    if method.per_sample:
        return False
    for names in (vars(method), *map(vars, type(method).__mro__)):
        if "sharded_loss" in names or "loss" in names:
            return "sharded_loss" in names
    return False


def _spread(z: Tensor, share: Share) -> Tensor:
    """The mean over dimensions of all rows' standard deviation (unbiased); z (n, D) are this process's rows."""
    if share.processes == 1:
        return z.std(dim=0).mean()
    centred = z - share.mean(z.mean(dim=0))
    return (share.total(centred.square().sum(dim=0)) / (share.processes * len(z) - 1)).sqrt().mean()


def unwrap(model: nn.Module) -> Method:
    """The method inside DistributedDataParallel and torch.compile wrappers."""
    inner: object = model
    while not isinstance(inner, Method):
        wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if wrapped is None:
            raise ValueError(f"model must be a Method, wrapped or not, got {type(model).__name__}")
        inner = wrapped
    return inner


def _accumulate(
    model: nn.Module, method: Method, views: Views, n_chunks: int, backward: Backward, context: Context, tf32: bool
) -> Terms:
    """Averages loss and gradient over equal chunks: exact, because the loss is a mean over rows."""
    total: Terms = {}
    for chunk in range(n_chunks):
        with _reduce_gradients(model, last=chunk == n_chunks - 1):
            outputs = _forward(model, views, chunk, context)
            leaves = _leaves(outputs)
            share = _loss(method, leaves, lambda loss: backward(loss / n_chunks), tf32)
            _carry(outputs, _gradients(method, leaves, 1)[0])
        for name, term in share.items():
            total[name] = total[name] + term / n_chunks if name in total else term / n_chunks
    return total


def _forward(model: nn.Module, views: Views, chunk: int, context: Context) -> Terms:
    inputs = views(chunk)
    with context(chunk):
        outputs = model(*inputs)
    n = len(inputs[0])
    if not isinstance(outputs, dict) or not outputs:
        raise ValueError(f"{_name(unwrap(model))}: forward must return a dict of tensors, got {_shown(outputs)}")
    for name, output in outputs.items():
        if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != n:
            raise ValueError(
                f"{_name(unwrap(model))}: output {name!r} must have one row for each of the {n} images, "
                f"got {_shown(output)}"
            )
    return outputs


def _outputs_without_graph(model: nn.Module, method: Method, views: Views, n_chunks: int, context: Context) -> Terms:
    """(n, ...) outputs of all this process's chunks, in the chunks' order; no running statistic changes."""
    whole: Terms = {}
    with torch.no_grad(), _reduce_gradients(model, last=False), _frozen_statistics(model):
        for chunk in range(n_chunks):
            parts = _forward(model, views, chunk, context)
            _check_alike(method, whole, parts, chunk)
            for name, part in parts.items():
                n = len(part)
                if chunk == 0:  # allocated once: a final torch.cat would need twice the memory
                    whole[name] = part.new_empty(n_chunks * n, *part.shape[1:])
                whole[name][chunk * n : (chunk + 1) * n] = part
    return whole


def _check_alike(method: Method, whole: Terms, parts: Terms, chunk: int) -> None:
    """Refuses outputs whose names or shapes depend on the chunk."""
    first = {name: tuple(output.shape[1:]) for name, output in whole.items()}
    these = {name: tuple(output.shape[1:]) for name, output in parts.items()}
    if chunk and first != these:
        raise ValueError(
            f"{_name(method)}: outputs must be alike in all chunks, got {first} in 0 and {these} in {chunk}"
        )


def _leaves(outputs: Terms) -> Terms:
    """The outputs as the leaves of the loss's own graph; integers, and what needs no gradient, stay as they are.

    What comes from a pass without a graph may need one: then every floating-point output gets it.
    """
    traced = any(output.requires_grad for output in outputs.values())
    return {
        name: output.detach().requires_grad_(output.is_floating_point() and (output.requires_grad or not traced))
        for name, output in outputs.items()
    }


def _loss(method: Method, leaves: Terms, backward: Backward, tf32: bool) -> Terms:
    """Back-propagates the loss to the leaves; returns its terms, without their graph."""
    with tf32_products(tf32):
        terms = global_loss(method, leaves)
        _refuse_parameters(method, leaves, terms["loss"])
        backward(terms["loss"])
    return {name: term.detach() for name, term in terms.items()}


def _refuse_parameters(method: Method, leaves: Terms, loss: Tensor) -> None:
    """Raises if the loss's graph reaches a trainable parameter.

    Its gradient would be computed once on every process instead of once over all, outside DistributedDataParallel.
    """
    known = {id(leaf) for leaf in leaves.values()}
    for variable in _reached([loss]):
        if id(variable) not in known:
            # Looked up here alone: this runs in every step, and a network has hundreds of names.
            for name, parameter in method.named_parameters():
                if parameter is variable:
                    raise ValueError(
                        f"{_name(method)}: loss must use no trainable parameter, got {name}: move it into forward"
                    )


def _reached(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the graph of some tensors."""
    seen: set[Any] = set()
    ahead = [value.grad_fn for value in values]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        ahead += [function for function, _ in node.next_functions]


def unreached_parameters(method: Method, inputs: Sequence[Tensor]) -> list[str]:
    """The names of the trainable parameters on which no output of a forward pass depends; changes nothing.

    Args:
        method: not wrapped.
        inputs: some rows of each of its views; at least 2, for batch norm.
    """
    kept = [(buffer, buffer.clone()) for buffer in method.buffers()]
    device = next(method.parameters()).device
    drawn = random_state(device)
    reached = {id(variable) for variable in _reached(method(*inputs).values())}
    set_random_state(device, drawn)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return [name for name, p in method.named_parameters() if p.requires_grad and id(p) not in reached]


def _gradients(method: Method, leaves: Terms, n_chunks: int) -> list[Terms]:
    """For each chunk, the loss's gradient with respect to its rows of the outputs, where there is one."""
    found = {name: leaf.grad.chunk(n_chunks) for name, leaf in leaves.items() if leaf.grad is not None}
    if not found:
        raise ValueError(f"{_name(method)}: the loss must depend on an output, got none of {', '.join(leaves)}")
    return [{name: rows[chunk] for name, rows in found.items()} for chunk in range(n_chunks)]


def _carry(outputs: Terms, gradients: Terms) -> None:
    """Carries the outputs' gradients through the network."""
    names = [name for name in gradients if outputs[name].requires_grad]
    # Not through ``backward``: under fp16 the gradients carry the scale already.
    torch.autograd.backward([outputs[name] for name in names], [gradients[name] for name in names])


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


def _full_precision(x: Tensor) -> Tensor:
    """Casts bfloat16 and float16 to float32; float64 stays (tests of gradients need it), and so do integers."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _name(method: Method) -> str:
    return type(method).__name__


def _shown(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's global generators, on the CPU and on this device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Back to what `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
