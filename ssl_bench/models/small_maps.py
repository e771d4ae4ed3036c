"""3 x 3 convolutions over feature maps of at most 2 x 2 pixels, as one dense matrix product.

A ResNet with the ImageNet stem ends at 1 x 1 pixels for 32 x 32 images, and at 2 x 2 for 64 x 64. A padded 3 x 3
convolution over so small a map is a linear layer: over 1 x 1 only the kernel's centre meets the image (1 of 9
products), over 2 x 2 every output sees every input (16 of 36). oneDNN's weight gradients of such layers are slow.
`benchmarks/throughput.py` times the bare step with and without.
"""

from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 2  # pixels of a side; at 3 the dense matrix has as many products as the convolution


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution that is a matrix product on the CPU where the map is small, and `nn.Conv2d` elsewhere.

    Same parameters, same state_dict, the same function up to the rounding of sums taken in another order. The matrix
    product has no rules for torch.func's transforms (vmap, jvp); ordinary autograd may differentiate it repeatedly.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, C, H, W) to (n, O, H', W')."""
        # Only on the CPU: a GPU's libraries choose among many algorithms themselves, and it was not measured there.
        if x.device.type != "cpu" or x.ndim != 4 or max(x.shape[-2:]) > LARGEST:
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        elif x.dtype != self.weight.dtype:
            return super().forward(x)  # raises torch's own error
        with torch.autocast("cpu", enabled=False):
            return _DenseConvolution.apply(x, self.weight, self.stride[0])


def use_small_maps(model: nn.Module) -> None:
    """Turns a model's 3 x 3 convolutions (padding 1, stride 1 or 2, one group, no bias) into `SmallMapConv2d`."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.padding == (1, 1)
            and module.padding_mode == "zeros"
            and module.stride in ((1, 1), (2, 2))
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.bias is None
        ):
            module.__class__ = SmallMapConv2d


def _outputs(height: int, width: int, stride: int) -> list[tuple[int, int, slice, slice]]:
    """Each output pixel's row and column, and the kernel's rows and columns that meet the map there."""
    rows, columns = range((height - 1) // stride + 1), range((width - 1) // stride + 1)
    return [
        (i, j, slice(1 - stride * i, 1 - stride * i + height), slice(1 - stride * j, 1 - stride * j + width))
        for i in rows
        for j in columns
    ]


def _dense(weight: Tensor, height: int, width: int, stride: int, dtype: torch.dtype) -> Tensor:
    """The convolution's matrix: (H' W' O, H W C) of a weight (O, C, 3, 3)."""
    kernel = weight.permute(0, 2, 3, 1).to(dtype)  # (O, 3, 3, C)
    outputs = _outputs(height, width, stride)
    blocks = [kernel[:, rows, columns].flatten(1) for _, _, rows, columns in outputs]  # (O, H W C) each
    return torch.cat(blocks)


def _fold(matrix: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The weight's gradient from the matrix's: every tap sums its places, in the weight's own precision."""
    n_out, n_in = weight.shape[:2]
    outputs = _outputs(height, width, stride)
    blocks = matrix.view(len(outputs), n_out, height, width, n_in).unbind(0)
    kernel = weight.new_zeros((n_out, 3, 3, n_in))
    for (_, _, rows, columns), block in zip(outputs, blocks, strict=True):
        kernel[:, rows, columns] += block
    return kernel.permute(0, 3, 1, 2)


class _DenseConvolution(torch.autograd.Function):
    """y = x W' with the matrix made from the weight when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        n, _, height, width = x.shape
        shape = (n, (height - 1) // stride + 1, (width - 1) // stride + 1, weight.shape[0])
        y = _pixels_last(x) @ _dense(weight, height, width, stride, x.dtype).T
        return y.view(shape).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        n, channels, height, width = x.shape
        grad = _pixels_last(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(weight, height, width, ctx.stride, x.dtype)
            grad_x = grad_x.view(n, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_weight = _fold(grad.T @ _pixels_last(x), weight, height, width, ctx.stride)
        return grad_x, grad_weight, None


def _pixels_last(x: Tensor) -> Tensor:
    """(n, C, H, W) as (n, H W C): no copy where the memory format is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1)
