"""W-MSE equals its official code (as lightly has it) and a loop, whole and in sub-batches."""

import re

import pytest
import torch
from lightly.loss.wmse_loss import WMSELoss
from method_cases import FEATURES, assert_same_loss, build, network, rows
from torch import Tensor, nn

from ssl_bench.methods import WMSE


def method(**options) -> WMSE:
    return build(WMSE, **({"projector": (16, 4)} | options))


def whiten(z: Tensor, eps: float) -> Tensor:
    n, d = z.shape
    mean = sum(z) / n
    covariance = sum(torch.outer(row - mean, row - mean) for row in z) / (n - 1)
    factor = torch.linalg.cholesky((1 - eps) * covariance + eps * torch.eye(d, dtype=z.dtype))
    return torch.stack([torch.linalg.inv(factor) @ (row - mean) for row in z])


def paper(z1: Tensor, z2: Tensor, size: int, eps: float = 0.0) -> Tensor:
    """|v / |v| - w / |w||^2 of the two views' whitened embeddings, one pair after the other."""
    total = z1.new_zeros(())
    for start in range(0, len(z1), size):
        part = slice(start, start + size)
        for v, w in zip(whiten(z1[part], eps), whiten(z2[part], eps), strict=True):
            total = total + ((v / v.norm() - w / w.norm()) ** 2).sum()
    return total / len(z1)


@pytest.mark.parametrize(("sub_batch", "eps"), [(None, 0.0), (10, 0.0), (5, 0.0), (None, 0.1), (20, 0.5)])
def test_loss_and_gradient_are_the_papers(sub_batch, eps):
    outputs = rows("z1", "z2", n=20, d=4)
    ours = method(sub_batch=sub_batch, eps=eps)
    assert_same_loss(ours.loss(*outputs)["loss"], paper(*outputs, sub_batch or 20, eps), outputs)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_loss_is_lightlys(eps):
    outputs = rows("z1", "z2", n=20, d=4)
    theirs = WMSELoss(embedding_dim=4, eps=eps, track_running_stats=False, w_size=20)
    assert_same_loss(method(eps=eps).loss(*outputs)["loss"], theirs(torch.cat(outputs)), outputs)


def test_whitened_rows_have_mean_zero_and_covariance_one():
    (z,) = rows("z", n=20, d=4)
    white = method()._whiten(z)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(4, dtype=z.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4, dtype=z.dtype), rtol=0, atol=1e-12)


def test_the_order_of_the_rows_matters_in_sub_batches_alone():
    z1, z2 = rows("z1", "z2", n=20, d=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for sub_batch, same in ((None, True), (20, True), (10, False)):
        losses = [method(sub_batch=sub_batch).loss(a, b)["loss"] for a, b in ((z1, z2), (z1[order], z2[order]))]
        assert torch.allclose(*losses, rtol=1e-10, atol=0) == same


def test_a_dominant_direction_is_no_collapse():
    """As after some epochs on CIFAR-10: in float32 the covariance would not be invertible."""
    z1, z2 = rows("z1", "z2", n=20, d=4)
    z1, z2 = (z.detach() + 1e4 * z[:, :1].detach() for z in (z1, z2))
    singles = [z.float().requires_grad_() for z in (z1, z2)]
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(torch.cov(singles[0].detach().T))
    loss = method().loss(*singles)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), method().loss(z1, z2)["loss"], rtol=1e-2, atol=0)
    loss.backward()
    assert all(z.grad.isfinite().all() for z in singles)


def test_a_collapse_gives_nan_instead_of_an_error_or_a_number():
    z1, z2 = (torch.ones(8, 4, dtype=torch.float64) for _ in range(2))
    assert method().loss(z1, z2)["loss"].isnan()


def test_too_few_images_are_refused():
    four, six = rows("z1", "z2", n=4, d=4), rows("z1", "z2", n=6, d=4)
    with pytest.raises(ValueError, match="the batch must have more images than the embedding's 4 dimensions, got 4"):
        method().loss(*four)
    assert method(eps=0.1).loss(*four)["loss"].isfinite()
    with pytest.raises(ValueError, match="w_mse: sub_batch must divide the batch of 6 images, got 5"):
        method(sub_batch=5).loss(*six)


def test_defaults_are_the_papers():
    ours = WMSE(network(), FEATURES)
    assert [type(m) for m in ours.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [m.out_features for m in ours.projector if isinstance(m, nn.Linear)] == [1024, 64]
    assert (ours.sub_batch, ours.eps) == (None, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_batch": 4}, "w_mse: sub_batch must be > the projector's last width 4, got 4"),
        ({"eps": 1.5}, "w_mse: eps must be in [0, 1], got 1.5"),
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
