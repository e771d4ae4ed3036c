"""Sharpness against quadratic forms and the exact Hessian of a small net."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_bench.eval.sharpness import (
    Hessian,
    Sharpness,
    batch_norm_mode,
    measure_sharpness,
    sam_sharpness,
    top_eigenvalue,
    trace,
)


def quadratic(eigenvalues: list[float]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A symmetric matrix with these eigenvalues, a linear term, and a point split over two parameters."""
    generator = torch.Generator().manual_seed(0)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    a = basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    w = torch.randn(n, generator=generator, dtype=torch.float64)
    return a, b, [w[:2].clone().requires_grad_(), w[2:].view(1, -1).clone().requires_grad_()]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in params])


@pytest.mark.parametrize(
    "eigenvalues", [[9.0, 4.0, 1.0, 0.5, 0.1, -2.0], [3.0, 3.0, 3.0, 1.0, 0.0], [-1.0, -2.0, -3.0, -50.0], [2.0] * 4]
)
def test_quadratic_forms(eigenvalues: list[float]) -> None:
    a, b, params = quadratic(eigenvalues)

    def loss() -> Tensor:
        w = flat(params)
        return 0.5 * w @ a @ w + b @ w

    hessian = Hessian(loss, params)
    top = top_eigenvalue(hessian, tolerance=1e-9)
    assert top.value == pytest.approx(max(eigenvalues), rel=1e-6)  # the largest, not the largest in absolute value
    assert top.residual < 1e-6
    assert top.iterations <= len(eigenvalues) + 2
    estimate = trace(hessian, samples=300)
    assert abs(estimate.value - sum(eigenvalues)) < 4 * estimate.standard_error + 1e-9
    g = a @ flat(params).detach() + b
    expected = 0.05 * g.norm() + 0.5 * 0.05**2 * (g @ a @ g) / g.norm() ** 2
    assert sam_sharpness(loss, params, [g[:2], g[2:].view(1, -1)]) == pytest.approx(expected.item(), rel=1e-9)


def test_hutchinson_is_exact_on_a_diagonal() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    estimate = trace(Hessian(lambda: (scale * w**2).sum(), [w]), samples=3)
    assert estimate == (14.0, 0.0)


def test_a_linear_loss_has_no_curvature() -> None:
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    hessian = Hessian(lambda: w.sum(), [w, unused])
    assert top_eigenvalue(hessian).value == 0
    assert trace(hessian) == (0.0, 0.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.norm.running_mean = torch.linspace(-1, 1, 5)
        self.norm.running_var = torch.linspace(0.5, 3, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).tanh()))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(16) % 3


def exact_hessian(net: Net, mode: str) -> Tensor:
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    params = [net.get_parameter(name).detach() for name in names]
    shapes = [parameter.shape for parameter in params]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        frozen = {"frozen": net.frozen}
        with batch_norm_mode(net, "train" if mode == "train" else "eval"):
            return nn.functional.cross_entropy(torch.func.functional_call(net, {**values, **frozen, **buffers}, X), Y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([parameter.flatten() for parameter in params]))
    assert isinstance(hessian, Tensor)
    return hessian


def measure(net: Net, mode: Any, **settings: Any) -> Sharpness:
    return measure_sharpness(net, lambda: nn.functional.cross_entropy(net(X), Y), batch_norm=mode, **settings)


def test_the_exact_hessian_of_a_net_in_both_modes_of_batch_norm() -> None:
    net = Net()
    measured = {}
    for mode in ("train", "eval"):
        exact = exact_hessian(net, mode)
        result = measured[mode] = measure(net, mode, samples=400, iterations=200)
        top = torch.linalg.eigvalsh(exact)[-1].item()
        assert result.top_eigenvalue.value == pytest.approx(top, rel=2e-3)
        assert abs(result.top_eigenvalue.value - top) <= result.top_eigenvalue.residual
        assert abs(result.trace.value - exact.trace().item()) < 4 * result.trace.standard_error
        assert result.trace.standard_error < 0.2 * abs(result.trace.value)
        assert result.batch_norm == mode
        assert result.sam > 0
    assert measured["train"].top_eigenvalue.value != pytest.approx(measured["eval"].top_eigenvalue.value, rel=0.05)
    assert measured["train"].loss != pytest.approx(measured["eval"].loss, rel=0.01)


def test_lanczos_survives_many_iterations_in_float32() -> None:
    """Without reorthogonalisation: far past convergence the value stays."""
    net = Net()
    expected = torch.linalg.eigvalsh(exact_hessian(net, "eval"))[-1].item()
    net.float()
    with batch_norm_mode(net, "eval"):
        params = [parameter for parameter in net.parameters() if parameter.requires_grad]
        hessian = Hessian(lambda: nn.functional.cross_entropy(net(X.float()), Y), params)
        top = top_eigenvalue(hessian, iterations=150, tolerance=0.0)
    assert top.value == pytest.approx(expected, rel=1e-4)


def test_model_and_global_rng_are_left_alone() -> None:
    net = Net().train()
    net.last.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = measure(net, "train")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net.modules()] == [True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(4)
    assert measure(net, "train") == first
    assert measure(net, "train", seed=1).trace != first.trace


def test_refusals() -> None:
    net = Net()
    with pytest.raises(ValueError, match="batch_norm must be train or eval, got 'off'"):
        measure(net, "off")
    with pytest.raises(ValueError, match="rho must be > 0, got 0"):
        measure(net, "eval", rho=0)
    with pytest.raises(ValueError, match="samples must be >= 2, got 1"):
        measure(net, "eval", samples=1)
    with pytest.raises(ValueError, match="the loss must be a finite scalar, got nan"):
        measure_sharpness(net, lambda: net(X).sum() * math.nan)
    with pytest.raises(ValueError, match=r"the loss must be a finite scalar, got shape \(16, 3\)"):
        measure_sharpness(net, lambda: net(X))
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        measure(net, "eval", iterations=0)
    with pytest.raises(ValueError, match="at least one parameter must require a gradient"):
        measure_sharpness(nn.Identity(), lambda: torch.zeros(()))
