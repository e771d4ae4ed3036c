"""A small classifier with batch norm, its data and its pipeline, for tests of what surrounds the training loop."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.augment.views import Labels, Normalize
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.data.sources import ResidentSource
from ssl_bench.methods import Method


class SmallClassifier(Method):
    """Images (n, 3, 4, 4) of five classes."""

    per_sample = True

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), 48, nn.Identity())
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Scores and labels."""
        return {"scores": self.net(x), "labels": y}

    def loss(self, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"loss": nn.functional.cross_entropy(scores, labels)}


def small_batches(**options: Any) -> Pipeline:
    """64 random images with labels, on one process."""
    torch.manual_seed(0)
    source = ResidentSource(torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8), torch.arange(64) % 5)
    views = [Normalize(mean=(0.5,) * 3, std=(0.25,) * 3), Labels()]
    where: Any = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    return Pipeline(source, views, **{"seed": 0, "chunk_size": None, **options}, **where)
