"""Few-shot: fixed stratified draws, and scikit-learn's own choice of the strength."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from ssl_bench.eval import Probe
from ssl_bench.eval.few_shot import STRENGTHS, FewShot, draw, fitted


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def test_draws_are_stratified_fixed_and_differ() -> None:
    labels = torch.tensor([0] * 300 + [1] * 100 + [2] * 4)
    first = draw(labels, 0.1, 0)
    assert labels[first].bincount().tolist() == [30, 10, 1]
    assert torch.equal(first, draw(labels, 0.1, 0))
    assert not torch.equal(first, draw(labels, 0.1, 1))
    assert len(first.unique()) == len(first)


def test_the_strength_is_the_one_that_scikit_learn_chooses() -> None:
    x, y = (value.numpy() for value in digits())
    x, y = x[:150].astype(np.float64) / 16, y[:150]
    theirs = LogisticRegressionCV(
        Cs=list(STRENGTHS),
        cv=StratifiedKFold(5),
        max_iter=500,
        scoring="accuracy",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    ).fit(x, y)
    weight, bias, classes = fitted(x, y)
    scores = torch.from_numpy(x) @ weight + bias
    np.testing.assert_array_equal(classes.numpy(), theirs.classes_)
    np.testing.assert_allclose(scores.softmax(dim=1).numpy(), theirs.predict_proba(x), atol=2e-3)


def test_a_class_of_one_image_and_two_classes() -> None:
    x, y = digits()
    few = torch.cat([(y == label).nonzero()[:1, 0] for label in range(10)])
    weight, _, classes = fitted(x[few].double().numpy(), y[few].numpy())
    assert weight.shape == (64, 10)
    assert classes.tolist() == list(range(10))
    two = (y < 2).nonzero()[:60, 0]
    weight, bias, classes = fitted(x[two].double().numpy() / 16, y[two].numpy())
    hits = classes[(x[two].double() / 16 @ weight + bias).argmax(dim=1)] == y[two]
    assert hits.double().mean() == 1


def test_mean_and_deviation_over_five_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_bench.eval.few_shot.STRENGTHS", (0.1, 1.0))
    x, y = digits()
    metrics = FewShot()(Probe.from_features(x[:1200], y[:1200], x[1200:], y[1200:]))
    assert set(metrics) == {
        *("top1", "top1_1pct", "top1_1pct_sd", "n_1pct", "top1_10pct", "top1_10pct_sd", "n_10pct", "n_test"),
    }
    assert metrics["top1"] == metrics["top1_10pct"]
    assert metrics["n_1pct"] == 10
    assert metrics["n_10pct"] == pytest.approx(120, abs=3)
    assert 30 < metrics["top1_1pct"] < 75
    assert 80 < metrics["top1_10pct"] < 95
    assert 0 < metrics["top1_10pct_sd"] < 3
    assert metrics["n_test"] == 597
