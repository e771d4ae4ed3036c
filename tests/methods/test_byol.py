"""BYOL equals its paper's equation 2, and its teacher follows the student."""

import math
import re

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from method_cases import FEATURES, assert_follows, assert_same_loss, build, network, rows
from torch import Tensor, nn

from ssl_bench.methods import BYOL

WIDTHS = {"projector": (7, 5), "predictor": (6,)}


def method(**options) -> BYOL:
    return build(BYOL, **(WIDTHS | options))


def paper(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """|p / |p| - z / |z||^2 of each image and direction, one by one."""
    total = p1.new_zeros(())
    for p, z in ((p1, z2.detach()), (p2, z1.detach())):
        for a, b in zip(p, z, strict=True):
            total = total + ((a / a.norm() - b / b.norm()) ** 2).sum()
    return total / len(p1)


def test_loss_and_gradient_are_the_papers():
    outputs = rows("p1", "p2", "z1", "z2")
    assert_same_loss(method().loss(*outputs)["loss"], paper(*outputs), outputs)


def test_loss_is_lightlys():
    p1, p2, z1, z2 = outputs = rows("p1", "p2", "z1", "z2")
    similarity = NegativeCosineSimilarity()
    expected = 4 + 2 * (similarity(p1, z2.detach()) + similarity(p2, z1.detach()))
    assert_same_loss(method().loss(*outputs)["loss"], expected, outputs)


def test_the_teachers_momentum_goes_to_one_along_a_cosine():
    """Paper: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
    assert_follows(method(momentum=0.9), lambda progress: 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2)


def test_forward_predicts_with_the_student_and_targets_with_the_teacher():
    byol, generator = method(), torch.Generator().manual_seed(3)
    x1, x2 = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        byol.projector[0].weight.mul_(2)  # the student moves, the teacher not yet
    outputs = byol(x1, x2)
    assert [name for name, output in outputs.items() if output.requires_grad] == ["p1", "p2"]
    assert torch.equal(outputs["p2"], byol.predictor(byol.projector(byol.backbone(x2))))
    assert torch.equal(outputs["z1"], byol.teacher(x1))
    assert not torch.allclose(outputs["z1"], byol.embed(x1))
    assert byol.evaluated == "backbone"


def test_default_heads_are_the_papers():
    heads = BYOL(network(), FEATURES)
    shapes = [
        [(m.in_features, m.out_features) for m in h if isinstance(m, nn.Linear)]
        for h in (heads.projector, heads.predictor)
    ]
    assert shapes == [[(FEATURES, 4096), (4096, 256)], [(256, 4096), (4096, 256)]]
    assert heads.momentum == 0.996


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.1}, "byol: momentum must be in [0, 1], got 1.1"),
        ({"momentum": math.nan}, "byol: momentum must be in [0, 1], got nan"),
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
        ({"predictor": (0,)}, "predictor: widths must be one or more numbers > 0, got (0, 5)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
