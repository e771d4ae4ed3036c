"""timm's optimizers by name are what timm's factory makes, and the record says with which values."""

import json
import re

import pytest
import timm.optim
import torch
from optim_cases import difference, run

from ssl_bench.optim import timm_optimizer
from ssl_bench.recipe import registry
from ssl_bench.recipe.compose import build, compose

NAMES = [str(name) for name in timm.optim.list_optimizers()]
ELSEWHERE = {name for name in NAMES if name.startswith(("bnb", "fused"))} | {"adahessian"}


def make(**keywords):
    return timm_optimizer([torch.nn.Parameter(torch.ones(2, 2))], **({"lr": 1.0} | keywords))


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")  # kron
@pytest.mark.parametrize("name", sorted(set(NAMES) - ELSEWHERE))
def test_every_name_has_the_factorys_settings_and_the_record_shows_them(name):
    theirs = timm.optim.create_optimizer_v2([torch.nn.Parameter(torch.ones(2, 2))], name, lr=0.1)
    recorded = registry.check("optimizer", "timm", {"name": name, "lr": 0.1})
    recorded = json.loads(json.dumps(recorded))
    ours = make(**recorded)
    assert type(ours) is type(theirs)
    assert {**ours.param_groups[0], "params": []} == {**theirs.param_groups[0], "params": []}
    for key, value in recorded.items():
        if key in theirs.param_groups[0] and value is not None:  # None is left for the optimizer to work out
            assert json.loads(json.dumps(theirs.param_groups[0][key])) == value
    assert registry.check("optimizer", "timm", recorded) == registry.check(
        "optimizer", "timm", {"name": name, "lr": 0.1}
    )


@pytest.mark.parametrize("name", ["lars", "larc", "momentum", "sgdp", "rmsprop"])
def test_momentum_is_the_factorys_and_not_the_classs(name):
    assert make(name=name).param_groups[0]["momentum"] == 0.9
    assert make(name=name, momentum=0.5).param_groups[0]["momentum"] == 0.5
    assert registry.check("optimizer", "timm", {"name": name, "lr": 1.0})["momentum"] == 0.9


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("lion", {"betas": (0.8, 0.9)}),
        ("lars", {"momentum": 0.7}),
        ("adopt", {"eps": 1e-4}),
        ("lars", {"trust_coeff": 0.02}),  # a keyword that only some have
        ("larc", {"nesterov": True}),
        ("adan", {"betas": (0.98, 0.92, 0.99)}),
    ],
)
def test_steps_are_the_factorys(name, keywords):
    theirs = run(lambda p: timm.optim.create_optimizer_v2(p.values(), name, lr=1.0, weight_decay=0.1, **keywords))
    assert difference(run(lambda p: timm_optimizer(p.values(), name, 1.0, 0.1, **keywords)), theirs) == 0


def test_a_recipe_keeps_them():
    recipe = compose("pretrain", ["optimizer=timm", "optimizer.name=larc", "optimizer.lr=1", "optimizer.eps=1e-7"])
    options = recipe.optimizer.options
    assert (options["momentum"], options["eps"], options["trust_clip"], options["trust_coeff"]) == (
        0.9,
        1e-7,
        True,
        1e-3,
    )
    assert build("pretrain", recipe.to_dict()).identity() == recipe.identity()
    same = compose("pretrain", ["optimizer=timm", "optimizer.name=larc", "optimizer.lr=1", "optimizer.eps=1e-7",
                                "optimizer.momentum=0.9"])  # fmt: skip
    assert same.identity() == recipe.identity()


def test_an_unknown_timm_name_suggests_the_nearest_and_lists_the_known():
    wanted = r"timm_optimizer: unknown optimizer 'lmab'; did you mean 'lamb'\? \(known: .*sgd"
    with pytest.raises(ValueError, match=wanted):
        make(name="lmab")
    with pytest.raises(ValueError, match=wanted):
        compose("pretrain", ["optimizer=timm", "optimizer.name=lmab", "optimizer.lr=1"])


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
@pytest.mark.skipif(torch.cuda.is_available(), reason="apex and bitsandbytes may be here")
def test_what_cannot_be_made_here_is_refused_in_one_line(name):
    refused = r"^(timm_optimizer.*cannot be created here|optimizer\.name must be a first-order optimizer)"
    with pytest.raises(ValueError, match=refused) as caught:
        registry.check("optimizer", "timm", {"name": name, "lr": 1.0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "adamw", "momentum": 0.9}, r"[adamw]: momentum must be None, got 0.9"),
        ({"name": "sgd", "betas": (0.9, 0.9)}, r"[sgd]: betas must be None, got"),
        ({"name": "sgd", "trust_coeff": 1.0}, r"[sgd]: trust_coeff must be None, got 1.0 (sgd has no"),
        ({"name": "adan", "betas": (0.9, 0.9)}, r"[adan]: betas must be 3 numbers in [0, 1), got"),
        ({"name": "adahessian"}, ": name must be a first-order optimizer, got 'adahessian'"),
        ({"name": "sgd", "lr": -1.0}, r"[sgd]: lr must be a number in [0, inf), got -1"),
        ({"name": "muon", "conv_mode": "x"}, r"[muon]: cannot be created here: Invalid conv_mode: x"),
    ],
)
def test_bad_timm_keywords(keywords, message):
    message = f"timm_optimizer{message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**keywords)
    in_recipes = re.sub(r"^.*: (?=\w+ must be)", "optimizer.", message)
    with pytest.raises(ValueError, match=re.escape(in_recipes)):
        registry.check("optimizer", "timm", {"lr": 1.0, **keywords})
