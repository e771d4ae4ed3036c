"""The supervised network: loss, accuracies, and weights from the seed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ssl_bench.methods import Classifier
from ssl_bench.recipe.compose import compose
from ssl_bench.training import build
from ssl_bench.training.gradient import global_loss


class Fixed(nn.Module):
    """A head that gives the scores it was told."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, _features: torch.Tensor) -> torch.Tensor:
        return self.scores


def test_top1_and_top5_in_percent():
    classifier = Classifier(nn.Flatten(), 4, num_classes=8)
    scores = torch.arange(8.0).repeat(4, 1)  # class 7 is first, class 3 is fifth, class 2 is sixth
    classifier.head = Fixed(scores)
    result = global_loss(classifier, classifier(torch.zeros(4, 1, 2, 2), torch.tensor([7, 3, 2, 3])))
    assert result["top1"].item() == 25
    assert result["top5"].item() == 75
    assert result["loss"].item() == pytest.approx(cross_entropy(scores, torch.tensor([7, 3, 2, 3])).item())


def test_two_classes_have_a_top5_of_100():
    classifier = Classifier(nn.Flatten(), 4, num_classes=2)
    result = classifier.loss(torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert result["top5"].item() == 100


def test_the_loss_is_float32_under_autocast_and_only_it_has_a_gradient():
    classifier = Classifier(nn.Flatten(), 3 * 16 * 16, 10)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = classifier(x, y)
        assert outputs["logits"].dtype == torch.bfloat16
        result = global_loss(classifier, outputs)
    assert {name: value.dtype for name, value in result.items()} == dict.fromkeys(
        ("loss", "top1", "top5"), torch.float32
    )
    assert not result["top1"].requires_grad
    assert not result["top5"].requires_grad
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_equal_seeds_give_equal_heads_whatever_the_global_generator():
    def head(seed: int) -> torch.Tensor:
        torch.rand(1)
        return build.classifier(compose("classify", [f"seed={seed}"]), 3).head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        Classifier(nn.Flatten(), 4, num_classes=1)
