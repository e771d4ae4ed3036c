"""CLARS against the author's formula, with micro-batch gradients made up by the test."""

import copy

import pytest
import torch
from optim_cases import STEPS, difference, gradient, lr_at, make_params

from ssl_bench.optim import CLARS, Telemetry
from ssl_bench.optim.clars import CLARSChunks

MU, BETA, ETA, AFTER, CAP, EPS, COUNT = 0.9, 0.05, 1e-2, 1e-3, 0.1, 1e-6, 3


def micro_gradient(name, shape, step, j):
    return gradient(name, shape, 100 * (step + 1) + j) * (5 if name == "linear" else 1)


def provider(params):
    """Leaves the micro-batches' gradients in the parameters one after another, as a trainer does."""

    def micro_gradients(step, read):
        found = []
        for j in range(COUNT):
            for name, p in params.items():
                p.grad = micro_gradient(name, p.shape, step, j).to(p.dtype)
            found.append(read())
        for p in params.values():
            p.grad = None
        return torch.stack(found).mean(0)

    return micro_gradients


def make(params, cls=CLARS, named=False, **keywords):
    settings = {"momentum": MU, "weight_decay": BETA, **keywords}
    optimizer = cls(params.items() if named else params.values(), 1.0, **settings)
    optimizer.micro_gradients = provider(params)
    return optimizer


def train(optimizer, params, steps):
    for k in steps:
        for name, p in params.items():
            p.grad = gradient(name, p.shape, k, p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(k)
        optimizer.step()
        for name, p in params.items():
            assert torch.equal(p.grad, gradient(name, p.shape, k, p.dtype))


def formula(measured=STEPS):
    """lars_optimizer.py and main_cifar_lars.py's compute_M at 064a1ab; 1-d tensors skip the scale, not the decay."""
    out = {}
    for name, p in make_params().items():
        w, b = p.detach(), 0
        for k in range(STEPS):
            d = gradient(name, w.shape, k) + BETA * w
            scale = 1.0
            if w.ndim > 1:
                if w.norm() != 0 and d.norm() != 0:
                    scale = w.norm() / (d.norm() + EPS) * (ETA if k < measured else AFTER)
                if k < measured:
                    m = sum(micro_gradient(name, w.shape, k, j).norm() for j in range(COUNT)) / COUNT
                    scale = min(CAP, scale * (d.norm() / (m + EPS)))
            b = MU * b + d
            w = w - lr_at(k) * scale * b
        out[name] = w
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("measured", [None, 10, 0])
@pytest.mark.parametrize("cls", [CLARS, CLARSChunks])
def test_clars_is_the_authors_formula(dtype, tolerance, measured, cls):
    params = make_params(dtype)
    optimizer = make(params, cls, measured_steps=measured)
    train(optimizer, params, range(STEPS))
    expected = formula(STEPS if measured is None else measured)
    assert difference({name: p.detach() for name, p in params.items()}, expected) < tolerance


def test_the_cap_and_the_measure_are_at_work():
    params = make_params()
    optimizer = make(params, named=True)
    telemetry = Telemetry(optimizer)
    train(optimizer, params, range(2))
    rows = telemetry.columns()
    first = zip(rows["step"], rows["layer"], rows["ratio"].tolist(), strict=True)
    found = {layer: ratio for step, layer, ratio in first if step == 0}
    assert found["zero"] == pytest.approx(CAP)  # |w| = 0: s0 = 1, and |d| / M is above the cap
    assert 0 < found["linear"] < CAP / 10


def test_a_run_goes_on_from_its_state():
    whole = make_params()
    train(make(whole, measured_steps=8), whole, range(STEPS))
    params = make_params()
    first = make(params, measured_steps=8)
    train(first, params, range(6))
    again = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = make(again, measured_steps=8)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, again, range(6, STEPS))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_without_micro_gradients_it_says_what_is_missing():
    params = make_params()
    optimizer = CLARS(params.values(), 1.0)
    for p in params.values():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="CLARS: micro_gradients must be set before the first step, got None"):
        optimizer.step()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("lr", -1.0), ("momentum", 1.0), ("eta", -1.0), ("eta_after", -1.0), ("cap", 0.0), ("micro_batch", 0),
     ("micro_batches", 0), ("measured_steps", -1), ("eps", -1.0)],
)  # fmt: skip
def test_bad_keywords_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=rf"^CLARS: {keyword} must .* got "):
        CLARS([torch.nn.Parameter(torch.ones(2, 2))], **{"lr": 1.0, keyword: value})
