"""knn-v1 against the plain computation, its ties, and what it refuses."""

import math
import sys

import pytest
import torch
from torch import Tensor

from ssl_bench.eval import KNN, Probe, knn_predict
from ssl_bench.eval.knn import KS, nearest


def reference(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> list[int]:
    """The definition, one query at a time in float64: stable sort, votes in order, lowest class among equals."""
    bank = bank.double() / bank.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    queries = queries.double() / queries.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    predictions = []
    for query in queries:
        cosine = bank @ query
        order = cosine.sort(descending=True, stable=True).indices[:k].tolist()
        votes = [0.0] * (int(labels.max()) + 1)
        for index in order:
            votes[int(labels[index])] += math.exp(float(cosine[index]) / 0.07)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 24, generator=generator)
    train_y, test_y = torch.arange(400) % 7, torch.arange(90) % 7
    train_x = centres[train_y] + 1.5 * torch.randn(400, 24, generator=generator)
    test_x = centres[test_y] + 1.5 * torch.randn(90, 24, generator=generator)
    return train_x, train_y, test_x, test_y


def test_equals_the_plain_computation(blobs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train_x, train_y, test_x, test_y = blobs
    predictions = knn_predict(train_x, train_y, test_x)
    metrics = KNN()(Probe.from_features(*blobs))
    for k in KS:
        expected = reference(train_x, train_y, test_x, k)
        assert predictions[k].tolist() == expected
        accuracy = 100 * sum(p == y for p, y in zip(expected, test_y.tolist(), strict=True)) / 90
        assert metrics[f"top1_k{k}"] == pytest.approx(accuracy)
    assert metrics["top1"] == metrics["top1_k20"]
    assert metrics["n_test"] == 90
    assert len({tuple(predictions[k].tolist()) for k in KS}) > 1  # the several k do differ here


def test_scale_of_features_does_not_matter(blobs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train_x, train_y, test_x, test_y = blobs
    scales = torch.rand(400, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled = Probe.from_features(train_x * scales, train_y, 7 * test_x, test_y)
    assert KNN()(scaled) == KNN()(Probe.from_features(*blobs))


def test_the_bank_is_found_in_itself(blobs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train_x, train_y, _, _ = blobs
    assert KNN()(Probe.from_features(train_x, train_y, train_x, train_y))["top1_k1"] == 100


@pytest.mark.parametrize("k", [1, 3, 10, 64, 200, 300])
def test_ties_go_to_the_lower_index(k: int) -> None:
    """Corners of a cube, each many times: every cosine is exact in float32 and most neighbours are tied."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[a, b, c, d] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for d in (-1, 1)]) / 2
    bank = corners[torch.randint(16, (300,), generator=generator)]
    cosines, indices = nearest(bank, corners, k)
    expected = (corners @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(cosines, expected.values[:, :k])


def test_collapsed_features_get_the_first_images_votes() -> None:
    """All features equal, or all zero: nearest are the first k by index, and the vote is theirs."""
    labels = torch.tensor([2, 2, 1] + [0] * 300)
    for features in (torch.full((303, 4), 0.5), torch.zeros(303, 4)):
        predictions = knn_predict(features, labels, features[:5])
        assert predictions[1].tolist() == [2] * 5
        assert predictions[20].tolist() == [0] * 5


def test_equal_votes_go_to_the_lower_class() -> None:
    bank = torch.tensor([[1.0, 0, 0, 0]] * 20)
    labels = torch.tensor([4, 1] * 10)
    assert knn_predict(bank, labels, bank[:3], (20,))[20].tolist() == [1, 1, 1]


def test_k_is_limited_to_the_bank() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 5, generator=generator), torch.randn(12, 5, generator=generator)
    labels = torch.arange(30) % 4
    metrics = KNN()(Probe.from_features(bank, labels, queries, torch.arange(12) % 4))
    assert knn_predict(bank, labels, queries)[200].tolist() == reference(bank, labels, queries, 30)
    assert set(metrics) == {"top1", "top1_k1", "top1_k10", "top1_k20", "top1_k200", "n_test"}


def test_deterministic_and_without_global_randomness(blobs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    rng = torch.get_rng_state()
    assert KNN()(Probe.from_features(*blobs, seed=0)) == KNN()(Probe.from_features(*blobs, seed=1))
    assert torch.equal(torch.get_rng_state(), rng)


X, Y = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:19], Y[:19], X, Y), "the train set must have at least 20 images, got 19"),
        ((X, Y[:5], X, Y), r"train labels must be \(24,\) as there are 24 images, got \(5,\)"),
        ((X, Y, X, Y[:5]), r"test labels must be \(24,\) as there are 24 images, got \(5,\)"),
        ((X, 0 * Y + 3, X, Y), r"train labels must be of at least 2 classes, got \[3\]"),
        ((X, Y, X[:, :2], Y), "test features must have 3 dimensions as train, got 2"),
        ((X.view(24, 3, 1), Y, X, Y), r"train features must be \(N, D\) with N >= 1, got \(24, 3, 1\)"),
        ((X, Y, X[:0], Y[:0]), r"test features must be \(N, D\) with N >= 1, got \(0, 3\)"),
        ((X, Y - 1, X, Y), "train labels must be integers >= 0, got torch.int64 from -1"),
        ((X, Y.float(), X, Y), "train labels must be integers >= 0, got torch.float32 from 0.0"),
        ((X, Y, X / 0, Y), "test features must be finite, got 24 of 24 that are not"),
    ],
)
def test_refusals(arguments: tuple[Tensor, Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        KNN()(Probe.from_features(*arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["cannot be imported", "runs out of memory"])
def test_where_faiss_fails_torch_finds_the_same_and_says_so(blobs, how, monkeypatch) -> None:
    import faiss

    expected = KNN()(Probe.from_features(*blobs))
    if how == "cannot be imported":
        monkeypatch.setitem(sys.modules, "faiss", None)
    else:
        monkeypatch.setattr(
            faiss, "IndexFlatIP", lambda _dim: _raise(RuntimeError("Error: 'err == cudaSuccess' failed"))
        )
    with pytest.warns(RuntimeWarning, match="knn-v1: faiss failed .*; searched by torch instead"):
        assert KNN()(Probe.from_features(*blobs)) == expected


def _raise(error: Exception) -> None:
    raise error
