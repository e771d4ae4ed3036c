"""torch.compile of the step, and its capture in a CUDA graph."""

import pytest
import torch
from optim_cases import difference, gradient, lr_at, make_params, run
from torch._dynamo.testing import CompileCounterWithBackend

from ssl_bench.optim import LAMB, LARS, TVLARS

ALL = {
    "lars": lambda p, **k: LARS(p, clip=True, zero_norm="skip", **k),
    "lamb": lambda p, **k: LAMB(p, **k),
    "tvlars": lambda p, **k: TVLARS(p, decay=0.3, delay_steps=6, **k),
    "tvlars_released": lambda p, **k: TVLARS(p, decay=0.3, variant="released", **k),
}
EVERY = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def set_lr(optimizer, value):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


@EVERY
@pytest.mark.parametrize("kind", ["tensor", "number"])
@pytest.mark.filterwarnings("ignore")  # of torch.compile itself, which differ from release to release
def test_compiled_step_equals_the_plain_one_without_a_recompilation_per_step(make, kind):
    """A tensor lr compiles once; a number once more, when Dynamo sees it change and makes it an input."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params = make_params(torch.float32)
    optimizer = make(params.values(), lr=torch.tensor(0.1) if kind == "tensor" else 0.1)
    step = torch.compile(optimizer.step, backend=counter)
    for k in range(5):
        for name, p in params.items():
            p.grad = gradient(name, p.shape, k, p.dtype)
        set_lr(optimizer, lr_at(k))
        step()
    expected = run(lambda p: make(p.values(), lr=0.1), torch.float32, steps=5)
    assert difference({n: p.detach() for n, p in params.items()}, expected) < 2e-6
    assert counter.frame_count <= (1 if kind == "tensor" else 2)


@pytest.mark.gpu
@EVERY
def test_cuda_graph_replays_with_the_schedule_and_phi_moving(make):
    """Captured once, replayed with new gradients and learning rates: equal to the eager steps."""
    results = []
    for capture in (False, True):
        params = {n: torch.nn.Parameter(p.detach().cuda()) for n, p in make_params(torch.float32).items()}
        grads = {n: torch.zeros_like(p) for n, p in params.items()}
        optimizer = make(params.values(), lr=torch.tensor(0.1, device="cuda"))
        for name, p in params.items():
            p.grad = grads[name]

        def load(k, grads=grads, optimizer=optimizer):
            for name, g in grads.items():
                g.copy_(gradient(name, g.shape, k, g.dtype))
            set_lr(optimizer, lr_at(k))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for k in range(2):
                load(k)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if capture:
            with torch.cuda.graph(graph):
                optimizer.step()
        for k in range(2, 8):
            load(k)
            graph.replay() if capture else optimizer.step()
        results.append({n: p.detach().cpu() for n, p in params.items()})
    assert difference(*results) < 2e-6


@pytest.mark.gpu
@EVERY
def test_gpu_equals_cpu_and_never_synchronises(make):
    expected = run(lambda p: make(p.values(), lr=0.1), torch.float32, steps=5)
    params = {n: torch.nn.Parameter(p.detach().cuda()) for n, p in make_params(torch.float32).items()}
    optimizer = make(params.values(), lr=0.1)
    for k in range(5):
        for name, p in params.items():
            p.grad = gradient(name, p.shape, k, p.dtype).cuda()
        set_lr(optimizer, lr_at(k))
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert difference({n: p.detach().cpu() for n, p in params.items()}, expected) < 2e-5
