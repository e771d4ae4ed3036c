"""From a recipe to networks; a part of `ssl_bench.training.build`."""

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ssl_bench.methods.base import Method
from ssl_bench.methods.classifier import Classifier
from ssl_bench.models import backbone as backbones
from ssl_bench.models.backbone import create_backbone, load_backbone, seeded
from ssl_bench.models.pretrained import load_published, load_weights
from ssl_bench.recipe import registry, weights
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime import peers, seeds
from ssl_bench.runtime.console import say


def backbone(recipe: Recipe, *, fresh: bool = False) -> tuple[nn.Module, int]:
    """The backbone before the first step and its feature dimension; the same for equal seeds.

    Args:
        recipe: whose model and seed count.
        fresh: leave out the weights that the recipe starts from (``model.checkpoint``, ``model.pretrained``).

    Raises:
        ValueError, OSError: in one line; no such model, or weights that are not there or do not fit.
    """
    model = recipe.model
    sizes: dict[str, Any] = {"img_size": model.img_size, "patch_size": model.patch_size}
    if model.dynamic_img_size:
        sizes["dynamic_img_size"] = True
    network, feature_dim = create_backbone(
        model.name,
        stem=model.stem,
        init=model.init,
        seed=seeds.derive_seed(recipe.seed, seeds.INIT),
        factory=registry.foreign("backbone", model.name),
        **sizes,
    )
    if not fresh and model.checkpoint is not None:
        found = weights.digest(model.checkpoint)
        if found != model.checkpoint_sha256:
            raise ValueError(
                f"model.checkpoint must be the file that the run started from, SHA-256 {model.checkpoint_sha256}..., "
                f"got {model.checkpoint} with {found}..."
            )
        _say_once(load_weights(network, weights.locate(model.checkpoint)))
    elif not fresh and model.pretrained:
        given = {key: value for key, value in sizes.items() if value is not None}
        _say_once(load_published(network, model.name, **given))
    return network, feature_dim


@cache  # a run also evaluates what it started from
def _say_once(line: str) -> None:
    if peers.rank() == 0:
        say(line)


def check_images(recipe: Recipe, side: int | None) -> None:
    """Checks that the recipe's model takes images of a size (None = of any); one from outside says so itself.

    Raises:
        ValueError: in one line.
    """
    model = recipe.model
    if registry.foreign("backbone", model.name) is None:
        backbones.check_images(model.name, side, stem=model.stem, img_size=model.img_size, patch_size=model.patch_size)


def trained_backbone(recipe: Recipe, path: Path) -> nn.Module:
    """The backbone that a run of the recipe left as ``backbone.safetensors``."""
    return load_backbone(path, factory=registry.foreign("backbone", recipe.model.name))[0]


def method(recipe: Recipe) -> Method:
    """The untrained backbone with the pretraining method around it; the same for equal seeds."""
    network, feature_dim = backbone(recipe)
    make = registry.resolve("method", recipe.method.target)
    with seeded(seeds.derive_seed(recipe.seed, seeds.PROJECTOR)):
        return make(network, feature_dim, **recipe.method.options)


def classifier(recipe: Recipe, num_classes: int) -> Classifier:
    """The untrained classifier; the same for equal seeds."""
    network, feature_dim = backbone(recipe)
    with seeded(seeds.derive_seed(seeds.derive_seed(recipe.seed, seeds.INIT), seeds.INIT, 1)):
        return Classifier(network, feature_dim, num_classes)
