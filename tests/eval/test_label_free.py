"""The label-free measures: each equal to its formula, right on known data, independent of how it is run."""

import numpy as np
import pytest
import torch
from eval_doubles import Backbone, Images, Shift, Splits, assert_unchanged, state, to_float
from torch import Tensor, nn

from ssl_bench.eval import Probe, evaluate
from ssl_bench.eval.alignment_uniformity import alignment, uniformity
from ssl_bench.eval.alpha_req import decay_exponent
from ssl_bench.eval.lidar import lidar
from ssl_bench.eval.linear_augmented import augmented_spaces
from ssl_bench.eval.pca_2d import PCA2D, main_plane
from ssl_bench.eval.rankme import RankMe, effective_rank, singular_values
from ssl_bench.recipe.compose import compose
from ssl_bench.training.build_data import _needs

NAMES = ["rankme-v1", "alpha-req-v1", "lidar-v1", "alignment-uniformity-v1"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(50, 12), (9, 12)])
def test_rankme_is_its_formula(shape: tuple[int, int]) -> None:
    x = randn(*shape) * torch.linspace(0.1, 3, 12)
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = singular / np.abs(singular).sum() + 1e-7
    assert effective_rank(singular_values(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_rankme_of_known_spectra() -> None:
    assert effective_rank(singular_values(torch.eye(7))) == pytest.approx(7, rel=1e-5)
    assert effective_rank(singular_values(torch.ones(30, 5))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(singular_values(torch.zeros(30, 5))) == pytest.approx(1, abs=1e-4)


def test_alpha_is_the_weighted_fit_of_the_covariances_spectrum() -> None:
    x = randn(400, 40).double() @ torch.diag(torch.linspace(4, 0.2, 40).double())
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy(), rowvar=False))[::-1]
    rank = np.arange(6, 41)
    slope, _ = np.polyfit(np.log(rank), np.log(eigenvalues[5:40]), 1, w=np.sqrt(1 / rank))
    assert decay_exponent(x) == pytest.approx(-slope, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float) -> None:
    basis, _ = torch.linalg.qr(randn(300, 150).double() - randn(300, 150).double().mean(dim=0))
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q  # orthonormal columns of mean 0
    x = basis * torch.arange(1, 151).double() ** (-alpha / 2)
    assert decay_exponent(x) == pytest.approx(alpha, rel=1e-6)


def test_alpha_of_few_directions_is_infinite_and_of_few_images_is_refused() -> None:
    assert decay_exponent(randn(50, 3) @ randn(3, 20)) == float("inf")
    with pytest.raises(ValueError, match=r"features must be \(N, D\) with N > 7 and D > 6, got \(50, 6\)"):
        decay_exponent(randn(50, 6))


def test_lidar_is_its_formula() -> None:
    z = randn(20, 5, 6) + 2 * randn(20, 1, 6, seed=1)
    z64 = z.double().numpy()
    means = z64.mean(axis=1)
    s_b = np.mean([np.outer(m - means.mean(axis=0), m - means.mean(axis=0)) for m in means], axis=0)
    s_w = np.mean([np.outer(v - means[i], v - means[i]) for i in range(20) for v in z64[i]], axis=0) + 1e-4 * np.eye(6)
    # The eigenvalues of S_w^-1/2 S_b S_w^-1/2 are those of S_w^-1 S_b.
    values = np.sort(np.linalg.eigvals(np.linalg.solve(s_w, s_b)).real)
    p = values / np.abs(values).sum() + 1e-7
    assert lidar(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-8)


def test_lidar_counts_the_directions_that_tell_images_apart() -> None:
    images = torch.zeros(200, 1, 10)
    images[..., :3] = 5 * randn(200, 1, 3)
    assert lidar(images + 0.1 * randn(200, 10, 10, seed=1)) == pytest.approx(3, abs=0.3)


def test_alignment_and_uniformity_are_their_formulas() -> None:
    x, y = randn(40, 7), randn(40, 7, seed=1)
    u, v = (nn.functional.normalize(z.double()) for z in (x, y))
    assert alignment(x, y) == pytest.approx((u - v).norm(dim=1).pow(2).mean().item(), rel=1e-12)
    expected = torch.pdist(u).pow(2).mul(-2).exp().mean().log().item()  # as in the paper's listing
    assert uniformity(x) == pytest.approx(expected, rel=1e-9)
    assert uniformity(x, rows=7) == pytest.approx(expected, rel=1e-9)
    assert alignment(x, x) == 0
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-12)


@pytest.fixture
def splits() -> Splits:
    return Splits(Images(60), Images(33, seed=1))


def test_results_without_a_top1_and_without_labels(splits: Splits) -> None:
    backbone = Backbone(dim=9)
    before = state(backbone)
    splits.train.labels = torch.zeros(60, dtype=torch.int64)  # of one class: nothing to learn from
    results = evaluate(backbone, splits, NAMES, to_float, augment=Shift(), batch_size=16)
    assert [set(result["metrics"]) - {"n_images"} for result in results] == [
        {"rankme"},
        {"alpha"},
        {"lidar"},
        {"alignment", "uniformity"},
    ]
    assert all(result["metrics"]["n_images"] == 60 for result in results)
    assert_unchanged(backbone, before)
    # Images of three colours with noise: one direction or two matter.
    assert 1 < results[0]["metrics"]["rankme"] < 9
    again = evaluate(backbone, splits, NAMES, to_float, augment=Shift(), batch_size=60)
    for one, other in zip(results, again, strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-3)


def test_they_need_neither_labels_nor_test_images(splits: Splits) -> None:
    splits.train.labels, splits.test = torch.full((60,), -1), Images(0)
    results = evaluate(Backbone(dim=9), splits, NAMES, to_float, augment=Shift(), batch_size=16)
    assert [result["n_test"] for result in results] == [None] * 4  # a record of 0 test images could not be read
    assert all(result["metrics"]["n_images"] == 60 for result in results)
    recipe = compose("pretrain", [f"eval.protocols=[{','.join(NAMES)}]", "eval.online_every_epochs=0"])
    assert _needs(recipe) == ("", False)
    assert _needs(compose("pretrain", ["eval.protocols=[rankme-v1,pca-2d-v1]", "eval.online_every_epochs=0"]))[1]


def test_the_embeddings_are_measured_where_there_is_a_projector(splits: Splits) -> None:
    backbone, projector = Backbone(dim=9), nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8)).train()
    before = state(projector)
    results = evaluate(backbone, splits, NAMES, to_float, augment=Shift(), projector=projector)
    assert {"rankme", "rankme_embeddings"} < set(results[0]["metrics"])
    assert {"uniformity", "uniformity_embeddings"} < set(results[3]["metrics"])
    assert_unchanged(projector, before)
    assert projector.training
    probe = Probe(backbone, splits, to_float)
    with torch.no_grad():
        z = projector.eval()(probe.features("train"))
    assert results[0]["metrics"]["rankme_embeddings"] == pytest.approx(effective_rank(singular_values(z)), rel=1e-5)


def test_a_fixed_part_of_a_large_set(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_bench.eval.rankme.IMAGES", 20)
    probe = Probe(Backbone(dim=9), splits, to_float)
    assert RankMe()(probe)["n_images"] == 20
    assert len(set(splits.train.asked)) == 20
    assert splits.test.asked == []


def test_each_image_gets_the_same_views_whatever_the_batch(splits: Splits) -> None:
    views = [
        augmented_spaces(Probe(Backbone(), splits, to_float, augment=Shift(), batch_size=size, seed=3), 3)[""]
        for size in (7, 60)
    ]
    assert views[0].shape == (3, 60, 6)
    torch.testing.assert_close(*views)
    assert not torch.allclose(views[0][0], views[0][1])


def test_the_main_plane_is_that_of_the_covariance() -> None:
    x = randn(50, 12) * torch.linspace(0.1, 3, 12) + 5
    plane, shares = main_plane(x)
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy(), rowvar=False))
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    np.testing.assert_allclose(np.abs(plane.numpy()), np.abs(centred @ vectors[:, [-1, -2]]), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(shares.numpy(), values[[-1, -2]] / values.sum(), rtol=1e-9)
    largest = plane.gather(0, plane.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()  # the same picture of the same features, whatever the decomposition's signs
    assert torch.allclose(main_plane(-x + 3)[0].abs(), plane.abs())


def test_the_main_plane_of_fewer_directions() -> None:
    plane, shares = main_plane(torch.ones(6, 4))
    assert plane.abs().max() == shares.max() == 0
    plane, shares = main_plane(randn(6, 1))
    assert shares.tolist() == [pytest.approx(1), 0]
    assert plane[:, 1].abs().max() == 0


def test_a_picture_of_fixed_test_images_with_their_labels(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_bench.eval.pca_2d.IMAGES", 20)
    backbone = Backbone(dim=9)
    (result,) = evaluate(backbone, splits, ["pca-2d-v1"], to_float, batch_size=7)
    assert result["n_test"] == 20
    assert type(result["metrics"]) is dict
    metrics, points = result["metrics"], result["points"]
    assert metrics["explained"] == pytest.approx(metrics["explained_1"] + metrics["explained_2"])
    assert 0 < metrics["explained_2"] <= metrics["explained_1"] < 100
    assert splits.train.asked == []
    columns = {name: list(map(int, points[name].split())) for name in ("x", "y", "label")}
    assert columns["label"] == [int(splits.test.labels[index]) for index in splits.test.asked]
    plane, _ = main_plane(Probe(backbone, splits, to_float).subset(train=0, test=20).features("test"))
    for axis, name in enumerate("xy"):
        assert (torch.tensor(columns[name]) * points["scale"] / 1000).tolist() == pytest.approx(
            plane[:, axis].tolist(), abs=points["scale"] / 500
        )
    assert max(map(abs, columns["x"] + columns["y"])) == 1000
    splits.test.labels = torch.full((33,), -1)
    assert "label" not in evaluate(backbone, splits, [PCA2D()], to_float)[0]["points"]
