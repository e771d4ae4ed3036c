"""Small stand-ins that the evaluators' tests share: a source of images, a backbone with batch norm, a transform."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Images:
    """Noisy uint8 images, each class around its own colour; `lose` drops that many images of every batch."""

    def __init__(self, n: int, classes: int = 3, size: int = 8, seed: int = 0, lose: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % classes
        noise = torch.randint(0, 60, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        colours = torch.randint(
            0, 190, (classes, 3, 1, 1), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
        )
        self.images = noise + colours[self.labels].to(torch.uint8)
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

    def __init__(self, dim: int = 6, dropout: float = 0.5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim)
        self.norm.running_mean = torch.linspace(-1, 1, dim)
        self.norm.running_var = torch.linspace(0.5, 2, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.conv(x)).relu()).mean(dim=(2, 3))


def to_float(images: Tensor) -> Tensor:
    return images.float() / 50 - 2.5


class Shift:
    """A random augmentation: each image is brightened by its own amount and, by chance, mirrored."""

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"by": torch.rand(n, generator=generator), "flip": torch.rand(n, generator=generator) < 0.5}

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        assert len(images) == len(params["by"])
        x = torch.where(params["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        return to_float(x) + params["by"].view(-1, 1, 1, 1)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert all(parameter.grad is None for parameter in module.parameters())
