"""TVLARS against Algorithm 1, the released code's formula, torch's SGD and LARS."""

import math

import pytest
import torch
from optim_cases import TOLERANCE, difference, make_params, reference, run
from tiny_net import TinyNet

from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import LARS, TVLARS
from ssl_bench.optim.tvlars import phi
from ssl_bench.recipe import registry

BETA, MU, ETA, LAMBDA, DELAY = 0.05, 0.9, 0.02, 0.3, 6.0
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
PATHS = pytest.mark.parametrize(
    "path", [{}, {"fused": False}, {"fused": False, "foreach": False}], ids=["fused", "foreach", "loop"]
)


def paper(params, **keywords):
    defaults = {"momentum": MU, "weight_decay": BETA, "eta": ETA, "decay": LAMBDA, "delay_steps": DELAY}
    return TVLARS(params.values(), **(defaults | keywords))


def released(params, **keywords):
    defaults = {"momentum": MU, "weight_decay": BETA, "eta": ETA, "decay": LAMBDA, "variant": "released"}
    return TVLARS(params.values(), **(defaults | keywords))


def gamma(w, g, lr, step, alpha=1.0, gamma_min=0.0):
    """Algorithm 1's layer learning rate: 0 where |w| is."""
    d_norm = (g + BETA * w).norm()
    factor = 1 / (alpha + math.exp(LAMBDA * (step - DELAY))) + gamma_min
    return lr * ETA * factor * w.norm() / d_norm if d_norm > 0 else 0.0


def algorithm_1(alpha=1.0, gamma_min=0.0):
    """The text's m-form: m+ = w - gamma g; w+ = m+ + mu (m+ - m), m_0 = w_0."""

    def rule(w, g, state, lr, step):
        m = state.get("m", w)
        state["m"] = w - gamma(w, g, lr, step, alpha, gamma_min) * g
        return state["m"] + MU * (state["m"] - m)

    return rule


def released_rule(w, g, state, lr, step):
    """opt/tvlars.py at commit 89c3291, with the filters on."""
    d = g + BETA * w if w.ndim != 1 else g
    if w.ndim != 1:
        w_norm, d_norm = w.norm().clamp(0, 10), d.norm().clamp(0, 10)
        q = ETA / (0.1 + math.exp(LAMBDA * (step + 1))) * w_norm / d_norm if w_norm > 0 and d_norm > 0 else 1.0
        d = d * q
    state["mu"] = MU * state.get("mu", 0) + d
    return w - lr * state["mu"]


@BOTH
@PATHS
@pytest.mark.parametrize("keywords", [{}, {"alpha": 0.5, "gamma_min": 0.1}])
def test_paper_is_algorithm_1(dtype, path, keywords):
    ours = run(lambda p: paper(p, **keywords, **path), dtype)
    assert difference(ours, reference(algorithm_1(**keywords), dtype)) < TOLERANCE[dtype]


@PATHS
def test_t1_paper_is_torchs_nesterov_sgd_fed_the_scaled_gradient(path):
    def rule(w, g, state, lr, step):
        if "sgd" not in state:
            state["w"] = torch.nn.Parameter(w.clone())
            state["sgd"] = torch.optim.SGD([state["w"]], 1.0, momentum=MU, nesterov=True)
        state["w"].grad = gamma(w, g, lr, step) * g
        state["sgd"].step()
        return state["w"].detach().clone()

    assert difference(run(lambda p: paper(p, **path)), reference(rule)) < 1e-12


@BOTH
@PATHS
def test_t2_without_decay_of_phi_it_is_lars_times_phi(dtype, path):
    """lambda = 0: phi = 1 / (1 + 1) in the paper, 1 / (0.1 + 1) in the released code, for ever."""
    tv = run(lambda p: paper(p, decay=0.0, weight_decay=0.0, **path), dtype)
    plain = run(
        lambda p: LARS(
            p.values(),
            1.0,
            momentum=MU,
            weight_decay=0.0,
            eta=ETA / 2,
            nesterov=True,
            lr_in_buffer=True,
            adapt_1d=True,
            zero_norm="literal",
        ),
        dtype,
    )
    assert difference(tv, plain) < TOLERANCE[dtype]
    tv = run(lambda p: released({n: q for n, q in p.items() if n != "scalar"}, decay=0.0, **path), dtype)
    plain = run(
        lambda p: LARS(
            [q for n, q in p.items() if n != "scalar"],
            1.0,
            momentum=MU,
            weight_decay=BETA,
            eta=ETA / 1.1,
            norm_clamp=10.0,
        ),
        dtype,
    )
    assert difference(tv, plain) < TOLERANCE[dtype]


@BOTH
@PATHS
def test_t3_released_is_the_released_formula(dtype, path):
    assert difference(run(lambda p: released(p, **path), dtype), reference(released_rule, dtype)) < TOLERANCE[dtype]


def code_of_the_preprints_time(norm_clamp, factor):
    """opt/tvlars.py of 2023, with the filters on: q = eta factor(t) |w| / |d|, norms clamped or not."""

    def rule(w, g, state, lr, step):
        d = g + BETA * w if w.ndim != 1 else g
        if w.ndim != 1:
            w_norm, d_norm = (x.norm().clamp(0, norm_clamp) if norm_clamp else x.norm() for x in (w, d))
            d = d * (ETA * factor(step) * w_norm / d_norm if w_norm > 0 and d_norm > 0 else 1.0)
        state["mu"] = MU * state.get("mu", 0) + d
        return w - lr * state["mu"]

    return rule


@BOTH
@PATHS
def test_2023_07_is_commit_d52d3bd(dtype, path):
    reference_rule = code_of_the_preprints_time(None, lambda t: math.exp(LAMBDA * (t + 1)) ** -1)
    ours = run(lambda p: released(p, variant="2023-07", **path), dtype)
    assert difference(ours, reference(reference_rule, dtype)) < TOLERANCE[dtype]
    assert difference(ours, run(lambda p: released(p, **path), dtype)) > 1e-2


@BOTH
@PATHS
@pytest.mark.parametrize("delay", [0.0, 6.0, 6.5])
def test_2023_08_is_commit_10bcfd2(dtype, path, delay):
    def factor(t):
        return 1.0 if t < delay else (0.1 + math.exp(LAMBDA * (t + 1))) ** -1

    ours = run(lambda p: released(p, variant="2023-08", delay_steps=delay, **path), dtype)
    assert difference(ours, reference(code_of_the_preprints_time(10.0, factor), dtype)) < TOLERANCE[dtype]
    plain = run(lambda p: released(p, **path), dtype)
    assert (difference(ours, plain) < TOLERANCE[dtype]) == (delay == 0)


@pytest.mark.parametrize(("variant", "clamped"), [("released", True), ("2023-08", True), ("2023-07", False)])
def test_which_code_clamps_the_norms(variant, clamped):
    w = torch.nn.Parameter(torch.full((20, 20), 5.0, dtype=torch.float64))  # |w| = 100
    w.grad = torch.full((20, 20), 1.0, dtype=torch.float64)  # |g| = 20
    TVLARS([w], lr=1.0, weight_decay=0.0, eta=0.1, decay=0.0, alpha=1.0, variant=variant).step()
    ratio = 10 / 10 if clamped else 100 / 20
    torch.testing.assert_close(w.detach(), torch.full((20, 20), 5.0 - 0.1 / 2 * ratio, dtype=torch.float64))


def test_t3_the_norm_clamp_is_at_work():
    """A tensor with norms above 10, where the clamped ratio is 1 and the plain one is not."""
    w = torch.nn.Parameter(torch.full((20, 20), 5.0, dtype=torch.float64))  # |w| = 100
    w.grad = torch.full((20, 20), 1.0, dtype=torch.float64)  # |g| = 20
    TVLARS([w], lr=1.0, weight_decay=0.0, eta=0.1, decay=0.0, variant="released").step()
    torch.testing.assert_close(w.detach(), torch.full((20, 20), 5.0 - 0.1 / 1.1, dtype=torch.float64))


@PATHS
def test_the_letter_of_algorithm_1_leaves_a_zero_tensor_where_it_is(path):
    out = run(lambda p: paper(p, **path))
    assert not out["zero"].any()
    assert not out["zero.bias"].any()
    assert run(lambda p: paper(p, zero_norm="update", **path))["zero.bias"].norm() > 0.1


def test_barlow_twins_at_lr_2_no_longer_lets_zero_biases_jump():
    """With q = 1, without eta and phi, one step moves each by 2 x the raw gradient of a sum over dimensions."""

    def longest_bias(**keywords):
        torch.manual_seed(0)
        method = BarlowTwins(TinyNet(), TinyNet.num_features, projector=(64, 64, 64))
        biases = [p for name, p in method.named_parameters() if name.endswith("bias") and not p.any()]
        assert len(biases) >= 3  # of the batch norms
        optimizer = TVLARS(method.parameters(), lr=2.0, delay_steps=980, **keywords)
        norms = []
        for _ in range(24):
            z1, z2 = (method.embed(torch.randn(64, 3, 16, 16)) for _ in range(2))
            optimizer.zero_grad()
            method.loss(z1=z1, z2=z2)["loss"].backward()
            optimizer.step()
            norms.append(max(float(p.detach().norm()) for p in biases))
        return max(norms)

    assert longest_bias() == 0
    assert longest_bias(zero_norm="update") > 10


def test_each_variant_has_its_own_lambda_alpha_and_zero_norm():
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    for variant, own in {
        "paper": (1e-4, 1.0, "literal"),
        "released": (1e-3, 0.1, "update"),
        "2023-08": (1e-3, 0.1, "update"),
        "2023-07": (1e-3, 0.0, "update"),
    }.items():
        assert tuple(TVLARS(weights, variant=variant).defaults[k] for k in ("decay", "alpha", "zero_norm")) == own
        assert TVLARS(weights, variant=variant, zero_norm="skip").defaults["zero_norm"] == "skip"
        assert registry.check("optimizer", "tvlars", {"lr": 1.0, "variant": variant})["zero_norm"] == own[2]
        assert TVLARS(weights, variant=variant, decay=0.5, alpha=2.0).defaults["decay"] == 0.5


def test_variants_differ():
    assert difference(run(paper), run(released)) > 1e-2


def test_paper_excludes_no_tensor_and_released_the_1d_ones():
    params = make_params()
    assert [g["adapt"] for g in paper(params).param_groups] == [True]
    groups = released(params).param_groups
    assert [(g["adapt"], g["weight_decay"]) for g in groups] == [(True, BETA), (False, 0.0)]
    assert [p.ndim for p in groups[1]["params"]] == [1, 1]  # not the 0-d tensor: the code tests ndim == 1
    assert len(paper(params, adapt_1d=False, decay_1d=False).param_groups) == 2


@pytest.mark.parametrize(
    ("decay", "steps_per_epoch", "values"),
    [  # the table of the specification: alpha 1, gamma_min 0, d_e = 10 epochs; t = 0, 100, 1000, 10000
        (1e-2, 98, (0.9999, 0.9998, 0.450, 6.7e-40)),
        (1e-3, 98, (0.727, 0.707, 0.495, 1.2e-4)),
        (1e-4, 98, (0.5245, 0.522, 0.4995, 0.289)),
        (1e-5, 98, (0.5024, 0.5022, 0.5000, 0.4775)),
        (1e-2, 4, (0.599, 0.354, 6.8e-5, 5.5e-44)),
        (1e-3, 4, (0.510, 0.485, 0.277, 4.7e-5)),
        (1e-4, 4, (0.501, 0.4985, 0.476, 0.270)),
        (1e-5, 4, (0.5001, 0.4999, 0.4976, 0.475)),
    ],
)
def test_phi_table(decay, steps_per_epoch, values):
    t = torch.tensor([0.0, 100.0, 1000.0, 10000.0], dtype=torch.float64)
    found = phi(t, decay=decay, delay_steps=10 * steps_per_epoch, alpha=1.0, gamma_min=0.0)
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-2, atol=0)


def test_phi_time_unit_and_bounds():
    a = phi(250.0, decay=0.5, delay_steps=100.0, alpha=1.0, gamma_min=0.0, time_unit_steps=50.0)
    assert float(a) == pytest.approx(1 / (1 + math.exp(0.5 * (250 - 100) / 50)))
    late = phi(torch.tensor([1e9]), decay=1.0, delay_steps=0.0, alpha=1.0, gamma_min=0.25)
    assert float(late) == 0.25  # float32's exp would overflow past 88
    assert float(phi(0.0, decay=1e-3, delay_steps=-1.0, alpha=0.1, gamma_min=0.0)) == pytest.approx(0.9083, abs=1e-3)


@PATHS
def test_a_huge_exponent_stops_the_step_without_nan(path):
    params = make_params(torch.float32)
    weight = params["linear"]
    optimizer = TVLARS([weight], decay=1e3, **path)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.isfinite(weight).all()
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.state[weight]["momentum_buffer"].zero_()
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("lr", -1.0),
        ("momentum", 0.0),
        ("decay", -1.0),
        ("delay_steps", -1.0),
        ("alpha", -0.1),
        ("gamma_min", -0.1),
        ("variant", "text"),
        ("time_unit_steps", 0.0),
        ("zero_norm", "none"),
    ],
)
def test_bad_keywords_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=rf"^TVLARS: {keyword} must .* got "):
        TVLARS([torch.nn.Parameter(torch.ones(2, 2))], **{keyword: value})


@pytest.mark.parametrize(
    ("variant", "keyword"),
    [
        *[(variant, keyword) for variant in ("released", "2023-07") for keyword in ("delay_steps", "gamma_min")],
        ("2023-08", "gamma_min"),
    ],
)
def test_the_code_refuses_what_it_does_not_have(variant, keyword):
    with pytest.raises(ValueError, match=f"TVLARS: {keyword} must be 0 with variant='{variant}', got 1"):
        TVLARS([torch.nn.Parameter(torch.ones(2, 2))], variant=variant, **{keyword: 1.0})
