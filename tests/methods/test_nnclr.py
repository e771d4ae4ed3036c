"""NNCLR equals its paper's pseudocode, support set included, step after step."""

import re

import pytest
import torch
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from method_cases import FEATURES, assert_same_loss, build, network, rows
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.methods import NNCLR

WIDTHS = {"projector": (7, 8, 5), "predictor": (6,), "queue": 16}


def method(**options) -> NNCLR:
    return build(NNCLR, **(WIDTHS | options))


def nearest(z: Tensor, queue: Tensor) -> Tensor:
    """Each row's neighbour at the smallest distance of the normalised rows."""
    found = []
    for row in z.detach():
        distances = [(row / row.norm() - neighbour / neighbour.norm()).norm() for neighbour in queue]
        found.append(queue[distances.index(min(distances))])
    return torch.stack(found)


def paper(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """L(NN(z1), p2) / 2 + L(NN(z2), p1) / 2; L is the cross-entropy of each neighbour's row of NN p' / t."""
    total = p1.new_zeros(())
    for z, p in ((z1, p2), (z2, p1)):
        for i, neighbour in enumerate(nearest(z, queue)):
            logits = torch.stack([F.cosine_similarity(neighbour, row, dim=0) / temperature for row in p])
            total = total + (torch.log(torch.exp(logits).sum()) - logits[i]) / 2
    return total / len(p1)


@pytest.mark.parametrize("size", [6, 12, 16])  # one batch, two, and one that is not a multiple
def test_losses_gradients_and_support_set_are_the_papers_over_several_steps(size):
    nnclr = method(queue=size, temperature=0.3)
    ring, at = nnclr.queue.rows.clone(), 0
    for step in range(6):
        outputs = rows("p1", "p2", "z1", "z2", seed=step)
        assert_same_loss(nnclr.loss(*outputs)["loss"], paper(*outputs, ring, 0.3), outputs)
        latest = F.normalize(outputs[2].detach())
        for row in latest[latest[:, 0].argsort()]:
            ring[at], at = row, (at + 1) % size
        torch.testing.assert_close(nnclr.queue.rows, ring, rtol=1e-12, atol=0)
        assert int(nnclr.queue.pointer) == at


def test_the_neighbours_are_lightlys():
    nnclr, theirs = method(queue=40), NNMemoryBankModule((40, 5))
    theirs.bank = nnclr.queue.rows.clone()
    (z,) = rows("z", n=20)
    torch.testing.assert_close(nnclr._nearest(z), theirs(z.detach(), update=False), rtol=0, atol=0)


def test_the_support_set_is_in_the_state_and_goes_on_where_it_was():
    nnclr, resumed = method(queue=7), method(queue=7)
    names = ("p1", "p2", "z1", "z2")
    for step in range(3):
        nnclr.loss(*rows(*names, seed=step))
    resumed.load_state_dict(nnclr.state_dict())
    for step in range(3, 5):
        assert torch.equal(*[m.loss(*rows(*names, seed=step))["loss"] for m in (nnclr, resumed)])


def test_defaults_are_the_papers():
    nnclr = NNCLR(network(), FEATURES)
    for ours, theirs in (
        (nnclr.projector, NNCLRProjectionHead(FEATURES, 2048, 256)),
        (nnclr.predictor, NNCLRPredictionHead(256, 4096, 256)),
    ):
        kinds = [[(type(m), [tuple(p.shape) for p in m.parameters()]) for m in h] for h in (ours, theirs.layers)]
        assert kinds[0] == kinds[1]
    assert nnclr.queue.rows.shape == (98304, 256)
    assert nnclr.temperature == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": -1}, "queue must be > 0, got -1"),
        ({"temperature": 0.0}, "nnclr: temperature must be > 0, got 0.0"),
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
        ({"predictor": (0,)}, "predictor: widths must be one or more numbers > 0, got (0, 5)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
