"""Claims: each verdict is reached by runs made to reach it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from synthetic_runs import write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Result, gather
from ssl_bench.report.claims import ERRATA, check_claims
from ssl_bench.report.claims.accuracy import arrival, check_speed
from ssl_bench.report.claims.evidence import Claim, verdict_of
from ssl_bench.report.claims.ratio import phi_table
from ssl_bench.report.curves import Curves, load_curves
from ssl_bench.report.inference import pooled
from ssl_bench.report.results import table1

POLYNOMIAL = {"target": "polynomial", "power": 1.0}


def load(result: Result) -> Curves:
    return load_curves(result.record)


def claims(folder: Path) -> dict[str, Claim]:
    return {claim.letter: claim for claim in check_claims(gather(*find_runs(folder)), load)}


def test_without_runs_nothing_is_measured(tmp_path: Path) -> None:
    write_run(tmp_path / "a", telemetry=False)
    found = claims(tmp_path)
    assert list(found) == list("abcdefg")
    assert {claim.verdict for claim in found.values()} == {"not measured"}
    assert all(not claim.table.rows for claim in found.values())
    assert all(claim.says and claim.rule for claim in found.values())


FULL: dict[str, Any] = {"steps": 306, "batch_size": 16_384, "telemetry": False}  # the paper's 100 epochs


def write_pairs(folder: Path, differences: list[float], *, lr: float = 1.0, **settings: object) -> None:
    """LARS at 70 and TVLARS so much ahead, one pair for each seed, at the paper's length unless told otherwise."""
    chosen = FULL | {"lr": lr} | settings
    for seed, difference in enumerate(differences):
        write_run(folder / f"lars{lr}-{seed}", seed=seed, top1=70.0, **chosen)
        write_run(folder / f"tv{lr}-{seed}", optimizer="tvlars", decay=1e-4, seed=seed, top1=70 + difference, **chosen)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([2.0, 2.2, 1.9], "supported"),
        ([0.5, 0.6, 0.4], "contradicted"),  # ahead, and by less than a point
        ([1.5, 0.4, 2.5], "undecided"),
        ([9.0], "undecided (n = 1)"),
    ],
)
def test_a_tvlars_against_lars(tmp_path: Path, differences: list[float], verdict: str) -> None:
    write_pairs(tmp_path, differences)
    claim = claims(tmp_path)["a"]
    assert claim.verdict == verdict
    assert [record["by"] for record in claim.table.records] == pytest.approx(differences)


def test_a_random_data_is_undecided_or_right() -> None:
    """True differences of exactly the threshold: neither verdict may come often."""
    rng = np.random.default_rng(0)
    draws = 1 + rng.standard_normal((1000, 3))
    found = [verdict_of(pooled([row]), 1.0) for row in draws.tolist()]
    assert 0 < sum(one != "undecided" for one in found) <= 75  # 5% of 1,000, within three deviations


def test_a_rates_count_alike_and_a_lost_run_counts_as_chance(tmp_path: Path) -> None:
    write_pairs(tmp_path, [2.0, 3.0], lr=1.0)
    write_pairs(tmp_path, [10.0, 11.0], lr=2.0)
    claim = claims(tmp_path)["a"]
    # By hand: the mean of 2.5 and 10.5; half = t(2) x sqrt(0.5 x (1/2 + 1/2)) / 2.
    half = scipy.stats.t.ppf(0.975, 2) * 0.5**0.5 / 2
    assert f"is 6.5 (95%: {6.5 - half:.3g} to {6.5 + half:.3g}; n = 4 in 2) points" in claim.finding
    write_run(tmp_path / "lost", seed=2, status="collapsed", **FULL)
    write_run(tmp_path / "won", seed=2, optimizer="tvlars", decay=1e-4, **FULL)
    assert claims(tmp_path)["a"].table.records[2]["by"] == 60  # 70 against chance


def test_a_runs_cut_short_decide_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path, [5.0, 5.1, 5.2], steps=60)
    claim = claims(tmp_path)["a"]
    assert claim.verdict == "not reached"
    assert "5.1 (95%" in claim.finding


def test_b_what_the_warmup_is_worth(tmp_path: Path) -> None:
    for seed, lost in enumerate((4.0, 4.5, 5.0)):
        write_run(tmp_path / f"wa{seed}", seed=seed, top1=80.0, **FULL)
        write_run(
            tmp_path / f"no{seed}", seed=seed, top1=80 - lost, schedule=POLYNOMIAL, **FULL
        )  # fmt: skip
    claim = claims(tmp_path)["b"]
    assert claim.verdict == "supported"
    assert "4.5 (95%: 3.26 to 5.74" in claim.finding


def curve(top1: dict[float, float]) -> Curves:
    epochs = np.array(list(top1))
    metrics = {"step": epochs * 10, "epochs": epochs, "test_top1": np.array(list(top1.values()))}
    return Curves(metrics)


def test_c_epochs_to_the_optimum(tmp_path: Path) -> None:
    assert arrival(curve({10: 50, 20: 70, 30: 69.5, 40: 70.9, 50: 71.0})) == 20
    assert arrival(curve({10: 50, 20: 70})) is None
    steps = 100 * 50_000 // 4096 + 1
    for seed in range(2):
        write_run(tmp_path / f"l{seed}", seed=seed, batch_size=4096, steps=steps, telemetry=False)
        write_run(tmp_path / f"t{seed}", seed=seed, batch_size=4096, steps=steps, telemetry=False, optimizer="tvlars")
    slow = curve({epoch: min(epoch, 80) for epoch in range(10, 101, 10)})
    fast = {0: curve({epoch: min(4 * epoch, 80) for epoch in range(10, 101, 10)})}
    fast[1] = curve({epoch: min(2 * epoch, 80) for epoch in range(10, 101, 10)})
    collection = gather(*find_runs(tmp_path))
    claim = check_speed(collection, lambda run: slow if "/l" in str(run.record.folder) else fast[run.seed])
    assert [(r["epochs_lars"], r["epochs_tvlars"]) for r in claim.table.records] == [(80, 20), (80, 40)]
    assert "LARS needs 2.83 times" in claim.finding  # sqrt(4 x 2)
    assert claim.verdict == "undecided"


def test_d_the_best_lambda(tmp_path: Path) -> None:
    best = {512: 1e-4, 2048: 1e-3}
    for batch_size, good in best.items():
        for decay in (1e-4, 1e-3):
            for seed in range(2):
                write_run(
                    tmp_path / f"{batch_size}-{decay}-{seed}", optimizer="tvlars", decay=decay, seed=seed,
                    batch_size=batch_size, steps=100 * 50_000 // batch_size + 1, telemetry=False,
                    top1=75.0 if decay == good else 70.0,
                )  # fmt: skip
    claim = claims(tmp_path)["d"]
    assert claim.verdict == "supported"
    assert [record["slope"] for record in claim.table.records] == pytest.approx([0.5, 0.5])  # a decade in two doublings


def test_e_the_start_of_the_ratio(tmp_path: Path) -> None:
    # Gradients that vanish faster make the ratio of the initial phase larger.
    for seed in range(2):
        write_run(tmp_path / f"wa{seed}", gradient=0.5, seed=seed)
        write_run(tmp_path / f"nowa{seed}", gradient=0.01, schedule=POLYNOMIAL, seed=seed)
    claim = claims(tmp_path)["e"]
    assert claim.verdict == "supported"
    for record in claim.table.records:
        assert record["peak_without"] > record["peak_warmup"]  # type: ignore[operator]
        assert record["first_warmup"] == pytest.approx(record["first_without"], rel=0.2)
    for seed in range(2):
        write_run(tmp_path / "b" / f"wa{seed}", gradient=0.01, lr=2.0, seed=seed)
        write_run(tmp_path / "b" / f"nowa{seed}", gradient=0.5, lr=2.0, schedule=POLYNOMIAL, seed=seed)
    assert claims(tmp_path / "b")["e"].verdict == "contradicted"
    write_run(tmp_path / "c" / "wa", gradient=0.01)
    write_run(tmp_path / "c" / "nowa", gradient=0.5, schedule=POLYNOMIAL)
    assert claims(tmp_path / "c")["e"].verdict == "undecided (n = 1)"


def test_phi_is_a_table_and_no_claim(tmp_path: Path) -> None:
    write_run(tmp_path / "slow", optimizer="tvlars", decay=1e-5, batch_size=16384, steps=306)  # 100 epochs
    write_run(tmp_path / "fast", optimizer="tvlars", decay=0.1)
    by_decay = {record["lambda"]: record for record in phi_table(gather(*find_runs(tmp_path)), load).records}
    first, last = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3.9))
    assert by_decay[0.1]["change"] == pytest.approx(1 - last / first)
    assert by_decay[0.1]["lambda_x_steps"] == pytest.approx(6)
    assert by_decay[1e-5]["change"] < 0.01  # type: ignore[operator]


def test_the_erratum_on_phi_is_true() -> None:
    falls = []
    for batch_size in (512, 16384):
        epoch = 50_000 / batch_size
        first, last = (1 / (1 + math.exp(1e-4 * (t - 10 * epoch))) for t in (0, 100 * epoch))
        falls.append(f"{100 * (1 - last / first):.2g}%")
    assert falls == ["44%", "1.5%"]
    assert any("falls by 44% at B = 512 and by 1.5% at B = 16,384" in " ".join(text.split()) for text in ERRATA)


def test_the_erratum_on_the_test_images_is_true() -> None:
    tiny = [c for c in table1().values() if c.key[:2] == ("classification", "tiny-imagenet")]
    assert len(tiny) == 54
    assert all(math.isclose(c.accuracy / 0.04, round(c.accuracy / 0.04), abs_tol=1e-6) for c in tiny)
    assert any("2,500" in erratum for erratum in ERRATA)
