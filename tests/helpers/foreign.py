"""Plug-ins from outside for end-to-end tests: a data set, an evaluator without a top-1, a backbone."""

from pathlib import Path

import numpy as np
from torch import nn

from ssl_bench.data.raw import Located, RawDataset, RawSplit
from ssl_bench.eval import Probe


def locate(path: Path | None) -> Located:
    """Two classes of random 16-pixel images, a light one and a dark one; nothing on disk."""
    assert path is None
    images = np.random.default_rng(0).integers(0, 128, (96, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(96) % 2
    images[labels == 1] += 100

    def split(part: slice) -> RawSplit:
        return RawSplit(labels[part], lambda: iter(images[part]), lambda index: f"made image {index}")

    return Located((), lambda: RawDataset(split(slice(0, 64)), split(slice(64, 96)), ("dark", "light")))


class Spread:
    """An evaluator that measures no accuracy."""

    name = "spread-v1"

    def __call__(self, probe: Probe) -> dict[str, float]:
        """The mean standard deviation of the test features."""
        return {"spread": probe.features("test").std(dim=0).mean().item()}


def backbone() -> nn.Module:
    """Eight features of any image."""
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_features = 8  # type: ignore[assignment]
    return net
