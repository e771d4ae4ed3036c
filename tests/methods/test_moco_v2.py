"""MoCo v2 equals MoCo's equation 1 with the queue as the only negatives, step after step."""

import math
import re

import pytest
import torch
from lightly.loss import NTXentLoss
from method_cases import FEATURES, assert_follows, assert_same_loss, build, network, rows
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods import MoCoV2

WIDTHS = {"projector": (7, 5), "queue": 16}


def method(**options) -> MoCoV2:
    return build(MoCoV2, **(WIDTHS | options))


def paper(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log exp(q'k+ / t) / (exp(q'k+ / t) + sum over the queue of exp(q'k / t)), one query after the other."""
    total = q.new_zeros(())
    for query, key in zip(q, k.detach(), strict=True):
        query, key = query / query.norm(), key / key.norm()
        positive = torch.exp((query * key).sum() / temperature)
        negatives = sum(torch.exp((query * row).sum() / temperature) for row in queue)
        total = total - torch.log(positive / (positive + negatives))
    return total / len(q)


@pytest.mark.parametrize("size", [6, 12, 16, 4])  # one batch, two, one that is not a multiple, less than a batch
def test_losses_gradients_and_queue_are_the_papers_over_several_steps(size):
    moco = method(queue=size, temperature=0.3)
    ring, at = moco.queue.rows.clone(), 0
    for step in range(6):
        q, k = outputs = rows("q", "k", seed=step)
        expected = paper(q, k, ring, 0.3)
        assert_same_loss(moco.loss(q, k)["loss"], expected, outputs)
        keys = F.normalize(k.detach())
        keys = keys[keys[:, 0].argsort()]
        for key in keys if size >= 6 else keys[[0, 1, 3, 4]]:  # 4 of 6, evenly
            ring[at], at = key, (at + 1) % size
        torch.testing.assert_close(moco.queue.rows, ring, rtol=1e-12, atol=0)
        assert int(moco.queue.pointer) == at


def test_loss_is_lightlys_with_a_memory_bank():
    moco, theirs = method(temperature=0.2), NTXentLoss(temperature=0.2, memory_bank_size=(16, 5))
    theirs.memory_bank.bank = moco.queue.rows.clone()
    for step in range(2):  # of 6 rows: lightly's bank drops what does not fit at its end
        outputs = rows("q", "k", seed=step)
        expected = theirs(outputs[0], outputs[1].detach())
        assert_same_loss(moco.loss(*outputs)["loss"], expected, outputs)


def test_the_teachers_momentum_is_constant():
    assert_follows(method(momentum=0.9), lambda _progress: 0.9)


def test_queries_come_from_the_student_and_keys_from_the_teacher():
    moco, generator = method(), torch.Generator().manual_seed(3)
    x1, x2 = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        moco.projector[0].weight.mul_(2)
    outputs = moco(x1, x2)
    assert torch.equal(outputs["q"], moco.embed(x1))
    assert torch.equal(outputs["k"], moco.teacher(x2))
    assert not outputs["k"].requires_grad
    assert (moco.evaluated, moco.spread_of) == ("backbone", "q")


def test_the_queue_is_in_the_state_and_goes_on_where_it_was():
    moco, resumed = method(queue=7), method(queue=7)
    for step in range(3):
        moco.loss(*rows("q", "k", seed=step))
    resumed.load_state_dict(moco.state_dict())
    assert int(resumed.queue.pointer) == 18 % 7
    for step in range(3, 5):
        losses = [m.loss(*rows("q", "k", seed=step))["loss"] for m in (moco, resumed)]
        assert torch.equal(*losses)


def test_defaults_are_the_papers():
    moco = MoCoV2(network(), FEATURES)
    assert [type(m) for m in moco.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [(m.out_features, m.bias is not None) for m in moco.projector[::2]] == [(2048, True), (128, True)]
    assert moco.queue.rows.shape == (65536, 128)
    assert (moco.temperature, moco.momentum) == (0.2, 0.999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue must be > 0, got 0"),
        ({"temperature": 0.0}, "moco_v2: temperature must be > 0, got 0.0"),
        ({"temperature": math.nan}, "moco_v2: temperature must be > 0, got nan"),
        ({"momentum": -0.1}, "moco_v2: momentum must be in [0, 1], got -0.1"),
        ({"projector": (0,)}, "projector: widths must be one or more numbers > 0, got (0,)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
