"""The state of every layer-wise optimizer: checkpoints, copies, counters, missing gradients."""

import copy
import pickle

import pytest
import torch
from layerwise_cases import EVERY, PATHS, values
from optim_cases import STEPS, advance, difference, gradient, make_params, run
from torch import nn

from ssl_bench.optim import TVLARS


@EVERY
@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dict_round_trip_is_an_uninterrupted_run(make, path, dtype, tmp_path):
    expected = run(lambda p: make(p.values(), **path), dtype)
    first = make_params(dtype)
    optimizer = make(first.values(), **path)
    advance(optimizer, first, range(11))
    torch.save({"params": values(first), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = make_params(dtype)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(saved["params"][name])
    resumed = make(second.values(), **path)
    resumed.load_state_dict(saved["optimizer"])
    advance(resumed, second, range(11, STEPS))
    for name, value in values(second).items():
        assert torch.equal(value, expected[name]), name


def test_the_step_counter_survives_a_bf16_checkpoint():
    """257 is no bf16 number; a counter that is cast with the state would stand still there."""
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = TVLARS([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(257)
    other = TVLARS([p])
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert other.state[p]["step"].dtype == torch.float32
    assert float(other.state[p]["step"]) == 258


@EVERY
def test_deepcopy_and_pickle(make):
    params = make_params()
    optimizer = make(params.values())
    advance(optimizer, params, range(5))
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        names = list(params)
        ordered = sorted(
            params.values(), key=lambda p: [id(q) for g in optimizer.param_groups for q in g["params"]].index(id(p))
        )
        copies = dict(
            zip(
                [names[[id(q) for q in params.values()].index(id(p))] for p in ordered],
                [q for g in clone.param_groups for q in g["params"]],
                strict=True,
            )
        )
        for name, q in copies.items():
            q.grad = gradient(name, q.shape, 5)
        clone.step()
        for name, p in params.items():
            stays = isinstance(optimizer, TVLARS) and optimizer.defaults["zero_norm"] == "literal" and not p.any()
            assert torch.equal(copies[name], p) == stays


def test_none_gradients_are_skipped_whole():
    """No momentum decay, no counter, no decay of the weights."""
    params = make_params()
    optimizer = TVLARS(params.values(), lr=0.1, decay=0.3)
    advance(optimizer, params, range(3))
    before = values(params)
    buffer = optimizer.state[params["conv"]]["momentum_buffer"].clone()
    for name, p in params.items():
        p.grad = None if name == "conv" else gradient(name, p.shape, 3)
    optimizer.step()
    assert torch.equal(params["conv"], before["conv"])
    assert torch.equal(optimizer.state[params["conv"]]["momentum_buffer"], buffer)
    assert float(optimizer.state[params["conv"]]["step"]) == 3
    assert float(optimizer.state[params["linear"]]["step"]) == 4
    assert not torch.equal(params["linear"], before["linear"])


@EVERY
def test_counters_may_differ_within_a_group(make):
    """A tensor that joins late is treated as its own first step, whichever path."""

    def late(**path):
        params = make_params()
        optimizer = make(params.values(), **path)
        for k in range(8):
            for name, p in params.items():
                p.grad = None if name == "linear" and k < 5 else gradient(name, p.shape, k)
            optimizer.step()
        return values(params)

    loop = late(fused=False, foreach=False)
    assert difference(late(), loop) < 1e-13
    assert difference(late(fused=False), loop) < 1e-13
