"""Linear probes on freshly augmented images, the backbone run at every step (`linear-aug-v1` and two reproductions)."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ssl_bench.eval.features import ImageSource, embed, eval_mode, gather_rows, shard
from ssl_bench.eval.linear import Heads, count_correct
from ssl_bench.eval.probe import Metrics, Probe

# What the cosine counts. "step": once from 1 to 0 over all steps. "epoch": the same, constant within an epoch.
# "released": down over `epochs` *steps* and up again, over and over (made for epochs, stepped per batch).
Schedule = Literal["step", "epoch", "released"]

Prepared = Callable[[Tensor, slice], Tensor]  # the uint8 images of a slice of a batch to the backbone's input
Prepare = Callable[[int], Prepared]  # given the size of the whole batch, for which it draws all random numbers


def schedule_factor(kind: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate's multiplier at a step, counted from 0."""
    turns = {"step": step / (steps_per_epoch * epochs), "epoch": step // steps_per_epoch / epochs}
    return 0.5 * (1 + math.cos(math.pi * turns.get(kind, step / epochs)))


@dataclass(frozen=True)
class AugmentedProbe:
    """A linear head trained by SGD on augmented images; every difference between three protocols is a named switch.

    Common to all: one head, cross-entropy, SGD with momentum, each epoch a permutation whose last batch is short,
    weights from N(0, 0.01), bias 0, the head of the last epoch tested. The head and all of its randomness are computed
    alike on every process; only the backbone's passes are divided, so the number of processes does not change the
    result.

    Args:
        name: the protocol's name and version.
        lr: peak learning rate per 256 images; scaled by the batch actually used.
        batch_size: images per step; a smaller train set is one batch.
        momentum: in [0, 1).
        weight_decay: L2 factor on weight and bias; 0 turns it off.
        epochs: passes over the train set.
        schedule: see `Schedule`.
        train_mode: run the backbone in train mode, in training and in the test, so that batch norm uses the batch's
            own statistics. A fault, kept for a reproduction.
        augmented_test: augment the test images like the train images. A fault, likewise.
        partial_test: test on a random 1/replicas of the test set, and average over batches instead of images, so that
            the short last batch counts as much as any. A fault, likewise.
        replicas: R >= 1, the processes of the reproduced run: in train mode batch norm sees 1/R of a batch.
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
    tabulated: ClassVar[bool] = True
    needs_augment: ClassVar[bool] = True

    def __call__(self, probe: Probe) -> Metrics:
        """Trains the head and tests it; every process gets the same result.

        `probe.batch_size` counts in the test only, and changes the result only by rounding; where batch norm or the
        average depends on the batch, the protocol's own is taken.

        Returns:
            "top1", "top5" (of at most C classes) in percent, and "n_test", the number of images tested.

        Raises:
            ValueError: if the train labels are all of one class, or the model or the head has diverged.
        """
        augment, classes = probe.augment, probe.classes
        if augment is None:
            raise ValueError("augment must be a random resized crop with flip, got None")
        generator = torch.Generator().manual_seed(probe.seed)

        def augmented(n: int) -> Prepared:
            params = augment.draw(n, generator)
            return lambda images, part: augment(images, {key: value[part] for key, value in params.items()})

        def plain(_: int) -> Prepared:
            return lambda images, _: probe.transform(images)

        if self.train_mode:  # which moves running statistics
            probe = replace(probe, backbone=copy.deepcopy(probe.backbone), extracted={})
        device = torch.device(probe.device)
        devices = [device] if device.type == "cuda" else []
        with (
            eval_mode(probe.backbone),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices, enabled=self.train_mode),
        ):
            if self.train_mode:
                torch.manual_seed(probe.seed)  # for dropout and the like; the caller's generators are restored
                probe.backbone.train()
            heads = self._train(probe, classes, augmented, generator)
            return self._test(probe, heads, augmented if self.augmented_test else plain, generator)

    def _train(self, probe: Probe, classes: int, prepare: Prepare, generator: torch.Generator) -> Heads:
        source = probe.images("train")
        size = min(self.batch_size, len(source))
        steps_per_epoch = math.ceil(len(source) / size)
        pieces = self.replicas if self.train_mode else probe.world_size
        heads: Heads | None = None
        for epoch in range(self.epochs):
            batches = torch.randperm(len(source), generator=generator).split(size)
            for i, x in enumerate(batch_features(probe, source, batches, prepare, pieces, separate=self.train_mode)):
                if heads is None:
                    # Checked once: a wait for the GPU at every step would be slow, and a diverged model shows at once.
                    if not bool(x.isfinite().all()):
                        raise ValueError(
                            "features must be finite, got a first batch that is not (the model has diverged)"
                        )
                    grid = [(self.lr * size / 256, self.weight_decay)]
                    heads = Heads(
                        x.shape[1],
                        classes,
                        grid=grid,
                        generators=[generator],
                        momentum=self.momentum,
                        device=x.device,
                    )
                step = epoch * steps_per_epoch + i
                y = source.labels[batches[i]].to(x.device, non_blocking=True)
                heads.step(x[None], y[None], schedule_factor(self.schedule, step, steps_per_epoch, self.epochs))
            if probe.on_progress is not None:
                probe.on_progress(self.name, epoch + 1, self.epochs)
        assert heads is not None
        if not bool(heads.finite().all()):
            raise ValueError(f"the head must be finite, got one that has diverged in {self.epochs} epochs")
        return heads

    def _test(self, probe: Probe, heads: Heads, prepare: Prepare, generator: torch.Generator) -> Metrics:
        source, batch_size, pieces = probe.images("test"), probe.batch_size, probe.world_size
        indices = torch.arange(len(source))
        if self.partial_test:
            indices = torch.randperm(len(source), generator=generator)[: math.ceil(len(source) / self.replicas)]
        if self.train_mode or self.partial_test:  # the batch of one process of the reproduced run
            batch_size, pieces = max(1, self.batch_size // self.replicas), 1
        batches = indices.split(batch_size)
        hits = []
        features = batch_features(probe, source, batches, prepare, pieces, separate=self.train_mode)
        for batch, x in zip(batches, features, strict=True):
            y, logits = source.labels[batch].to(x.device), heads.logits(x[None])[0, 0]
            hits.append(torch.stack([count_correct(logits, y, k) for k in (1, 5)]))
        correct = torch.stack(hits).cpu()  # (batches, 2)
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        mean = (correct / sizes[:, None]).mean(dim=0) if self.partial_test else correct.sum(dim=0) / len(indices)
        top1, top5 = (100 * mean).tolist()
        return {"top1": top1, "top5": top5, "n_test": len(indices)}


def batch_features(
    probe: Probe, source: ImageSource, batches: Sequence[Tensor], prepare: Prepare, pieces: int, *, separate: bool
) -> Iterator[Tensor]:
    """The (n, D) features of each batch on every process, each process running the backbone on a part of it.

    A batch is cut into contiguous pieces, and each process takes some of them, in order.

    Args:
        probe: whose backbone runs, in the mode it is in.
        source: the split.
        batches: (n,) int64 indices of each batch.
        prepare: called once per batch, in order, with its size (everything random is drawn here, for the whole batch);
            returns what turns the uint8 images of a slice of the batch into the backbone's input.
        pieces: into how many a batch is cut; if there are fewer than processes, some processes have none.
        separate: give each piece a pass of its own, because batch norm in train mode sees one pass.
    """
    shares = []  # for each batch this process's part, the sizes of its pieces, and the images of every process
    for batch in batches:
        sizes = [len(piece) for piece in batch.tensor_split(pieces)]
        owned = [sizes[shard(pieces, rank, probe.world_size)] for rank in range(probe.world_size)]
        counts = [sum(own) for own in owned]
        start = sum(counts[: probe.rank])
        shares.append((slice(start, start + counts[probe.rank]), owned[probe.rank], counts))
    own = [batch[part] for batch, (part, _, _) in zip(batches, shares, strict=True)]
    stream = iter(source.batches([indices for indices in own if len(indices)]))
    for batch, (part, sizes, counts) in zip(batches, shares, strict=True):
        prepared = prepare(len(batch))
        features = torch.empty(0, 0, device=probe.device)
        if counts[probe.rank]:
            inputs = prepared(next(stream), part)
            passes = inputs.split(sizes) if separate else (inputs,)
            features = torch.cat([embed(probe.backbone, x, probe.precision) for x in passes if len(x)])
        yield gather_rows(features, counts, probe.device) if probe.world_size > 1 else features


def augmented_spaces(probe: Probe, views: int) -> dict[str, Tensor]:
    """What label-free measures of augmented train images look at; see `Probe.spaces`.

    Args:
        probe: with an augmentation, whose draws depend on the probe's seed alone.
        views: of each image, >= 1.

    Returns:
        by "" the (views, N, D) features, by "_embeddings" the (views, N, E) embeddings if there are any.

    Raises:
        ValueError: no augmentation, or features that are not finite.
    """
    augment = probe.augment
    if augment is None:
        raise ValueError("augment must be a random resized crop with flip, got None")
    generator, source = torch.Generator().manual_seed(probe.seed), probe.images("train")
    batches = torch.arange(len(source)).split(probe.batch_size)

    def view() -> Tensor:
        # Drawn for all images at once, so that the batch size does not change which image gets which.
        params, starts = augment.draw(len(source), generator), itertools.count(0, probe.batch_size)

        def prepare(n: int) -> Prepared:
            start = next(starts)
            batch = {key: value[start : start + n] for key, value in params.items()}
            return lambda images, part: augment(images, {key: value[part] for key, value in batch.items()})

        return torch.cat(list(batch_features(probe, source, batches, prepare, probe.world_size, separate=False)))

    with eval_mode(probe.backbone), torch.no_grad():
        features = torch.stack([view() for _ in range(views)])
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got some that are not (the model has diverged)")
    if probe.projector is None:
        return {"": features}
    return {"": features, "_embeddings": torch.stack([probe.project(one) for one in features])}


LINEAR_AUG = AugmentedProbe("linear-aug-v1")

# The paper (section 5): SGD with a cosine over 100 epochs "as implemented by BT authors". Their evaluate.py
# (facebookresearch/barlowtwins, commit 8e8d284) has the rest: lr 0.3, batch 256, momentum 0.9, weight decay 1e-6,
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

# Each difference of the released probe alone, in the sound probe, to see which explains which part of the gap. They
# need no new training: `ssl-bench evaluate RUN` adds their numbers to a run that has ended.
SINGLE_FAULTS = (
    replace(LINEAR_AUG, name="linear-aug-v1+weight-decay", weight_decay=RELEASED_PROBE.weight_decay),
    replace(LINEAR_AUG, name="linear-aug-v1+schedule", schedule=RELEASED_PROBE.schedule),
    replace(LINEAR_AUG, name="linear-aug-v1+train-mode", train_mode=True, replicas=RELEASED_PROBE.replicas),
    replace(LINEAR_AUG, name="linear-aug-v1+augmented-test", augmented_test=True),
    replace(LINEAR_AUG, name="linear-aug-v1+partial-test", partial_test=True, replicas=RELEASED_PROBE.replicas),
)
