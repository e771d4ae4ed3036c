"""The parameter groups of every layer-wise optimizer, and the parameters that it refuses."""

import pytest
import torch
from layerwise_cases import EVERY, values
from optim_cases import advance, gradient, make_params
from torch import nn

from ssl_bench.optim import LAMB, LARS, TVLARS


@EVERY
def test_settings_hold_per_group(make):
    """Groups with their own lr and weight decay are independent optimizers."""
    params = make_params()
    own = {"conv": {"lr": 0.3, "weight_decay": 0.2}, "linear": {"lr": 0.05, "weight_decay": 0.0}}
    together = make([{"params": [params[n]], **k} for n, k in own.items()])
    for k in range(6):
        for name in own:
            params[name].grad = gradient(name, params[name].shape, k)
        together.step()
    for name, keywords in own.items():
        alone = make_params()[name]
        optimizer = make([{"params": [alone], **keywords}])
        for k in range(6):
            alone.grad = gradient(name, alone.shape, k)
            optimizer.step()
        assert torch.equal(alone, params[name])


def test_eta_and_lambda_per_group():
    a, b = (nn.Parameter(torch.ones(2, 2)) for _ in "ab")
    optimizer = TVLARS(
        [{"params": [a], "eta": 0.1, "decay": 0.0}, {"params": [b], "eta": 0.2, "decay": 5.0, "delay_steps": 1.0}],
        weight_decay=0.0,
    )
    for p in (a, b):
        p.grad = torch.ones(2, 2)
    optimizer.step()
    step = 1.9  # Nesterov's first step: gamma (1 + mu)
    torch.testing.assert_close(1 - a.detach(), torch.full((2, 2), step * 0.1 * 0.5))
    phi = 1 / (1 + torch.tensor(-5.0).exp())
    torch.testing.assert_close(1 - b.detach(), (step * 0.2 * phi).expand(2, 2))


@EVERY
def test_add_param_group_later(make):
    params = make_params()
    optimizer = make([params["conv"]])
    advance(optimizer, {"conv": params["conv"]}, range(3))
    optimizer.add_param_group({"params": [params["linear"], params["conv.bias"]], "lr": 0.2})
    before = values(params)
    advance(optimizer, {n: params[n] for n in ("conv", "linear", "conv.bias")}, range(3, 5))
    assert all(not torch.equal(params[n], before[n]) for n in ("conv", "linear", "conv.bias"))


def test_plain_parameters_leave_1d_tensors_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for make in (LARS, LAMB):
        weights, others = make(module.parameters(), lr=0.1, weight_decay=0.01).param_groups
        assert all(p.ndim > 1 for p in weights["params"])
        assert all(p.ndim <= 1 for p in others["params"])
        assert (weights["adapt"], weights["weight_decay"]) == (True, 0.01)
        assert (others["adapt"], others["weight_decay"]) == (False, 0.0)
        (all_in_one,) = make(module.parameters(), lr=0.1, decay_1d=True, adapt_1d=True).param_groups
        assert all_in_one["adapt"]
        decayed = make(module.parameters(), lr=0.1, weight_decay=0.01, decay_1d=True).param_groups[1]
        assert (decayed["adapt"], decayed["weight_decay"]) == (False, 0.01)


def test_0d_tensors_are_left_out_and_1_1_c_tensors_are_not():
    params = make_params()
    weights, others = LARS(params.values(), lr=0.1).param_groups
    assert any(p is params["scalar"] for p in others["params"])
    assert any(p is params["per_channel"] for p in weights["params"])


def test_a_group_that_speaks_for_itself_is_not_split():
    params = make_params()
    (group,) = LARS([{"params": params.values(), "adapt": True, "weight_decay": 0.1}], lr=0.1).param_groups
    assert len(group["params"]) == len(params)


def test_names_follow_the_parameters():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for named in (
        module.named_parameters(),
        [{"params": [*module.parameters()], "param_names": [n for n, _ in module.named_parameters()]}],
    ):
        groups = LARS(named, lr=0.1).param_groups
        assert [g["param_names"] for g in groups] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]


def test_tied_parameters_are_stepped_once():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    optimizer = LARS(module.parameters(), lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 1
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert module[1].weight is module[0].weight


# ------------------------------------------------------------------------------------------------------------ refusals


@EVERY
def test_sparse_gradients_are_refused(make):
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2), check_invariants=True)
    with pytest.raises(ValueError, match=r"gradients must be dense, got layout torch\.sparse_coo"):
        make([p]).step()


@EVERY
def test_duplicate_parameters_are_refused(make):
    p = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match="params must hold each parameter once, got"):
        make([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}])


@EVERY
@pytest.mark.parametrize("dtype", [torch.complex64])
def test_complex_parameters_are_refused(make, dtype):
    with pytest.raises(ValueError, match=r"must be real floating-point tensors, got torch\.complex64"):
        make([nn.Parameter(torch.ones(3, 2, dtype=dtype))])


@EVERY
def test_sharded_parameters_are_refused(make):
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # no threads, no network
    try:
        p = nn.Parameter(distribute_tensor(torch.ones(4, 2), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
        with pytest.raises(ValueError, match=r"params must be whole .* is sharded: its local norm is not the layer's"):
            make([p])
    finally:
        dist.destroy_process_group()
    flat = nn.Parameter(torch.ones(4))
    flat._fsdp_flattened = True  # what FSDP marks the original parameters with
    with pytest.raises(ValueError, match="is sharded"):
        make([flat])
