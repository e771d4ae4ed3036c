"""Linear probes on freshly augmented images, the backbone run at every step (`linear-aug-v1` and two reproductions)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_bench.eval.base import Augment, ImageDataset, ImageSource, Metrics, Progress, Transform, count_correct
from ssl_bench.eval.features import Precision, embed, frozen, gather_rows, shard
from ssl_bench.eval.linear import Heads

# What the cosine counts. "step": once from 1 to 0 over all steps. "epoch": the same, constant within an epoch.
# "released": over `epochs` *steps* and back up, again and again (a schedule made for epochs but stepped per batch).
Schedule = Literal["step", "epoch", "released"]

Prepared = Callable[[Tensor, slice], Tensor]  # the uint8 images of a slice of a batch to the backbone's input
Prepare = Callable[[int], Prepared]  # given the size of the whole batch, for which it draws what is random


def schedule_factor(kind: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate's multiplier at a step, counted from 0."""
    turns = {"step": step / (steps_per_epoch * epochs), "epoch": step // steps_per_epoch / epochs}
    return 0.5 * (1 + math.cos(math.pi * turns.get(kind, step / epochs)))


@dataclass(frozen=True)
class AugmentedProbe:
    """A linear head trained by SGD on augmented images, every difference between three protocols a named switch.

    All of them: cross-entropy, SGD with momentum, each epoch a permutation whose last batch is short, weights from
    N(0, 0.01), bias 0, the last epoch's head reported, one head. The head and all of its randomness are computed
    alike on every process; only the backbone's passes are divided, so that the number of processes changes nothing.

    Args:
        name: the protocol's name and version.
        lr: peak learning rate per 256 images; scaled by the batch actually used.
        batch_size: images per step; a smaller train set is one batch.
        momentum: in [0, 1).
        weight_decay: L2 factor on weight and bias; 0 for none.
        epochs: passes over the train set.
        schedule: see `Schedule`.
        train_mode: run the backbone in train mode, so that batch norm uses the batch's own statistics, in training
            and in the test. A fault, kept for a reproduction.
        augmented_test: augment the test images as the train images. A fault, likewise.
        partial_test: test on a random 1/replicas of the test set, and average over batches instead of images, the
            short last one counting as much as any. A fault, likewise.
        replicas: R >= 1, the processes that the reproduced run had: in train mode batch norm sees 1/R of a batch.
    """

    name: str
    lr: float = 0.3
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 100
    schedule: Schedule = "step"
    train_mode: bool = False
    augmented_test: bool = False
    partial_test: bool = False
    replicas: int = 1
    inputs: Literal["images"] = "images"
    tabulated: bool = True
    limits: None = None

    def __call__(
        self,
        backbone: nn.Module,
        dataset: ImageDataset,
        transform: Transform,
        augment: Augment,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        batch_size: int = 512,
        rank: int = 0,
        world_size: int = 1,
        on_progress: Progress | None = None,
    ) -> Metrics:
        """Trains the head and tests it. Every process must call it; each gets the same metrics.

        Args:
            backbone: images to features; a copy is used, the caller's own stays as it is, bit for bit.
            dataset: train and test splits, on the device.
            transform: the test transform.
            augment: the training augmentation.
            seed: of the head's weights, the batch order and the augmentation.
            device: where the backbone is.
            precision: of the backbone's passes.
            batch_size: images per pass in the test; it does not change the result but by rounding, except in the
                reproduction of a per-batch average, which takes the protocol's own batch.
            rank: this process.
            world_size: the number of processes.
            on_progress: called with (name, epochs done, epochs).

        Returns:
            "top1", "top5" (of at most C classes) in percent, and "n_test", the number of images tested.

        Raises:
            ValueError: if the train labels are all of one class or a feature is not finite (the model has diverged).
        """
        labels = dataset.train.labels
        if len(labels) == 0 or int(labels.min()) == int(labels.max()):
            raise ValueError(f"{self.name}: at least 2 classes are needed, got {len(labels.unique())}")
        backbone = copy.deepcopy(backbone) if self.train_mode else backbone  # train mode moves running statistics
        generator = torch.Generator().manual_seed(seed)
        passes = _Passes(backbone, device, precision, rank, world_size, self.train_mode)

        def augmented(n: int) -> Prepared:
            params = augment.draw(n, generator)
            return lambda images, part: augment(images, {key: value[part] for key, value in params.items()})

        def plain(_: int) -> Prepared:
            return lambda images, _: transform(images)

        devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
        with frozen(backbone), torch.random.fork_rng(devices=devices, enabled=self.train_mode):
            if self.train_mode:
                torch.manual_seed(seed)  # for dropout and the like; the caller's generators come back as they were
                backbone.train()
            heads = self._train(passes, dataset.train, augmented, generator, on_progress)
            prepare = augmented if self.augmented_test else plain
            return self._test(passes, heads, dataset.test, prepare, generator, batch_size)

    def _train(
        self,
        passes: "_Passes",
        source: ImageSource,
        prepare: Prepare,
        generator: torch.Generator,
        on_progress: Progress | None,
    ) -> Heads:
        size = min(self.batch_size, len(source))
        steps_per_epoch = math.ceil(len(source) / size)
        pieces = self.replicas if self.train_mode else passes.world_size
        heads: Heads | None = None
        for epoch in range(self.epochs):
            batches = torch.randperm(len(source), generator=generator).split(size)
            for i, x in enumerate(passes(source, batches, pieces, prepare)):
                heads = heads or self._heads(x, int(source.labels.max()) + 1, size, generator)
                step = epoch * steps_per_epoch + i
                y = source.labels[batches[i]].to(x.device, non_blocking=True)
                heads.step(x[None], y[None], schedule_factor(self.schedule, step, steps_per_epoch, self.epochs))
            if on_progress is not None:
                on_progress(self.name, epoch + 1, self.epochs)
        assert heads is not None
        if not bool(heads.finite().all()):
            raise ValueError(f"{self.name}: the head is not finite after {self.epochs} epochs: it has diverged")
        return heads

    def _heads(self, x: Tensor, classes: int, size: int, generator: torch.Generator) -> Heads:
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.name}: the first batch's features are not finite: the model has diverged")
        return Heads(
            x.shape[1],
            classes,
            lrs=[self.lr * size / 256],
            weight_decays=[self.weight_decay],
            generators=[generator],
            momentum=self.momentum,
            device=x.device,
        )

    def _test(
        self,
        passes: "_Passes",
        heads: Heads,
        source: ImageSource,
        prepare: Prepare,
        generator: torch.Generator,
        batch_size: int,
    ) -> Metrics:
        indices, pieces = torch.arange(len(source)), passes.world_size
        if self.partial_test:
            indices = torch.randperm(len(source), generator=generator)[: math.ceil(len(source) / self.replicas)]
        if self.train_mode or self.partial_test:  # a batch of one process of the reproduced run
            batch_size, pieces = max(1, self.batch_size // self.replicas), 1
        batches = indices.split(batch_size)
        hits = []
        for batch, x in zip(batches, passes(source, batches, pieces, prepare), strict=True):
            y, logits = source.labels[batch].to(x.device), heads.logits(x[None])[0, 0]
            hits.append(torch.stack([count_correct(logits, y, k) for k in (1, 5)]))
        correct = torch.stack(hits).cpu()  # (batches, 2)
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        mean = (correct / sizes[:, None]).mean(dim=0) if self.partial_test else correct.sum(dim=0) / len(indices)
        top1, top5 = (100 * mean).tolist()
        return {"top1": top1, "top5": top5, "n_test": len(indices)}


class _Passes:
    """The backbone's passes over all processes: each takes part of every batch, and each gets the whole back.

    A batch is cut into contiguous pieces, of which each process takes some, in order. In train mode a piece is what
    one process of the reproduced run saw, and has a pass of its own; in eval mode it is just a process's part.
    """

    def __init__(
        self,
        backbone: nn.Module,
        device: torch.device | str,
        precision: Precision,
        rank: int,
        world_size: int,
        train_mode: bool,
    ) -> None:
        self.backbone, self.device, self.precision = backbone, device, precision
        self.rank, self.world_size, self.train_mode = rank, world_size, train_mode

    def _share(self, n: int, pieces: int) -> tuple[slice, list[int], list[int]]:
        """This process's part of a batch of n, the sizes of its pieces, and the images that each process has."""
        sizes = [n // pieces + (i < n % pieces) for i in range(pieces)]
        owned = [sizes[shard(pieces, rank, self.world_size)] for rank in range(self.world_size)]
        counts = [sum(own) for own in owned]
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank]), owned[self.rank], counts

    def __call__(
        self,
        source: ImageSource,
        batches: Sequence[Tensor],
        pieces: int,
        prepare: Prepare,
    ) -> Iterator[Tensor]:
        """The (n, D) features of each batch, on every process.

        Args:
            source: the split.
            batches: (n,) int64 indices of each batch.
            pieces: into how many a batch is cut; below the number of processes, some have none.
            prepare: called once per batch, in order, with its size (here what is random is drawn, for the whole
                batch), gives what turns the uint8 images of a slice of the batch into the backbone's input.
        """
        shares = [self._share(len(batch), pieces) for batch in batches]
        own = [batch[part] for batch, (part, _, _) in zip(batches, shares, strict=True)]
        stream = iter(source.batches([indices for indices in own if len(indices)]))
        for batch, (part, sizes, counts) in zip(batches, shares, strict=True):
            turn = prepare(len(batch))
            features = torch.empty(0, 0, device=self.device)
            if counts[self.rank]:
                inputs = turn(next(stream), part)
                passes = inputs.split(sizes) if self.train_mode else (inputs,)
                features = torch.cat([embed(self.backbone, piece, self.precision) for piece in passes if len(piece)])
            yield gather_rows(features, counts, self.device) if self.world_size > 1 else features


LINEAR_AUG = AugmentedProbe("linear-aug-v1")

# The paper (section 5): SGD with a cosine over 100 epochs "as implemented by BT authors", whose evaluate.py
# (facebookresearch/barlowtwins, commit 8e8d284) gives the rest: lr 0.3, batch 256, momentum 0.9, weight decay 1e-6,
# the cosine stepped once per epoch, the backbone in eval mode, the test images whole.
PAPER_PROBE = AugmentedProbe("paper-probe", weight_decay=1e-6, schedule="epoch")

# The released code (KhoiDOO/tvlars, commit 89c3291, self_sl.py and dataset/cl.py), faults included: CosineAnnealingLR
# with T_max = epochs is stepped per batch; `clf_model.eval()` is never called and its batch norm not synchronised;
# `cl_test_transform` crops and flips at random; only rank 0's part of a DistributedSampler over the test set is
# tested, and accuracies are averaged per batch; the weight decay is the pretraining's (`--wd`, 5e-4 by default). Four
# processes: the paper's Tiny ImageNet accuracies are multiples of 1/2,500.
RELEASED_PROBE = AugmentedProbe(
    "released-probe",
    weight_decay=5e-4,
    schedule="released",
    train_mode=True,
    augmented_test=True,
    partial_test=True,
    replicas=4,
)

# Each of the released probe's differences alone, in the sound probe: which of them explains which part of the gap.
# They need no new run: `ssl-bench evaluate RUN` adds their numbers to one that has ended.
SINGLE_FAULTS = (
    replace(LINEAR_AUG, name="linear-aug-v1+weight-decay", weight_decay=RELEASED_PROBE.weight_decay),
    replace(LINEAR_AUG, name="linear-aug-v1+schedule", schedule=RELEASED_PROBE.schedule),
    replace(LINEAR_AUG, name="linear-aug-v1+train-mode", train_mode=True, replicas=RELEASED_PROBE.replicas),
    replace(LINEAR_AUG, name="linear-aug-v1+augmented-test", augmented_test=True),
    replace(LINEAR_AUG, name="linear-aug-v1+partial-test", partial_test=True, replicas=RELEASED_PROBE.replicas),
)
