"""Fine-tuning: the loop equal to a plain one with torch.optim.SGD, the selection, and a backbone left as it was."""

import copy
import math

import pytest
import torch
from eval_doubles import Backbone, Images, Shift, Splits, assert_unchanged, state, to_float
from torch import nn

from ssl_bench.eval import Probe, evaluate, holdout
from ssl_bench.eval.finetune import Finetune


class Short(Finetune):
    epochs = 3
    batch_size = 16
    lrs = (0.03, 0.3)


@pytest.fixture
def splits() -> Splits:
    return Splits(Images(65), Images(33, seed=1))  # 65 = 4 batches of 16 and one image, which joins the last


def plain(backbone: nn.Module, images: Images, indices: torch.Tensor, lr: float, seed: int) -> nn.Module:
    """The protocol written out, with LambdaLR for the cosine."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(copy.deepcopy(backbone), nn.Linear(6, 3)).train()
    with torch.no_grad():
        network[1].weight.copy_(0.01 * torch.randn(3, 6, generator=generator))
        network[1].bias.zero_()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    sizes = [16, 16, 16, 17] if len(indices) == 65 else [16] * (len(indices) // 16) + [len(indices) % 16]
    total = 3 * len(sizes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / total)))
    for _ in range(3):
        order = indices[torch.randperm(len(indices), generator=generator)]
        for batch in order.split(sizes):
            augment = Shift()
            x = augment(images.images[batch], augment.draw(len(batch), generator))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), images.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def top1(network: nn.Module, images: Images, indices: torch.Tensor) -> float:
    with torch.no_grad():
        found = network(to_float(images.images[indices])).argmax(dim=1)
    return 100 * (found == images.labels[indices]).double().mean().item()


def test_equals_a_plain_loop(splits: Splits) -> None:
    backbone = Backbone(dropout=0.0).train()
    before, rng = state(backbone), torch.get_rng_state()
    (result,) = evaluate(backbone, splits, [Short()], to_float, augment=Shift(), seed=5, batch_size=20)
    assert_unchanged(backbone, before)
    assert torch.equal(torch.get_rng_state(), rng)
    metrics = result["metrics"]
    part, held = holdout(splits.train.labels)
    val = [top1(plain(backbone, splits.train, part, lr, 5), splits.train, held) for lr in Short.lrs]
    chosen = Short.lrs[max(range(2), key=val.__getitem__)]
    network = plain(backbone, splits.train, torch.arange(65), chosen, 5)
    assert metrics == {
        "top1": pytest.approx(top1(network, splits.test, torch.arange(33))),
        "top5": 100,
        "lr": chosen,
        "val_top1": pytest.approx(max(val)),
        "n_test": 33,
    }
    ours = Short()._train(Probe(backbone, splits, to_float, augment=Shift(), seed=5), Shift(), torch.arange(65), chosen)
    for mine, theirs in zip(ours.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert metrics["top1"] > 60  # three colours


def test_the_protocols_numbers() -> None:
    protocol = Finetune()
    assert (protocol.lrs, protocol.momentum, protocol.weight_decay) == ((0.01, 0.03, 0.1), 0.9, 1e-4)
    assert (protocol.epochs, protocol.batch_size) == (50, 256)


def test_a_network_that_diverges_at_every_rate_is_said(splits: Splits) -> None:
    class Far(Short):
        lrs = (1e30,)

    with pytest.raises(ValueError, match=r"finetune-v1: the network must be finite, got one that has diverged"):
        evaluate(Backbone(), splits, [Far()], to_float, augment=Shift())
