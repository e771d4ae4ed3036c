"""The squared off-diagonal entries of a cross-product matrix, by whichever of its two forms is cheaper."""

from typing import Any

import torch
from torch import Tensor


def gram_is_cheaper(n: int, d: int) -> bool:
    """Whether (N, N) Gram matrices beat the (D, D) cross-product: 8 N^2 D against 6 N D^2 operations, both passes.

    The bound also keeps the Gram form accurate. It subtracts sum_i C_ii^2 from |C|_F^2, and a C of rank at most N has
    |C|_F^2 >= (sum_i C_ii)^2 / N: for an even diagonal the difference is at least a third of what is subtracted, so
    two bits at most are lost however well the off-diagonal is trained.
    """
    return 4 * n < 3 * d


def _products(a: Tensor, b: Tensor, gram: bool) -> tuple[Tensor, ...]:
    """aa' (N, N), bb' (N, N) and the cross-product's diagonal (D,); or the cross-product (D, D), its diagonal zero."""
    if not gram:
        return ((a.T @ b).fill_diagonal_(0),)
    aa = a @ a.T
    return aa, aa if a is b else b @ b.T, (a * b).sum(dim=0)


class _OffDiagonal(torch.autograd.Function):
    """sum_{i != j} (a'b)_ij^2 with one product saved for the backward pass, (D, D) or (N, N)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, gram: bool) -> Tensor:
        ctx.gram, ctx.symmetric = gram, b is None
        b = a if b is None else b
        products = _products(a, b, gram)
        ctx.save_for_backward(a, b, *products)
        if gram:
            aa, bb, diagonal = products
            return (aa * bb).sum() - diagonal.square().sum()
        return products[0].square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, *products = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: what was saved knows nothing of a and b
            products = _products(a, a if ctx.symmetric else b, ctx.gram)
        scale = 2 * grad * (2 if ctx.symmetric else 1)
        if ctx.gram:
            aa, bb, diagonal = products
            grad_a = (bb @ a).sub_(b * diagonal) * scale
            grad_b = None if ctx.symmetric else (aa @ b).sub_(a * diagonal) * scale
        else:
            (c,) = products
            grad_a = (b @ c.T) * scale
            grad_b = None if ctx.symmetric else (a @ c) * scale
        return grad_a, grad_b, None


def off_diagonal_energy(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Computes sum_{i != j} (a'b)_ij^2.

    Since |a'b|_F^2 = <aa', bb'>, it needs no (D, D) matrix when N is small: at N = 512 and D = 4096 that is a sixth
    of the operations.

    Args:
        a: (N, D).
        b: (N, D); None for ``a`` itself.

    Returns:
        a scalar of the dtype of ``a``.
    """
    return _OffDiagonal.apply(a, b, gram_is_cheaper(*a.shape))
