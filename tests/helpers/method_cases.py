"""What the tests of single methods share: small networks, views, outputs, and how a loss is compared.

That chunks, processes, replays and a resumed run are one and the same is tested of all methods by test_invariance.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.methods import Crop, Method
from ssl_bench.methods.views import View

FEATURES = 16


def network() -> nn.Module:
    """(n, 3, H, W) of any size -> (n, FEATURES), smooth and without batch norm, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(1))


def small_vit(image: int = 8, patch: int = 2, **options: object) -> nn.Module:
    """timm's vision transformer with two blocks, 24 wide."""
    torch.manual_seed(0)
    shape = {"img_size": image, "patch_size": patch, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **(shape | options))


def build(cls: type[Method], **options: Any) -> Any:
    """A method in float64 and without batch norm, so that an image does not see the others."""
    return _without_norm(cls(network(), FEATURES, **options).double())


def _without_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(child, _BatchNorm) else _without_norm(child))
    return module


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


def rows(*names: str, n: int = 6, d: int = 5, seed: int = 0) -> list[Tensor]:
    """Correlated (n, d) outputs in float64 whose gradients are asked for, one for each name."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = torch.randn(1 + len(names), n, d, dtype=torch.float64, generator=generator)
    return [(common + 0.7 * noise).requires_grad_() for noise in own]


def assert_same_loss(actual: Tensor, expected: Tensor, inputs: Sequence[Tensor], rtol: float = 1e-10) -> None:
    """Equal values, and equal gradients with respect to each input (None where neither reaches it)."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
    found, wanted = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (actual, expected))
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference, rtol=rtol, atol=rtol * float(reference.abs().max()))


def assert_follows(method: Method, momentum: Callable[[float], float]) -> None:
    """The teacher is a copy at first, gets no gradient, and goes to momentum teacher + (1 - momentum) student."""
    teacher: Any = method.teacher
    pairs = list(
        zip(teacher.parameters(), [*method.backbone.parameters(), *method.projector.parameters()], strict=True)
    )
    assert pairs
    for old, new in pairs:
        assert torch.equal(old, new)
        assert not old.requires_grad
    generator = torch.Generator().manual_seed(1)
    for progress in (0.0, 0.3, 0.9):
        with torch.no_grad():
            for _, new in pairs:
                new.add_(torch.randn(new.shape, dtype=new.dtype, generator=generator))
            m = momentum(progress)
            expected = [m * old + (1 - m) * new for old, new in pairs]
            method.begin_step(progress)
        for (old, _), value in zip(pairs, expected, strict=True):
            torch.testing.assert_close(old.detach(), value.detach(), rtol=1e-12, atol=1e-12)
