"""Statistics against scipy, closed forms and enumeration."""

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from ssl_bench.report.inference import (
    CONFIDENCE,
    COVERAGE,
    best_of_k,
    holm,
    p_value,
    paired_difference,
    summarize,
    t_interval,
    two_level,
)
from ssl_bench.report.inference import test_set_error as error_of_the_test_set

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_summary() -> None:
    assert summarize([]).mean is None
    one = summarize([3.0])
    assert (one.n, one.mean, one.sd) == (1, 3.0, None)
    two = summarize([1.0, 3.0])
    assert two.mean == 2
    assert two.sd == pytest.approx(2**0.5)


def test_the_stated_coverage_is_the_measured_one() -> None:
    record = json.loads((BENCHMARKS / "results" / "coverage.json").read_text())["coverage_percent"]
    assert {n: tuple(record["normal"][str(n)].values()) for n in COVERAGE} == COVERAGE
    for name, by_size in record.items():
        for n, both in by_size.items():
            assert int(n) > 20 or both["student"] >= both["bca"], (name, n)
    assert record["a tenth lost"]["3"]["student"] == pytest.approx(100 / 3, abs=1)
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", BENCHMARKS / "coverage.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    assert module.CONFIDENCE == CONFIDENCE
    measured = module.coverage(*module.POPULATIONS["normal"], n=3, samples=2_000, resamples=100)
    assert measured["student"] == pytest.approx(95, abs=1.5)
    assert measured["bca"] < 80


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
    assert paired.interval == (1.0, 1.0)
    assert paired.verdict(paired.p_value) == "ahead"
    back = paired_difference(right, left)
    assert back is not None
    assert back.verdict(back.p_value) == "behind"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 5.0}, {0: 1.0})
    assert single is not None
    assert (single.n, single.mean, single.interval, single.verdict(single.p_value)) == (
        1, 4.0, None, "undecided (n = 1)",
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 10])
def test_p_value_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, size=n).tolist()
    assert p_value(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert p_value(values[:1]) is None
    assert p_value([0.0, 0.0]) == 1
    assert p_value([2.0, 2.0]) == 0


def test_holm_is_the_step_down_procedure() -> None:
    # By hand: 4 x 0.005, 3 x 0.011, 2 x 0.02, 1 x 0.04, each at least the one before.
    assert holm([0.02, 0.005, 0.04, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []
    # Of true ties a family decides something in at most 5% of cases; single tests at 5% would in one case of four.
    rng, false = np.random.default_rng(0), 0
    for _ in range(1_000):
        found = holm([p_value(row) for row in rng.standard_normal((6, 4)).tolist()])
        false += min(value for value in found if value is not None) < 0.05
    assert 20 <= false <= 75


def test_the_error_of_the_test_set_is_binomial() -> None:
    reference = scipy.stats.norm.ppf(0.975) * scipy.stats.binom.std(10_000, 0.8) / 10_000
    assert error_of_the_test_set(80.0, 10_000) == pytest.approx(100 * reference)
    assert error_of_the_test_set(100.0, 10_000) == 0


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
