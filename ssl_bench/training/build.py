"""The augmentations that a recipe asks for."""

from typing import Any

import torch

from ssl_bench.augment.views import Augmentation, Normalize, PadCropFlipRotate, RandomResizedCropFlip, SSLView
from ssl_bench.data.dataset import Dataset
from ssl_bench.recipe.schema import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Barlow Twins' blur (sigma 0.1 to 2.0 pixels) is meant for images of this side.
BLUR_REFERENCE = 224  # pixels


def _stats(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    if recipe.augment.stats == "imagenet":
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": dataset.mean, "std": dataset.std}


def _size(dataset: Dataset) -> int:
    return dataset.train.image_shape[-1]


def pretraining_views(
    recipe: Recipe, dataset: Dataset, *, compiled: bool = False, graphed: bool = False
) -> list[Augmentation]:
    """The two views of self-supervised pretraining, each with its own blur and solarisation.

    Args:
        recipe: see its ``augment``.
        dataset: whose images they are.
        compiled, graphed: whether each view is one compiled program, one CUDA graph, or both; for GPUs.
    """
    options, size = recipe.augment, _size(dataset)
    factor = size / BLUR_REFERENCE if options.blur == "scaled" else 1.0
    return [
        SSLView(
            size,
            crop_scale=options.crop_scale,
            flip=options.flip,
            jitter=options.jitter,
            jitter_p=options.jitter_p,
            gray_p=options.gray_p,
            blur_p=0.0 if options.blur == "off" else options.blur_p[view],
            blur_sigma=(options.blur_sigma[0] * factor, options.blur_sigma[1] * factor),
            solarize_p=options.solarize_p[view],
            dtype=COMPUTE_DTYPE[recipe.precision],
            compile=compiled,
            graph=graphed,
            **_stats(recipe, dataset),
        )
        for view in range(2)
    ]


def classification_view(
    recipe: Recipe, dataset: Dataset, *, compiled: bool = False, graphed: bool = False
) -> Augmentation:
    """The one view of supervised training: padded crop, flip, rotation; ``compiled`` and ``graphed`` as above."""
    options = recipe.augment
    return PadCropFlipRotate(
        pad=options.pad,
        flip=options.flip,
        degrees=options.rotation,
        dtype=COMPUTE_DTYPE[recipe.precision],
        compile=compiled,
        graph=graphed,
        **_stats(recipe, dataset),
    )


def probe_view(recipe: Recipe, dataset: Dataset) -> Augmentation:
    """What augmented probes train on: random resized crop and flip."""
    return RandomResizedCropFlip(_size(dataset), **_stats(recipe, dataset))


def test_view(recipe: Recipe, dataset: Dataset) -> Normalize:
    """The test transform: normalised, nothing random."""
    return Normalize(**_stats(recipe, dataset))
