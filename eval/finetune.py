"""The whole network trained on the labels, from the backbone's weights (`finetune-v1`)."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.eval.features import ImageSource, embed, eval_mode
from ssl_bench.eval.linear import INIT_STD, count_correct, holdout
from ssl_bench.eval.probe import Augment, Metrics, Probe


class Finetune:
    """`finetune-v1`: a copy of the backbone and a new linear head, trained together.

    SGD with Nesterov momentum 0.9, batch 256, 50 epochs, cosine to 0, weight decay 1e-4 on all parameters, random
    resized crop and flip; lr from {0.01, 0.03, 0.1} selected on a held-out tenth of train by the last epoch's accuracy,
    then trained again on all of train; the last epoch is tested. The head starts from N(0, 0.01), bias 0. Batch norm
    takes the batch's statistics in training. An epoch's last batch is short; one of a single image joins the batch
    before. Every process computes the same: the number of processes changes neither result nor time.
    """

    name = "finetune-v1"
    tabulated = True
    needs_augment = True
    lrs = (0.01, 0.03, 0.1)
    momentum = 0.9
    weight_decay = 1e-4
    epochs = 50
    batch_size = 256

    def __call__(self, probe: Probe) -> Metrics:
        """Trains once for each learning rate on nine tenths of train, once on all of it, and tests.

        Returns:
            "top1" and "top5" (percent; top5 is of at most C classes), the chosen "lr", "val_top1" (held-out accuracy of
            the choice) and "n_test".

        Raises:
            ValueError: no class has two train images, so that one could be held out, or every learning rate diverges.
        """
        if probe.augment is None:
            raise ValueError("augment must be a random resized crop with flip, got None")
        source, labels = probe.images("train"), probe.labels("train")
        part, held = holdout(labels)
        if len(held) == 0:
            raise ValueError(f"a class must have at least 2 train images, got {len(source)} of as many classes")
        val_top1 = []
        for lr in self.lrs:
            network = self._train(probe, probe.augment, part, lr)
            val_top1.append(_accuracy(probe, network, source, held)[0])
        best = max(range(len(self.lrs)), key=val_top1.__getitem__)  # the first of equal ones
        network = self._train(probe, probe.augment, torch.arange(len(source)), self.lrs[best])
        top1, top5 = _accuracy(probe, network, probe.images("test"), torch.arange(len(probe.images("test"))))
        if top1 < 0:
            raise ValueError(f"the network must be finite, got one that has diverged at every lr of {self.lrs}")
        return {
            "top1": top1,
            "top5": top5,
            "lr": self.lrs[best],
            "val_top1": val_top1[best],
            "n_test": len(probe.images("test")),
        }

    def _train(self, probe: Probe, augment: Augment, indices: Tensor, lr: float) -> nn.Sequential:
        """The network after the last epoch on these images; equal arguments give the same one."""
        source, device = probe.images("train"), torch.device(probe.device)
        labels = probe.labels("train")
        generator = torch.Generator().manual_seed(probe.seed)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(probe.seed)  # for dropout and the like; the caller's generators are restored
            backbone = copy.deepcopy(probe.backbone).requires_grad_(True).train()
            head = nn.Linear(_width(probe), probe.classes)
            with torch.no_grad():
                head.weight.copy_(INIT_STD * torch.randn(head.weight.shape, generator=generator))
                head.bias.zero_()
            network = nn.Sequential(backbone, head).to(device)
            optimizer = torch.optim.SGD(
                network.parameters(), lr=lr, momentum=self.momentum, nesterov=True, weight_decay=self.weight_decay
            )
            steps = len(self._batches(indices, generator=None))
            for epoch in range(self.epochs):
                batches = self._batches(indices, generator)
                for i, (batch, images) in enumerate(zip(batches, source.batches(batches), strict=True)):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (epoch * steps + i) / (steps * self.epochs)))
                    x = augment(images, augment.draw(len(batch), generator))
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast(device.type, torch.bfloat16, enabled=probe.precision == "bf16"):
                        logits = network(x)
                    optimizer.zero_grad(set_to_none=True)
                    F.cross_entropy(logits.float(), labels[batch.to(device)]).backward()
                    optimizer.step()
                if probe.on_progress is not None:
                    probe.on_progress(f"{self.name} lr {lr}", epoch + 1, self.epochs)
        return network

    def _batches(self, indices: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        """One epoch's batches, in a new order where there is a generator."""
        if generator is not None:
            indices = indices[torch.randperm(len(indices), generator=generator)]
        batches = list(indices.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm over one image of 1 x 1 pixels has no variance
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


def _width(probe: Probe) -> int:
    """The number of the backbone's features."""
    (images,) = probe.images("train").batches([torch.arange(min(2, len(probe.images("train"))))])
    with eval_mode(probe.backbone), torch.no_grad():
        return embed(probe.backbone, probe.transform(images), probe.precision).shape[1]


def _accuracy(probe: Probe, network: nn.Sequential, source: ImageSource, indices: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent in eval mode, without augmentation; -1 if a score is not finite."""
    batches = list(indices.split(probe.batch_size))
    correct = torch.zeros(2, dtype=torch.float64)
    with eval_mode(network), torch.no_grad():
        for batch, images in zip(batches, source.batches(batches), strict=True):
            logits = embed(network, probe.transform(images), probe.precision)
            if not bool(logits.isfinite().all()):
                return -1.0, -1.0
            labels = source.labels[batch].to(logits.device)
            correct += torch.stack([count_correct(logits, labels, k) for k in (1, 5)]).cpu()
    top1, top5 = (100 * correct / len(indices)).tolist()
    return top1, top5
