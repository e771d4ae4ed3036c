"""CorInfoMax's loss is the paper's, step after step, from a naive running covariance."""

import math

import pytest
import torch
from method_cases import FEATURES, network
from torch import Tensor

from ssl_bench.methods import CorInfoMax


def corinfomax(**options):
    return CorInfoMax(network(), FEATURES, projector=(7, 5), **options).double()


class Naive:
    """One view's running mean and covariance, with loops."""

    def __init__(self, d: int, forget: float) -> None:
        self.mean, self.covariance, self.forget = torch.zeros(d).double(), torch.eye(d).double(), forget

    def log_det(self, u: Tensor, eps: float) -> Tensor:
        mean = self.forget * self.mean + (1 - self.forget) * sum(u) / len(u)
        batch = sum(torch.outer(row - mean, row - mean) for row in u) / len(u)
        covariance = self.forget * self.covariance + (1 - self.forget) * batch
        self.mean, self.covariance = mean.detach(), covariance.detach()
        return torch.linalg.eigvalsh(covariance + eps * torch.eye(len(covariance)).double()).log().sum()


@pytest.mark.parametrize("forget", [0.01, 0.6])
def test_loss_gradient_and_buffers_are_the_papers_step_after_step(forget):
    ours = corinfomax(sim_coeff=3.0, cov_coeff=2.0, forget=forget, eps=1e-3)
    naive = Naive(5, forget), Naive(5, forget)
    data = torch.randn(3, 2, 10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for z in data.requires_grad_():
        u = z / (z * z).sum(2, keepdim=True).sqrt()
        log_det = sum(one.log_det(view, 1e-3) for one, view in zip(naive, u, strict=True)) / 5
        expected = 3 * ((u[0] - u[1]) ** 2).sum() / 50 - 2 * log_det
        terms = ours.loss(*z)
        torch.testing.assert_close(terms["loss"], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(terms["log_det"], log_det.detach(), rtol=1e-10, atol=0)
        gradient, wanted = (torch.autograd.grad(loss, data, retain_graph=True)[0] for loss in (terms["loss"], expected))
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
        for view in (0, 1):
            torch.testing.assert_close(ours.mean[view, 0], naive[view].mean, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(ours.covariance[view], naive[view].covariance, rtol=1e-10, atol=1e-14)


def test_a_collapsed_batch_has_a_finite_loss_in_float32():
    """All embeddings alike: the covariance is singular but for eps, 1e-8, below float32's resolution of 1 / D."""
    ours = CorInfoMax(network(), FEATURES, projector=(7, 5), forget=0.0)
    z = torch.ones(6, 5).requires_grad_()
    loss = ours.loss(z, z)["loss"]
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(-2 * math.log(1e-8), rel=1e-4)
    loss.backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sim_coeff": -1.0}, "corinfomax: sim_coeff must be >= 0, got -1.0"),
        ({"cov_coeff": float("nan")}, "corinfomax: cov_coeff must be >= 0, got nan"),
        ({"forget": 1.5}, r"corinfomax: forget must be in \[0, 1\], got 1.5"),
        ({"eps": 0.0}, "corinfomax: eps must be > 0, got 0.0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        CorInfoMax(network(), FEATURES, **options)
