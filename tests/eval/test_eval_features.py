"""Features of a frozen backbone: each image once, on any number of processes, and nothing else touched."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eval_doubles import Backbone, Images, Shift, Splits, assert_unchanged, state, to_float
from torch import Tensor, nn
from torchrun import torchrun

from ssl_bench.eval import Probe, evaluate, extract_features
from ssl_bench.eval.features import eval_mode, gather_rows, shard
from ssl_bench.eval.linear_augmented import LINEAR_AUG, RELEASED_PROBE

N = 23  # not divisible by 2 or 3 processes, nor by the batch of 4
LABEL_FREE = ["rankme-v1", "alpha-req-v1", "lidar-v1", "alignment-uniformity-v1"]
SMALL_PROBES = [
    replace(LINEAR_AUG, name="aug", epochs=3, lr=10.0, batch_size=10),  # batches of 10, 10, and 3
    replace(RELEASED_PROBE, name="released", epochs=3, lr=10.0, batch_size=8, replicas=2),
]


def test_equals_the_plain_forward_pass() -> None:
    source, backbone = Images(N), Backbone()
    features = extract_features(backbone, source, to_float, batch_size=4)
    with torch.no_grad():
        expected = backbone.eval()(to_float(source.images))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected)
    assert source.asked == list(range(N))


def test_a_subset_is_fixed_and_in_order() -> None:
    splits, backbone = Splits(Images(N), Images(10, seed=1)), Backbone()
    probe = Probe(backbone, splits, to_float)
    part = probe.subset(train=7, test=99)
    features = part.features("train")
    chosen = list(splits.train.asked)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 7
    torch.testing.assert_close(features, extract_features(backbone, splits.train, to_float)[chosen])
    assert torch.equal(part.labels("train"), splits.train.labels[chosen])
    assert part.features("test") is probe.features("test")  # no more images than that: the whole split
    splits.train.asked.clear()
    assert torch.equal(Probe(backbone, splits, to_float, seed=9).subset(train=7, test=3).features("train"), features)
    assert splits.train.asked == chosen  # whatever the seed


def test_backbone_modes_and_global_rng_are_left_alone() -> None:
    backbone = Backbone().train()
    backbone.conv.eval()  # a mixture of modes must come back as it was
    before, rng = state(backbone), torch.get_rng_state()
    extract_features(backbone, Images(N), to_float, batch_size=4)
    assert_unchanged(backbone, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in backbone.modules()] == [True, False, True, True]
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    backbone = Backbone().train()
    with pytest.raises(RuntimeError, match="stop"), eval_mode(backbone):
        raise RuntimeError("stop")
    assert all(module.training for module in backbone.modules())


def test_bf16_gives_float32_features_close_to_fp32() -> None:
    source, backbone = Images(N), Backbone()
    full = extract_features(backbone, source, to_float)
    half = extract_features(backbone, source, to_float, precision="bf16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_an_outer_autocast_does_not_leak_in() -> None:
    source, backbone = Images(N), Backbone()
    expected = extract_features(backbone, source, to_float)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract_features(backbone, source, to_float), expected)


def test_progress_counts_batches() -> None:
    seen: list[tuple[str, int, int]] = []
    extract_features(Backbone(), Images(N), to_float, batch_size=10, on_progress=lambda *event: seen.append(event))
    assert seen == [("features", 1, 3), ("features", 2, 3), ("features", 3, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(Backbone(), Images(N), to_float, **arguments)


def test_refuses_a_backbone_without_pooling() -> None:
    with pytest.raises(ValueError, match=r"must return \(n, D\) features, got \(23, 4, 6, 6\)"):
        extract_features(nn.Conv2d(3, 4, 3), Images(N), to_float)


def test_a_lost_image_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="23 images must give as many features, got 22"):
        extract_features(Backbone(), Images(N, lose=1), to_float)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_shards_cover_everything_once(world_size: int) -> None:
    items = list(range(6))
    parts = [items[shard(6, rank, world_size)] for rank in range(world_size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


class Everywhere:
    """An evaluator that does not look at which process it is on."""

    name = "everywhere-v1"

    def __call__(self, probe: Probe) -> dict[str, float]:
        return {"mean": probe.features("train").mean().item(), "test": probe.features("test").std().item()}


def sharded() -> dict[str, Any]:
    """In each of several processes: the features over all, alone, and what a wrong count says."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    alone = Images(N)
    results: dict[str, Any] = {"alone": extract_features(Backbone(), alone, to_float, batch_size=4)}
    for batch_size in (4, 16):  # of 16: two batches, so the third process has none
        source = Images(N)
        features = extract_features(
            Backbone(), source, to_float, batch_size=batch_size, rank=rank, world_size=world_size
        )
        results[f"features{batch_size}"], results[f"asked{batch_size}"] = features, source.asked
    settings: dict[str, Any] = {"batch_size": 4, "rank": rank, "world_size": world_size}
    try:
        extract_features(Backbone(), Images(N, lose=1 if rank == 1 else 0), to_float, **settings)
    except RuntimeError as error:
        results["error"] = str(error)
    try:
        gather_rows(torch.zeros(2, 3 + rank), [2] * world_size, "cpu")
    except RuntimeError as error:
        results["width_error"] = str(error)
    splits = Splits(Images(N), Images(10, seed=1))
    evaluators = ["knn-v1", "online", Everywhere()]
    for where, world in (("alone", {}), ("over all", {"rank": rank, "world_size": world_size})):
        found = evaluate(Backbone(), splits, evaluators, to_float, batch_size=4, **world)
        results[f"evaluate {where}"] = [result["metrics"] for result in found]
    try:
        diverged = Backbone()
        nn.init.constant_(diverged.conv.weight, torch.nan)
        evaluate(diverged, splits, ["knn-v1"], to_float, rank=rank, world_size=world_size)
    except ValueError as error:
        results["diverged"] = str(error)
    projector = nn.Linear(9, 8, bias=False)
    nn.init.eye_(projector.weight)
    for where, world in (("alone", {}), ("over all", {"rank": rank, "world_size": world_size})):
        label_free: dict[str, Any] = {"augment": Shift(), "projector": projector, "batch_size": 16, **world}
        found = evaluate(Backbone(dim=9), splits, LABEL_FREE, to_float, **label_free)
        results[f"label-free {where}"] = {result["protocol"]: result["metrics"] for result in found}
    for probe in SMALL_PROBES:
        for where, world in (("alone", {}), ("over all", {"rank": rank, "world_size": world_size})):
            metrics = probe(Probe(Backbone(dropout=0.0), splits, to_float, augment=Shift(), batch_size=4, **world))
            results[f"{probe.name} {where}"] = metrics
    return results


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_equal_one(world_size: int, tmp_path: Path) -> None:
    results = torchrun(sharded, world_size, tmp_path)
    alone: Tensor = results[0]["alone"]
    assert alone.shape == (N, 6)
    assert results[0]["evaluate over all"] == results[0]["evaluate alone"]
    assert all(result["evaluate over all"] == [] for result in results[1:])
    label_free = results[0]["label-free over all"]
    assert label_free == {
        name: pytest.approx(metrics, rel=1e-4) for name, metrics in results[0]["label-free alone"].items()
    }
    assert list(label_free) == LABEL_FREE
    for result in results:
        assert result["diverged"].startswith("knn-v1: train features must be finite, got 23 of 23")
        assert torch.equal(result["features4"], alone)  # bitwise: the batches are the same ones
        torch.testing.assert_close(result["features16"], alone)
        assert re.fullmatch(r"process 1 must bring \d+ rows of 6 dimensions, got \d+ of 6", result["error"])
        assert f"process 0 must bring 2 rows of {2 + world_size} dimensions, got 2 of 3" in result["width_error"]
        for probe in SMALL_PROBES:
            assert result[f"{probe.name} over all"] == results[0][f"{probe.name} alone"]
    for batch_size in (4, 16):
        assert [i for result in results for i in result[f"asked{batch_size}"]] == list(range(N))
