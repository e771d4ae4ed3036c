"""LARS against the formulas of its public implementations, and against the packages that publish them."""

import lightly.utils.lars
import pytest
import pytorch_optimizer
import timm.optim.lars
import torch
import torch_optimizer
from optim_cases import TOLERANCE, advance, difference, lr_at, make_params, reference, run, split

from ssl_bench.optim import LARS

BETA, MU, ETA = 0.05, 0.9, 1e-3
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
PATHS = pytest.mark.parametrize(
    "path", [{}, {"fused": False}, {"fused": False, "foreach": False}], ids=["fused", "foreach", "loop"]
)


def barlow_twins(w, g, state, lr, _step, beta=BETA, eta=ETA):
    """The official Barlow Twins / VICReg rule; bias and norm are excluded from decay and adaptation."""
    d = g + beta * w if w.ndim > 1 else g
    if w.ndim > 1:
        w_norm, d_norm = w.norm(), d.norm()
        q = eta * w_norm / d_norm if w_norm > 0 and d_norm > 0 else torch.ones(())
        d = d * q
    state["mu"] = MU * state.get("mu", 0) + d
    return w - lr * state["mu"]


def excluded(params):
    """Groups in which the 1-d tensors have no decay, as timm, lightly and torch-optimizer want them."""
    return split(params, weight_decay=0.0)


@BOTH
@PATHS
def test_l1_norm_of_sum_is_the_official_barlow_twins_rule(dtype, path):
    ours = run(lambda p: LARS(p.values(), lr=1.0, momentum=MU, weight_decay=BETA, eta=ETA, **path), dtype)
    assert difference(ours, reference(barlow_twins, dtype)) < TOLERANCE[dtype]


@BOTH
@PATHS
@pytest.mark.parametrize("peer", ["timm", "lightly", "torch_optimizer"])
def test_l2_sum_of_norms_is_timm_lightly_and_torch_optimizer(dtype, path, peer):
    make = {
        "timm": lambda p: timm.optim.lars.Lars(excluded(p), 1.0, momentum=MU, weight_decay=BETA, trust_coeff=ETA),
        "lightly": lambda p: lightly.utils.lars.LARS(
            excluded(p), 1.0, momentum=MU, weight_decay=BETA, trust_coefficient=ETA
        ),
        "torch_optimizer": lambda p: torch_optimizer.LARS(
            excluded(p), 1.0, momentum=MU, weight_decay=BETA, trust_coefficient=ETA
        ),
    }[peer]
    zero_norm = "gradient" if peer == "timm" else "skip"
    ours = run(
        lambda p: LARS(
            excluded(p),
            1.0,
            momentum=MU,
            weight_decay=BETA,
            eta=ETA,
            denominator="sum_of_norms",
            eps=1e-8,
            zero_norm=zero_norm,
            adapt_without_decay=False,
            **path,
        ),
        dtype,
    )
    assert difference(ours, run(make, dtype)) < TOLERANCE[dtype]


@BOTH
@PATHS
def test_l3_sum_of_norms_without_eps_is_pytorch_optimizer(dtype, path):
    theirs = run(
        lambda p: pytorch_optimizer.LARS(p.values(), 1.0, weight_decay=BETA, momentum=MU, trust_coefficient=ETA), dtype
    )
    ours = run(
        lambda p: LARS(p.values(), 1.0, momentum=MU, weight_decay=BETA, eta=ETA, denominator="sum_of_norms", **path),
        dtype,
    )
    assert difference(ours, theirs) < TOLERANCE[dtype]


@BOTH
@PATHS
@pytest.mark.parametrize("nesterov", [False, True])
def test_l4_without_decay_the_denominators_agree_with_timm(dtype, path, nesterov):
    theirs = run(
        lambda p: timm.optim.lars.Lars(
            p.values(), 1.0, momentum=MU, trust_coeff=ETA, always_adapt=True, eps=0.0, nesterov=nesterov
        ),
        dtype,
    )
    for denominator in ("norm_of_sum", "sum_of_norms"):
        ours = run(
            lambda p, denominator=denominator: LARS(
                p.values(),
                1.0,
                momentum=MU,
                weight_decay=0.0,
                eta=ETA,
                denominator=denominator,
                nesterov=nesterov,
                adapt_1d=True,
                **path,
            ),
            dtype,
        )
        assert difference(ours, theirs) < TOLERANCE[dtype]


@BOTH
@PATHS
@pytest.mark.parametrize("eta", [1e-3, 0.9])
def test_clip_is_timms_larc(dtype, path, eta):
    keywords = {"momentum": MU, "weight_decay": BETA}
    theirs = run(lambda p: timm.optim.lars.Lars(excluded(p), 1.0, trust_coeff=eta, trust_clip=True, **keywords), dtype)
    ours = run(
        lambda p: LARS(
            p.values(),
            1.0,
            eta=eta,
            denominator="sum_of_norms",
            eps=1e-8,
            zero_norm="gradient",
            clip=True,
            **keywords,
            **path,
        ),
        dtype,
    )
    assert difference(ours, theirs) < TOLERANCE[dtype]
    unclipped = run(lambda p: LARS(p.values(), 1.0, eta=eta, denominator="sum_of_norms", **keywords, **path), dtype)
    assert difference(ours, unclipped) > 1e-3


@PATHS
def test_clip_at_learning_rate_zero_is_finite(path):
    still = run(lambda p: LARS(p.values(), 0.0, clip=True, **path), lr=lambda _: 0.0)
    assert difference(still, {n: p.detach() for n, p in make_params().items()}) == 0


@PATHS
def test_lr_in_buffer_is_you_2017(path):
    """b = mu b + lr q d; w -= b (You 2017, SimCLR, optax)."""

    def rule(w, g, state, lr, _step):
        d = g + BETA * w if w.ndim > 1 else g
        q = ETA * w.norm() / d.norm() if w.ndim > 1 and w.norm() > 0 and d.norm() > 0 else 1.0
        state["b"] = MU * state.get("b", 0) + lr * q * d
        return w - state["b"]

    def ours(inside, lr=lr_at):
        return run(lambda p: LARS(p.values(), 1.0, momentum=MU, weight_decay=BETA, lr_in_buffer=inside, **path), lr=lr)

    assert difference(ours(True), reference(rule)) < 1e-12
    assert difference(ours(True), ours(False)) > 1e-3
    assert difference(ours(True, lambda _: 0.3), ours(False, lambda _: 0.3)) < 1e-12


def test_denominators_differ_with_decay():
    a, b = (
        run(lambda p, d=d: LARS(p.values(), 1.0, weight_decay=BETA, denominator=d))
        for d in ("norm_of_sum", "sum_of_norms")
    )
    assert difference(a, b) > 1e-4


@PATHS
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_unadapted_groups_are_torchs_sgd(path, momentum, nesterov):
    keywords = {"momentum": momentum, "weight_decay": BETA, "nesterov": nesterov}
    theirs = run(lambda p: torch.optim.SGD(p.values(), 1.0, **keywords))
    ours = run(lambda p: LARS([{"params": p.values(), "adapt": False, "weight_decay": BETA}], 1.0, **keywords, **path))
    assert difference(ours, theirs) < 1e-12


@PATHS
def test_nesterov_is_torchs_sgd_fed_the_scaled_gradient(path):
    params = make_params()
    other = make_params()
    sgd = torch.optim.SGD(other.values(), 1.0, momentum=MU, nesterov=True)

    class Scaled:
        param_groups = sgd.param_groups

        def step(self):
            for p in other.values():
                d = p.grad + BETA * p.detach() if p.ndim > 1 else p.grad
                q = ETA * p.norm() / d.norm() if p.ndim > 1 and p.norm() > 0 and d.norm() > 0 else 1.0
                p.grad = d * q
            sgd.step()

    advance(LARS(params.values(), 1.0, momentum=MU, weight_decay=BETA, nesterov=True, **path), params, range(25))
    advance(Scaled(), other, range(25))
    assert difference({n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in other.items()}) < 1e-12


@PATHS
def test_norm_clamp_bounds_both_norms(path):
    def rule(w, g, state, lr, _step):
        d = g + BETA * w if w.ndim > 1 else g
        if w.ndim > 1 and w.norm() > 0 and d.norm() > 0:
            d = d * ETA * min(w.norm(), 0.5) / min(d.norm(), 0.5)
        state["b"] = MU * state.get("b", 0) + d
        return w - lr * state["b"]

    ours = run(lambda p: LARS(p.values(), 1.0, momentum=MU, weight_decay=BETA, norm_clamp=0.5, **path))
    assert difference(ours, reference(rule)) < 1e-12
    assert difference(ours, reference(barlow_twins)) > 1e-4


@PATHS
def test_eps_is_added_to_either_denominator(path):
    for denominator in ("norm_of_sum", "sum_of_norms"):
        w = torch.nn.Parameter(torch.full((2, 2), 2.0, dtype=torch.float64))  # |w| = 4
        w.grad = torch.full((2, 2), 1.5, dtype=torch.float64)  # |g| = 3
        LARS([w], 1.0, weight_decay=0.0, eta=1.0, eps=1.0, denominator=denominator, **path).step()
        torch.testing.assert_close(w.detach(), torch.full((2, 2), 2.0 - 1.5, dtype=torch.float64))


# One step with lr 1, eta 0.1, beta 0.5 on |w| = 4 or 0 and |g| = 2 or 0: what is subtracted from each element.
@PATHS
@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
@pytest.mark.parametrize(
    ("zero_norm", "w", "g", "expected"),
    [
        ("update", 0.0, 1.0, 1.0),  # q = 1
        ("literal", 0.0, 1.0, 0.0),  # q = eta 0 / |d|
        ("gradient", 0.0, 1.0, 1.0),
        ("skip", 0.0, 1.0, 1.0),
        ("update", 2.0, 0.0, 0.1 / 0.5 * 0.5 * 2.0),  # d = beta w, q = eta / beta
        ("literal", 2.0, 0.0, 0.1 / 0.5 * 0.5 * 2.0),
        ("gradient", 2.0, 0.0, 0.5 * 2.0),  # plain decay
        ("skip", 2.0, 0.0, 0.0),  # neither
        ("update", 0.0, 0.0, 0.0),
        ("literal", 0.0, 0.0, 0.0),
        ("gradient", 0.0, 0.0, 0.0),
        ("skip", 0.0, 0.0, 0.0),
    ],
)
def test_zero_norms(path, denominator, zero_norm, w, g, expected):
    p = torch.nn.Parameter(torch.full((2, 2), w, dtype=torch.float64))
    p.grad = torch.full((2, 2), g, dtype=torch.float64)
    LARS([p], 1.0, weight_decay=0.5, eta=0.1, zero_norm=zero_norm, denominator=denominator, **path).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), w - expected, dtype=torch.float64))


@PATHS
def test_adapt_without_decay(path):
    def step(**keywords):
        p = torch.nn.Parameter(torch.full((2, 2), 2.0, dtype=torch.float64))
        p.grad = torch.ones(2, 2, dtype=torch.float64)
        LARS([p], 1.0, weight_decay=0.0, eta=0.1, **keywords, **path).step()
        return float(2.0 - p.detach()[0, 0])

    assert step() == pytest.approx(0.2)  # eta |w| / |g| = 0.1 x 4 / 2
    assert step(adapt_without_decay=False) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "1"),
        ("lr", torch.ones(2)),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("eta", -1.0),
        ("eps", -1e-8),
        ("eps", True),
        ("denominator", "sum"),
        ("zero_norm", "one"),
        ("norm_clamp", 0.0),
    ],
)
def test_bad_keywords_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=rf"^LARS: {keyword} must .* got "):
        LARS([torch.nn.Parameter(torch.ones(2, 2))], **{"lr": 1.0, keyword: value})


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="LARS: momentum must be > 0 with nesterov=True, got 0"):
        LARS([torch.nn.Parameter(torch.ones(2, 2))], 1.0, momentum=0.0, nesterov=True)
