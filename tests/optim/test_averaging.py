"""Averages of the weights against their formulas; training itself does not notice them."""

import copy

import pytest
import torch
from optim_cases import STEPS, advance, make_params

from ssl_bench.optim import LAMB, TVLARS, WeightAverage, has_evaluation_point, sgd

MAKERS = {
    "tvlars": lambda p: TVLARS(p.values(), lr=0.1, eta=0.02),
    "lamb": lambda p: LAMB(p.values(), lr=0.1),
    "sgd": lambda p: sgd(p.values(), lr=0.1),
}


def trajectory(make):
    """The weights after each step, without an average."""
    params = make_params()
    optimizer, seen = make(params), []
    for step in range(STEPS):
        advance(optimizer, params, [step])
        seen.append({name: p.detach().clone() for name, p in params.items()})
    return seen


def ema(seen, decay=0.9):
    average = seen[0]
    for weights in seen[1:]:
        average = {name: decay * average[name] + (1 - decay) * w for name, w in weights.items()}
    return average


def mean(seen):
    return {name: torch.stack([weights[name] for weights in seen]).mean(0) for name in seen[0]}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize(("kind", "formula"), [("ema", ema), ("mean", mean)])
@pytest.mark.parametrize("start", [0, 7])
def test_the_evaluation_point_is_the_average_and_training_goes_on_unchanged(make, kind, formula, start):
    seen = trajectory(make)
    params = make_params()
    optimizer = make(params)
    WeightAverage(optimizer, kind, decay=0.9, start=start)
    assert has_evaluation_point(optimizer)
    for step in range(STEPS):
        advance(optimizer, params, [step])
        for _ in range(2):  # twice is once
            optimizer.eval()
        expected = formula(seen[start : step + 1]) if step >= start else seen[step]
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), expected[name])
        optimizer.train()
        optimizer.train()
        for name, p in params.items():
            assert torch.equal(p, seen[step][name])


@pytest.mark.parametrize("kind", ["ema", "mean"])
@pytest.mark.parametrize("stop", [0, 3, 12])
def test_it_is_part_of_the_state(kind, stop):
    def start():
        params = make_params()
        optimizer = MAKERS["tvlars"](params)
        return params, optimizer, WeightAverage(optimizer, kind, decay=0.9, start=5)

    params, optimizer, whole = start()
    advance(optimizer, params, range(stop))
    again, resumed, average = start()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(params[name])
    resumed.load_state_dict(saved)
    for one, values in ((optimizer, params), (resumed, again)):
        advance(one, values, range(stop, STEPS))
    assert average.steps == whole.steps == STEPS
    assert all(torch.equal(a, b) for a, b in zip(average.average, whole.average, strict=True))


def test_misuse_is_refused():
    params = make_params()
    optimizer = MAKERS["sgd"](params)
    assert not has_evaluation_point(optimizer)
    WeightAverage(optimizer)
    with pytest.raises(ValueError, match="WeightAverage: optimizer must not average its weights itself, got SGD"):
        WeightAverage(optimizer)
    advance(optimizer, params, [0])
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) must follow optimizer.train\(\)"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"a step must follow optimizer.train\(\)"):
        advance(optimizer, params, [1])
    for keyword, value in (("kind", "median"), ("decay", 1.0), ("start", -1)):
        with pytest.raises(ValueError, match=rf"^WeightAverage: {keyword} must .* got "):
            WeightAverage(MAKERS["sgd"](make_params()), **{keyword: value})
