"""The statistics of the report, each a pure function of numbers.

Accuracies are in percent, differences in percentage points. Intervals are Student's at every number of seeds:
``COVERAGE`` says why. scipy.special is enough here: scipy.stats takes a second to import.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

CONFIDENCE = 0.95

# How often a nominal 95% interval of n normal values holds the true mean, in percent: Student's, and the BCa
# bootstrap's, which knows only the values it was given (of three there are ten resamples). Measured by
# benchmarks/coverage.py; up to n = 20 Student's is the better one in every population there, skewed ones and such with
# outliers too.
COVERAGE = {2: (95.3, 50.0), 3: (94.8, 72.4), 5: (95.2, 83.8), 10: (95.2, 89.7)}


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


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean; None for n < 2."""
    n = len(values)
    if n < 2:
        return None
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * float(np.std(values, ddof=1)) / n**0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


@dataclass(frozen=True)
class Estimate:
    """A mean with Student's 95% interval.

    Attributes:
        mean: of the groups' means.
        interval: None where one value is all there is.
        values: how many numbers it rests on.
        groups: of how many kinds, e.g. settings.
    """

    mean: float
    interval: tuple[float, float] | None
    values: int
    groups: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:.3g} (n = 1)"
        low, high = self.interval
        return f"{self.mean:.3g} (95%: {low:.3g} to {high:.3g}; n = {self.values} in {self.groups})"


def pooled(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean over groups of equal weight, e.g. one for each setting with one value for each seed.

    The groups are taken as they are: the interval is over seeds, by the variance within groups pooled over them (a
    one-way analysis of variance). Where no group has two values it is over groups.

    Returns:
        None without a value.
    """
    arrays = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not arrays:
        return None
    means = np.array([group.mean() for group in arrays])
    count, kinds = sum(map(len, arrays)), len(arrays)
    free = count - kinds
    if free == 0:
        return Estimate(float(means.mean()), t_interval(means.tolist()), count, kinds)
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in arrays) / free
    error = (within * sum(1 / len(group) for group in arrays)) ** 0.5 / kinds
    half, mean = float(stdtrit(free, 0.5 + CONFIDENCE / 2)) * error, float(means.mean())
    return Estimate(mean, (mean - half, mean + half), count, kinds)


def p_value(values: Sequence[float]) -> float | None:
    """Of Student's two-sided test that the mean is 0; None for n < 2."""
    n = len(values)
    if n < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / n**0.5
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(n - 1, -abs(mean) / error))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values of one family of tests (Holm 1979): below 0.05 the family's error is kept at 5%.

    Args:
        p_values: of the family's tests; None for a comparison that could not be tested, which is no member.
    """
    order = sorted((index for index, p in enumerate(p_values) if p is not None), key=lambda index: p_values[index] or 0)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(order) - rank) * (p_values[index] or 0.0))
        adjusted[index] = min(1.0, largest)
    return adjusted


def test_set_error(top1: float, images: int) -> float:
    """Half the 95% interval of an accuracy over other test images of the same kind, in points (binomial, normal).

    An upper bound for the mean over seeds, which saw the same images: the part that seeds share does not average out,
    the rest does.

    Args:
        top1: percent.
        images: evaluated.
    """
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * float(ndtri(0.5 + CONFIDENCE / 2)) * (share * (1 - share) / images) ** 0.5


@dataclass(frozen=True)
class Paired:
    """A difference paired by seed.

    Attributes:
        differences: in points, one for each seed that both have.
    """

    differences: tuple[float, ...]

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """In points."""
        return float(np.mean(self.differences))

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None for one pair."""
        return summarize(self.differences).sd

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95%, not corrected for other comparisons; None for one pair."""
        return t_interval(self.differences)

    @property
    def p_value(self) -> float | None:
        """Student's, two-sided, not corrected for other comparisons; None for one pair."""
        return p_value(self.differences)

    def verdict(self, adjusted: float | None) -> str:
        """What the test says: "ahead", "behind", "undecided", or "undecided (n = 1)".

        Args:
            adjusted: the p value after the correction for its family (``holm``).
        """
        if adjusted is None:
            return "undecided (n = 1)"
        return "undecided" if adjusted >= 1 - CONFIDENCE else "ahead" if self.mean > 0 else "behind"


def paired_difference(left: Mapping[int, float], right: Mapping[int, float]) -> Paired | None:
    """left - right over the seeds that both have; None where they share no seed.

    Args:
        left, right: accuracy in percent by seed.
    """
    shared = sorted(left.keys() & right.keys())
    return Paired(tuple(left[seed] - right[seed] for seed in shared)) if shared else None


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
