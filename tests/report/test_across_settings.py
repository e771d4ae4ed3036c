"""Statistics across settings against scipy, enumeration and populations whose answer is known."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ssl_bench.report.across_settings import (
    chance_of_being_best,
    critical_batch,
    interquartile_mean,
    performance_profile,
    power_law,
    rank_correlation,
    share_near_best,
    stratified_bootstrap,
)


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


@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_the_interquartile_mean_is_scipys(n: int) -> None:
    scores = np.random.default_rng(n).normal(size=(5, n))
    assert interquartile_mean(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=1))


def test_the_bootstrap_is_stratified() -> None:
    """Tasks of different levels and no spread within: resampling the tasks would vary, resampling their runs cannot."""
    assert stratified_bootstrap([[10.0, 10.0], [50.0, 50.0], [90.0, 90.0]]) == (50.0, 50.0, 50.0)
    estimate, low, high = stratified_bootstrap([[10.0], [50.0]])
    assert estimate == 30
    assert np.isnan([low, high]).all()


def test_the_bootstraps_interval_is_that_of_all_resamples() -> None:
    tasks = [[1.0, 5.0], [2.0, 8.0], [4.0, 6.0]]
    everything = [
        scipy.stats.trim_mean(np.concatenate(drawn), 0.25)
        for drawn in itertools.product(*(list(itertools.product(runs, repeat=2)) for runs in tasks))
    ]
    _, low, high = stratified_bootstrap(tasks, draws=20_000)
    assert (low, high) == pytest.approx(tuple(np.quantile(everything, (0.025, 0.975))), abs=0.3)


def test_the_chance_of_being_best_is_that_of_all_draws() -> None:
    scores = {"a": [[1.0, 3.0], [5.0]], "b": [[2.0, 2.0], [5.0]], "c": [[0.0], [1.0]]}
    # Task 1: a is 1 or 3 against 2: half; task 2: a and b tie.
    assert chance_of_being_best(scores, draws=20_000) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.0}, abs=0.01)
    assert sum(chance_of_being_best(scores).values()) == pytest.approx(1)


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.integers(0, 5, 12).tolist(), rng.normal(size=12).tolist()
    assert rank_correlation(left, right) == pytest.approx(scipy.stats.spearmanr(left, right).statistic)
    assert np.isnan(rank_correlation([1, 1], [1, 2]))


def test_a_power_law_is_recovered() -> None:
    sizes = [256.0, 512.0, 1024.0, 2048.0]
    assert power_law(sizes, [0.1 * size**0.5 for size in sizes]) == pytest.approx(0.5)
    assert power_law([256.0, 256.0], [1.0, 2.0]) is None


def test_the_critical_batch_is_recovered() -> None:
    sizes = [128.0, 512.0, 2048.0, 8192.0]
    assert critical_batch(sizes, [300 * (1 + 900 / size) for size in sizes]) == pytest.approx((300, 900))
    assert critical_batch(sizes, [10.0, 20.0, 40.0, 80.0]) is None  # more steps at larger batches: no such law
    assert critical_batch([128.0], [10.0]) is None
