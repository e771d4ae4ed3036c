"""The step of every layer-wise optimizer: the corner cases that others were bitten by."""

import pytest
import torch
from layerwise_cases import ALL, EVERY, PATHS
from optim_cases import advance, difference, gradient, lr_at, make_params, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_bench.optim import LARS
from ssl_bench.optim.kernels import Blocked, Fused, is_dense
from ssl_bench.optim.telemetry import VALUES, Telemetry

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
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0)])
def test_the_gpus_path_agrees_with_the_per_tensor_loop(make, dtype, tolerance, monkeypatch):
    """torch's fused kernels for many tensors at once, on the CPU, which has them too; their statistics as well."""

    def recorded(**keywords):
        def build(params):
            made.append(make(params.values(), **keywords))
            telemetry.append(Telemetry(made[-1]))
            return made[-1]

        made, telemetry = [], []
        weights = run(build, dtype)
        columns = telemetry[0].columns()
        return weights, torch.stack([columns[name].nan_to_num(-1) for name in VALUES])

    loop, seen = recorded(fused=False, foreach=False)
    served = []
    monkeypatch.setattr(Blocked, "DEVICE", "nowhere")
    monkeypatch.setattr(Fused, "DEVICE", "cpu")
    original = Fused.serves.__func__
    monkeypatch.setattr(
        Fused, "serves", classmethod(lambda cls, bucket: served.append(original(cls, bucket)) or served[-1])
    )
    fused, also_seen = recorded()
    assert difference(fused, loop) <= tolerance
    torch.testing.assert_close(also_seen, seen, rtol=1e-4, atol=1e-6)
    assert any(served) == (dtype != torch.bfloat16)


class Passes(TorchDispatchMode):
    """Counts how often tensors of N elements are read or written, by what each operation says of its arguments."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        named = [about.name for about in function._schema.arguments]
        given = dict(zip(named, args, strict=False)) | kwargs
        changed = [about.name for about in function._schema.arguments if about.alias_info and about.alias_info.is_write]
        # The fused kernels would change the gradients where they are given a scale to undo.
        written = [given[name] for name in changed if name != "grads"]
        self.count += len(self.large(given)) + len(self.large(written if changed else result))
        return result

    def large(self, values):
        found = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
        return {id(each) for each in found if each.numel() == self.size}


@pytest.mark.parametrize(
    ("make", "fused", "passes"), [("lars", True, 12), ("lars", False, 15), ("lamb", True, 14), ("lamb", False, 27)]
)
def test_passes_over_memory_on_a_gpu(make, fused, passes, monkeypatch):
    monkeypatch.setattr(Blocked, "DEVICE", "nowhere")
    monkeypatch.setattr(Fused, "DEVICE", "cpu")
    p = nn.Parameter(torch.ones(30, 10))
    optimizer = ALL[make]([p], fused=None if fused else False)
    for _ in range(2):  # the first step makes the state
        p.grad = torch.ones(30, 10)
        with Passes(300) as seen:
            optimizer.step()
    assert seen.count == passes


@EVERY
def test_paths_agree_on_tensors_larger_than_a_block(make, monkeypatch):
    """Blocks of 7 elements and chunks of 20, so that every tensor is cut and chunks are mixed."""
    loop = run(lambda p: make(p.values(), fused=False, foreach=False))
    monkeypatch.setattr("ssl_bench.optim.kernels.BLOCK", 7)
    monkeypatch.setattr("ssl_bench.optim.kernels.CPU_CHUNK", 20)
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
    with pytest.raises(ValueError, match=r"fused must be .* got True, which needs dense float32 or float64"):
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


# -------------------------------------------------------------------------------------- learning rates as tensors


@EVERY
@PATHS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_a_number(make, path, shape):
    expected = run(lambda p: make(p.values(), **path), torch.float32, steps=6)
    found = run(lambda p: make(p.values(), **path), torch.float32, steps=6, lr=lambda k: torch.full(shape, lr_at(k)))
    assert difference(found, expected) < 1e-6
