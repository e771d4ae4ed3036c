"""Statistics over settings, batch sizes and time: profiles, aggregates, rank correlations, power laws.

Each is a pure function of numbers. The aggregates are those of Agarwal et al. 2021 ("Deep reinforcement learning at the
edge of the statistical precipice", the package rliable).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ssl_bench.report.inference import CONFIDENCE

Array = np.ndarray

BOOTSTRAP_SEED = 20231129  # so that the same runs always give the same interval
DRAWS = 2_000  # of the stratified bootstrap, and of the ranks


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


def interquartile_mean(scores: Array) -> Array:
    """The mean of the middle half of the last axis: a quarter of the values is cut at either end.

    As scipy's ``trim_mean(..., 0.25)``, which rliable uses: int(n / 4) values at each end.
    """
    n = scores.shape[-1]
    cut = int(0.25 * n)
    return np.sort(scores, axis=-1)[..., cut : n - cut].mean(axis=-1)


def stratified_bootstrap(tasks: Sequence[Sequence[float]], *, draws: int = DRAWS) -> tuple[float, float, float]:
    """The interquartile mean over all runs of all tasks, with its 95% percentile interval.

    Every replicate draws, from each task's runs, as many as there are with replacement (Agarwal et al. 2021, section
    4.1), so it keeps the tasks and varies the runs.

    Args:
        tasks: the scores of each task's runs; tasks may have different numbers of runs.
        draws: replicates.

    Returns:
        estimate, low, high; the last two are NaN where no task has two runs.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    arrays = [np.asarray(runs, dtype=float) for runs in tasks]
    estimate = float(interquartile_mean(np.concatenate(arrays)))
    if max(map(len, arrays)) < 2:
        return estimate, np.nan, np.nan
    drawn = [runs[rng.integers(0, len(runs), (draws, len(runs)))] for runs in arrays]
    replicates = interquartile_mean(np.concatenate(drawn, axis=1))
    low, high = np.quantile(replicates, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return estimate, float(low), float(high)


def chance_of_being_best(scores: Mapping[str, Sequence[Sequence[float]]], *, draws: int = DRAWS) -> dict[str, float]:
    """P(best): how often a contender's run, drawn at random in each task, is the best one; the mean over tasks.

    The first rank's share of Agarwal et al. 2021, appendix A (rank distributions); runs that tie share it.

    Args:
        scores: by contender the scores of each task's runs; all have the same tasks in the same order.
        draws: of one run for each contender and task.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    names = list(scores)
    shares = np.zeros(len(names))
    tasks = len(scores[names[0]])
    for task in range(tasks):
        drawn = np.array([rng.choice(np.asarray(scores[name][task], dtype=float), draws) for name in names])
        best = drawn == drawn.max(axis=0)
        shares += (best / best.sum(axis=0)).mean(axis=1) / tasks
    return dict(zip(names, shares.tolist(), strict=True))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties at their mean rank; NaN where one side has a single value.

    scipy.stats has it too, but takes a second to import.
    """

    def ranks(values: Sequence[float]) -> Array:
        _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    x, y = ranks(left), ranks(right)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def power_law(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The exponent p of y ~ x^p, by least squares on the logarithms; None unless x has two different values."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


def critical_batch(sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float] | None:
    """The least number of steps and the critical batch size: steps = least (1 + critical / B).

    McCandlish et al. 2018, equation 2.7; least squares on the logarithm of the steps would need a search, so the fit is
    linear in 1 / B with weights 1 / steps, which makes the relative errors count alike.

    Args:
        sizes: batch sizes B.
        steps: to one target.

    Returns:
        least, critical; None with fewer than two sizes, or where the fit is not of this form (a value <= 0).
    """
    if len(set(sizes)) < 2:
        return None
    inverse, y = 1 / np.asarray(sizes, dtype=float), np.asarray(steps, dtype=float)
    slope, least = np.polyfit(inverse, y, 1, w=1 / y)
    return (float(least), float(slope / least)) if least > 0 and slope > 0 else None
