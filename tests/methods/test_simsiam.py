"""SimSiam equals its paper's equations 3 and 4, with the stop-gradient where it belongs."""

import re

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from method_cases import FEATURES, assert_same_loss, build, network, rows
from torch import Tensor, nn

from ssl_bench.methods import SimSiam

WIDTHS = {"projector": (7, 8, 5), "predictor": (6,)}


def method(**options) -> SimSiam:
    return build(SimSiam, **(WIDTHS | options))


def paper(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """-p'z / (|p| |z|) of each image and direction, one by one."""
    total = p1.new_zeros(())
    for p, z in ((p1, z2.detach()), (p2, z1.detach())):
        for a, b in zip(p, z, strict=True):
            total = total - (a * b).sum() / (a.norm() * b.norm()) / 2
    return total / len(p1)


def test_loss_and_gradient_are_the_papers():
    outputs = rows("p1", "p2", "z1", "z2")
    assert_same_loss(method().loss(*outputs)["loss"], paper(*outputs), outputs)


def test_loss_is_lightlys():
    p1, p2, z1, z2 = outputs = rows("p1", "p2", "z1", "z2")
    similarity = NegativeCosineSimilarity()
    expected = (similarity(p1, z2.detach()) + similarity(p2, z1.detach())) / 2
    assert_same_loss(method().loss(*outputs)["loss"], expected, outputs)


def test_a_prediction_that_is_the_other_views_embedding_has_the_least_loss():
    z1, z2 = (z.detach() for z in rows("z1", "z2"))
    torch.testing.assert_close(method().loss(3 * z2, z1, z1, z2)["loss"].item(), -1.0)


def test_the_stop_gradient_is_on_the_target_alone():
    simsiam, generator = method(), torch.Generator().manual_seed(3)
    x1, x2 = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    outputs = simsiam(x1, x2)
    assert torch.equal(outputs["p1"], simsiam.predictor(outputs["z1"]))
    gradients = torch.autograd.grad(simsiam.loss(**outputs)["loss"], list(simsiam.parameters()))
    fixed = {name: simsiam.embed(x).detach() for name, x in (("z1", x1), ("z2", x2))}
    again = {"p1": simsiam.predictor(simsiam.embed(x1)), "p2": simsiam.predictor(simsiam.embed(x2))} | fixed
    expected = torch.autograd.grad(paper(**again), list(simsiam.parameters()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


def test_default_heads_are_lightlys():
    """(Which are the official code's.)"""
    heads = SimSiam(network(), FEATURES)
    for ours, theirs in (
        (heads.projector, SimSiamProjectionHead(FEATURES, 2048, 2048)),
        (heads.predictor, SimSiamPredictionHead(2048, 512, 2048)),
    ):
        kinds = [[(type(m), [tuple(p.shape) for p in m.parameters()]) for m in h] for h in (ours, theirs.layers)]
        assert kinds[0] == kinds[1]
    assert not heads.projector[-1].affine
    assert isinstance(heads.predictor[-1], nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
        ({"predictor": (-1,)}, "predictor: widths must be one or more numbers > 0, got (-1, 5)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
