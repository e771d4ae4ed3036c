"""Statistics against scipy, closed forms and enumeration."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ssl_bench.report.inference import (
    BOOTSTRAP_SEED,
    RESAMPLES,
    best_of_k,
    bootstrap_interval,
    paired_difference,
    performance_profile,
    share_near_best,
    summarize,
    t_interval,
    two_level,
)


def test_summary() -> None:
    assert summarize([]).mean is None
    one = summarize([3.0])
    assert (one.n, one.mean, one.sd) == (1, 3.0, None)
    two = summarize([1.0, 3.0])
    assert two.mean == 2
    assert two.sd == pytest.approx(2**0.5)


@pytest.mark.parametrize("n", [5, 12, 30])
@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_is_scipys(n: int, statistic: object) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    ours = bootstrap_interval(values.tolist(), statistic)  # type: ignore[arg-type]
    reference = scipy.stats.bootstrap(
        (values,),
        statistic,
        n_resamples=RESAMPLES,
        method="BCa",
        confidence_level=0.95,
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    assert ours == pytest.approx((reference.low, reference.high), rel=2e-2)


def test_bootstrap_covers_and_corrects() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.exponential(size=40).tolist(), resamples=500) or (0.0, 0.0)
        inside += low <= 1 <= high
    assert 178 <= inside <= 199  # 95% nominal, a little less for a skewed population
    skewed = rng.exponential(size=40).tolist()
    low, high = bootstrap_interval(skewed) or (0.0, 0.0)
    assert high - np.mean(skewed) > np.mean(skewed) - low  # the percentile interval alone is nearly symmetric


def test_bootstrap_of_too_little() -> None:
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = bootstrap_interval([1.0, 3.0]) or (0.0, 0.0)
    assert 1 <= low <= high <= 3
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


@pytest.mark.parametrize("n", [2, 3, 10, 31])
def test_t_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n).tolist()
    reference = scipy.stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(reference)
    assert t_interval(values[:1]) is None


def test_pairing_by_seed_removes_what_seeds_share() -> None:
    noise = {0: -9.0, 1: 0.0, 2: 8.0, 3: 3.0}
    left = {seed: 70 + value for seed, value in noise.items()}
    right = {seed: 69 + value for seed, value in noise.items() if seed != 3} | {7: 5.0}
    paired = paired_difference(left, right)
    assert paired is not None
    assert (paired.n, paired.mean, paired.sd) == (3, 1.0, 0.0)
    assert paired.bootstrap == (1.0, 1.0)
    assert paired.verdict == "ahead"
    assert paired_difference(right, left).verdict == "behind"  # type: ignore[union-attr]
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 5.0}, {0: 1.0})
    assert single is not None
    assert (single.n, single.mean, single.bootstrap, single.verdict) == (1, 4.0, None, "undecided")


def test_best_of_k_is_the_mean_over_all_subsets() -> None:
    values = [71.0, 10.0, 64.5, 80.25, 80.25, 33.0]
    expected = [
        np.mean([max(subset) for subset in itertools.combinations(values, k)]) for k in range(1, len(values) + 1)
    ]
    assert best_of_k(values) == pytest.approx(expected)
    assert best_of_k([4.0]) == [4.0]
    assert best_of_k([]) == []
    many = best_of_k(list(range(3000)))  # binomials would overflow; the mean of a uniform maximum is known
    assert many[99] == pytest.approx(100 / 101 * 3001 - 1)


def test_share_near_best() -> None:
    assert share_near_best([80.0, 79.0, 78.9, 10.0]) == 0.5
    assert share_near_best([80.0, 79.0, 78.9, 10.0], within=0) == 0.25
    with pytest.raises(ValueError, match="got none"):
        share_near_best([])


def test_performance_profile() -> None:
    scores = {"a": {"LARS": 80.0, "LAMB": 78.0}, "b": {"LARS": 60.0, "LAMB": 65.0}, "c": {"LARS": 50.0}}
    profile = performance_profile(scores, [0, 2, 5])
    assert profile["LARS"] == pytest.approx([2 / 3, 2 / 3, 1])
    assert profile["LAMB"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_two_levels_are_the_analysis_of_variance() -> None:
    table = [[70.0, 70.4, 69.8], [72.0, 71.7, 72.5], [69.0, 69.3, 68.4], [71.0, 71.1, 70.2]]
    split = two_level(table)
    assert split is not None
    f_statistic = scipy.stats.f_oneway(*table).statistic
    between = split.probes * split.sd_runs**2 + split.sd_probes**2
    assert between / split.sd_probes**2 == pytest.approx(f_statistic)
    assert split.sd_mean == pytest.approx(scipy.stats.sem([np.mean(row) for row in table]))


def test_two_levels_are_recovered() -> None:
    rng = np.random.default_rng(3)
    estimates = []
    for _ in range(300):
        runs = 70 + 0.8 * rng.standard_normal((6, 1)) + 0.3 * rng.standard_normal((6, 4))
        split = two_level(runs.tolist())
        assert split is not None
        estimates.append((split.sd_runs**2, split.sd_probes**2))
    assert np.mean(estimates, axis=0) == pytest.approx([0.64, 0.09], rel=0.12)


def test_two_levels_need_two_of_each() -> None:
    assert two_level([[70.0, 71.0]]) is None
    assert two_level([[70.0], [71.0]]) is None
    assert two_level([[70.0, 72.0], [71.0, 71.0]]).sd_runs == 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the same number of probe seeds"):
        two_level([[70.0, 71.0], [70.0]])
