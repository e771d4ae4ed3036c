"""LAMB and LAMBC against their formula, timm and torch-optimizer."""

import pytest
import timm.optim
import torch
import torch_optimizer
from optim_cases import TOLERANCE, advance, difference, gradient, lr_at, make_params, reference, run, split

from ssl_bench.optim import LAMB, LAMBC

BETA, BETAS, EPS = 0.05, (0.9, 0.999), 1e-6
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
PATHS = pytest.mark.parametrize(
    "path", [{}, {"fused": False}, {"fused": False, "foreach": False}], ids=["fused", "foreach", "loop"]
)


def lamb_rule(correct=True, beta=BETA, adapt_all=False, lo=0.0, hi=float("inf"), lower=0.0, upper=float("inf")):
    """The formula of You et al. 2020, algorithm 2; 1-d tensors without decay and adaptation."""

    def rule(w, g, state, lr, step):
        t = step + 1
        state["m"] = m = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
        state["v"] = v = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g * g
        if correct:
            m, v = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        u = m / (v.sqrt() + EPS) + (beta * w if w.ndim > 1 else 0)
        top = w.norm().clamp(lo, hi)
        r = 1.0
        if w.ndim > 1 or adapt_all:
            r = top / u.norm() if top > 0 and u.norm() > 0 else torch.ones((), dtype=w.dtype)
            r = r.clamp(lower, upper)
        return w - lr * r * u

    return rule


def slow(k):
    return 0.01 * lr_at(k)


@BOTH
@PATHS
@pytest.mark.parametrize(
    ("keywords", "formula"),
    [
        ({}, {}),
        ({"bias_correction": False}, {"correct": False}),
        ({"adapt_1d": True}, {"adapt_all": True}),
        ({"norm_bounds": (0.5, 2.0)}, {"lo": 0.5, "hi": 2.0}),
        ({"ratio_bounds": (0.2, 0.9)}, {"lower": 0.2, "upper": 0.9}),
    ],
)
def test_formula(dtype, path, keywords, formula):
    ours = run(lambda p: LAMB(p.values(), betas=BETAS, eps=EPS, weight_decay=BETA, **keywords, **path), dtype, lr=slow)
    assert difference(ours, reference(lamb_rule(**formula), dtype, lr=slow)) < TOLERANCE[dtype]


@BOTH
@PATHS
def test_m1_is_timms_lamb_after_a_global_clip(dtype, path):
    params, other = make_params(dtype), make_params(dtype)
    ours = LAMB(params.values(), betas=BETAS, eps=EPS, weight_decay=BETA, adapt_without_decay=False, **path)
    theirs = timm.optim.Lamb(split(other, weight_decay=0.0), betas=BETAS, eps=EPS, weight_decay=BETA, max_grad_norm=1.0)
    for k in range(25):
        grads = {name: gradient(name, p.shape, k, dtype) for name, p in params.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert norm > 1.0  # the clip is at work
        for name, g in grads.items():
            params[name].grad, other[name].grad = g / norm, g.clone()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = slow(k)
        ours.step()
        theirs.step()
    a, b = ({n: p.detach() for n, p in tree.items()} for tree in (params, other))
    assert difference(a, b) < TOLERANCE[dtype]


@BOTH
@PATHS
@pytest.mark.parametrize("adapt_without_decay", [True, False])
def test_m1_without_any_clip(dtype, path, adapt_without_decay):
    theirs = run(
        lambda p: timm.optim.Lamb(
            split(p, weight_decay=0.0), eps=EPS, weight_decay=BETA, max_grad_norm=None, always_adapt=adapt_without_decay
        ),
        dtype,
        lr=slow,
    )
    ours = run(
        lambda p: LAMB(
            split(p, weight_decay=0.0, adapt=True),
            eps=EPS,
            weight_decay=BETA,
            adapt_without_decay=adapt_without_decay,
            **path,
        ),
        dtype,
        lr=slow,
    )
    assert difference(ours, theirs) < TOLERANCE[dtype]


@BOTH
@PATHS
def test_m2_is_torch_optimizers_lamb(dtype, path):
    theirs = run(lambda p: torch_optimizer.Lamb(p.values(), lr=1e-3, eps=EPS, weight_decay=BETA), dtype, lr=slow)
    ours = run(
        lambda p: LAMB(
            p.values(),
            eps=EPS,
            weight_decay=BETA,
            bias_correction=False,
            norm_bounds=(0.0, 10.0),
            decay_1d=True,
            adapt_1d=True,
            **path,
        ),
        dtype,
        lr=slow,
    )
    assert difference(ours, theirs) < TOLERANCE[dtype]


@BOTH
@PATHS
def test_m4_lambc_is_timms_lambc(dtype, path):
    lambc = timm.optim.get_optimizer_class("lambc")
    theirs = run(
        lambda p: lambc(split(p, weight_decay=0.0), eps=EPS, weight_decay=BETA, max_grad_norm=None), dtype, lr=slow
    )
    ours = run(
        lambda p: LAMBC(p.values(), eps=EPS, weight_decay=BETA, adapt_without_decay=False, **path), dtype, lr=slow
    )
    assert difference(ours, theirs) < TOLERANCE[dtype]


def test_lambc_clips_where_lamb_does_not():
    def step(make):
        p = torch.nn.Parameter(torch.full((2, 2), 100.0))
        p.grad = torch.ones(2, 2)
        make([p], lr=1.0, weight_decay=0.0, eps=0.0).step()
        return 100.0 - float(p.detach()[0, 0])

    assert step(LAMB) == pytest.approx(100.0, rel=1e-4)  # |w| / |u| = 100
    assert step(LAMBC) == pytest.approx(1.0, rel=1e-4)
    assert step(lambda p, **k: LAMBC(p, upper=3.0, **k)) == pytest.approx(3.0, rel=1e-4)
    assert step(lambda p, **k: LAMBC(p, lower=200.0, upper=300.0, **k)) == pytest.approx(200.0, rel=1e-4)


@PATHS
def test_released_oddity_is_adam_without_bias_correction(path):
    """The authors' Barlow Twins code sets the trust ratio to 1 (commit 89c3291, LAMB(adam=True))."""

    def rule(w, g, state, lr, _step):
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
        return w - lr * (state["m"] / (state["v"].sqrt() + EPS) + BETA * w)

    ours = run(
        lambda p: LAMB(p.values(), weight_decay=BETA, trust_ratio="one", bias_correction=False, decay_1d=True, **path),
        lr=slow,
    )
    assert difference(ours, reference(rule, lr=slow)) < 1e-12
    assert difference(ours, reference(lamb_rule(correct=False), lr=slow)) > 1e-3


@PATHS
def test_zero_norms(path):
    """w = 0: r = 1. g = 0: r applies to the decay that is left of u."""

    def moved(w, g, **keywords):
        p = torch.nn.Parameter(torch.full((2, 2), w, dtype=torch.float64))
        p.grad = torch.full((2, 2), g, dtype=torch.float64)
        LAMB([p], lr=0.1, weight_decay=0.5, eps=1e-30, **keywords, **path).step()
        return w - float(p.detach()[0, 0])

    assert moved(0.0, 1.0) == pytest.approx(0.1)
    assert moved(0.0, 1.0, norm_bounds=(6.0, 10.0)) == pytest.approx(0.1 * 6 / 2)  # lo lets a zero tensor move
    assert moved(2.0, 0.0) == pytest.approx(0.1 * 2.0)  # r u = |w| u / |u|, and u = beta w
    assert moved(0.0, 0.0) == 0.0


@PATHS
def test_no_first_moment(path):
    """beta1 = 0 and beta2 = 0: u is the gradient's sign."""
    ours = run(
        lambda p: LAMB(p.values(), betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, trust_ratio="one", **path), steps=1
    )
    for name, w in make_params().items():
        expected = w.detach() - lr_at(0) * gradient(name, w.shape, 0).sign()
        torch.testing.assert_close(ours[name], expected)


@pytest.mark.parametrize(
    ("make", "keyword", "value", "named"),
    [
        (LAMB, "lr", -1.0, "lr"),
        (LAMB, "betas", (0.9, 1.0), r"betas\[1\]"),
        (LAMB, "betas", (0.9,), "betas"),
        (LAMB, "eps", -1.0, "eps"),
        (LAMB, "norm_bounds", (2.0, 1.0), "norm_bounds"),
        (LAMB, "ratio_bounds", (-1.0, 1.0), "ratio_bounds"),
        (LAMB, "trust_ratio", "two", "trust_ratio"),
        (LAMBC, "upper", 0.0, "ratio_bounds"),
    ],
)
def test_bad_keywords_are_refused_by_name(make, keyword, value, named):
    with pytest.raises(ValueError, match=rf"^{make.__name__}: {named} must .* got "):
        make([torch.nn.Parameter(torch.ones(2, 2))], **{keyword: value})


def test_scratch_is_no_state():
    params = make_params(torch.float32)
    optimizer = LAMB(params.values())
    advance(optimizer, params, range(1))
    assert {key for state in optimizer.state.values() for key in state} == {"exp_avg", "exp_avg_sq", "step"}
