"""Parameter groups cover a module exactly once, with the settings that were asked for."""

import pytest
import torch
from torch import nn

from ssl_bench.optim import LARS, OPTIMIZERS, build_groups, check_cover
from ssl_bench.optim.groups import hold_frozen


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def table(groups):
    """name -> (lr, weight_decay, adapt)"""
    return {n: (g["lr"], g["weight_decay"], g["adapt"]) for g in groups for n in g["param_names"]}


def test_1d_tensors_have_neither_decay_nor_adaptation_by_default():
    groups = build_groups(net(), lr=2.0, weight_decay=0.1)
    assert table(groups) == {
        "0.weight": (2.0, 0.1, True),
        "3.weight": (2.0, 0.1, True),
        **dict.fromkeys(("0.bias", "1.weight", "1.bias", "3.bias"), (2.0, 0.0, False)),
    }


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"decay_1d": True}, (2.0, 0.1, False)),
        ({"adapt_1d": True}, (2.0, 0.0, True)),
        ({"decay_1d": True, "adapt_1d": True}, (2.0, 0.1, True)),
        ({"lr_1d": 0.5}, (0.5, 0.0, False)),
        ({"lr_1d": 0.0}, (0.0, 0.0, False)),
    ],
)
def test_1d_settings(keywords, expected):
    found = table(build_groups(net(), lr=2.0, weight_decay=0.1, **keywords))
    assert found["1.bias"] == expected
    assert found["0.weight"] == (2.0, 0.1, True)


def test_filters_by_pattern_and_by_function():
    found = table(build_groups(net(), lr=2.0, weight_decay=0.1, exclude=["3.*"]))
    assert found["3.weight"] == (2.0, 0.0, False)
    found = table(build_groups(net(), lr=2.0, weight_decay=0.1, exclude_decay=["0.weight"]))
    assert (found["0.weight"], found["3.weight"]) == ((2.0, 0.0, True), (2.0, 0.1, True))
    found = table(build_groups(net(), lr=2.0, weight_decay=0.1, exclude_adapt=lambda _, p: p.ndim == 4))
    assert (found["0.weight"], found["3.weight"]) == ((2.0, 0.1, False), (2.0, 0.1, True))


def test_frozen_and_tied_parameters():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    assert list(table(build_groups(module, lr=1.0, weight_decay=0.0))) == ["a.weight", "b.bias"]


def test_cover_is_checked():
    module = net()
    groups = build_groups(module, lr=1.0, weight_decay=0.1)
    check_cover(module, groups)
    with pytest.raises(ValueError, match=r"every trainable parameter, got none with '0\.bias' \(4 in all\)"):
        check_cover(module, groups[:1])
    with pytest.raises(ValueError, match=r"each parameter once, got '0\.weight' more than once"):
        check_cover(module, [*groups, groups[0]])
    with pytest.raises(ValueError, match="only trainable parameters of the module, got another"):
        check_cover(module, [*groups, {"params": [nn.Parameter(torch.ones(1))]}])


@pytest.mark.parametrize("name", ["lr", "weight_decay", "lr_1d"])
def test_negative_values_are_refused(name):
    with pytest.raises(ValueError, match=f"build_groups: {name} must be a number in \\[0, inf\\), got -1"):
        build_groups(net(), **{"lr": 1.0, "weight_decay": 0.0, name: -1.0})


def test_a_pattern_without_a_match_and_a_module_without_parameters_are_refused():
    with pytest.raises(ValueError, match=r"must match a parameter name \(such as '0\.weight'\), got 'bn\*'"):
        build_groups(net(), lr=1.0, weight_decay=0.0, exclude=["bn*"])
    with pytest.raises(ValueError, match="module must have trainable parameters, got a ReLU without"):
        build_groups(nn.ReLU(), lr=1.0, weight_decay=0.0)


def test_every_optimizer_takes_the_groups_as_they_are():
    for name, make in OPTIMIZERS.items():
        module = net()
        groups = build_groups(module, lr=0.25, weight_decay=0.1, lr_1d=0.5, adapt_1d=True)
        optimizer = make(groups, lr=1.0, **({"name": "lion"} if name == "timm" else {}))
        if name.startswith("clars"):
            optimizer.micro_gradients = lambda _step, read: read()
        check_cover(module, optimizer.param_groups)
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.1), (0.5, 0.0)]
        module(torch.randn(2, 3, 3, 3)).sum().backward()
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        for a, b in zip(before, module.parameters(), strict=True):
            # Algorithm 1 leaves a tensor that starts at zero where it is.
            assert torch.equal(a, b) == (name == "tvlars" and not a.any()) or b.grad.norm() <= 0.1


def test_lars_groups_of_a_module_are_those_of_its_parameters():
    module = net()
    built = LARS(build_groups(module, lr=1.0, weight_decay=0.1), lr=1.0).param_groups
    plain = LARS(module.parameters(), lr=1.0, weight_decay=0.1).param_groups
    for a, b in zip(built, plain, strict=True):
        assert (a["adapt"], a["weight_decay"]) == (b["adapt"], b["weight_decay"])
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]


@pytest.mark.parametrize("make", [LARS, torch.optim.AdamW])
def test_frozen_layers_do_not_move_and_then_train_as_if_they_had_just_begun(make):
    torch.manual_seed(0)
    module = net()
    groups = build_groups(module, lr=0.1, weight_decay=0.1, freeze=["3.*"], freeze_steps=3)
    assert {n for g in groups if "frozen_steps" in g for n in g["param_names"]} == {"3.weight", "3.bias"}
    optimizer = make(groups, lr=0.1)
    hold_frozen(optimizer)
    fresh = make(build_groups(module[3], lr=0.1, weight_decay=0.1), lr=0.1)
    start = [p.detach().clone() for p in module.parameters()]
    x = torch.randn(4, 3, 3, 3)
    for step in range(5):
        if step == 4:  # resumed from a checkpoint
            saved = optimizer.state_dict()
            optimizer = make(build_groups(module, lr=0.1, weight_decay=0.1, freeze=["3.*"], freeze_steps=3), lr=0.1)
            optimizer.load_state_dict(saved)
            hold_frozen(optimizer)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        before = [p.detach().clone() for p in module[3].parameters()]
        if step >= 3:  # what an optimizer that starts now makes of the same gradients
            fresh.step()
            expected = [p.detach().clone() for p in module[3].parameters()]
            for p, old in zip(module[3].parameters(), before, strict=True):
                p.data.copy_(old)
        optimizer.step()
        for i, p in enumerate(module[3].parameters()):
            torch.testing.assert_close(p.detach(), expected[i] if step >= 3 else start[4 + i])
        assert not torch.equal(module[0].weight, start[0])


def test_nothing_is_frozen_for_no_steps():
    groups = build_groups(net(), lr=0.1, weight_decay=0.1, freeze=["3.*"])
    assert not any("frozen_steps" in group for group in groups)
    with pytest.raises(ValueError, match="a pattern must match a parameter name"):
        build_groups(net(), lr=0.1, weight_decay=0.1, freeze=["head.*"], freeze_steps=3)
