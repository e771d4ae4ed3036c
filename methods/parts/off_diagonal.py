"""The sum of squared off-diagonal entries of a cross-product matrix, in the cheaper of its two forms."""

from typing import Any

import torch
from torch import Tensor

from ssl_bench.methods.parts.share import WHOLE, Share, refuse_second_derivative


def gram_is_cheaper(n: int, d: int) -> bool:
    """Whether (N, N) Gram matrices beat the (D, D) cross-product: 8 N^2 D against 6 N D^2 operations in both passes.

    The bound also keeps the Gram form accurate. It subtracts sum_i C_ii^2 from |C|_F^2, and a C of rank at most N has
    |C|_F^2 >= (sum_i C_ii)^2 / N: if the diagonal is even, the difference is at least a third of what is subtracted,
    so at most two bits are lost, however small training makes the off-diagonal.
    """
    return 4 * n < 3 * d


def _products(a: Tensor, b: Tensor, gram: bool, share: Share) -> tuple[Tensor, ...]:
    """The global batch's cross-product (D, D) with diagonal 0; or, in the Gram form, five tensors.

    These are aa' and bb' (n, N), this process's rows times all rows, the cross-product's diagonal (D,), and all rows of
    a and b (N, D).
    """
    if not gram:
        return (share.total(a.T @ b).fill_diagonal_(0),)
    all_a = share.gather(a)
    all_b = all_a if a is b else share.gather(b)
    aa = a @ all_a.T
    return aa, aa if a is b else b @ all_b.T, share.total((a * b).sum(dim=0)), all_a, all_b


class _OffDiagonal(torch.autograd.Function):
    """sum_{i != j} (a'b)_ij^2, which saves its (D, D) or (n, N) products for the backward pass.

    Its backward pass needs no communication: every process has the products, and so the whole gradient of its rows.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, gram: bool, share: Share) -> Tensor:
        ctx.gram, ctx.symmetric, ctx.share = gram, b is None, share
        b = a if b is None else b
        products = _products(a, b, gram, share)
        ctx.save_for_backward(a, b, *products)
        if gram:
            aa, bb, diagonal, *_ = products
            return share.total((aa * bb).sum()) - diagonal.square().sum()
        return products[0].square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b, *products = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative: saved products have no graph to a and b
            refuse_second_derivative(ctx.share)
            products = _products(a, a if ctx.symmetric else b, ctx.gram, ctx.share)
        # Times the processes: each back-propagates the same value (the convention of `runtime.distributed`).
        scale = 2 * grad * (2 if ctx.symmetric else 1) * ctx.share.processes
        if ctx.gram:
            aa, bb, diagonal, all_a, all_b = products
            grad_a = (bb @ all_a).sub_(b * diagonal) * scale
            grad_b = None if ctx.symmetric else (aa @ all_b).sub_(a * diagonal) * scale
        else:
            (c,) = products
            grad_a = (b @ c.T) * scale
            grad_b = None if ctx.symmetric else (a @ c) * scale
        return grad_a, grad_b, None, None


def off_diagonal_energy(a: Tensor, b: Tensor | None = None, share: Share = WHOLE) -> Tensor:
    """Computes sum_{i != j} (a'b)_ij^2 over all rows of the global batch.

    Since |a'b|_F^2 = <aa', bb'>, no (D, D) matrix is needed if N is small: at N = 512 and D = 4096 that takes a sixth
    of the operations.

    Args:
        a: (n, D) this process's rows.
        b: (n, D); None for ``a`` itself.
        share: which rows of the global batch these are.

    Returns:
        a scalar of the dtype of ``a``.
    """
    return _OffDiagonal.apply(a, b, gram_is_cheaper(share.processes * a.shape[0], a.shape[1]), share)
