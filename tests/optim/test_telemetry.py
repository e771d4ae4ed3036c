"""Telemetry's rows against the definitions of their columns."""

import math

import pytest
import torch
from optim_cases import advance, difference, gradient, make_params
from torch import nn

from ssl_bench.optim import LAMB, LARS, OPTIMIZERS, TVLARS, Telemetry, adamw, build_groups, sgd
from ssl_bench.optim.telemetry import VALUES

BETA, LR = 0.05, 0.1
PATHS = pytest.mark.parametrize("path", [{}, {"fused": False}], ids=["fused", "foreach"])


def named(params):
    return list(params.items())


def rows(telemetry):
    """(step, layer) -> {column: number}"""
    c = telemetry.columns()
    n = len(c["step"])
    assert all(len(c[key]) == n for key in c)
    return {(c["step"][i], c["layer"][i]): {key: float(c[key][i]) for key in VALUES} for i in range(n)}


def one_step(make, params=None):
    """One recorded step on the known gradients; (row of each layer, w before, w after)."""
    params = make_params() if params is None else params
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = make(named(params))
    telemetry = Telemetry(optimizer)
    advance(optimizer, params, [0], lr=lambda _: LR)
    found = rows(telemetry)
    return {n: found[0, n] for n in params}, before, {n: p.detach() for n, p in params.items()}


MAKERS = {
    "lars": lambda p, **k: LARS(p, lr=LR, weight_decay=BETA, **k),
    "lars_nesterov": lambda p, **k: LARS(p, lr=LR, weight_decay=BETA, nesterov=True, **k),
    "lars_inside_sum": lambda p, **k: LARS(
        p, lr=LR, weight_decay=BETA, lr_in_buffer=True, denominator="sum_of_norms", **k
    ),
    "lars_without_momentum": lambda p, **k: LARS(p, lr=LR, weight_decay=BETA, momentum=0.0, **k),
    "tvlars": lambda p, **k: TVLARS(p, lr=LR, weight_decay=BETA, decay=0.3, delay_steps=2.0, **k),
    "tvlars_released": lambda p, **k: TVLARS(p, lr=LR, weight_decay=BETA, decay=0.3, variant="released", **k),
    "lamb": lambda p, **k: LAMB(p, lr=LR, weight_decay=BETA, **k),
    "sgd": lambda p: sgd(p, lr=LR, weight_decay=BETA),
    "adamw": lambda p: adamw(p, lr=LR),
    "timm": lambda p: OPTIMIZERS["timm"](p, name="lars", lr=LR, weight_decay=BETA),
}


PLAIN = ("sgd", "adamw", "timm")  # not ours: they have no paths


@pytest.mark.parametrize(
    ("name", "path"), [(n, {}) for n in MAKERS] + [(n, {"fused": False}) for n in MAKERS if n not in PLAIN]
)
def test_norms_and_steps_of_every_optimizer(name, path):
    found, before, after = one_step(lambda p: MAKERS[name](p, **path))
    for layer, row in found.items():
        w, g = before[layer], gradient(layer, before[layer].shape, 0)
        assert row["weight_norm"] == pytest.approx(float(w.norm()), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-5)
        if w.norm() > 0:
            assert row["relative_step"] == pytest.approx(float((after[layer] - w).norm() / w.norm()), rel=1e-4)
        else:  # x / 0, or 0 / 0 where Algorithm 1 leaves a zero tensor where it is
            assert math.isnan(row["relative_step"]) if name == "tvlars" else math.isinf(row["relative_step"])
        assert math.isnan(row["phi"]) == (not name.startswith("tvlars"))
        if name in PLAIN:
            assert math.isnan(row["ratio"])
            assert math.isnan(row["raw_ratio"])
            assert row["lr"] == pytest.approx(LR)


@PATHS
def test_lars_ratios(path):
    found, before, _ = one_step(lambda p: MAKERS["lars"](p, **path))
    for layer, row in found.items():
        w, g = before[layer], gradient(layer, before[layer].shape, 0)
        d = g + BETA * w if w.ndim > 1 else g
        assert row["update_norm"] == pytest.approx(float(d.norm()), rel=1e-5)
        if w.ndim <= 1:
            assert math.isnan(row["ratio"])
            assert row["lr"] == pytest.approx(LR)
            assert row["zero_norm"] == 0
        elif layer == "zero":
            assert (row["ratio"], row["zero_norm"]) == (1.0, 1.0)
        else:
            assert row["raw_ratio"] == pytest.approx(float(w.norm() / d.norm()), rel=1e-5)
            assert row["ratio"] == pytest.approx(1e-3 * row["raw_ratio"], rel=1e-5)
            assert row["lr"] == pytest.approx(LR * row["ratio"], rel=1e-5)
            assert row["zero_norm"] == 0


@PATHS
@pytest.mark.parametrize(
    ("name", "phi"), [("tvlars", 1 / (1 + math.exp(-0.6))), ("tvlars_released", 1 / (0.1 + math.exp(0.3)))]
)
def test_tvlars_phi(path, name, phi):
    found, _, _ = one_step(lambda p: MAKERS[name](p, **path))
    assert found["conv"]["phi"] == pytest.approx(phi, rel=1e-5)
    assert found["conv"]["ratio"] == pytest.approx(1e-3 * phi * found["conv"]["raw_ratio"], rel=1e-5)


@PATHS
def test_lamb_ratio_is_of_its_update(path):
    found, before, after = one_step(lambda p: MAKERS["lamb"](p, **path))
    row = found["conv"]
    assert row["ratio"] == pytest.approx(row["weight_norm"] / row["update_norm"], rel=1e-5)
    assert float((after["conv"] - before["conv"]).norm()) == pytest.approx(row["lr"] * row["update_norm"], rel=1e-5)


def test_the_applied_ratio_shows_the_clip():
    found, _, _ = one_step(lambda p: LARS(p, lr=LR, eta=100.0, weight_decay=BETA, clip=True))
    assert found["conv"]["ratio"] == 1.0
    assert found["conv"]["raw_ratio"] != 1.0


@pytest.mark.parametrize("name", MAKERS)
def test_recording_does_not_change_the_run(name):
    results = []
    for every in (0, 1):
        params = make_params(torch.float32)
        optimizer = MAKERS[name](named(params))
        Telemetry(optimizer, every)
        advance(optimizer, params, range(6))
        results.append({n: p.detach() for n, p in params.items()})
    assert difference(*results) == 0


def test_every_nth_step_and_flush_in_blocks():
    params = make_params()
    optimizer = LARS(named(params), lr=LR)
    telemetry = Telemetry(optimizer, 3)
    advance(optimizer, params, range(4))
    assert {step for step, _ in rows(telemetry)} == {0, 3}
    assert rows(telemetry) == {}
    advance(optimizer, params, range(4, 8))
    found = rows(telemetry)
    assert {step for step, _ in found} == {6}
    assert {layer for _, layer in found} == set(params)
    telemetry.close()
    advance(optimizer, params, range(8, 12))
    assert rows(telemetry) == {}


def test_a_resumed_run_goes_on_counting():
    params = make_params()
    optimizer = LARS(named(params), lr=LR)
    telemetry = Telemetry(optimizer, 4, first_step=7)
    advance(optimizer, params, range(7, 13))
    assert {step for step, _ in rows(telemetry)} == {8, 12}


def test_off_leaves_no_hooks():
    optimizer = LARS([nn.Parameter(torch.ones(2, 2))], lr=LR)
    telemetry = Telemetry(optimizer, 0)
    assert not optimizer._optimizer_step_pre_hooks
    assert telemetry.columns()["step"] == []


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_step_that_the_scaler_skips_leaves_no_row(name):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MAKERS[name]([("w", p)])
    telemetry = Telemetry(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(3):
        optimizer.zero_grad()
        scaler.scale(p.sum()).backward()
        if k == 1:
            p.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    found = rows(telemetry)
    assert [step for step, _ in found] == [0, 1]
    assert all(row["grad_norm"] == 2.0 for row in found.values())  # unscaled


def test_names_of_groups_and_of_bare_parameters():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for optimizer, expected in (
        (LARS(build_groups(module, lr=LR, weight_decay=0.0), lr=LR), ["0.weight", "1.weight", "0.bias", "1.bias"]),
        (LARS(module.parameters(), lr=LR), ["0.0", "0.1", "1.0", "1.1"]),
    ):
        telemetry = Telemetry(optimizer)
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert telemetry.columns()["layer"] == expected


def test_a_parameter_without_a_gradient_has_no_row():
    params = make_params()
    optimizer = LARS(named(params), lr=LR)
    telemetry = Telemetry(optimizer)
    params["conv"].grad = torch.ones_like(params["conv"])
    optimizer.step()
    assert telemetry.columns()["layer"] == ["conv"]


def test_negative_every_is_refused():
    with pytest.raises(ValueError, match=r"Telemetry: every must be an integer >= 0 \(0 turns it off\), got -1"):
        Telemetry(LARS([nn.Parameter(torch.ones(2, 2))], lr=LR), -1)
