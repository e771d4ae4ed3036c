"""`evaluate`: names to results, with the features extracted once and nothing left changed."""

import inspect
import textwrap

import pytest
import torch
from eval_doubles import Backbone, Images, Splits, assert_unchanged, state, to_float
from torch import Tensor

import ssl_bench.eval
from ssl_bench.eval import EVALUATORS, KNN, Online, Probe, evaluate, extract_features, get_evaluator


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
    again = Probe.from_features(
        extract_features(backbone, splits.train, to_float, batch_size=16),
        splits.train.labels,
        extract_features(backbone, splits.test, to_float, batch_size=16),
        splits.test.labels,
    )
    assert results[1]["metrics"] == KNN()(again)


def test_results_other_processes_get_nothing(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of a pretended pair: it shares the passes (all of them here) and computes no number."""
    monkeypatch.setattr("ssl_bench.eval.features.gather_rows", lambda local, *_: local.repeat(9, 1)[:60])
    monkeypatch.setattr("ssl_bench.eval.knn.knn_predict", lambda *_: pytest.fail("computed on rank 1"))
    assert evaluate(Backbone(), splits, ["knn-v1"], to_float, rank=1, world_size=2, batch_size=8) == []


def test_online_looks_at_a_fixed_part(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Online, "train_images", 30)
    monkeypatch.setattr(Online, "test_images", 10)
    first = evaluate(Backbone(), splits, ["online"], to_float, seed=0)
    asked = list(splits.train.asked)
    assert len(asked) == 30
    assert asked == sorted(set(asked))
    assert len(splits.test.asked) == 10
    assert first[0]["n_test"] == 10
    splits.train.asked.clear()
    again = evaluate(Backbone(), splits, ["online"], to_float, seed=5)
    assert splits.train.asked == asked
    assert again[0]["metrics"] == first[0]["metrics"]


def test_online_learns_what_can_be_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 5
    x = torch.randn(5, 12, generator=generator)[y] + 0.3 * torch.randn(300, 12, generator=generator)
    metrics = Online()(Probe.from_features(x[:200], y[:200], x[200:], y[200:]))
    assert metrics["top1"] > 95
    assert metrics["knn_top1"] > 95
    wrong_y = y[:200].roll(100)[torch.randperm(200, generator=generator)]
    shuffled = Online()(Probe.from_features(x[:200], wrong_y, x[200:], y[200:]))
    assert shuffled["top1"] < 50


def test_online_bears_constant_features() -> None:
    x, y = torch.ones(40, 6), torch.arange(40) % 2
    assert Online()(Probe.from_features(x, y, x, y))["top1"] == 50


def test_unknown_name_lists_the_known_and_the_nearest(splits: Splits) -> None:
    with pytest.raises(ValueError, match="unknown evaluator 'knn'; did you mean 'knn-v1'") as caught:
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
    with pytest.raises(ValueError, match=f"{name}: train features must be finite, got 60 of 60 that are not"):
        evaluate(Diverged(), splits, [name], to_float)


class Spread:
    """A foreign evaluator: it needs no class, gives no top1, and does not care about processes."""

    name = "spread-v1"

    def __call__(self, probe: Probe) -> dict[str, float]:
        features = probe.features("test")
        return {"spread": features.std(dim=0).mean().item(), "seed": probe.seed, "labels": len(probe.labels("test"))}


def test_a_foreign_evaluator_is_one_class(splits: Splits) -> None:
    results = evaluate(Backbone(), splits, ["knn-v1", Spread(), Spread()], to_float, seed=3)
    metrics = results[1]["metrics"]
    assert metrics == results[2]["metrics"] == {"spread": metrics["spread"], "seed": 3, "labels": 33}
    assert results[1]["protocol"] == "spread-v1"
    assert results[1]["n_test"] == 33
    assert results[1]["tabulated"] is True
    assert 0 < results[1]["feature_seconds"] < results[0]["feature_seconds"]  # of the test images alone
    assert splits.test.asked == list(range(33))


def test_an_evaluator_can_take_images_and_a_subset(splits: Splits) -> None:
    class Brightness:
        name = "brightness-v1"
        tabulated = False

        def __call__(self, probe: Probe) -> dict[str, float]:
            part = probe.subset(train=20, test=5)
            (images,) = part.images("test").batches([torch.arange(5)])
            with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
                probe.images("val")  # type: ignore[arg-type]
            return {"mean": images.double().mean().item(), "n_test": len(images)}

    (result,) = evaluate(Backbone(), splits, [Brightness()], to_float)
    assert result["metrics"]["mean"] == splits.test.images[splits.test.asked].double().mean().item()
    assert (result["n_test"], result["feature_seconds"], result["tabulated"]) == (5, 0, False)


def test_metrics_must_be_plain_numbers(splits: Splits) -> None:
    class Tensors:
        name = "tensors-v1"

        def __call__(self, probe: Probe) -> dict[str, Tensor]:
            return {"top1": probe.features("test").mean()}

    with pytest.raises(ValueError, match="tensors-v1: top1 must be a plain number, got a Tensor"):
        evaluate(Backbone(), splits, [Tensors()], to_float)


def test_the_example_in_the_docstring_runs(splits: Splits) -> None:
    text = inspect.getdoc(ssl_bench.eval)
    assert text is not None
    example = textwrap.dedent(text.split("::\n\n", 1)[1])
    scope = {"Probe": Probe, "torch": torch, "evaluate": evaluate, "backbone": Backbone(), "dataset": splits}
    exec(example.replace("evaluate(", "results = evaluate("), scope | {"transform": to_float}, found := {})
    assert [result["protocol"] for result in found["results"]] == ["knn-v1", "nearest-mean-v1"]
    assert found["results"][1]["metrics"]["top1"] > 50
