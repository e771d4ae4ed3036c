"""TVLARS in a plain PyTorch loop: Barlow Twins on the digits, without the suite's recipes, loop or records.

python examples/plain_pytorch.py --steps 30
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import TVLARS

CROP = v2.RandomResizedCrop(32, scale=(0.4, 1.0), antialias=True)


def digits() -> torch.Tensor:
    """All 1,797 images as (N, 3, 32, 32) in [0, 1]."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).div_(16)[:, None]
    return torch.nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def view(images: torch.Tensor) -> torch.Tensor:
    """A crop of each image of its own; methods of the suite expect two such views."""
    return torch.stack([CROP(image) for image in images])


def train(steps: int, batch_size: int = 256) -> list[float]:
    """Trains for so many steps; returns the losses."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(digits()), batch_size=batch_size, shuffle=True, drop_last=True)
    backbone = timm.create_model("resnet18", num_classes=0)
    method = BarlowTwins(backbone, backbone.num_features, projector=(512, 512, 1024))

    # The delay and lambda's time unit are in steps: epochs times the steps of an epoch.
    optimizer = TVLARS(method.parameters(), lr=1.0, variant="paper", decay=1e-4, delay_steps=2 * len(loader))

    losses: list[float] = []
    while len(losses) < steps:
        for (images,) in loader:
            outputs = method(view(images), view(images))  # {"z1": (n, D), "z2": (n, D)}
            # On several processes: gather each output here, by torch.distributed.nn.functional.all_gather, which has a
            # gradient, so that the loss sees the global batch.
            loss = method.loss(**outputs)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()  # phi(t) counts these steps; a scheduler on top would be another optimizer
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Barlow Twins under TVLARS in a plain loop.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    for step, loss in enumerate(train(arguments.steps, arguments.batch_size), 1):
        print(f"step {step:3d}  loss {loss:.2f}")
