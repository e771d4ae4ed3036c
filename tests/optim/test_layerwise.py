"""What every layer-wise optimizer must bear: the corner cases that others were bitten by."""

import copy
import pickle

import pytest
import torch
from optim_cases import STEPS, advance, difference, gradient, lr_at, make_params, run
from torch import nn

from ssl_bench.optim import LAMB, LAMBC, LARS, TVLARS
from ssl_bench.optim.layerwise import is_dense

ALL = {
    "lars": lambda p, **k: LARS(p, lr=0.1, weight_decay=0.05, **k),
    "lars_sum_of_norms": lambda p, **k: LARS(p, lr=0.1, denominator="sum_of_norms", zero_norm="skip", eps=1e-8, **k),
    "lars_inside_nesterov": lambda p, **k: LARS(p, lr=0.1, lr_in_buffer=True, nesterov=True, clip=True, **k),
    "lamb": lambda p, **k: LAMB(p, lr=0.1, weight_decay=0.05, **k),
    "lambc": lambda p, **k: LAMBC(p, lr=0.1, bias_correction=False, **k),
    "tvlars": lambda p, **k: TVLARS(p, lr=0.1, eta=0.02, decay=0.3, delay_steps=6, **k),
    "tvlars_released": lambda p, **k: TVLARS(p, lr=0.1, eta=0.02, decay=0.3, variant="released", **k),
}
EVERY = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
PATHS = pytest.mark.parametrize(
    "path", [{}, {"fused": False}, {"fused": False, "foreach": False}], ids=["fused", "foreach", "loop"]
)


def values(params):
    return {name: p.detach().clone() for name, p in params.items()}


# ------------------------------------------------------------------------------------------------- paths and numerics


@EVERY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0)])
def test_paths_agree_with_the_per_tensor_loop(make, dtype, tolerance):
    loop, foreach, chosen = (
        run(lambda p, k=k: make(p.values(), **k), dtype)
        for k in ({"fused": False, "foreach": False}, {"fused": False}, {})
    )
    assert difference(foreach, loop) <= tolerance
    assert difference(chosen, loop) <= tolerance


@EVERY
def test_paths_agree_on_tensors_larger_than_a_block(make, monkeypatch):
    """Blocks of 7 elements and chunks of 20, so that every tensor is cut and chunks are mixed."""
    loop = run(lambda p: make(p.values(), fused=False, foreach=False))
    monkeypatch.setattr("ssl_bench.optim.blocked.BLOCK", 7)
    monkeypatch.setattr("ssl_bench.optim.layerwise.CPU_CHUNK", 20)
    assert difference(run(lambda p: make(p.values(), fused=True)), loop) < 1e-13
    assert difference(run(lambda p: make(p.values(), fused=False)), loop) < 1e-13


def test_the_norm_of_a_cancelling_sum_is_exact():
    """g = -beta w (1 + 1e-4): |g + beta w|^2 from inner products alone would be rounding noise in float32."""
    beta = 0.05
    w = torch.linspace(1, 2, 3000, dtype=torch.float64).reshape(30, 100)
    results = {}
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(w.to(dtype, copy=True))
        p.grad = (-beta * w * (1 + 1e-4)).to(dtype)
        optimizer = LARS([p], lr=0.1, weight_decay=beta, fused=True)
        optimizer.recording = True
        optimizer.step()
        results[dtype] = float(optimizer.layer_stats[0].update_norm)
    assert results[torch.float64] == pytest.approx(1e-4 * beta * float(w.norm()), rel=1e-9)
    assert results[torch.float32] == pytest.approx(results[torch.float64], rel=1e-2)  # g itself is rounded


@EVERY
@PATHS
def test_gradients_are_not_changed(make, path):
    params = make_params()
    optimizer = make(params.values(), **path)
    for k in range(3):
        advance(optimizer, params, [k])
        for name, p in params.items():
            assert torch.equal(p.grad, gradient(name, p.shape, k))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(make, dtype):
    """One step equals the float32 step on the same values, rounded once: the norm of 100,000 is infinite in fp16."""
    big = torch.full((50, 50), 1000.0).to(dtype)
    small = torch.full((50, 50), 2.0).to(dtype)
    results = []
    for kind in (dtype, torch.float32):
        p = nn.Parameter(small.to(kind, copy=True))
        p.grad = (big * 2).to(kind)  # |g| = 100,000
        make([p], fused=False).step()
        results.append(p.detach().to(dtype))
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


@EVERY
def test_channels_last_and_transposed_parameters(make):
    """The same values in other layouts: dense ones take the fused path, gradients of another layout do not."""
    results = []
    for fused, grad_format in ((False, "same"), (True, "same"), (None, "other")):
        g = torch.Generator().manual_seed(0)
        conv = nn.Parameter(torch.randn(6, 5, 3, 3, generator=g).to(memory_format=torch.channels_last))
        linear = nn.Parameter(torch.randn(5, 4, generator=g).t())
        optimizer = make([conv, linear], fused=fused)
        for _ in range(4):
            for p in (conv, linear):
                grad = torch.randn(p.shape, generator=g)
                p.grad = torch.empty_like(p).copy_(grad) if grad_format == "same" else grad
            optimizer.step()
        results.append({"conv": conv.detach(), "linear": linear.detach()})
    assert difference(results[1], results[0]) < 2e-6
    assert difference(results[2], results[0]) < 2e-6


def test_is_dense():
    x = torch.empty(4, 6, 3, 3)
    assert is_dense(x)
    assert is_dense(x.to(memory_format=torch.channels_last))
    assert is_dense(x.transpose(0, 3))
    assert is_dense(torch.empty(()))
    assert not is_dense(x[:, ::2])
    assert not is_dense(torch.empty(3, 1).expand(3, 4))


@EVERY
def test_fused_is_refused_where_it_cannot_serve(make):
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="fused=True needs dense float32 or float64 parameters on the CPU"):
        make([p], fused=True).step()


@EVERY
@PATHS
def test_empty_tensors_and_a_group_without_gradients(make, path):
    empty, still = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2, 2))
    empty.grad = torch.empty(0, 3)
    optimizer = make([{"params": [empty]}, {"params": [still]}], **path)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert still not in optimizer.state


# --------------------------------------------------------------------------------------------------- state and resume


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
            assert not torch.equal(copies[name], p)


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


# ------------------------------------------------------------------------------------------------------------- groups


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
    with pytest.raises(ValueError, match="params holds a parameter more than once"):
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
        with pytest.raises(ValueError, match="is sharded, so its local norm is not the layer's"):
            make([p])
    finally:
        dist.destroy_process_group()
    flat = nn.Parameter(torch.ones(4))
    flat._fsdp_flattened = True  # what FSDP marks the original parameters with
    with pytest.raises(ValueError, match="is sharded"):
        make([flat])


# ------------------------------------------------------------------------------------------------ closures and scaling


@EVERY
def test_closure_runs_once_with_gradients_enabled(make):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make([p])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
    assert calls == [True]
    assert not torch.equal(p, torch.ones(2, 2))


def scaled_run(make, scale, bad_step=None):
    """Six steps through a GradScaler; in `bad_step` a gradient is infinite."""
    p = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = make([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    target = torch.linspace(0, 3, 12).reshape(3, 4)
    for k in range(6):
        optimizer.zero_grad()
        scaler.scale(((p - target) ** 2).mean()).backward()
        if k == bad_step:
            p.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    return p.detach(), optimizer


@EVERY
def test_loss_scale_does_not_matter(make):
    plain, scaled = (scaled_run(make, scale)[0] for scale in (1.0, 2.0**12))
    assert torch.equal(plain, scaled)  # powers of two


@EVERY
def test_steps_that_the_scaler_skips_do_not_count(make):
    value, optimizer = scaled_run(make, 2.0**12, bad_step=3)
    assert torch.isfinite(value).all()
    for state in optimizer.state.values():
        if "step" in state:
            assert float(state["step"]) == 5


# --------------------------------------------------------------------------------------- learning rates as tensors


@EVERY
@PATHS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_a_number(make, path, shape):
    expected = run(lambda p: make(p.values(), **path), torch.float32, steps=6)
    found = run(lambda p: make(p.values(), **path), torch.float32, steps=6, lr=lambda k: torch.full(shape, lr_at(k)))
    assert difference(found, expected) < 1e-6
