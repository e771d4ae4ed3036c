"""`evaluate`: names to results, with the features extracted once and nothing left changed."""

import pytest
import torch
from eval_doubles import Backbone, Images, Splits, assert_unchanged, state, to_float
from torch import Tensor

from ssl_bench.eval import EVALUATORS, KNN, evaluate, extract_features, get_evaluator
from ssl_bench.eval.online import Online, subset


@pytest.fixture
def splits() -> Splits:
    return Splits(Images(60), Images(33, seed=1))


def test_results_in_order_with_features_extracted_once(splits: Splits) -> None:
    backbone = Backbone().train()
    before, rng = state(backbone), torch.get_rng_state()
    results = evaluate(backbone, splits, ["linear-cached-v1", "knn-v1", "online"], to_float, batch_size=16)
    assert [result["protocol"] for result in results] == ["linear-cached-v1", "knn-v1", "online"]
    assert splits.train.asked == list(range(60))
    assert splits.test.asked == list(range(33))
    assert [result["n_test"] for result in results] == [33, 33, 33]
    assert [result["tabulated"] for result in results] == [True, True, False]
    assert all(result["seconds"] > 0 and result["precision"] == "fp32" for result in results)
    assert_unchanged(backbone, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in backbone.modules())
    expected = KNN()(
        extract_features(backbone, splits.train, to_float, batch_size=16),
        splits.train.labels,
        extract_features(backbone, splits.test, to_float, batch_size=16),
        splits.test.labels,
    )
    assert results[1]["metrics"] == expected


def test_results_other_processes_get_nothing(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of a pretended pair: it shares the passes (all of them here) and computes no number."""
    monkeypatch.setattr("ssl_bench.eval.features.gather_rows", lambda local, *_: local.repeat(9, 1)[:60])
    monkeypatch.setattr("ssl_bench.eval.run.check_features", lambda *_: None)
    monkeypatch.setattr(KNN, "__call__", lambda *_, **__: pytest.fail("computed on rank 1"))
    assert evaluate(Backbone(), splits, ["knn-v1"], to_float, rank=1, world_size=2, batch_size=8) == []


def test_online_looks_at_a_fixed_part(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Online, "limits", (30, 10))
    first = evaluate(Backbone(), splits, ["online"], to_float, seed=0)
    assert splits.train.asked == subset(60, 30).tolist()
    assert len(splits.test.asked) == 10
    assert first[0]["n_test"] == 10
    again = evaluate(Backbone(), splits, ["online"], to_float, seed=5)
    assert again[0]["metrics"] == first[0]["metrics"]


def test_online_learns_what_can_be_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 5
    x = torch.randn(5, 12, generator=generator)[y] + 0.3 * torch.randn(300, 12, generator=generator)
    metrics = Online()(x[:200], y[:200], x[200:], y[200:])
    assert metrics["top1"] > 95
    assert metrics["knn_top1"] > 95
    shuffled = Online()(x[:200], y[:200].roll(100)[torch.randperm(200, generator=generator)], x[200:], y[200:])
    assert shuffled["top1"] < 50


def test_online_bears_constant_features() -> None:
    x, y = torch.ones(40, 6), torch.arange(40) % 2
    assert Online()(x, y, x, y)["top1"] == 50


def test_unknown_name_lists_the_known_and_the_nearest(splits: Splits) -> None:
    with pytest.raises(ValueError, match="unknown protocol 'knn', did you mean 'knn-v1'") as caught:
        evaluate(Backbone(), splits, ["linear-cached-v1", "knn"], to_float)
    assert all(name in str(caught.value) for name in EVALUATORS)
    assert splits.train.asked == []


def test_names_are_the_keys() -> None:
    assert all(get_evaluator(name).name == name for name in EVALUATORS)


class Diverged(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


@pytest.mark.parametrize("name", ["knn-v1", "linear-cached-v1", "online"])
def test_a_diverged_model_is_refused_by_name(splits: Splits, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 60 of 60 train features are not finite: the model has diverged"):
        evaluate(Diverged(), splits, [name], to_float)
