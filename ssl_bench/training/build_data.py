"""From a recipe to images, views and batches; a part of `ssl_bench.training.build`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ssl_bench.augment.views import (
    Labels,
    Noise,
    PadCropFlipRotate,
    SSLView,
    View,
)
from ssl_bench.data.dataset import Dataset, hold_out
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.methods import views as declarations
from ssl_bench.methods.views import Crop, PaddedCrop
from ssl_bench.recipe import content, registry
from ssl_bench.recipe.schema import Recipe
from ssl_bench.training.build_networks import check_images
from ssl_bench.training.processes import Processes, contents

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLUR_REFERENCE = 224  # pixels; the side of the images for which Barlow Twins' sigma of 0.1 to 2.0 is meant


def dataset(recipe: Recipe, where: Processes) -> Dataset:
    """The recipe's data set, on the device.

    Raises:
        ValueError, OSError: in one line; among others, it lacks the labels or the test split that the run needs.
    """
    options = recipe.data
    labels, test = _needs(recipe)
    loaded = content.load(options, labels=labels, test=test and options.holdout == 0)
    check_images(recipe, loaded.train.image_shape[-1])
    data = (hold_out(loaded, options.holdout) if options.holdout else loaded).to(where.device)
    where.compare(contents(data) if where.world_size > 1 else {})
    return data


def _needs(recipe: Recipe) -> tuple[str, bool]:
    """What needs the train images' labels ("" = nothing), and whether anything needs a test split."""
    if recipe.track == "classify":
        return "classification", True
    options, users = recipe.eval, ["data.holdout"] if recipe.data.holdout else []
    views = getattr(registry.resolve("method", recipe.method.target), "views", ()) if recipe.method.target else ()
    users += [recipe.method.target] if any(isinstance(view, declarations.Labels) for view in views) else []
    if options.data is not None:
        return ", ".join(users), False
    found = {name: registry.resolve("evaluator", name) for name in options.protocols}
    found |= {"eval.online_every_epochs": None} if options.online_every_epochs else {}
    users += [name for name, evaluator in found.items() if getattr(evaluator, "needs_labels", True)]
    return ", ".join(users), any(getattr(evaluator, "needs_test", True) for evaluator in found.values())


def evaluation_dataset(recipe: Recipe, data: Dataset, where: Processes) -> Dataset:
    """What the recipe's backbones are evaluated on, on the device: ``eval.data``, or what they are trained on."""
    options = content.evaluated(recipe)
    if options is None or recipe.track == "classify":
        return data
    return content.load(replace(options, size=options.size or data.train.image_shape[-1])).to(where.device)


def stats(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    if recipe.augment.stats == "imagenet":
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": data.mean, "std": data.std}


def about_images(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """What a user of the backbone must do to images: "mean" and "std" of each channel, and "size" in pixels."""
    return {key: [float(x) for x in value] for key, value in stats(recipe, data).items()} | {
        "size": data.train.image_shape[-1]
    }


def _view_options(recipe: Recipe, data: Dataset, where: Processes) -> dict[str, Any]:
    """What all training views share. On a CPU, compiling them costs time; on a GPU it saves kernels."""
    gpu = where.device.type == "cuda"
    return {
        "dtype": COMPUTE_DTYPE[recipe.precision],
        "compile": recipe.compile and gpu,
        "graph": recipe.cuda_graphs is not False and gpu,
        **stats(recipe, data),
    }


def views(recipe: Recipe, data: Dataset, declared: Sequence[Any], where: Processes) -> list[View]:
    """Makes what a method declares as its views, with what it leaves open taken from the recipe.

    Raises:
        ValueError: in one line; an unknown view, or a crop that the images are too small for.
    """
    options, crops, made = recipe.augment, 0, list[View]()
    shared = _view_options(recipe, data, where)
    for number, view in enumerate(declared):
        if isinstance(view, Crop):
            made.append(_crop(recipe, data, view, f"views[{number}]", crops % 2, shared))
            crops += 1
        elif isinstance(view, PaddedCrop):
            made.append(PadCropFlipRotate(pad=options.pad, flip=options.flip, degrees=options.rotation, **shared))
        elif isinstance(view, declarations.Noise):
            made.append(Noise(view.width))
        elif isinstance(view, declarations.Labels):
            made.append(Labels())
        else:
            raise ValueError(f"views[{number}] must be a Crop, PaddedCrop, Noise or Labels, got {view!r}")
    return made


def _crop(recipe: Recipe, data: Dataset, crop: Crop, name: str, like: int, shared: dict[str, Any]) -> SSLView:
    """One random crop; blur is drawn for pixels of the crop, whose scale is that of the images."""
    options, side = recipe.augment, data.train.image_shape[-1]
    size = side if crop.size is None else crop.size if not 0 < crop.size < 1 else max(1, round(crop.size * side))
    if not 0 < size <= side or size != int(size):
        raise ValueError(f"{name}: a crop's size must be pixels up to the images' {side}, or a fraction, got {size}")
    factor = side / BLUR_REFERENCE if options.blur == "scaled" else 1.0
    blur_p = options.blur_p[like] if crop.blur_p is None else crop.blur_p
    solarize_p = options.solarize_p[like] if crop.solarize_p is None else crop.solarize_p
    return SSLView(
        int(size),
        crop_scale=options.crop_scale if crop.scale is None else crop.scale,
        flip=options.flip,
        jitter=options.jitter,
        jitter_p=options.jitter_p if crop.color else 0.0,
        gray_p=options.gray_p if crop.color else 0.0,
        blur_p=blur_p if crop.color and options.blur != "off" else 0.0,
        blur_sigma=(options.blur_sigma[0] * factor, options.blur_sigma[1] * factor),
        solarize_p=solarize_p if crop.color else 0.0,
        **shared,
    )


def pipeline(recipe: Recipe, data: Dataset, views: Sequence[View], where: Processes, **instead: Any) -> Pipeline:
    """The run's batches.

    Args:
        recipe: whose batch size, seed and track count.
        data: the data set, on the device.
        views: make the network's inputs.
        where: which share of each batch this process computes.
        instead: keywords of `Pipeline` that replace the recipe's (a measurement of a run's snapshots has its own seed).
    """
    options = {
        "seed": recipe.seed,
        "batch_size": recipe.batch_size,
        "chunk_size": recipe.chunk_size,
        "last_batch": recipe.last_batch,
        **instead,
    }
    return Pipeline(data.train, views, rank=where.rank, world_size=where.world_size, device=where.device, **options)
