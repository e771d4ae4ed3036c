"""What the tests of single methods share: a small net without batch norm, inputs, and the engine's two ways."""

import copy
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn

from ssl_bench.methods import Crop, Method
from ssl_bench.methods.views import View
from ssl_bench.training.gradient import compute_gradient

FEATURES = 12


def smooth_net() -> nn.Module:
    """A small smooth network for images of any size, with ``FEATURES`` features."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, FEATURES)
    )


def small_vit(image: int = 8, patch: int = 2, **options: object) -> nn.Module:
    """timm's vision transformer with two blocks, 24 wide."""
    torch.manual_seed(0)
    shape = {"img_size": image, "patch_size": patch, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **(shape | options))


def without_batch_norm(method: Method) -> Method:
    """The method in float64, its projectors without batch norm, so that chunks of a batch do not see each other."""
    for module in method.modules():
        if isinstance(module, nn.Sequential):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm1d):
                    module.register_module(name, nn.Identity())
    return method.double()


def inputs(declared: Sequence[View], n: int, side: int = 8) -> tuple[Tensor, ...]:
    """Float64 inputs of the declared shapes."""
    generator = torch.Generator().manual_seed(n)
    made = []
    for view in declared:
        if isinstance(view, Crop):
            size = side if view.size is None else view.size if view.size >= 1 else round(view.size * side)
            made.append(torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator))
        else:
            made.append(torch.rand(n, view.width, dtype=torch.float64, generator=generator))
    return tuple(made)


def two_steps(method: Method, n_chunks: int, n: int = 8) -> dict[str, Tensor]:
    """Losses, gradients, and buffers after two steps of gradient descent on half the views, in chunks."""
    method, found = copy.deepcopy(method), {}
    views = inputs(method.views, 2 * n)
    for step in range(2):
        method.begin_step(step / 2)
        method.zero_grad()

        def chunk(number: int, step: int = step) -> tuple[Tensor, ...]:
            start = step * n + number * (n // n_chunks)
            return tuple(x[start : start + n // n_chunks] for x in views)

        terms = compute_gradient(method, chunk, n_chunks, Tensor.backward)
        found |= {f"{name} {step}": value for name, value in terms.items()}
        for name, p in method.named_parameters():
            if p.grad is not None:
                found[f"gradient {step} of {name}"] = p.grad.clone()
                p.data.sub_(0.1 * p.grad)
    return found | {f"buffer {name}": value.clone() for name, value in method.named_buffers()}


def assert_chunks_are_the_whole(method: Method, rtol: float = 1e-11) -> None:
    """Two steps in four chunks give the losses, gradients and buffers of two whole steps; all that trains has one."""
    whole, chunked = two_steps(method, 1), two_steps(method, 4)
    assert whole.keys() == chunked.keys()
    for name, value in whole.items():
        largest = float(value.abs().max()) if value.isfinite().all() else 1.0
        torch.testing.assert_close(chunked[name], value, rtol=0, atol=max(rtol * largest, 1e-14), msg=name)
    trained = {f"gradient 1 of {name}" for name, p in method.named_parameters() if p.requires_grad}
    assert trained <= whole.keys()
