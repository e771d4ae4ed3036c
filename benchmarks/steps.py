"""The training steps that benchmarks time: the suite's loop end to end and the bare compute, at any sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_bench.augment.views import Labels, PadCropFlipRotate, SSLView, View
from ssl_bench.data.dataset import load_dataset
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.data.sources import ResidentSource
from ssl_bench.methods import BarlowTwins, Classifier, Method
from ssl_bench.models.backbone import create_backbone
from ssl_bench.models.small_maps import SmallMapConv2d
from ssl_bench.optim import LARS, Telemetry, build_groups
from ssl_bench.recipe.compose import compose
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime.tf32 import tf32_products
from ssl_bench.training import build
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient, GraphedUpdate
from ssl_bench.training.loop import Trainer
from ssl_bench.training.plan import Rhythm

STATS: dict[str, Any] = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
Steps = Callable[[int], None]  # runs so many training steps


@dataclass(frozen=True)
class Sizes:
    """What is timed; each field is an option of the command line."""

    batch: int = 512  # images per step
    pixels: int = 32  # side of an image
    stem: str = "imagenet"  # of the ResNet-18: "imagenet", or "cifar" with 16 times the positions
    projector: tuple[int, ...] = (2048, 2048, 4096)  # Barlow Twins' widths; other methods have their own
    method: str = "barlow_twins"  # of the pretraining track, as its file in configs/method has it
    chunk: int | None = None  # images in memory at a time, for ours end to end; None = the whole batch
    steps: int = 4 if not torch.cuda.is_available() else 50  # of a turn
    turns: int = 5  # that count, after one to warm up
    workers: int = 2  # the peers' loading processes
    images: int = 10_000  # in the data set, at most
    data_path: str | None = None  # CIFAR-10's folder of parquet files; None = random images
    authors: str | None = None  # a checkout of github.com/KhoiDOO/tvlars (89c3291); None = leave their code out


QUICK = Sizes(batch=8, projector=(16, 16), steps=1, turns=1, workers=0, images=32)


def _insist(reason: str) -> None:
    raise RuntimeError(f"without CUDA graphs: {reason}")


class NoRun:
    """The loop's `RunIO` without a run: takes what the loop hands over and forgets it."""

    def log(self, row: dict[str, float]) -> None:
        """One line of the metrics."""

    def log_telemetry(self, columns: dict[str, Any]) -> None:
        """One block of layer statistics."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint."""

    def snapshot(self, step: int, module: nn.Module) -> None:
        """The weights."""

    def should_stop(self, step: int) -> bool:  # noqa: ARG002 (the protocol's)
        """Never."""
        return False

    def progress(self, step: int, row: dict[str, float] | None) -> None:
        """After every step."""


def build_task(track: str, sizes: Sizes, *, plain: bool = False) -> Method:
    """The network of a track: ResNet-18, and the projector or a classifier's head.

    Args:
        track: "pretrain" or "classify".
        sizes: what is timed.
        plain: with torch's convolutions everywhere, as everybody else has them (see `ssl_bench.models.small_maps`).
    """
    backbone, features = create_backbone("resnet18", stem=sizes.stem, init="torchvision", seed=0)
    for module in backbone.modules():
        if plain and type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d
    if track == "classify":
        return Classifier(backbone, features, 10)
    if sizes.method == "barlow_twins":
        return BarlowTwins(backbone, features, projector=sizes.projector)
    return build.method(recipe_of(sizes))


def recipe_of(sizes: Sizes) -> Recipe:
    """The recipe of a pretraining method; those on tokens have a ViT-Tiny with patches of 4 x 4."""
    vit = ["model=vit_tiny", f"model.img_size={sizes.pixels}"]
    model = vit if sizes.method == "mae" else [f"model.stem={sizes.stem}"]
    return compose("pretrain", [f"method={sizes.method}", *model, "precision=bf16", "protocol=fair"])


def views(track: str, sizes: Sizes, task: Method, options: dict[str, Any]) -> list[View]:
    """The track's views; those of methods other than Barlow Twins as a run makes them."""
    if track == "classify":
        return [PadCropFlipRotate(**options), Labels()]
    if sizes.method == "barlow_twins":
        return [SSLView(sizes.pixels, solarize_p=p, **options) for p in (0.0, 0.2)]
    data: Any = SimpleNamespace(train=SimpleNamespace(image_shape=(3, sizes.pixels, sizes.pixels)), **STATS)
    where: Any = SimpleNamespace(device=next(task.parameters()).device)
    return build.views(recipe_of(sizes), data, task.views, where)


def load_images(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, pixels, pixels) and their labels: random ones, or CIFAR-10's first."""
    if sizes.data_path is None:
        n = max(sizes.images, sizes.batch)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, sizes.pixels, sizes.pixels), dtype=torch.uint8, generator=generator)
        return images, torch.arange(n) % 10
    train = load_dataset("cifar10", path=sizes.data_path, size=sizes.pixels).train
    first = torch.arange(min(max(sizes.images, sizes.batch), len(train)))
    return next(iter(train.batches([first]))), train.labels[first]


def build_trainer(
    track: str,
    sizes: Sizes,
    *,
    telemetry: Callable[..., Telemetry] = Telemetry,
    every: int = 10,
    plain: bool = False,
    compile_options: dict[str, Any] | None = None,
    graphs: bool | None = None,
) -> Trainer:
    """The suite's loop as a run builds it, without a run's directory.

    Args:
        track: "pretrain" or "classify".
        sizes: what is timed.
        telemetry: makes the recorder of an optimizer.
        every: steps between its records; 0 = off.
        plain: see `build_task`.
        compile_options: torch.compile's, for the network's parts (and, on a GPU, the views); None = not compiled.
        graphs: whether views and gradient are CUDA graphs; None = as a run decides.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    device = accelerator.device
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as a run sets it
    task = build_task(track, sizes, plain=plain).to(device, memory_format=torch.channels_last)
    optimizer = LARS(build_groups(task, lr=0.1, weight_decay=5e-4, lr_1d=1e-3), lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    compiled = compile_options is not None and device.type == "cuda"
    if graphs is None:
        graphs = device.type == "cuda"
    options = {**STATS, "dtype": torch.bfloat16, "compile": compiled, "graph": graphs}
    pipeline = Pipeline(
        ResidentSource(*load_images(sizes)).to(device),
        views(track, sizes, task, options),
        seed=0, batch_size=sizes.batch, chunk_size=sizes.chunk,
        rank=0, world_size=1, device=device,
    )  # fmt: skip
    gradient: Callable[..., Any] = partial(compute_gradient, tf32=True)
    update = None
    if graphs and pipeline.n_chunks == 1:
        gradient = graphed = GraphedGradient(gradient, task, _insist)
        update = GraphedUpdate(optimizer, lambda: graphed.replaying, _insist)
    if compile_options is not None:
        for part in task.children():
            part.compile(**compile_options)
    model, wrapped = accelerator.prepare(task, optimizer)
    return Trainer(
        model=model, optimizer=wrapped, schedule=lambda _step: 1.0,
        gradient=gradient, pipeline=pipeline,
        rhythm=Rhythm(0, log=10, checkpoint=0, check_equal=0), accelerator=accelerator, io=NoRun(),
        telemetry=telemetry(optimizer, every=every), graphed_update=update,
    )  # fmt: skip


def end_to_end(trainer: Trainer) -> Steps:
    """All that a run does in a step."""

    def run(steps: int) -> None:
        trainer.rhythm.total = trainer.step + steps
        trainer.run()

    return run


def bare(trainer: Trainer) -> Steps:
    """Forward, backward and optimizer step on one batch that is augmented and on the device already."""
    inputs = next(iter(trainer.pipeline.batches(0, 1))).views(0)
    model, optimizer, method = trainer.model, trainer.optimizer, trainer.module

    def run(steps: int) -> None:
        for _ in range(steps):
            outputs = model(*inputs)
            with tf32_products():
                method.loss(**outputs)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
