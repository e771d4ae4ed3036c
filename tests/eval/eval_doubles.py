"""Small stand-ins that the evaluators' tests share: a source of images, a backbone with batch norm, a transform."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Images:
    """Random uint8 images in memory; `lose` drops that many images of the last batch of some process."""

    def __init__(self, n: int, classes: int = 3, size: int = 8, seed: int = 0, lose: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % classes
        noise = torch.randint(0, 120, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        self.images = noise + (40 * self.labels).to(torch.uint8).view(n, 1, 1, 1)
        self.lose = lose
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        for index in indices:
            self.asked += index.tolist()
            yield self.images[index[self.lose :]]


@dataclass
class Splits:
    train: Images
    test: Images


class Backbone(nn.Module):
    """A convolution, batch norm with statistics worth keeping, dropout (which eval mode must silence), pooling."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim)
        self.norm.running_mean = torch.linspace(-1, 1, dim)
        self.norm.running_var = torch.linspace(0.5, 2, dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.conv(x)).relu()).mean(dim=(2, 3))


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert all(parameter.grad is None for parameter in module.parameters())
