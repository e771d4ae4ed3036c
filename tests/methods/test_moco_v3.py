"""MoCo v3 equals its paper's algorithm 1; a ViT's patch projection stays as it was drawn."""

import math
import re

import pytest
import timm
import torch
from method_cases import FEATURES, assert_follows, assert_same_loss, build, network, rows
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods import MoCoV3

WIDTHS = {"projector": (7, 5), "predictor": (6,)}


def method(**options) -> MoCoV3:
    return build(MoCoV3, **(WIDTHS | options))


def vit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**shape)


def paper(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> Tensor:
    """ctr(q1, k2) + ctr(q2, k1), where ctr is 2 t times the cross-entropy, one query after the other."""
    total = q1.new_zeros(())
    for q, k in ((q1, k2.detach()), (q2, k1.detach())):
        for i, query in enumerate(q):
            logits = torch.stack([F.cosine_similarity(query, key, dim=0) / temperature for key in k])
            total = total + 2 * temperature * (torch.log(torch.exp(logits).sum()) - logits[i])
    return total / len(q1)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_and_gradient_are_the_papers(temperature):
    outputs = rows("q1", "q2", "k1", "k2")
    moco = method(temperature=temperature)
    assert_same_loss(moco.loss(*outputs)["loss"], paper(*outputs, temperature), outputs)


def test_the_teachers_momentum_goes_to_one_along_a_cosine():
    assert_follows(method(momentum=0.8), lambda progress: 1 - 0.2 * (math.cos(math.pi * progress) + 1) / 2)


def test_queries_come_from_the_predictor_and_keys_from_the_teacher():
    moco, generator = method(), torch.Generator().manual_seed(3)
    x1, x2 = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        moco.projector[0].weight.mul_(2)
    outputs = moco(x1, x2)
    assert [name for name, output in outputs.items() if output.requires_grad] == ["q1", "q2"]
    assert torch.equal(outputs["q2"], moco.predictor(moco.embed(x2)))
    assert torch.equal(outputs["k1"], moco.teacher(x1))
    assert (moco.evaluated, moco.spread_of) == ("backbone", "q1")


def test_default_heads_are_the_papers():
    """Batch norm after every layer, the last one of each head without parameters."""
    moco = MoCoV3(network(), FEATURES)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in moco.projector] == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert [type(m) for m in moco.predictor] == [*hidden, nn.Linear, nn.BatchNorm1d]
    widths = [[m.out_features for m in h if isinstance(m, nn.Linear)] for h in (moco.projector, moco.predictor)]
    assert widths == [[4096, 4096, 256], [4096, 256]]
    assert not moco.projector[-1].affine
    assert not moco.predictor[-1].affine
    assert (moco.temperature, moco.momentum) == (0.2, 0.99)


@pytest.mark.parametrize(("freeze", "frozen"), [(None, True), (True, True), (False, False)])
def test_a_vits_patch_projection_is_frozen_unless_told_otherwise(freeze, frozen):
    moco = MoCoV3(vit(), 12, projector=(6, 4), predictor=(6,), freeze_patch_embed=freeze)
    before = moco.backbone.patch_embed.proj.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        with torch.no_grad():
            moco.begin_step(step / 2)
        moco.loss(**moco(*torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(step))))["loss"].backward()
        optimizer.step()
    assert torch.equal(moco.backbone.patch_embed.proj.weight, before) == frozen
    assert torch.equal(moco.teacher.backbone.patch_embed.proj.weight, before) == frozen
    trained = {name.split(".")[0] for name, p in moco.backbone.named_parameters() if p.grad is not None}
    assert trained == {"cls_token", "pos_embed", "blocks", "norm"} | (set() if frozen else {"patch_embed"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "moco_v3: temperature must be > 0, got -1.0"),
        ({"momentum": 2.0}, "moco_v3: momentum must be in [0, 1], got 2.0"),
        (
            {"freeze_patch_embed": True},
            "moco_v3: freeze_patch_embed must be null or false without a patch_embed, got true",
        ),
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
        ({"predictor": (0,)}, "predictor: widths must be one or more numbers > 0, got (0, 5)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
