"""The probes on augmented images against plain torch loops, their faults on purpose, and what they leave alone."""

import copy
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from eval_doubles import Backbone, Images, Shift, Splits, assert_unchanged, state, to_float
from torch import Tensor, nn

from ssl_bench.eval import EVALUATORS, AugmentedProbe, Probe, evaluate
from ssl_bench.eval.linear import Heads
from ssl_bench.eval.linear_augmented import (
    LINEAR_AUG,
    PAPER_PROBE,
    RELEASED_PROBE,
    SINGLE_FAULTS,
    schedule_factor,
)

EPOCHS, BATCH = 6, 20


@pytest.fixture
def splits() -> Splits:
    return Splits(Images(50, classes=6), Images(147, classes=6, seed=1))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Heads]:
    """The heads that probes train during a test."""
    heads: list[Heads] = []
    train = AugmentedProbe._train

    def remember(self: AugmentedProbe, *arguments: Any) -> Heads:
        heads.append(train(self, *arguments))
        return heads[-1]

    monkeypatch.setattr(AugmentedProbe, "_train", remember)
    return heads


def assert_same_head(heads: Heads, head: nn.Linear) -> None:
    torch.testing.assert_close(heads.weight[0].T, head.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(heads.bias[0, 0], head.bias.detach(), rtol=1e-3, atol=1e-4)


def plain_loop(probe: AugmentedProbe, splits: Splits, seed: int) -> tuple[nn.Linear, nn.Module, torch.Generator]:
    """The training as anybody would write it: nn.Linear, autograd, torch.optim.SGD and torch's own scheduler."""
    backbone = Backbone(8, dropout=0.0).train(probe.train_mode)
    generator = torch.Generator().manual_seed(seed)
    head, optimizer, scheduler = nn.Linear(8, 6), None, None
    for _ in range(probe.epochs):
        for index in torch.randperm(50, generator=generator).split(probe.batch_size):
            x = Shift()(splits.train.images[index], Shift().draw(len(index), generator))
            with torch.no_grad():
                pieces = x.tensor_split(probe.replicas) if probe.train_mode else [x]
                features = torch.cat([backbone(piece) for piece in pieces])
            if optimizer is None:
                with torch.no_grad():
                    head.weight.copy_(0.01 * torch.randn(8, 1, 6, generator=generator)[:, 0].T)
                    head.bias.zero_()
                optimizer = torch.optim.SGD(
                    head.parameters(), lr=probe.lr * BATCH / 256, momentum=0.9, weight_decay=probe.weight_decay
                )
                period = probe.epochs * 3 if probe.schedule == "step" else probe.epochs
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
            assert scheduler is not None
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), splits.train.labels[index]).backward()
            optimizer.step()
            if probe.schedule != "epoch":
                scheduler.step()
        if probe.schedule == "epoch":
            assert scheduler is not None
            scheduler.step()
    return head, backbone, generator


def on(splits: Splits, backbone: nn.Module | None = None, **settings: Any) -> Probe:
    return Probe(backbone or Backbone(8, dropout=0.0), splits, to_float, augment=Shift(), **settings)


def small(probe: AugmentedProbe) -> AugmentedProbe:
    return replace(probe, epochs=EPOCHS, batch_size=BATCH, lr=6.0)


@pytest.mark.parametrize("probe", [LINEAR_AUG, PAPER_PROBE], ids=lambda probe: probe.name)
def test_sound_probes_equal_a_plain_loop(probe: AugmentedProbe, splits: Splits, trained: list[Heads]) -> None:
    probe = small(probe)
    head, backbone, _ = plain_loop(probe, splits, seed=4)
    with torch.no_grad():
        logits = head(backbone.eval()(to_float(splits.test.images)))
    metrics = probe(on(splits, seed=4, batch_size=8))
    assert_same_head(trained[0], head)
    ranks = (logits.argsort(dim=1, descending=True) == splits.test.labels[:, None]).int().argmax(dim=1)
    assert metrics["top1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert metrics["n_test"] == 147
    assert 25 < metrics["top1"] < 100  # neither chance nor trivial


def test_released_probe_has_the_released_faults(splits: Splits, trained: list[Heads]) -> None:
    """Batch norm over 1/R of a batch, a random augmentation in the test, 1/R of the test set, a mean over batches."""
    probe = small(RELEASED_PROBE)
    head, backbone, generator = plain_loop(probe, splits, seed=4)
    assert backbone.training
    tested = torch.randperm(147, generator=generator)[:37]  # a quarter, rounded up
    shares = []
    for index in tested.split(5):  # a process's batch: 20 / 4 images, the last one short
        x = Shift()(splits.test.images[index], Shift().draw(len(index), generator))
        with torch.no_grad():
            hits = head(backbone(x)).argmax(dim=1) == splits.test.labels[index]
        shares.append(hits.double().mean())
    metrics = probe(on(splits, seed=4))
    assert_same_head(trained[0], head)
    assert metrics["top1"] == pytest.approx(100 * torch.stack(shares).mean().item())
    assert metrics["n_test"] == 37


@pytest.mark.parametrize(
    "sound", [{"train_mode": False}, {"augmented_test": False}, {"partial_test": False}, {"schedule": "step"}]
)
def test_each_fault_can_be_mended_alone(sound: dict[str, Any], splits: Splits, trained: list[Heads]) -> None:
    probe = small(RELEASED_PROBE)
    faulty = probe(on(splits, seed=4))
    mended = replace(probe, **sound)(on(splits, seed=4))
    assert mended["n_test"] == (147 if "partial_test" in sound else 37)
    if "train_mode" in sound or "schedule" in sound:  # what concerns the training; the others the test alone
        assert not torch.allclose(trained[0].weight, trained[1].weight, rtol=0.01)
    else:
        assert torch.equal(trained[0].weight, trained[1].weight)
        assert mended != faulty


def test_schedules_against_torch() -> None:
    def torch_schedule(period: int, steps: int, every: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
        factors = []
        for step in range(steps):
            factors.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (step + 1) % every == 0:
                scheduler.step()
        return factors

    for kind, period, every in (("step", 100, 1), ("epoch", 20, 5), ("released", 20, 1)):
        ours = [schedule_factor(kind, step, steps_per_epoch=5, epochs=20) for step in range(100)]
        assert ours == pytest.approx(torch_schedule(period, 100, every), abs=1e-9), kind
    assert schedule_factor("released", 40, steps_per_epoch=5, epochs=20) == 1  # back at the peak after two "periods"


def test_protocols_are_what_their_names_say() -> None:
    """A protocol's defaults never change in place: this test changes only when a name is added."""
    common = {"lr": 0.3, "batch_size": 256, "momentum": 0.9, "epochs": 100}
    for probe in (LINEAR_AUG, PAPER_PROBE, RELEASED_PROBE):
        assert {key: getattr(probe, key) for key in common} == common
    switches = ("weight_decay", "schedule", "train_mode", "augmented_test", "partial_test", "replicas")
    assert [getattr(LINEAR_AUG, key) for key in switches] == [0.0, "step", False, False, False, 1]
    assert [getattr(PAPER_PROBE, key) for key in switches] == [1e-6, "epoch", False, False, False, 1]
    assert [getattr(RELEASED_PROBE, key) for key in switches] == [5e-4, "released", True, True, True, 4]


def test_every_difference_of_the_released_probe_stands_alone_once() -> None:
    kinds = [field.name for field in fields(AugmentedProbe) if field.name not in ("name", "replicas")]
    changed = []
    for probe in SINGLE_FAULTS:
        (one,) = [key for key in kinds if getattr(probe, key) != getattr(LINEAR_AUG, key)]
        assert getattr(probe, one) == getattr(RELEASED_PROBE, one)
        assert probe.name == f"linear-aug-v1+{one.replace('_', '-')}"
        assert probe.replicas == (RELEASED_PROBE.replicas if one in ("train_mode", "partial_test") else 1)
        assert EVALUATORS[probe.name] is probe
        changed.append(one)
    assert sorted(changed) == sorted(key for key in kinds if getattr(RELEASED_PROBE, key) != getattr(LINEAR_AUG, key))


@pytest.mark.parametrize("probe", [LINEAR_AUG, RELEASED_PROBE], ids=lambda probe: probe.name)
def test_backbone_and_global_rng_are_left_alone(probe: AugmentedProbe, splits: Splits) -> None:
    backbone = Backbone().train()  # with dropout, which train mode draws for
    backbone.norm.eval()
    before, rng = state(backbone), torch.get_rng_state()
    first = small(probe)(on(splits, backbone))
    assert_unchanged(backbone, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in backbone.modules()] == [True, True, False, True]
    torch.rand(3)
    assert small(probe)(on(splits, copy.deepcopy(backbone))) == first


def test_through_evaluate_with_progress(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "linear-aug-v1", small(LINEAR_AUG))
    seen: list[tuple[str, int, int]] = []
    results = evaluate(
        Backbone(),
        splits,
        ["linear-aug-v1"],
        to_float,
        augment=Shift(),
        seed=4,
        on_progress=lambda *event: seen.append(event),
    )
    assert results[0]["metrics"] == small(LINEAR_AUG)(on(splits, Backbone(), seed=4))
    assert results[0]["feature_seconds"] == 0
    assert seen[-1] == ("linear-aug-v1", EPOCHS, EPOCHS)


def test_refusals(splits: Splits) -> None:
    with pytest.raises(ValueError, match=r"linear-aug-v1: augment must be .*, got None"):
        evaluate(Backbone(), splits, ["knn-v1", "linear-aug-v1"], to_float)
    assert splits.train.asked == []
    with pytest.raises(ValueError, match=r"train labels must be of at least 2 classes, got \[0\]"):
        small(LINEAR_AUG)(on(Splits(Images(20, classes=1), splits.test)))

    class Diverged(Backbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.inf

    with pytest.raises(ValueError, match="features must be finite, got a first batch that is not"):
        small(LINEAR_AUG)(on(splits, Diverged()))
