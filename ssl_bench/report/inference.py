"""The statistics of the report, each a pure function of numbers.

Accuracies are in percent, differences in percentage points. The bootstrap has its own seed, so that the same runs
always give the same interval. scipy.special is enough here: scipy.stats takes a second to import.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

Array = np.ndarray

BOOTSTRAP_SEED = 20231129
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n numbers; the deviation is None where n < 2, all None where n = 0."""

    n: int
    mean: float | None
    sd: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation (n - 1) of numbers."""
    if not values:
        return Summary(0, None, None)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), sd)


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., Array] = np.mean,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float] | None:
    """The bias-corrected and accelerated (BCa) bootstrap interval (Efron 1987) of a statistic.

    With few values it is too narrow: three values have only ten distinct resamples. The report therefore gives
    Student's interval beside it.

    Args:
        values: n numbers.
        statistic: called with ``axis``, vectorised like np.mean.
        confidence: nominal coverage, in (0, 1).
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        the interval's ends, both the same where all values are equal; None for n < 2.
    """
    data = np.asarray(values, dtype=float)
    n = len(data)
    if n < 2:
        return None
    if (data == data[0]).all():
        return float(data[0]), float(data[0])
    indices = np.random.default_rng(seed).integers(0, n, (resamples, n))
    replicates = statistic(data[indices], axis=-1)
    observed = statistic(data, axis=-1)
    below = ((replicates < observed).sum() + (replicates <= observed).sum()) / (2 * resamples)
    bias = float(ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)))
    left_out = np.array([statistic(np.delete(data, index), axis=-1) for index in range(n)])
    spread = left_out.mean() - left_out
    scale = float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / (6 * scale) if scale else 0.0

    def level(alpha: float) -> float:
        z = bias + float(ndtri(alpha))
        return float(ndtr(bias + z / (1 - acceleration * z)))

    tails = [level((1 - confidence) / 2), level((1 + confidence) / 2)]
    low, high = np.quantile(replicates, tails)
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean; None for n < 2."""
    n = len(values)
    if n < 2:
        return None
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * float(np.std(values, ddof=1)) / n**0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


@dataclass(frozen=True)
class Paired:
    """A difference paired by seed.

    Attributes:
        n: pairs.
        mean: of the differences, in points.
        sd: of the differences; None for one pair.
        bootstrap: 95% BCa interval of the mean, None for one pair.
        student: 95% t interval of the mean, None for one pair.
    """

    n: int
    mean: float
    sd: float | None
    bootstrap: tuple[float, float] | None
    student: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """What the t interval says: "ahead", "behind" or "undecided"."""
        if self.student is None or self.student[0] <= 0 <= self.student[1]:
            return "undecided"
        return "ahead" if self.student[0] > 0 else "behind"


def paired_difference(left: dict[int, float], right: dict[int, float]) -> Paired | None:
    """The mean of left - right over the seeds that both have; None where they share no seed.

    Args:
        left, right: accuracy in percent by seed.
    """
    shared = sorted(left.keys() & right.keys())
    if not shared:
        return None
    differences = [left[seed] - right[seed] for seed in shared]
    summary = summarize(differences)
    return Paired(
        summary.n, float(np.mean(differences)), summary.sd, bootstrap_interval(differences), t_interval(differences)
    )


def best_of_k(values: Sequence[float]) -> list[float]:
    """The expected best of k trials drawn without replacement from n observed ones, for k = 1 ... n.

    The unbiased estimator sum_i C(i - 1, k - 1) / C(n, k) x v_(i) over the sorted values (Tang et al. 2020). Drawing
    with replacement, as in Dodge et al. 2019, is biased downwards.

    Args:
        values: the result of each trial, e.g. one for each learning rate of a grid.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n, below = len(ordered), np.arange(len(ordered))
    weight = np.full(n, 1 / max(n, 1))  # probability that the i-th smallest is the best of k; for k = 1 all are equal
    expected = []
    for k in range(1, n + 1):
        expected.append(float(weight @ ordered))
        if k < n:  # by recursion: the binomials themselves overflow
            weight = weight * np.maximum(below - k + 1, 0) * (k + 1) / (k * (n - k))
    return expected


def share_near_best(values: Sequence[float], within: float = 1.0) -> float:
    """The share of trials within so many points of the best one: 1 = any choice is good, 1/n = only the best is."""
    if not values:
        raise ValueError("values must hold at least one number, got none")
    best = max(values)
    return sum(value >= best - within for value in values) / len(values)


def performance_profile(scores: dict[str, dict[str, float]], gaps: Sequence[float]) -> dict[str, list[float]]:
    """For each contender the share of problems on which it is within so many points of the best (Dolan & More 2002).

    They use ratios; here differences, because accuracies have a ceiling, not a scale.

    Args:
        scores: percent by problem and contender; a contender without a score on a problem is never near the best there.
        gaps: points, >= 0.

    Returns:
        by contender a list as long as ``gaps``.
    """
    contenders = sorted({name for row in scores.values() for name in row})
    profile = {}
    for name in contenders:
        behind = [max(row.values()) - row[name] if name in row else np.inf for row in scores.values() if row]
        profile[name] = [float(np.mean([gap <= limit for gap in behind])) for limit in gaps]
    return profile


@dataclass(frozen=True)
class TwoLevel:
    """Variance of accuracies, split by level (one-way random effects, method of moments).

    Attributes:
        runs: pretraining seeds.
        probes: probe seeds of each.
        sd_runs: deviation due to the pretraining seed, in points; 0 where the estimate would be negative.
        sd_probes: deviation due to the probe seed.
        sd_mean: standard error of the grand mean.
    """

    runs: int
    probes: int
    sd_runs: float
    sd_probes: float
    sd_mean: float


def two_level(accuracies: Sequence[Sequence[float]]) -> TwoLevel | None:
    """Splits the variance of a balanced table into that between runs and that between probe seeds within a run.

    Args:
        accuracies: percent; one row for each pretraining seed, one entry for each probe seed; all rows equally long.

    Returns:
        None where there are fewer than two runs or two probe seeds.
    """
    if len({len(row) for row in accuracies}) > 1:
        counts = [len(row) for row in accuracies]
        raise ValueError(f"accuracies must have the same number of probe seeds in every run, got {counts}")
    table = np.asarray(accuracies, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        return None
    runs, probes = table.shape
    within = float(table.var(axis=1, ddof=1).mean())
    between = probes * float(table.mean(axis=1).var(ddof=1))
    of_runs = max(0.0, (between - within) / probes)
    return TwoLevel(runs, probes, of_runs**0.5, within**0.5, (between / (runs * probes)) ** 0.5)
