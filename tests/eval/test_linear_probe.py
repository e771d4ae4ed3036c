"""The cached linear probe: its batched arithmetic against torch's, its protocol, its accuracy against scikit-learn."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ssl_bench.eval import LinearCached, Probe, holdout
from ssl_bench.eval.linear import Heads, Standardize, accuracy, fit

GRID = [(0.05, 0.0), (0.5, 1e-2), (1.0, 1e-3)]
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Split:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


@pytest.fixture(scope="module")
def metrics(digits: Split) -> dict[str, float]:
    return LinearCached()(Probe.from_features(*digits))


def one_at_a_time(x: Tensor, y: Tensor, lr: float, weight_decay: float, seed: int, epochs: int) -> nn.Linear:
    """One head by nn.Linear, autograd and torch.optim.SGD; the same initial weights and batch order."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(x.shape[1], 10)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(x.shape[1], 1, 10, generator=generator)[:, 0].T)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    total = epochs * math.ceil(len(x) / 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / total)))
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return head


def test_equals_torch_sgd_one_head_at_a_time(digits: Split) -> None:
    x, y = digits[0][:130] / 16, digits[1][:130]  # 130 = 2 batches of 50 and a short one of 30
    heads = fit(x, y, classes=10, grid=GRID, seeds=[3, 8], epochs=4, batch_size=50)
    weight, bias = heads.weight.view(2, 64, 3, 10), heads.bias.view(2, 3, 10)
    test_x, test_y = digits[2] / 16, digits[3]
    top1 = accuracy(heads, test_x, test_y)
    for s, seed in enumerate((3, 8)):
        for g, (lr, weight_decay) in enumerate(GRID):
            head = one_at_a_time(x, y, lr, weight_decay, seed, epochs=4)
            torch.testing.assert_close(weight[s, :, g].T, head.weight.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bias[s, g], head.bias.detach(), rtol=1e-4, atol=1e-5)
            expected = 100 * (head(test_x).argmax(dim=1) == test_y).double().mean()
            assert top1[s, g].item() == pytest.approx(expected.item(), abs=0.51)  # one image of 397 may flip
    assert not torch.allclose(weight[0, :, 0], weight[1, :, 0])  # the seeds differ


def test_heads_do_not_disturb_each_other(digits: Split) -> None:
    """A head that blows up beside it changes nothing, and is marked."""
    x, y = digits[0][:100], digits[1][:100]
    settings = {"classes": 10, "seeds": [0], "epochs": 40, "batch_size": 20}
    alone = fit(x, y, grid=[(0.01, 0.0)], **settings)
    beside = fit(x, y, grid=[(0.01, 0.0), (1e4, 1.0)], **settings)
    torch.testing.assert_close(beside.weight[:, :, :10], alone.weight)
    assert beside.finite().tolist() == [[True, False]]
    top1 = accuracy(beside, x, y)
    assert top1[0, 0] > 80
    assert top1[0, 1] == -1


def test_top5_and_few_classes() -> None:
    heads = Heads(2, 3, grid=[(1.0, 0.0)], generators=[torch.Generator().manual_seed(0)])
    x, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
    assert accuracy(heads, x, y, k=5).item() == 100  # of three classes five always hold the right one
    many = Heads(2, 8, grid=[(1.0, 0.0)], generators=[torch.Generator().manual_seed(0)])
    logits = many.logits(x.unsqueeze(0))[0, 0]
    inside = [label in row.argsort(descending=True)[:5] for row, label in zip(logits, y, strict=True)]
    assert accuracy(many, x, y, k=5).item() == pytest.approx(100 * sum(inside) / 9)


def test_holdout_is_a_fixed_stratified_tenth() -> None:
    labels = torch.cat([torch.zeros(100), torch.ones(50), torch.full((4,), 2), torch.full((1,), 3)]).long()
    kept, held = holdout(labels)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(155))
    assert labels[held].bincount(minlength=4).tolist() == [10, 5, 1, 0]  # a lone image stays in train
    rng = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(holdout(labels)[1], held)
    torch.set_rng_state(rng)


def test_standardize_leaves_constant_dimensions_at_zero() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.0]) + 7
    z = Standardize(x)(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.tensor([1.0, 1.0, 0.0]))


def test_metrics_say_what_was_chosen_and_how_seeds_differ(metrics: dict[str, float]) -> None:
    seeds = torch.tensor([metrics[f"top1_seed{i}"] for i in range(3)], dtype=torch.float64)
    assert metrics["top1"] == pytest.approx(seeds.mean().item())
    assert metrics["top1_sd"] == pytest.approx(seeds.std().item())
    assert metrics["lr"] in LinearCached.lrs
    assert metrics["weight_decay"] in LinearCached.weight_decays
    assert metrics["top5"] > metrics["top1"]
    assert metrics["n_test"] == 397


def test_close_to_logistic_regression(digits: Split, metrics: dict[str, float]) -> None:
    train_x, train_y, test_x, test_y = digits
    standardize = Standardize(train_x)
    model = LogisticRegression(max_iter=2000).fit(standardize(train_x).numpy(), train_y.numpy())
    expected = 100 * model.score(standardize(test_x).numpy(), test_y.numpy())
    assert metrics["top1"] == pytest.approx(expected, abs=1.5)


def test_the_choice_is_made_on_held_out_train_images(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates, one of which cannot learn: the other is chosen, and the test set has no say in it."""
    train_x, train_y, test_x, test_y = digits
    monkeypatch.setattr(LinearCached, "lrs", (1e-9, 0.1))
    monkeypatch.setattr(LinearCached, "weight_decays", (0.0,))
    monkeypatch.setattr(LinearCached, "min_steps", 100)
    metrics = LinearCached()(Probe.from_features(train_x, train_y, test_x, (test_y + 1) % 10))
    assert metrics["lr"] == 0.1
    assert metrics["val_top1"] > 85
    assert metrics["top1"] < 15


def test_deterministic_by_its_own_seed(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearCached, "min_steps", 60)
    rng = torch.get_rng_state()
    first = LinearCached()(Probe.from_features(*digits, seed=0))
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(5)
    assert LinearCached()(Probe.from_features(*digits, seed=0)) == first
    assert LinearCached()(Probe.from_features(*digits, seed=1)) != first


def test_refusals() -> None:
    x, y = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2
    with pytest.raises(ValueError, match="a class must have at least 2 train images, got 24 of as many classes"):
        LinearCached()(Probe.from_features(x, torch.arange(24), x, y))
    infinite = torch.where(torch.arange(24)[:, None] == 3, torch.inf, x)
    with pytest.raises(ValueError, match="train features must be finite, got 1 of 24 that are not"):
        LinearCached()(Probe.from_features(infinite, y, x, y))
