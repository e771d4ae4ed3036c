"""Batch norm over the batch of all processes: torch's own on GPUs, an equal one for the CPU, which torch's refuses."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class _Normalize(torch.autograd.Function):
    """Standardises with the statistics of all processes; also returns mean, biased variance and count to record."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = x.to(statistics)
        dims = [d for d in range(x.ndim) if d != 1]
        count = wide.new_tensor([x.numel() // x.shape[1]])
        local_var, local_mean = torch.var_mean(wide, dims, correction=0)
        sums = torch.cat([count, local_mean * count])
        dist.all_reduce(sums)
        count, mean = sums[:1], sums[1:] / sums[:1]
        # Centred at the global mean: sums of raw squares would cancel where |mean| >> std.
        squares = (local_var + (local_mean - mean).square()) * (x.numel() // x.shape[1])
        dist.all_reduce(squares)
        var = squares / count
        inv_std = (var + eps).rsqrt()
        scale = inv_std if weight is None else inv_std * weight
        out = (wide - _channels(mean, x)) * _channels(scale, x)
        if bias is not None:
            out = out + _channels(bias, x)
        ctx.save_for_backward(x, weight, mean, inv_std, count)
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, inv_std, count = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inv_std, x)
        sums = torch.cat([wide.sum(dims), (wide * normal).sum(dims)])
        # This process's share: DistributedDataParallel averages weights' and biases' gradients as any other's.
        grad_bias, grad_weight = sums.clone().chunk(2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)
            mean_grad, mean_product = (sums / count).chunk(2)
            scale = inv_std if weight is None else inv_std * weight
            grad_x = wide - _channels(mean_grad, x) - normal * _channels(mean_product, x)
            grad_x = (grad_x * _channels(scale, x)).to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
            grad_bias.to(mean.dtype) if ctx.needs_input_grad[2] else None,
            None,
        )


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x, (n, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of all processes' samples together; for the CPU.

    The same parameters, buffers and state dict as ``nn.BatchNorm1d/2d/3d``. Statistics are taken in float32 at least,
    the running variance is unbiased, and evaluation mode is torch's. Processes may hold different numbers of samples.
    Its children, if any, follow the normalisation (the drop and act of timm's ``BatchNormAct2d``).
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"SyncBatchNorm: x got {x.ndim} dimensions, must be >= 2")

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, ...) -> the same shape, dtype and memory format."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            out = super().forward(x)
        else:
            self._check_input_dim(x)
            out, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
            if self.track_running_stats:
                self._record(mean, var, count)
        for after in self.children():
            out = after(out)
        return out

    @torch.no_grad()
    def _record(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), momentum)

    @classmethod
    def of(cls, layer: _BatchNorm) -> "SyncBatchNorm":
        """The same layer, sharing parameters and buffers, with synchronised statistics."""
        affine, tracked = layer.affine, layer.track_running_stats
        new = cls(layer.num_features, layer.eps, layer.momentum, affine, tracked, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        new.running_mean, new.running_var = layer.running_mean, layer.running_var
        new.num_batches_tracked = layer.num_batches_tracked
        new.training = layer.training
        for name, child in layer.named_children():
            new.add_module(name, child)
        return new
