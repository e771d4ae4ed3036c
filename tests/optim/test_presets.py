"""What a recipe's protocol and configuration files make of an optimizer, against the formulas that they claim."""

import math
from collections import OrderedDict

import pytest
import pytorch_optimizer
import timm.optim
import torch
import torch_optimizer
from optim_cases import difference, make_params, reference, run
from torch import nn

from ssl_bench.recipe.compose import compose
from ssl_bench.training import build

MU, BETA, ETA = 0.9, 5e-4, 1e-3


def from_recipe(track, *overrides):
    """Makes the optimizer of a command line on the tests' parameters."""

    def make(params):
        module = nn.Module()
        for name, param in params.items():
            module.register_parameter(name.replace(".", "_"), param)
        recipe = compose(track, [*overrides, "batch_size=100"])
        return build.optimizer(recipe, module, build.plan(recipe, 1000))[0]

    return make


def flash_lars(w, g, state, lr, step):  # noqa: ARG001 - a rule's signature
    """Lightning Flash's LARS: ratio and decay only where both norms are not zero; no tensor is excluded."""
    d = g
    if w.norm() != 0 and g.norm() != 0:
        d = (g + BETA * w) * ETA * w.norm() / (g.norm() + BETA * w.norm() + 1e-8)
    state["b"] = MU * state.get("b", 0) + d
    return w - lr * state["b"]


def jettify_lamb(w, g, state, lr, step):  # noqa: ARG001
    """jettify/pytorch-optimizer's LAMB: no bias correction, |w| at most 10, ratio 1 where a norm is zero."""
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    u = state["m"] / (state["v"].sqrt() + 1e-6) + BETA * w
    w_norm, u_norm = w.norm().clamp(0, 10), u.norm()
    return w - lr * (1.0 if w_norm == 0 or u_norm == 0 else w_norm / u_norm) * u


@pytest.mark.parametrize("track", ["pretrain", "classify"])
def test_the_papers_lars_is_lightning_flashs(track):
    ours = run(from_recipe(track, "protocol=paper", "optimizer=lars"))
    assert difference(ours, reference(flash_lars)) < 1e-12
    keywords = {"momentum": MU, "weight_decay": BETA, "trust_coefficient": ETA}
    theirs = run(lambda p: torch_optimizer.LARS(p.values(), 1.0, **keywords))  # from the same source
    assert difference(ours, theirs) < 1e-12
    assert difference(ours, run(from_recipe(track, "protocol=fair", "optimizer=lars"))) > 1e-3


@pytest.mark.parametrize("track", ["pretrain", "classify"])
def test_the_papers_lamb_is_jettifys(track):
    ours = run(from_recipe(track, "protocol=paper", "optimizer=lamb"))
    assert difference(ours, reference(jettify_lamb)) < 1e-12
    assert difference(ours, run(lambda p: torch_optimizer.Lamb(p.values(), 1.0, weight_decay=BETA))) < 1e-12


def test_the_papers_tvlars_is_algorithm_1():
    def algorithm_1(w, g, state, lr, step):
        phi = 1 / (1 + math.exp(1e-4 * (step - 10 * 10)))  # 1,000 images in batches of 100
        d_norm = (g + BETA * w).norm()
        m = state.get("m", w)
        state["m"] = w - (lr * ETA * phi * w.norm() / d_norm if d_norm > 0 else 0.0) * g
        return state["m"] + MU * (state["m"] - m)

    assert (
        difference(run(from_recipe("classify", "protocol=paper", "optimizer=tvlars")), reference(algorithm_1)) < 1e-12
    )


@pytest.mark.parametrize("protocol", ["paper", "released"])
@pytest.mark.parametrize(
    ("variant", "clamp", "phi"),
    [
        ("2023-08", 10, lambda t: 1.0 if t < 10 * 10 else (0.1 + math.exp(1e-3 * (t + 1))) ** -1),
        ("2023-07", math.inf, lambda t: math.exp(-1e-3 * (t + 1))),
    ],
)
def test_the_code_of_the_preprints_time_by_its_name(protocol, variant, clamp, phi):
    def rule(w, g, state, lr, step):
        d = g
        if w.ndim > 1:
            d = g + BETA * w
            w_norm, d_norm = min(w.norm(), clamp), min(d.norm(), clamp)
            d = d * (ETA * phi(step) * w_norm / d_norm if w_norm > 0 and d_norm > 0 else 1.0)
        state["b"] = MU * state.get("b", 0) + d
        return w - lr * state["b"]

    make = from_recipe("classify", f"protocol={protocol}", "optimizer=tvlars", f"optimizer.variant={variant}")
    expected = reference(rule, steps=120)
    assert difference(run(make, steps=120), expected) < 1e-12
    assert torch.isfinite(expected["linear"]).all()
    assert len(make_params()) == len(expected)


def larc(w, g, state, lr, step):  # noqa: ARG001
    """NVIDIA apex's LARC around momentum SGD: min(0.02 |w| / (|g| + beta |w| + 1e-8) / lr, 1) times lr."""
    d = g
    if w.norm() != 0 and g.norm() != 0:
        rate = 0.02 * w.norm() / (g.norm() + BETA * w.norm() + 1e-8)
        d = (g + BETA * w) * min(rate / lr, 1)
    state["b"] = MU * state.get("b", 0) + d
    return w - lr * state["b"]


def test_larc_is_apexs():
    everywhere = ("param_groups.decay_1d=true", "param_groups.adapt_1d=true", "param_groups.lr_1d=null")
    ours = run(from_recipe("classify", "optimizer=larc", *everywhere))
    assert difference(ours, reference(larc)) < 1e-12


def grouped(params, **matrices):
    """The parameters as protocol=fair has them, for an optimizer that is made without the suite."""
    return [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": 0.1, **matrices},
        {"params": [p for p in params.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("muon", lambda p: timm.optim.Muon(grouped(p), lr=1.0, momentum=0.95, nesterov=True)),
        ("soap", lambda p: pytorch_optimizer.SOAP(grouped(p), lr=1.0)),
        ("nesterov", lambda p: torch.optim.SGD(grouped(p), lr=1.0, momentum=0.9, nesterov=True)),
        ("adamw", lambda p: torch.optim.AdamW(grouped(p), lr=1.0)),
    ],
)
def test_comparators_are_their_librarys_with_1d_tensors_in_a_group_of_their_own(name, theirs):
    dtype = torch.float32  # SOAP's eigenvectors are float32
    ours = run(from_recipe("classify", f"optimizer={name}", "optimizer.weight_decay=0.1"), dtype)
    assert difference(ours, run(theirs, dtype)) < 1e-5


def test_muon_orthogonalises_matrices_and_moves_the_others_by_adamw_at_their_own_lr():
    made = from_recipe("classify", "optimizer=muon", "optimizer.lr=0.1", "param_groups.lr_1d=0.01")
    module = {"matrix": nn.Parameter(torch.randn(4, 6)), "bias": nn.Parameter(torch.zeros(4))}
    optimizer = made(module)
    before = module["matrix"].detach().clone()
    for param in module.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    step = module["matrix"].detach() - before * (1 - 0.1 * 0.05)
    singular = torch.linalg.svdvals(step) / torch.linalg.svdvals(step).max()
    assert singular.min() > 0.5  # Newton-Schulz brings them all near one value
    # NAdamW's first step is (1 + beta1) lr.
    torch.testing.assert_close(module["bias"].detach().abs(), torch.full((4,), 1.9 * 0.01), rtol=1e-3, atol=0)


def test_a_recipe_freezes_the_layers_that_it_names_in_steps_of_its_epochs():
    recipe = compose("classify", ["batch_size=100", "param_groups.freeze=[head.*]", "param_groups.freeze_epochs=2.5"])
    module = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    optimizer, _ = build.optimizer(recipe, module, build.plan(recipe, 1000))
    frozen = {name: group["frozen_steps"] for group in optimizer.param_groups if "frozen_steps" in group
              for name in group["param_names"]}  # fmt: skip
    assert frozen == {"head.weight": 25, "head.bias": 25}
    head, body = module.head.weight.detach().clone(), module.body.weight.detach().clone()
    for step in range(26):
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(module.head.weight, head) == (step < 25)
    assert not torch.equal(module.body.weight, body)


def test_gradual_warmup_knows_the_batch_size():
    words = ["schedule=gradual_warmup", "scaling.rule=linear", "optimizer=nesterov", "optimizer.lr=0.1"]
    recipe = compose("classify", [*words, "batch_size=1024", "epochs=90", "model.init=timm"])
    module = nn.Linear(2, 2)
    optimizer, schedule = build.optimizer(recipe, module, build.plan(recipe, 10240))
    assert optimizer.param_groups[0]["initial_lr"] * schedule(0) == pytest.approx(0.1)  # the base batch's
    assert optimizer.param_groups[0]["initial_lr"] * schedule(50) == pytest.approx(0.4)
    assert [round(schedule(k), 6) for k in (299, 300, 600, 800)] == [1, 0.1, 0.01, 0.001]
