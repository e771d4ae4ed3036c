"""Batch norm over the batch of all processes.

Why not torch's `nn.SyncBatchNorm`: it waits for the device in every layer, in order to leave out processes without
samples (here every process has some, so the host can run ahead), and it refuses the CPU. On a GPU this module calls the
same kernels; on the CPU it uses plain operations. A pass that repeats another (activations computed again) can take its
statistics from it, without communication.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

# In one tensor, so that nothing is copied afterwards (NCCL's list form copies once a process); torch 2.14 renames it.
_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(x: Tensor) -> Tensor:
    """(n, ...) of the same shape on every process -> (W * n, ...) in rank order; no gradient."""
    out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    _gather_single(out, x.contiguous())
    return out


Statistics = tuple[Tensor, Tensor, Tensor]  # mean, and what else the normalisation needs, of one call


def _over_all_processes(wide: Tensor) -> Statistics:
    """Mean, biased variance and count of each channel."""
    channels = wide.shape[1]
    dims = [d for d in range(wide.ndim) if d != 1]
    own = torch.cat([wide.new_tensor([wide.numel() // channels]), *torch.var_mean(wide, dims, correction=0)])
    counts, variances, means = gather_rows(own[None]).tensor_split([1, 1 + channels], dim=1)  # (W, 1), (W, C) twice
    count = counts.sum(dim=0)
    mean = (means * counts).sum(dim=0) / count
    # Centred at the global mean: sums of raw squares would cancel where |mean| >> std.
    return mean, ((variances + (means - mean).square()) * counts).sum(dim=0) / count, count


class _Normalize(torch.autograd.Function):
    """Standardises with the statistics of all processes; also returns the mean, biased variance and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kept: Statistics | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = x.to(statistics)
        mean, var, count = _over_all_processes(wide) if kept is None else kept
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
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std, count = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inv_std, x)
        sums = torch.cat([wide.sum(dims), (wide * normal).sum(dims)])
        # This process's share only: DistributedDataParallel averages these gradients like all others.
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
            None,
        )


class _NormalizeByKernels(torch.autograd.Function):
    """The same by torch's CUDA kernels; also updates the running statistics, unless they are None.

    The statistics that it returns are the mean, 1 / std and the counts of all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        kept: Statistics | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=_layout(x))
        if kept is None:
            kept = _NormalizeByKernels._over_all_processes(x, running_mean, running_var, momentum, eps)
        mean, inv_std, counts = kept
        ctx.save_for_backward(x, weight, mean, inv_std, counts)
        ctx.mark_non_differentiable(mean, inv_std, counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, inv_std, eps), mean, inv_std, counts

    @staticmethod
    def _over_all_processes(
        x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
    ) -> Statistics:
        mean, inv_std = torch.batch_norm_stats(x, eps)
        count = mean.new_full((1,), x.numel() // x.shape[1])  # filled on the device: no copy, no wait
        everyone = gather_rows(torch.cat([mean, inv_std, count])[None])
        means, inv_stds, counts = everyone.tensor_split([len(mean), 2 * len(mean)], dim=1)
        if running_mean is None:  # without running statistics the kernel would want the counts in x's dtype
            running_mean, running_var = torch.zeros_like(mean), torch.ones_like(mean)
        counts = counts.reshape(-1).to(running_mean.dtype)
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inv_stds, running_mean, running_var, momentum, eps, counts
        )
        return mean, inv_std, counts.to(torch.int32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std, counts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=_layout(x))  # the kernels assume that x is laid out like grad
        total, product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inv_std, weight, *wanted
        )
        grad_x = None
        if wanted[0]:
            sums = torch.cat([total, product])
            dist.all_reduce(sums)
            total, product = sums.chunk(2)
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inv_std, weight, total, product, counts)
        affine = weight is not None
        # This process's share only, as above.
        return grad_x, grad_weight if affine and wanted[1] else None, grad_bias if wanted[2] else None, *[None] * 5


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format that x has, or should be given for the kernels."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x, (n, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of all processes' samples together.

    Parameters, buffers and state dict are those of ``nn.BatchNorm1d/2d/3d``, and so is evaluation mode. Statistics are
    computed in float32 at least; the running variance is unbiased. Processes may hold different numbers of samples,
    but each must hold some. Child modules run after the normalisation (drop and act of timm's ``BatchNormAct2d``).
    """

    _kept: list[Statistics] | None = None  # takes the statistics of each call
    _reused: Iterator[Statistics] | None = None  # gives them, to the calls of a pass that repeats those

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"SyncBatchNorm: x must have at least 2 dimensions, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (n, C, ...); shape, dtype and memory format stay the same."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            out = super().forward(x)
        else:
            self._check_input_dim(x)
            reused = None if self._reused is None else next(self._reused)
            out, *found = self._by_kernels(x, reused) if x.is_cuda else self._by_operations(x, reused)
            if self._kept is not None:
                self._kept.append((found[0], found[1], found[2]))
        for after in self.children():
            out = after(out)
        return out

    def _by_kernels(self, x: Tensor, reused: Statistics | None) -> tuple[Tensor, ...]:
        tracked = self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        momentum = self._count_batch() if tracked else 0.0
        result: tuple[Tensor, ...] = _NormalizeByKernels.apply(
            x, self.weight, self.bias, mean, var, momentum, self.eps, reused
        )
        return result

    def _by_operations(self, x: Tensor, reused: Statistics | None) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _Normalize.apply(x, self.weight, self.bias, self.eps, reused)
        if self.track_running_stats:
            self._record(*result[1:])
        return result

    @torch.no_grad()
    def _count_batch(self) -> float:
        """Counts a batch and returns its weight in the running statistics; ``momentum=None`` waits for the device."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _record(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self._count_batch()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), momentum)

    @classmethod
    def of(cls, layer: _BatchNorm) -> "SyncBatchNorm":
        """Converts a layer; the new one shares its parameters and buffers."""
        affine, tracked = layer.affine, layer.track_running_stats
        new = cls(layer.num_features, layer.eps, layer.momentum, affine, tracked, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        new.running_mean, new.running_var = layer.running_mean, layer.running_var
        new.num_batches_tracked = layer.num_batches_tracked
        new.training = layer.training
        for name, child in layer.named_children():
            new.add_module(name, child)
        return new


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[dict[SyncBatchNorm, list[Statistics]]]:
    """Collects the statistics of every call of a module's synchronised batch norms, for `reuse_statistics`."""
    kept: dict[SyncBatchNorm, list[Statistics]] = {
        layer: [] for layer in module.modules() if isinstance(layer, SyncBatchNorm)
    }
    try:
        for layer, found in kept.items():
            layer._kept = found
        yield kept
    finally:
        for layer in kept:
            layer._kept = None


@contextmanager
def reuse_statistics(kept: Mapping[SyncBatchNorm, list[Statistics]]) -> Iterator[None]:
    """Gives the calls of a pass that repeats another the statistics of that, instead of communicating again."""
    try:
        for layer, found in kept.items():
            layer._reused = iter(found)
        yield
    finally:
        for layer in kept:
            layer._reused = None
