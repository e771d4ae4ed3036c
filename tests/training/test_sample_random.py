"""Numbers that belong to a sample: their distributions, and that they follow the sample and nothing else."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.training.sample_random import SampleRandom

N, WIDTH = 64, 2000


def draw(draws, positions: Tensor | None = None, step: int = 0) -> Tensor:
    """What a network draws for rows at these places of the batch."""
    random = SampleRandom(torch.device("cpu"))
    random.begin_step(step)
    positions = torch.arange(N) if positions is None else positions
    with random.rows(positions):
        return draws(len(positions))


KINDS = {
    "rand": lambda n: torch.rand(n, WIDTH),
    "uniform_": lambda n: torch.empty(n, WIDTH).uniform_(0, 1),
    "rand_like": lambda n: torch.rand_like(torch.empty(n, WIDTH)),
    "randn": lambda n: torch.randn(n, WIDTH),
    "normal_": lambda n: torch.empty(n, WIDTH).normal_(),
    "exponential_": lambda n: torch.empty(n, WIDTH).exponential_(),
    "dropout": lambda n: F.dropout(torch.ones(n, WIDTH), 0.3, training=True),
    "bernoulli_": lambda n: torch.empty(n, WIDTH).bernoulli_(0.7),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n, WIDTH), 0.7)),
}
CDF = {
    "rand": lambda x: x, "uniform_": lambda x: x, "rand_like": lambda x: x,
    "randn": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))), "normal_": lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)),
    "exponential_": lambda x: 1 - torch.exp(-x),
}  # fmt: skip


@pytest.mark.parametrize("kind", CDF)
def test_continuous_numbers_have_their_distribution(kind):
    x = draw(KINDS[kind]).double().flatten().sort().values
    steps = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
    distance = (CDF[kind](x) - steps).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / len(x) ** 0.5  # passed over by 1 in 1,000 of true ones
    assert x.isfinite().all()


@pytest.mark.parametrize("kind", ["dropout", "bernoulli_", "bernoulli"])
def test_seven_of_ten_are_kept_and_dropout_scales_them(kind):
    x = draw(KINDS[kind])
    kept = x != 0
    assert abs(float(kept.double().mean()) - 0.7) < 4 * (0.21 / x.numel()) ** 0.5
    torch.testing.assert_close(x[kept], torch.full_like(x[kept], 1 / 0.7 if kind == "dropout" else 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_follow_the_sample_however_the_batch_is_split(kind):
    whole = draw(KINDS[kind])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for places in (torch.arange(N)[16:32], order, order[:8]):
        assert torch.equal(draw(KINDS[kind], places), whole[places])
    assert not torch.equal(draw(KINDS[kind], step=1), whole)


def test_rows_columns_calls_and_copies_of_the_batch_are_unrelated():
    def twice(n: int) -> Tensor:
        return torch.stack([torch.randn(n, WIDTH), torch.randn(n, WIDTH)])

    first, second = draw(twice)
    copies = draw(lambda n: torch.randn(2 * n, WIDTH))  # as torch.cat of two views
    pairs = [(first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:]), (copies[:N], copies[N:])]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / a.numel() ** 0.5
    part = draw(lambda n: torch.randn(2 * n, WIDTH), torch.arange(8, 16))
    assert torch.equal(part, torch.cat([copies[8:16], copies[N + 8 : N + 16]]))


def test_a_caller_s_own_generator_is_its_own():
    expected = torch.rand(N, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(lambda n: torch.rand(n, 3, generator=torch.Generator().manual_seed(5))), expected)


def test_a_network_that_draws_nothing_runs_without_the_mode_from_the_second_step_on():
    def modes(network: nn.Module) -> list[int]:
        random, depths = SampleRandom(torch.device("cpu")), []
        network.register_forward_hook(lambda *_: depths.append(torch._C._len_torch_dispatch_stack()))
        for step in range(3):
            random.begin_step(step)
            with random.rows(torch.arange(4)):
                network(torch.ones(4, 2))
            random.end_step()
        return depths

    assert modes(nn.Linear(2, 2)) == [1, 0, 0]
    assert modes(nn.Sequential(nn.Linear(2, 2), nn.Dropout())) == [1, 1, 1]
