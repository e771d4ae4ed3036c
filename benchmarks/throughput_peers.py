"""The same training step made of other people's parts: lightly, torchvision, the TVLARS paper's authors."""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from PIL import Image
from steps import STATS, Sizes, Steps, build_task, load_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class PilImages(Dataset):
    """PIL images under a transform, as a peer's data set gives them."""

    def __init__(self, sizes: Sizes, transform: Callable[[Image.Image], Any]):
        images, labels = load_images(sizes)
        self.arrays, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def forever(images: PilImages, sizes: Sizes) -> Iterator[Any]:
    """A DataLoader's batches without end."""
    workers = sizes.workers
    loader = DataLoader(
        images, sizes.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return chain.from_iterable(repeat(loader))


def peer(sizes: Sizes, images: PilImages, task: nn.Module, optimizer: Any, loss: Any, bf16: bool) -> Steps:
    """A plain loop over a DataLoader; ``loss(task, inputs, labels)`` gives the scalar to differentiate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.to(device)
    batches = forever(images, sizes)

    def run(steps: int) -> None:
        for _ in range(steps):
            inputs, labels = next(batches)
            inputs = [x.to(device) for x in inputs] if isinstance(inputs, list) else inputs.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                value = loss(task, inputs, labels.to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return run


def lightly_twins(sizes: Sizes, *, bf16: bool) -> Steps:
    """Barlow Twins of lightly's parts: transforms, loss and LARS, on the same network."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from lightly.utils.lars import LARS as LightlyLARS

    views = [kind(input_size=sizes.pixels, gaussian_blur=0.0) for kind in (BYOLView1Transform, BYOLView2Transform)]
    task = build_task("pretrain", sizes, plain=True)
    criterion = BarlowTwinsLoss()

    def loss(model: Any, inputs: list[Tensor], _labels: Tensor) -> Tensor:
        z1, z2 = (model.embed(x) for x in inputs)
        return criterion(z1.float(), z2.float())

    optimizer = LightlyLARS(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return peer(sizes, PilImages(sizes, BYOLTransform(*views)), task, optimizer, loss, bf16)


def authors_twins(sizes: Sizes, *, bf16: bool) -> Steps:
    """Barlow Twins of the TVLARS paper's own parts, imported from their repository: views, network and loss, TVLARS.

    They always blur view 1, as their code stands.
    """
    sys.path.insert(0, str(sizes.authors))
    from dataset.cl import CLTransform  # type: ignore[import-not-found]
    from model.bt import BarlowTwins as TheirTwins  # type: ignore[import-not-found]
    from opt.tvlars import TVLARS as TheirTVLARS  # type: ignore[import-not-found]

    if not torch.distributed.is_initialized():  # their loss reduces over the processes
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    options = argparse.Namespace(
        bs=sizes.batch, model="resnet18", projector="-".join(map(str, sizes.projector)), btlmbda=0.0051
    )
    task = TheirTwins(options)
    optimizer = TheirTVLARS(task.parameters(), lr=0.1, weight_decay_filter=True, lars_adaptation_filter=True)
    optimizer.step = partial(optimizer.step, 1)  # an argument that it takes and does not use
    images = PilImages(sizes, CLTransform(sizes.pixels))
    return peer(sizes, images, task, optimizer, lambda model, views, _labels: model(*views), bf16)


def torchvision_classifier(sizes: Sizes, *, bf16: bool) -> Steps:
    """Classification as torchvision's users write it, with torch's SGD."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(sizes.pixels, padding=4), v2.RandomHorizontalFlip(), v2.RandomRotation(15),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(STATS["mean"], STATS["std"]),
        ]
    )  # fmt: skip
    task = build_task("classify", sizes, plain=True)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images = PilImages(sizes, transform)
    return peer(sizes, images, task, optimizer, lambda model, x, y: model.loss(**model(x, y))["loss"], bf16)
