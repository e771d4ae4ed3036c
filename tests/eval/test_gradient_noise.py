"""The spread of batch gradients against its formula, and sigma^2 / B."""

import pytest
import torch
from torch import Tensor, nn

from ssl_bench.eval.gradient_noise import measure_gradient_noise

N, D = 96, 5


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, 3), nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).pow(3).mean()


@pytest.fixture
def model() -> Regression:
    torch.manual_seed(0)
    return Regression().double()


def samples(seed: int = 1) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closures(model: Regression, x: Tensor, size: int):
    return [lambda part=part: model.loss(part) for part in x.split(size)]


def gradients(model: Regression, x: Tensor, size: int, mode: str) -> Tensor:
    """(batches, parameters): every batch's gradient, plainly."""
    model.train(mode == "train")
    rows = []
    for part in x.split(size):
        model.zero_grad()
        model.loss(part).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("size", [4, 16, 48])
def test_it_is_the_sample_variance_summed_over_parameters(model: Regression, size: int, mode: str) -> None:
    x = samples()
    rows = gradients(model, x, size, mode)
    model.zero_grad()
    noise = measure_gradient_noise(model, closures(model, x, size), batch_norm=mode)  # type: ignore[arg-type]
    assert noise.batches == N // size
    assert noise.squared_error == pytest.approx(rows.var(dim=0).sum().item(), rel=1e-10)
    expected = rows.mean(dim=0).square().sum() - rows.var(dim=0).sum() / len(rows)
    assert noise.gradient_squared == pytest.approx(expected.item(), rel=1e-9)


def test_for_a_mean_over_samples_it_falls_as_one_over_b(model: Regression) -> None:
    """Averaged over all ways to split the samples, B E|g_B - g|^2 is the same for every B (batch norm in eval mode)."""
    x = samples()
    scaled = []
    for size in (2, 8, 32):
        draws = [
            measure_gradient_noise(model, closures(model, samples_of(x, seed), size), batch_norm="eval").squared_error
            for seed in range(20)
        ]
        scaled.append(size * sum(draws) / len(draws))
    assert scaled[1] == pytest.approx(scaled[0], rel=0.1)
    assert scaled[2] == pytest.approx(scaled[0], rel=0.25)


def samples_of(x: Tensor, seed: int) -> Tensor:
    return x[torch.randperm(N, generator=torch.Generator().manual_seed(seed))]


def test_the_model_is_left_as_it_was(model: Regression) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.norm.eval()
    measure_gradient_noise(model, closures(model, samples(), 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_refuses_what_has_no_variance(model: Regression) -> None:
    with pytest.raises(ValueError, match="batches must be >= 2, got 1"):
        measure_gradient_noise(model, closures(model, samples(), N))
    with pytest.raises(ValueError, match="the loss of batch 1 must be finite, got nan"):
        measure_gradient_noise(model, [lambda: model.loss(samples()), lambda: model.loss(samples() * torch.nan)])
    with pytest.raises(ValueError, match="at least one parameter must require"):
        measure_gradient_noise(nn.ReLU(), [])
