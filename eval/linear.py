"""Linear heads on cached features: a grid of learning rates and weight decays in one product (`linear-cached-v1`)."""

import math

import torch
from torch import Tensor

from ssl_bench.eval.probe import Metrics, Probe

Grid = list[tuple[float, float]]  # (peak learning rate, L2 factor) of heads trained side by side

HOLDOUT_SEED = 20231114  # fixed: all runs on a data set hold out the same images, whatever their seeds
INIT_STD = 0.01  # of the head's weights; the bias starts at 0 (as in the official Barlow Twins evaluation)


def holdout(labels: Tensor, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Splits a train set into a part to fit on and a held-out part, class by class, always the same.

    Args:
        labels: (N,) int64 labels.
        fraction: the share of each class to hold out, rounded; a class of one image is never held out.

    Returns:
        the (n,) sorted indices to fit on and the (N - n,) sorted indices held out, on the CPU.
    """
    generator = torch.Generator().manual_seed(HOLDOUT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    held = []
    for label in shuffled.unique():
        members = order[shuffled == label]
        if len(members) > 1:
            held.append(members[: max(1, round(fraction * len(members)))])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    if held:
        mask[torch.cat(held)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def count_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many labels are among the k largest logits; k is limited to the number of classes.

    Args:
        logits: (..., n, C).
        labels: (n,) int64, or broadcastable to (..., n).
        k: 1 or 5.

    Returns:
        (...,) float64 counts, on the logits' device.
    """
    if k == 1:
        hits = logits.argmax(dim=-1) == labels
    else:
        hits = (logits.topk(min(k, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)).any(dim=-1)
    return hits.sum(dim=-1, dtype=torch.float64)


class Heads:
    """S x G linear classifiers trained side by side by SGD with momentum, as `torch.optim.SGD` trains one.

    Each of the S seeds has its own batches; its G heads see the same batch, each with its own learning rate and weight
    decay. Logits and gradients of all heads are one batched product each: a probe's grid then costs little more than
    one head. Per head: d = g + weight_decay w; b = momentum b + d; w -= lr b, on weight and bias alike.

    Args:
        dim: D, the features' dimension.
        classes: C.
        grid: G pairs (peak learning rate, L2 factor).
        generators: S CPU generators, which draw each seed's initial weights (the same for its G heads).
        momentum: of the gradient's buffer, in [0, 1).
        device: where the heads live.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        grid: Grid,
        generators: list[torch.Generator],
        momentum: float = 0.9,
        device: torch.device | str = "cpu",
    ) -> None:
        seeds = len(generators)
        init = torch.stack([torch.randn(dim, 1, classes, generator=g) for g in generators])
        self.weight = (INIT_STD * init).repeat(1, 1, len(grid), 1).view(seeds, dim, len(grid) * classes).to(device)
        self.bias = torch.zeros(seeds, 1, len(grid) * classes, device=device)
        self.momentum = momentum
        self._buffers = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        columns = torch.tensor(grid, device=device).T.contiguous()  # (2, G)
        self._lr, self._weight_decay = columns.repeat_interleave(classes, dim=1)
        self._decays = any(weight_decay for _, weight_decay in grid)
        self._shape = (seeds, len(grid), classes)

    def logits(self, x: Tensor) -> Tensor:
        """(S, n, D) features, or (1, n, D) for all seeds, to (S, G, n, C) logits."""
        seeds, grid, classes = self._shape
        product = torch.baddbmm(self.bias, x.expand(seeds, -1, -1), self.weight)
        return product.view(seeds, -1, grid, classes).transpose(1, 2)

    def finite(self) -> Tensor:
        """(S, G) whether every weight of a head is finite (after too high a learning rate it is not)."""
        weights = self.weight.isfinite().all(dim=1) & self.bias.isfinite().all(dim=1)
        return weights.view(self._shape).all(dim=-1)

    def step(self, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
        """One step of SGD on the mean cross-entropy of each seed's batch.

        Args:
            x: (S, n, D) features.
            y: (S, n) int64 labels.
            factor: the schedule's value; multiplies every head's learning rate.
        """
        seeds, grid, classes = self._shape
        n = x.shape[1]
        # The gradient in closed form, added into the momentum buffers by the product itself: no graph, and no other
        # tensor of the weights' size.
        scores = torch.baddbmm(self.bias, x, self.weight).view(seeds, n, grid, classes)
        delta = scores.softmax(dim=-1)  # d loss / d logits = (softmax - one-hot) / n
        index = y.view(seeds, n, 1, 1).expand(-1, -1, grid, 1)
        delta.scatter_add_(-1, index, delta.new_full((1, 1, 1, 1), -1.0).expand_as(index))
        flat = delta.view(seeds, n, grid * classes)
        weight_buffer, bias_buffer = self._buffers
        weight_buffer.baddbmm_(x.transpose(1, 2), flat, beta=self.momentum, alpha=1 / n)
        bias_buffer.mul_(self.momentum).add_(flat.mean(dim=1, keepdim=True))
        for parameter, buffer in ((self.weight, weight_buffer), (self.bias, bias_buffer)):
            if self._decays:
                buffer.addcmul_(parameter, self._weight_decay)
            parameter.addcmul_(buffer, self._lr, value=-factor)


class Standardize:
    """Features to zero mean and unit deviation per dimension, by the statistics of the (N, D) features given.

    A dimension whose deviation is below 1e-6 of the largest one is constant: it becomes 0, not amplified noise.
    """

    def __init__(self, x: Tensor) -> None:
        sd, mean = torch.std_mean(x.double(), dim=0, correction=0)
        scale = torch.where(sd > 1e-6 * sd.max(), 1 / sd, torch.zeros_like(sd))
        self.mean, self.scale = mean.float(), scale.float()  # (D,)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def accuracy(heads: Heads, x: Tensor, y: Tensor, k: int = 1) -> Tensor:
    """(S, G) top-k accuracies in percent, on the heads' device; a head with a non-finite weight gets -1."""
    correct = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, labels in zip(x.split(2048), y.split(2048), strict=True):
        correct = correct + count_correct(heads.logits(part.unsqueeze(0)), labels, k)
    return torch.where(heads.finite(), 100 * correct / len(x), -1.0)


def fit(x: Tensor, y: Tensor, *, classes: int, grid: Grid, seeds: list[int], epochs: int, batch_size: int) -> Heads:
    """Trains len(seeds) x len(grid) heads together, with half a cosine to 0 over all steps.

    Args:
        x: (N, D) float32 features.
        y: (N,) int64 labels, on the features' device.
        classes: C.
        grid: G pairs (peak learning rate, L2 factor).
        seeds: of the initial weights and the batch order.
        epochs: passes over x, >= 1.
        batch_size: images per step, >= 1; the last batch of an epoch is short.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    heads = Heads(x.shape[1], classes, grid=grid, generators=generators, device=x.device)
    total, step = epochs * math.ceil(len(x) / batch_size), 0
    for _ in range(epochs):
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators]).to(x.device)
        for batch in order.split(batch_size, dim=1):
            heads.step(x[batch], y[batch], 0.5 * (1 + math.cos(math.pi * step / total)))
            step += 1
    return heads


class LinearCached:
    """`linear-cached-v1`: the linear probe on features extracted once.

    Version 1 is the following, and any change of it takes a new name: features standardised per dimension by the
    images fitted on; softmax cross-entropy; SGD, momentum 0.9, batch 256, half a cosine to 0 over 20 epochs or, on a
    small train set, as many as give 500 steps; weight decay as L2 on weight and bias; weights from N(0, 0.01), bias 0;
    3 probe seeds (initial weights and batch order). The pair (lr, weight_decay) with the highest mean accuracy over
    the probe seeds on a held-out tenth of train (`holdout`) is fitted again on all of train, and its last epoch is
    tested. Of equal accuracies the lower lr wins, then the lower weight decay.
    """

    name = "linear-cached-v1"
    tabulated = True
    lrs = (0.01, 0.03, 0.1, 0.3)  # per 256 images, for standardised features
    weight_decays = (0.0, 1e-4, 1e-3)
    probe_seeds = 3
    epochs = 20
    min_steps = 500
    batch_size = 256

    def __call__(self, probe: Probe) -> Metrics:
        """Selects lr and weight decay on a held-out tenth of train, fits again on all of train, and tests.

        Returns:
            "top1" and "top5" (mean over the probe seeds, percent; top5 is of at most C classes), "top1_sd" (sample
            deviation over them), "top1_seed0" ..., the chosen "lr" and "weight_decay", "val_top1" (held-out accuracy
            of the choice), "n_test".

        Raises:
            ValueError: if no class has two train images, so that one could be held out.
        """
        train_x, test_x = probe.features("train"), probe.features("test")
        train_y, test_y, classes = probe.labels("train"), probe.labels("test"), probe.classes
        fitted, held = (indices.to(train_x.device) for indices in holdout(train_y))
        if len(held) == 0:
            raise ValueError(f"a class must have at least 2 train images, got {len(train_x)} of as many classes")
        if not probe.main:
            return {}

        def heads_for(x: Tensor, y: Tensor, grid: Grid) -> Heads:
            epochs = max(self.epochs, math.ceil(self.min_steps / math.ceil(len(x) / self.batch_size)))
            seeds = [(1000 * probe.seed + i) % 2**63 for i in range(self.probe_seeds)]  # below torch's limit
            return fit(x, y, classes=classes, grid=grid, seeds=seeds, epochs=epochs, batch_size=self.batch_size)

        grid = [(lr, weight_decay) for lr in self.lrs for weight_decay in self.weight_decays]
        # Even the standardisation leaves the held-out images out, so that they stand for unseen ones.
        standardize = Standardize(train_x[fitted])
        heads = heads_for(standardize(train_x[fitted]), train_y[fitted], grid)
        val_top1 = accuracy(heads, standardize(train_x[held]), train_y[held]).mean(dim=0).cpu()
        chosen = int(val_top1.argmax())  # the first of equal ones

        standardize = Standardize(train_x)
        heads = heads_for(standardize(train_x), train_y, [grid[chosen]])
        test_x = standardize(test_x)
        top1 = accuracy(heads, test_x, test_y).flatten().cpu()
        return {
            "top1": top1.mean().item(),
            "top5": accuracy(heads, test_x, test_y, k=5).mean().item(),
            "top1_sd": top1.std().item(),
            **{f"top1_seed{i}": value for i, value in enumerate(top1.tolist())},
            "lr": grid[chosen][0],
            "weight_decay": grid[chosen][1],
            "val_top1": val_top1[chosen].item(),
            "n_test": len(test_y),
        }
