"""The CPU path: norms and updates block by block, so that a block's intermediate tensors never leave the cache.

A plain sequence of tensor operations streams every tensor from memory once per operation; here a block of `BLOCK`
elements goes through all of them, and torch's fused SGD and Adam kernels do the update in one pass. Reading a CPU
scalar costs nothing, so the ratios are Python numbers. Float32 or float64, dense, same layout (`can_fuse` checks).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 19  # elements; four float32 blocks are 8 MiB
CANCELLED = 0.1  # part of |g|^2 + beta^2 |w|^2 below which |g + beta w|^2 has lost a digit to cancellation


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory: (numel,), no copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching stretches of at most `BLOCK` elements of dense tensors of one layout."""
    if tensors[0].numel() <= BLOCK:
        yield tuple(flat(t) for t in tensors)
    else:
        yield from zip(*(flat(t).split(BLOCK) for t in tensors), strict=True)


def scratch_like(params: Sequence[Tensor]) -> Tensor:
    """Uninitialised room for one block in the parameters' dtype."""
    return torch.empty(min(BLOCK, max(p.numel() for p in params)), dtype=params[0].dtype)


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product of two vectors as a number."""
    return torch.dot(x, y).item()


def vector(values: Sequence[float] | Sequence[tuple[float, ...]]) -> Tensor:
    """K numbers, or K rows of them, as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def layer_norms(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """|w|, |g| and |g + beta w| of each tensor in one pass over memory.

    |g + beta w|^2 = |g|^2 + 2 beta g.w + beta^2 |w|^2 needs no sum to be formed; where it cancels, the sum is formed.

    Args:
        params: K tensors.
        grads: K tensors.
        weight_decay: beta.

    Returns:
        Three (K,) float64 tensors.
    """
    rows = []
    for param, grad in zip(params, grads, strict=True):
        ww = gg = gw = 0.0
        for w, g in blocks(param, grad):
            ww += dot(w, w)
            gg += dot(g, g)
            if weight_decay != 0:
                gw += dot(g, w)
        parts = gg + weight_decay**2 * ww
        dd = parts + 2 * weight_decay * gw
        if dd < CANCELLED * parts:
            dd = sum(dot(d, d) for d in (torch.add(g, w, alpha=weight_decay) for w, g in blocks(param, grad)))
        rows.append((ww, gg, dd))
    w_norm, g_norm, d_norm = vector(rows).sqrt_().unbind(1)
    return w_norm, g_norm, d_norm


def momentum_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    factors: Sequence[float],
    decays: Sequence[float],
    momentum: float,
    lr: float,
    nesterov: bool,
    want_norms: bool,
) -> Tensor | None:
    """b = mu b + a (g + beta w); w -= lr b (Nesterov: lr (a (g + beta w) + mu b)): torch's fused SGD fed a d.

    Args:
        params, grads, buffers: K tensors each; params and buffers are changed.
        factors: a of each tensor.
        decays: beta of each tensor.
        momentum: mu.
        lr: what the buffer is multiplied by.
        nesterov: look ahead.
        want_norms: whether the norm of each tensor's step is wanted.

    Returns:
        |w_new - w| (K,) float64, or None.
    """
    scratch = scratch_like(params)
    squares = []
    for param, grad, buffer, a, decay in zip(params, grads, buffers, factors, decays, strict=True):
        total = 0.0
        whole = momentum == 0 or (nesterov and want_norms)  # whether a (g + beta w) itself is needed
        for w, g, b in blocks(param, grad, buffer):
            d = torch.mul(g, a, out=scratch[: w.numel()])
            if whole and decay != 0:
                d.add_(w, alpha=a * decay)
            if momentum == 0:  # the fused kernel takes no buffer then
                w.add_(b.copy_(d), alpha=-lr)
            else:
                torch._fused_sgd_(
                    [w], [d], [b], weight_decay=0.0 if whole else a * decay, momentum=momentum, lr=lr, dampening=0.0,
                    nesterov=nesterov, maximize=False, is_first_step=False,
                )  # fmt: skip
            if want_norms:
                u = d.add_(b, alpha=momentum) if nesterov else b
                total += dot(u, u)
        squares.append(total)
    return vector(squares).sqrt_().mul_(abs(lr)) if want_norms else None


def adam_direction_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    scratch: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    want_grad_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance Adam's moments and write u = m / (sqrt(v) + eps) + beta w into `scratch`, tensor after tensor.

    torch's fused Adam kernel with lr -1, given beta w in the place of the weights, adds m / (sqrt(v) + eps) to it.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: K tensors each; the moments are changed.
        steps: K counters for the bias correction, infinity for none.
        scratch: room for all elements together.
        betas: decay rates of the moments.
        eps: added to sqrt(v).
        weight_decay: beta.
        want_grad_norms: whether |g| is wanted; else it is NaN.

    Returns:
        |w|, |g|, |u|, each (K,) float64.
    """
    rows = []
    start = 0
    for param, grad, m_all, v_all, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        ww = uu = 0.0
        gg = 0.0 if want_grad_norms else float("nan")
        for w, g, m, v in blocks(param, grad, m_all, v_all):
            u = torch.mul(w, weight_decay, out=scratch[start : start + w.numel()])
            torch._fused_adam_(
                [u], [g], [m], [v], [], [step], lr=-1.0, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            ww += dot(w, w)
            uu += dot(u, u)
            if want_grad_norms:
                gg += dot(g, g)
            start += w.numel()
        rows.append((ww, gg, uu))
    w_norm, g_norm, u_norm = vector(rows).sqrt_().unbind(1)
    return w_norm, g_norm, u_norm


def scaled_add_(params: Sequence[Tensor], scratch: Tensor, scales: Sequence[float]) -> None:
    """w += scale * (the tensor's stretch of `scratch`), the counterpart of `adam_direction_`."""
    start = 0
    for param, scale in zip(params, scales, strict=True):
        # In the same blocks, so that each core finds the stretches that it wrote itself.
        for (w,) in blocks(param):
            w.add_(scratch[start : start + w.numel()], alpha=scale)
            start += w.numel()
