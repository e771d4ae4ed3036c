"""The projectors, what the base class does around a loss, and what constructors refuse."""

import inspect
import re
import typing

import pytest
import torch
from torch import nn

from ssl_bench.methods import METHODS, BarlowTwins, Method, SimCLR, VICReg


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def views(n: int = 8) -> torch.Tensor:
    return torch.randn(2, n, 3, 2, 2, generator=torch.Generator().manual_seed(n))


def kinds(method: Method) -> list[str]:
    return [f"{type(m).__name__}{' bias' if getattr(m, 'bias', None) is not None else ''}" for m in method.projector]


def test_projectors_are_the_papers():
    norm, relu = "BatchNorm1d bias", "ReLU"
    plain = [kinds(cls(backbone(), 5, projector=(7, 8, 9))) for cls in (BarlowTwins, SimCLR, VICReg)]
    assert plain[0] == ["Linear", norm, relu, "Linear", norm, relu, "Linear"]
    assert plain[1] == ["Linear", norm, relu, "Linear", norm, relu, "Linear", norm]
    assert plain[2] == ["Linear bias", norm, relu, "Linear bias", norm, relu, "Linear"]
    last = SimCLR(backbone(), 5, projector=(7, 9)).projector[-1]
    assert (last.weight.requires_grad, last.bias.requires_grad) == (True, False)


def test_default_projectors_end_in_4096_dimensions():
    """Those of the TVLARS paper's three methods."""
    widths = {cls: cls(backbone(), 5).projector for cls in (BarlowTwins, SimCLR, VICReg)}
    linear = {cls: [m.out_features for m in p if isinstance(m, nn.Linear)] for cls, p in widths.items()}
    assert linear == {BarlowTwins: [2048, 2048, 4096], SimCLR: [2048, 4096], VICReg: [2048, 2048, 4096]}


def test_each_view_is_embedded_by_itself():
    method, (x1, x2) = BarlowTwins(backbone(), 5, projector=(6, 4)), views()
    outputs = method(x1, x2)
    assert torch.equal(outputs["z1"], method.embed(x1))
    assert torch.equal(outputs["z2"], method.embed(x2))


@pytest.mark.parametrize("name", METHODS)
def test_keywords_are_typed_and_documented(name):
    """The recipe checks ``method.<keyword>`` by the annotation and prints the entry of the ``Args:`` block."""
    hints = typing.get_type_hints(METHODS[name].__init__)
    for keyword, parameter in inspect.signature(METHODS[name]).parameters.items():
        plain = (int, float, bool, bool | None, int | None, float | None, tuple[int, ...], tuple[float, float])
        assert hints[keyword] in (nn.Module, *plain)
        assert re.search(rf"^    {keyword}: \w", inspect.getdoc(METHODS[name]), re.MULTILINE)
        assert keyword in ("backbone", "feature_dim") or parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BarlowTwins(backbone(), 5, projector=()), "projector: widths must be one or more numbers > 0, got ()"),
        (
            lambda: SimCLR(backbone(), 5, projector=(8, 0)),
            "projector: widths must be one or more numbers > 0, got (8, 0)",
        ),
        (lambda: VICReg(backbone(), 0), "projector: feature_dim must be > 0, got 0"),
        (lambda: BarlowTwins(backbone(), 5, lambd=-1), "barlow_twins: lambd must be >= 0, got -1"),
        (lambda: BarlowTwins(backbone(), 5, lambd=float("nan")), "barlow_twins: lambd must be >= 0, got nan"),
        (lambda: SimCLR(backbone(), 5, temperature=0), "simclr: temperature must be > 0, got 0"),
        (lambda: VICReg(backbone(), 5, cov_coeff=-0.1), "vicreg: cov_coeff must be >= 0, got -0.1"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_backbone_with_other_features_is_refused():
    net = backbone()
    net.num_features = 512
    with pytest.raises(ValueError, match="feature_dim must be the backbone's 512, got 64"):
        BarlowTwins(net, 64)
