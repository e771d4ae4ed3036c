"""SupCon equals its paper's equation 2; without labels in common it is SimCLR's loss."""

import re

import pytest
import torch
from method_cases import FEATURES, assert_same_loss, build, network, rows
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods import Crop, Labels, SupCon
from ssl_bench.methods.parts import nt_xent

WIDTHS = {"projector": (7, 5)}


def method(**options) -> SupCon:
    return build(SupCon, **(WIDTHS | options))


def paper(z1: Tensor, z2: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """sum_i -1 / |P(i)| sum_{p in P(i)} log exp(z_i'z_p / t) / sum_{a != i} exp(z_i'z_a / t), as a mean over i."""
    z, classes = F.normalize(torch.cat([z1, z2])), [*labels.tolist(), *labels.tolist()]
    total = z.new_zeros(())
    for i, anchor in enumerate(z):
        others = [a for a in range(len(z)) if a != i]
        denominator = sum(torch.exp((anchor * z[a]).sum() / temperature) for a in others)
        positives = [p for p in others if classes[p] == classes[i]]
        for p in positives:
            total = total - torch.log(torch.exp((anchor * z[p]).sum() / temperature) / denominator) / len(positives)
    return total / len(z)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 0, 1], [3, 3, 3, 3, 3, 3], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("block", [30, 1 << 24])  # of several rows, and all
def test_loss_and_gradient_are_the_papers(monkeypatch, labels, block):
    monkeypatch.setattr(nt_xent, "BLOCK", block)
    z1, z2 = outputs = rows("z1", "z2")
    classes = torch.tensor(labels)
    ours = method(temperature=0.3)
    assert_same_loss(ours.loss(z1, z2, classes)["loss"], paper(z1, z2, classes, 0.3), outputs)


def test_classes_of_one_image_each_give_simclrs_loss():
    z1, z2 = outputs = rows("z1", "z2")
    assert_same_loss(method().loss(z1, z2, torch.arange(6))["loss"], nt_xent.nt_xent(z1, z2, 0.1), outputs)


def test_second_derivatives_are_those_of_finite_differences():
    z1, z2 = rows("z1", "z2", n=4, d=3)
    classes = torch.tensor([0, 1, 0, 0])
    assert torch.autograd.gradgradcheck(lambda a, b: method().loss(a, b, classes)["loss"], (z1, z2))


def test_labels_are_a_view_and_pass_through():
    supcon, generator = method(), torch.Generator().manual_seed(3)
    assert supcon.views == (Crop(), Crop(), Labels())
    x1, x2 = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    outputs = supcon(x1, x2, torch.tensor([1, 0, 2, 1]))
    assert torch.equal(outputs["z2"], supcon.embed(x2))
    assert outputs["labels"].tolist() == [1, 0, 2, 1]


def test_defaults_are_the_papers():
    supcon = SupCon(network(), FEATURES)
    assert [type(m) for m in supcon.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [m.out_features for m in supcon.projector[::2]] == [2048, 128]
    assert supcon.temperature == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "supcon: temperature must be > 0, got 0.0"),
        ({"projector": ()}, "projector: widths must be one or more numbers > 0, got ()"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(**options)
