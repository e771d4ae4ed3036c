"""Evaluates a run's models: the evaluators of ``ssl_bench.eval`` on this run's data, device and processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ssl_bench.data.dataset import Dataset
from ssl_bench.eval import evaluate
from ssl_bench.eval.features import extract_features
from ssl_bench.models.classifier import Classifier
from ssl_bench.runtime import seeds
from ssl_bench.runtime.console import Ticker
from ssl_bench.training import build as views


def evaluate_backbone(session: Any, dataset: Dataset, backbone: nn.Module) -> list[dict[str, Any]]:
    """The recipe's evaluators on a frozen backbone.

    Returns:
        for each protocol its name and version, metrics and chance (percent), seconds, and the number of test images.
    """
    recipe = session.recipe
    results = evaluate(
        backbone,
        dataset,
        recipe.eval.protocols,
        views.test_view(recipe, dataset),
        seed=recipe.eval.seed,
        device=session.device,
        precision=recipe.eval.precision,
        batch_size=recipe.eval.batch_size,
        augment=views.probe_view(recipe, dataset),
        rank=session.rank,
        world_size=session.world_size,
        on_progress=Ticker(enabled=session.main),
    )
    return [{**result, "seed": recipe.eval.seed, "chance": 100 / len(dataset.classes)} for result in results]


def evaluate_classifier(session: Any, dataset: Dataset, classifier: Classifier) -> list[dict[str, Any]]:
    """Top-1, top-5 and cross entropy on the whole test set, every image once over all processes."""
    recipe = session.recipe
    was_training = classifier.training
    logits = extract_features(
        _Logits(classifier),
        dataset.test,
        views.test_view(recipe, dataset),
        batch_size=recipe.eval.batch_size,
        device=session.device,
        precision=recipe.eval.precision,
        rank=session.rank,
        world_size=session.world_size,
    )
    classifier.train(was_training)
    labels = dataset.test.labels
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    metrics = {
        "top1": 100 * ranked[:, 0].double().mean().item(),
        "top5": 100 * ranked.any(1).double().mean().item(),
        "loss": nn.functional.cross_entropy(logits.double(), labels).item(),
    }
    return [
        {
            "protocol": "test-v1",
            "metrics": metrics,
            "n_test": len(labels),
            "seed": None,
            "chance": 100 / len(dataset.classes),
        }
    ]


class _Logits(nn.Module):
    """A classifier as the feature extractor wants it: images in, one row of logits out."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.logits(x)


def online_monitor(session: Any, dataset: Dataset, backbone: nn.Module) -> Callable[[int], dict[str, float]]:
    """The monitor during pretraining, with its own randomness; its numbers go to the metrics, never into a table."""

    def measure(step: int) -> dict[str, float]:
        recipe = session.recipe
        result = evaluate(
            backbone,
            dataset,
            ["online"],
            views.test_view(recipe, dataset),
            seed=seeds.derive_seed(recipe.seed, seeds.ONLINE, step),
            device=session.device,
            precision=recipe.eval.precision,
            batch_size=recipe.eval.batch_size,
            rank=session.rank,
            world_size=session.world_size,
        )
        return {"online_top1": result[0]["metrics"]["top1"]} if result else {}

    return measure
