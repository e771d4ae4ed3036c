"""The projectors, what the base class does around a loss, and what constructors refuse."""

import inspect
import re
import typing

import pytest
import torch
from torch import nn

from ssl_bench.methods import METHODS, BarlowTwins, Method, SimCLR, VICReg
from ssl_bench.methods.base import build_projector


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
    widths = {name: cls(backbone(), 5).projector for name, cls in METHODS.items()}
    linear = {name: [m.out_features for m in p if isinstance(m, nn.Linear)] for name, p in widths.items()}
    assert linear == {"barlow_twins": [2048, 2048, 4096], "simclr": [2048, 4096], "vicreg": [2048, 2048, 4096]}


@pytest.mark.parametrize("name", METHODS)
def test_each_view_is_embedded_by_itself(name):
    method, (x1, x2) = METHODS[name](backbone(), 5, projector=(6, 4)), views()
    z1, z2 = method(x1, x2, embed_only=True)
    assert torch.equal(z1, method.embed(x1))
    assert torch.equal(z2, method.embed(x2))
    terms = method(x1, x2)
    torch.testing.assert_close(terms["loss"], method.loss(z1, z2)["loss"])


def test_the_loss_is_float32_under_autocast_and_float64_stays():
    seen = []

    class Probe(Method):
        def loss(self, z1, z2):
            seen.append((z1.dtype, (z1 @ z2.T).dtype))
            return {"loss": (z1 * z2).mean()}

    method, (x1, x2) = Probe(backbone(), 5, build_projector(5, (4,))), views()
    with torch.autocast("cpu", torch.bfloat16):
        assert method.embed(x1).dtype == torch.bfloat16
        method(x1, x2)["loss"].backward()
    method.double()(x1.double(), x2.double())
    assert seen == [(torch.float32,) * 2, (torch.float64,) * 2]


def test_z_std_tells_a_spread_from_a_collapse():
    method = BarlowTwins(backbone(), 5, projector=(4,))
    spread = torch.cat([torch.eye(4), -torch.eye(4)]).requires_grad_()
    terms = method.global_loss(spread, spread)
    assert not terms["z_std"].requires_grad
    torch.testing.assert_close(terms["z_std"], torch.tensor(0.5), rtol=0.1, atol=0)  # 1 / sqrt(D), unbiased
    assert method.global_loss(torch.ones(8, 4), torch.ones(8, 4))["z_std"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_keywords_are_typed_and_documented(name):
    """The recipe checks ``method.<keyword>`` by the annotation and prints the entry of the ``Args:`` block."""
    hints = typing.get_type_hints(METHODS[name].__init__)
    for keyword, parameter in inspect.signature(METHODS[name]).parameters.items():
        assert hints[keyword] in (nn.Module, int, float, int | None, tuple[int, ...])
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


def test_a_batch_of_one_pair_and_unequal_views_are_refused():
    method = SimCLR(backbone(), 5, projector=(4,)).eval()
    with pytest.raises(ValueError, match="the global batch must have >= 2 pairs, got 1"):
        method(*views(1))
    with pytest.raises(ValueError, match=re.escape("must have the same shape, got (8, 4) and (4, 4)")):
        method(views(8)[0], views(4)[0])
