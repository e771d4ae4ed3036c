"""MMCR's loss is lightly's and the official code's: singular values of normalised means."""

import pytest
import torch
from lightly.loss import MMCRLoss
from method_cases import FEATURES, assert_same_loss, inputs, network
from torch import Tensor

from ssl_bench.methods import MMCR


def mmcr(**options):
    return MMCR(network(), FEATURES, projector=(7, 5), **options).double()


def embeddings(n: int, crops: int, d: int) -> Tensor:
    return torch.randn(n, crops, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_()


@pytest.mark.parametrize("lmbda", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(9, 2, 5), (4, 6, 5), (9, 4, 20)])  # more images, more crops, more dimensions
def test_loss_and_gradient_are_those_of_singular_values(shape, lmbda):
    z = embeddings(*shape)
    u = z / (z * z).sum(2, keepdim=True).sqrt()
    means = torch.linalg.eigvalsh(u.mean(1) @ u.mean(1).T).clamp(min=0)  # squares of singular values
    expected = -means[-min(shape[0], shape[2]) :].sqrt().sum()
    if lmbda:
        local = sum(torch.linalg.svd(one, full_matrices=False).S.sum() for one in u)
        expected = expected + lmbda * local / len(z)
    assert_same_loss(mmcr(lmbda=lmbda).loss(z)["loss"], expected, [z], rtol=1e-9)


def test_the_loss_is_lightlys():
    z = embeddings(8, 4, 5)
    u = torch.nn.functional.normalize(z, dim=2)
    expected = MMCRLoss(lmda=0.3)(u[:, :2], u[:, 2:])
    torch.testing.assert_close(mmcr(lmbda=0.3).loss(z)["loss"], expected, rtol=1e-12, atol=0)


def test_every_view_is_embedded_by_itself():
    method = mmcr(crops=3)
    crops = inputs(method.views, 6)
    assert len(crops) == 3
    z = method(*crops)["z"]
    assert z.shape == (6, 3, 5)
    assert torch.equal(z[:, 1], method.embed(crops[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"crops": 1}, "mmcr: crops must be >= 2, got 1"), ({"lmbda": -1.0}, "mmcr: lmbda must be >= 0, got -1.0")],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MMCR(network(), FEATURES, **options)
