"""TiCo's loss is lightly's, its covariance and its teacher move as they should."""

import math

import pytest
import torch
from lightly.loss import TiCoLoss
from method_cases import FEATURES, assert_follows, assert_same_loss, inputs, network
from torch import Tensor

from ssl_bench.methods import TiCo


def tico(**options):
    return TiCo(network(), FEATURES, projector=(7, 5), **options).double()


def batches(steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    z = torch.randn(steps, 2, 10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [(a.requires_grad_(), b) for a, b in z]


@pytest.mark.parametrize(("beta", "rho"), [(0.9, 8.0), (0.3, 2.0), (0.0, 0.0)])
def test_loss_and_gradient_equal_lightlys_step_after_step(beta, rho):
    ours, theirs = tico(beta=beta, rho=rho), TiCoLoss(beta=beta, rho=rho)
    for z1, t2 in batches():
        assert_same_loss(ours.loss(z1, t2)["loss"], theirs(z1, t2), [z1], rtol=1e-12)
        torch.testing.assert_close(ours.covariance, theirs.C, rtol=1e-12, atol=1e-15)


def test_the_loss_is_the_papers_sum_over_pairs():
    """z' C z with C = mean_j w_j z_j z_j' is a mean of squared cosines: an implicit memory bank."""
    ours, bank = tico(), []
    for z1, t2 in batches():
        terms = ours.loss(z1, t2)
        u, v = (z.detach() / z.detach().norm(dim=1, keepdim=True) for z in (z1, t2))
        bank = [(0.9 * weight, old) for weight, old in bank] + [(0.1, u)]
        contrast = sum(w * sum(float(a @ b) ** 2 for b in old) / len(old) for a in u for w, old in bank) / len(u)
        invariance = sum(1 - float(a @ b) for a, b in zip(u, v, strict=True)) / len(u)
        assert float(terms["contrast"]) == pytest.approx(contrast, rel=1e-10)
        assert float(terms["invariance"]) == pytest.approx(invariance, rel=1e-10)
        assert float(terms["loss"].detach()) == pytest.approx(invariance + 8 * contrast, rel=1e-10)


def test_the_teacher_follows_with_a_cosines_momentum_and_gets_the_second_view():
    method = tico(momentum=0.9)
    assert_follows(method, lambda progress: 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2)
    x1, x2 = inputs(method.views, 6)
    outputs = method.eval()(x1, x2)
    torch.testing.assert_close(outputs["z1"], method.embed(x1))
    torch.testing.assert_close(outputs["t2"], method.teacher(x2))
    assert outputs["z1"].requires_grad
    assert not outputs["t2"].requires_grad
    assert method.evaluated == "backbone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.1}, r"tico: beta must be in \[0, 1\], got 1.1"),
        ({"momentum": -0.1}, r"tico: momentum must be in \[0, 1\], got -0.1"),
        ({"rho": -1.0}, "tico: rho must be >= 0, got -1.0"),
        ({"rho": float("nan")}, "tico: rho must be >= 0, got nan"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        TiCo(network(), FEATURES, **options)
