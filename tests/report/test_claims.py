"""Claims: each verdict is reached by runs made to reach it."""

import math
from pathlib import Path

import pytest
from synthetic_runs import write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Result, gather
from ssl_bench.report.claims.evidence import Claim
from ssl_bench.report.claims.ratio import ERRATA, check_claims
from ssl_bench.report.curves import Curves, load_curves
from ssl_bench.report.results import table1

POLYNOMIAL = {"target": "polynomial", "power": 1.0}


def load(result: Result) -> Curves:
    return load_curves(result.record)


def claims(folder: Path) -> dict[str, Claim]:
    return {claim.letter: claim for claim in check_claims(gather(*find_runs(folder)), load)}


def test_without_runs_nothing_is_measured(tmp_path: Path) -> None:
    write_run(tmp_path / "a", telemetry=False)
    found = claims(tmp_path)
    assert list(found) == ["a", "b", "c", "d", "e"]
    assert {claim.verdict for claim in found.values()} == {"not measured"}
    assert all(not claim.table.rows for claim in found.values())


def test_a_the_start_of_the_ratio(tmp_path: Path) -> None:
    # Gradients that vanish faster make the ratio of the initial phase larger.
    write_run(tmp_path / "wa", gradient=0.5)
    write_run(tmp_path / "nowa", gradient=0.01, schedule=POLYNOMIAL)
    claim = claims(tmp_path)["a"]
    assert claim.verdict == "supported"
    (record,) = claim.table.records
    assert record["peak_without"] > record["peak_warmup"]  # type: ignore[operator]
    assert record["first_warmup"] == pytest.approx(record["first_without"])
    assert "same in 1 of them" in claim.finding
    write_run(tmp_path / "b/wa", gradient=0.01, lr=2.0)
    write_run(tmp_path / "b/nowa", gradient=0.5, lr=2.0, schedule=POLYNOMIAL)
    assert claims(tmp_path)["a"].verdict == "mixed"
    assert claims(tmp_path / "b")["a"].verdict == "contradicted"


def test_b_the_limit_of_the_ratio(tmp_path: Path) -> None:
    write_run(tmp_path / "far/a", gradient=0.5)
    far = claims(tmp_path / "far")["b"]
    assert far.verdict == "not reached"
    write_run(tmp_path / "near/a", gradient=1e-6)
    near = claims(tmp_path / "near")["b"]
    assert near.verdict == "contradicted"
    (record,) = near.table.records
    assert record["vanished"] > 0  # type: ignore[operator]
    assert 0.9 < record["scaled_ratio_there"] < 1  # type: ignore[operator]


def test_b_leaves_out_what_has_no_such_limit(tmp_path: Path) -> None:
    write_run(tmp_path / "a", gradient=1e-6, weight_decay=0.0)
    write_run(tmp_path / "b", gradient=1e-6, optimizer="tvlars", variant="released")
    write_run(tmp_path / "c", gradient=1e-6, optimizer="lamb")
    assert claims(tmp_path)["b"].verdict == "not measured"


def test_e_phi_hardly_moves_or_does(tmp_path: Path) -> None:
    write_run(tmp_path / "slow", optimizer="tvlars", decay=1e-5, batch_size=16384, steps=306)  # 100 epochs
    assert claims(tmp_path)["e"].verdict == "contradicted"
    write_run(tmp_path / "fast", optimizer="tvlars", decay=0.1)
    claim = claims(tmp_path)["e"]
    assert claim.verdict == "mixed"
    by_decay = {record["lambda"]: record for record in claim.table.records}
    first, last = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3.9))
    assert by_decay[0.1]["change"] == pytest.approx(1 - last / first)
    assert by_decay[0.1]["lambda_x_steps"] == pytest.approx(6)


def test_e_a_run_cut_short_decides_nothing_unless_phi_moved(tmp_path: Path) -> None:
    write_run(tmp_path / "slow", optimizer="tvlars", decay=1e-5)
    claim = claims(tmp_path)["e"]
    assert claim.verdict == "not reached"
    assert "1 of these were cut short" in claim.finding
    write_run(tmp_path / "fast", optimizer="tvlars", decay=0.1)
    assert claims(tmp_path)["e"].verdict == "supported"


def test_the_erratum_on_the_test_images_is_true() -> None:
    tiny = [c for c in table1().values() if c.key[:2] == ("classification", "tiny-imagenet")]
    assert len(tiny) == 54
    assert all(math.isclose(c.accuracy / 0.04, round(c.accuracy / 0.04), abs_tol=1e-6) for c in tiny)
    assert any("2,500" in erratum for erratum in ERRATA)
