"""TF32, in which a GPU multiplies float32 matrices with 10 bits of mantissa instead of 23: off, unless it is asked for.

The switches are torch's of before 2.9; they act on every torch that the suite runs on, and on no CPU.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def forbid_tf32() -> None:
    """From here on float32 means float32 in matrix products and convolutions; torch's default is TF32 in the latter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new API settings to control TF32", UserWarning)  # some versions, once
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


@contextmanager
def tf32_products(allowed: bool = True) -> Iterator[None]:
    """Matrix products of float32 tensors may use TF32 inside; nothing changes if not ``allowed``."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
