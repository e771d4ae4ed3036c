"""A plug-in for end-to-end tests: a small, smooth network with batch norm, registered with timm, and methods on it.

A ReLU network cannot serve to compare whole fp32 runs: a rounding difference of 1e-5 in the activations flips that
share of the ReLUs, which changes the gradient by the square root of it, and a few steps later the losses differ by
percents (``benchmarks/rounding.py``).
"""

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from ssl_bench.methods import BarlowTwins


class TinyNet(nn.Sequential):
    """Two strided convolutions with batch norm and tanh, averaged over the image."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 5, 4, 2), nn.BatchNorm2d(16), nn.Tanh(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.Tanh(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


@register_model
def tiny_smooth(**_options: Any) -> nn.Module:
    """timm.create_model("tiny_smooth")."""
    return TinyNet()


@register_model
def tiny_plain(**_options: Any) -> nn.Module:
    """timm.create_model("tiny_plain"): without batch norm, so that chunks of a batch do not see each other."""
    layers = (nn.Conv2d(3, 32, 5, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32))
    net = nn.Sequential(*layers)
    net.num_features = 32  # type: ignore[assignment]
    return net


class TinyTwins(BarlowTwins):
    """Barlow Twins as it is, but naming it imports this file."""


class DropoutTwins(BarlowTwins):
    """Barlow Twins with dropout before the projector: a method that draws from torch's global generator."""

    def embed(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D)."""
        return self.projector(nn.functional.dropout(self.backbone(x), 0.3, self.training))


class SpareTwins(BarlowTwins):
    """Barlow Twins with a layer that nothing uses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spare = nn.Linear(8, 8)


class IdleTwins(BarlowTwins):
    """Barlow Twins with a layer whose output the loss does not use."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.idle = nn.Linear(32, 8)

    def forward(self, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
        """Beside the embeddings, an output."""
        return {**super().forward(x1, x2), "idle": self.idle(self.backbone(x1))}

    def loss(self, z1: Tensor, z2: Tensor, idle: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Of the embeddings alone."""
        return super().loss(z1, z2)


class BrokenTwins(BarlowTwins):
    """Barlow Twins whose loss becomes NaN at the fourth step (of one process)."""

    calls = 0

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """As Barlow Twins', until it breaks."""
        BrokenTwins.calls += 1
        terms = super().loss(z1, z2)
        return terms | {"loss": terms["loss"] * (torch.nan if BrokenTwins.calls >= 4 else 1)}


def constant_schedule() -> Any:
    """The constant schedule, but naming it imports this file."""
    return lambda _step: 1.0


class TiedNet(TinyNet):
    """A network of which two names are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 32)."""
        for layer in list(self)[:8]:
            x = layer(x)
        return self.second(torch.tanh(self.first(x)))


@register_model
def tiny_tied(**_options: Any) -> nn.Module:
    """timm.create_model("tiny_tied")."""
    return TiedNet()
