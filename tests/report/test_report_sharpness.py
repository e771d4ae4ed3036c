"""Claims on what `ssl-bench analyze` measures: pairs and verdicts made to come out one way, and what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import analysis_of, write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import gather
from ssl_bench.report.claims.analysis import read_analysis, uncertain
from ssl_bench.report.claims.evidence import Claim
from ssl_bench.report.claims.sharpness import check_gradient_noise, check_sharpness

NOWA = {"target": "polynomial", "power": 1.0}


def sharpness_claim(folder: Path) -> Claim:
    return check_sharpness(gather(*find_runs(folder)))


def noise_claim(folder: Path) -> Claim:
    return check_gradient_noise(gather(*find_runs(folder)))


def write_pair(folder: Path, warm: dict[str, Any], cold: dict[str, Any], **settings: Any) -> None:
    """A LARS run with warm-up and one without, with these analyses."""
    write_run(folder / "wa", analysis=warm, telemetry=False, **settings)
    write_run(folder / "nowa", analysis=cold, telemetry=False, schedule=NOWA, **settings)


def test_one_run_is_no_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "wa", analysis=analysis_of((5, 10), (50, 20)), telemetry=False)
    claim = sharpness_claim(tmp_path)
    assert claim.verdict == "not measured"
    assert "in no pair" in claim.finding
    shown = dict(zip(claim.table.columns, claim.table.rows[1], strict=True))
    assert shown["top eigenvalue"] == "50.0 ± 0.5"
    assert shown["|w|"] == "20"
    assert shown["top eigenvalue × |w|²"] == "20000 ± 200"
    assert shown["trace"] == "450 ± 6"
    assert shown["SAM"] == "0.5"
    assert shown["batch norm, images"] == "train, 512"
    record = claim.table.records[1]
    assert record["top_eigenvalue_times_weights"] == 50 * 20**2
    assert record["top_eigenvalue_residual"] == 0.5
    assert any("Dinh et al. 2017" in note for note in claim.table.notes)


@pytest.mark.parametrize(
    ("warm", "cold", "verdict"),
    [
        ((50, 10), (20, 10), "supported"),
        ((20, 10), (50, 10), "contradicted"),
        ((50, 10), (20, 20), "mixed"),  # the eigenvalue is larger, its product with |w|^2 (5000, 8000) smaller
    ],
)
def test_the_verdict_needs_both_measures(
    tmp_path: Path, warm: tuple[float, float], cold: tuple[float, float], verdict: str
) -> None:
    for seed, factor in enumerate((1.0, 1.1, 0.9)):
        ends = [(factor * top, norm) for top, norm in (warm, cold)]
        write_pair(tmp_path / f"{seed}", analysis_of((1, 9), ends[0]), analysis_of((99, 9), ends[1]), seed=seed)
    assert sharpness_claim(tmp_path).verdict == verdict
    assert sharpness_claim(tmp_path / "0").verdict == "undecided (n = 1)"  # one pair decides nothing


def test_seeds_that_disagree_decide_nothing(tmp_path: Path) -> None:
    for seed, tops in enumerate(((50, 20), (20, 50), (50, 45))):
        write_pair(tmp_path / f"{seed}", analysis_of((tops[0], 10)), analysis_of((tops[1], 10)), seed=seed)
    assert sharpness_claim(tmp_path).verdict == "undecided"


def test_both_counts_are_told(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", analysis_of((50, 10)), analysis_of((20, 20)))
    write_pair(tmp_path / "b", analysis_of((50, 10)), analysis_of((20, 10)), lr=2.0)
    write_pair(tmp_path / "c", analysis_of((50, 10)), analysis_of((50, 10)), lr=3.0)
    finding = sharpness_claim(tmp_path).finding
    assert "With a warm-up against without it (LARS, LAMB), 3 pairs" in finding
    assert "by the top eigenvalue sharper in 2, flatter in 0, no difference in 1, relative difference" in finding
    assert "by the top eigenvalue × |w|² sharper in 1, flatter in 1, no difference in 1, relative difference" in finding
    assert "batch norm in train mode, 512 images" in finding
    assert "6 of 6 runs were cut short of the paper's epochs" in finding
    assert "TVLARS" not in finding


def test_tvlars_stands_beside_lars_with_warmup(tmp_path: Path) -> None:
    write_run(tmp_path / "wa", analysis=analysis_of((50, 10)), telemetry=False)
    for name, settings in {
        "tv": {},
        "other rate": {"lr": 2.0},
        "other seed": {"seed": 1},
        "other batch": {"batch_size": 1024},
        "other length": {"steps": 30},
    }.items():
        write_run(tmp_path / name, optimizer="tvlars", analysis=analysis_of((20, 10)), telemetry=False, **settings)
    claim = sharpness_claim(tmp_path)
    assert claim.verdict == "undecided (n = 1)"
    assert "LARS with a warm-up against TVLARS, 1 pair of one learning rate and seed" in claim.finding


def test_runs_of_another_recipe_are_no_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "wa", analysis=analysis_of((50, 10)), telemetry=False)
    write_run(tmp_path / "nowa", analysis=analysis_of((20, 10)), telemetry=False, schedule=NOWA, steps=30)
    assert sharpness_claim(tmp_path).verdict == "not measured"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (analysis_of((20, 10), batch_norm="eval"), "measured with different settings"),
        (analysis_of((20, 10), images=256), "measured with different settings"),
        (analysis_of((20, 10), (20, 10)), "the last measured steps differ"),
        (analysis_of((20, 10)) | {"settings": {}}, "the settings are not recorded"),
        ({**analysis_of((20, 10)), "sharpness": [{"step": 0, "top_eigenvalue": 20.0}]}, "|w| is missing"),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_told(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    write_pair(tmp_path, analysis_of((50, 10)), other)
    claim = sharpness_claim(tmp_path)
    assert claim.verdict == "not measured"
    assert "Left out: 1 pair, " in claim.finding
    assert reason in claim.finding
    assert len(claim.table.rows) == 1 + len(other["sharpness"])


def test_other_noise_settings_do_not_matter_to_sharpness(tmp_path: Path) -> None:
    write_pair(tmp_path, analysis_of((50, 10)), analysis_of((20, 10), noise_images=1024))
    assert "relative difference 0.857 (n = 1)" in sharpness_claim(tmp_path).finding  # 30 / 35


def test_a_damaged_analysis_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path / "a", analysis={"sharpness": [{"step": 1, "trace": "nan"}, {"trace": 1.0}, 7], "other": 3})
    write_run(tmp_path / "b", seed=1)
    (tmp_path / "b" / "analysis.json").write_text("[")
    assert sharpness_claim(tmp_path).verdict == "not measured"
    assert noise_claim(tmp_path).verdict == "not measured"
    assert read_analysis(tmp_path / "a") is None
    assert read_analysis(tmp_path / "b") is None


def test_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    found = analysis_of((50, 10))
    found["sharpness"][0]["trace"] = float("inf")
    (tmp_path / "analysis.json").write_text(json.dumps(found))
    analysis = read_analysis(tmp_path)
    assert analysis is not None
    assert "trace" not in analysis.sharpness[0]
    assert analysis.sharpness[0]["sam"] == 0.5


@pytest.mark.parametrize(("power", "verdict"), [(-1.0, "supported"), (-0.5, "contradicted")])
def test_noise_falls_with_the_batch(tmp_path: Path, power: float, verdict: str) -> None:
    found = analysis_of((50, 10), noise={b: 3 * b**power for b in (1024, 64, 256)})
    found["gradient_noise"].append({"step": 9, "batch_size": 64, "squared_error": 1.0})  # one size has no slope
    write_run(tmp_path / "a", analysis=found, telemetry=False)
    claim = noise_claim(tmp_path)
    assert claim.verdict == "undecided (n = 1)"
    for seed, steeper in enumerate((-0.01, 0.01, 0.02), start=1):
        other = analysis_of((50, 10), noise={b: 3 * b ** (power + steeper) for b in (64, 256, 1024)})
        write_run(tmp_path / "more" / f"{seed}", analysis=other, telemetry=False, seed=seed)
    assert noise_claim(tmp_path / "more").verdict == verdict
    (record,) = claim.table.records
    assert record["slope"] == pytest.approx(power)
    (row,) = claim.table.rows
    shown = dict(zip(claim.table.columns, row, strict=True))
    assert shown["B measured"] == "64, 256, 1024"
    assert shown["error, least B"] == f"{3 * 64**power:.3g}"
    assert shown["error, largest B"] == f"{3 * 1024**power:.3g}"
    assert record["least_noise_scale"] == pytest.approx(64 * 3 * 64**power / 0.5)
    assert shown["B_simple, least B"] == ("6" if power == -1.0 else "48")
    assert shown["batch norm, images"] == "train, 4096"
    assert "disjoint batches of one size about their mean" in claim.finding
    assert "batch norm in train mode, 4096 images for each size" in claim.finding


@pytest.mark.parametrize("squared", [0.0, -0.2, None])
def test_without_a_gradient_there_is_no_noise_scale(tmp_path: Path, squared: float | None) -> None:
    found = analysis_of((50, 10), noise={64: 0.2, 256: 0.05})
    for row in found["gradient_noise"]:
        row["gradient_squared"] = squared
    write_run(tmp_path / "a", analysis=found, telemetry=False)
    (row,) = noise_claim(tmp_path).table.rows
    assert row[-3:-1] == ("–", "–")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.345, 0.41, "12.3 ± 0.4"),
        (50.0, 0.5, "50.0 ± 0.5"),
        (20_000.0, 187.0, "20000 ± 187"),
        (1234.56, 0.0002, "1234.6 ± 0.0002"),
        (-7.25, 0.1, "-7.2 ± 0.1"),
        (0.5, 3.0, "0 ± 3"),
        (12.3456, None, "12.35"),
        (12.3456, 0.0, "12.35 ± 0"),
        (3.21e8, 4e6, "3.21e+08 ± 4e+06"),
    ],
)
def test_digits_end_where_the_uncertainty_begins(value: float, error: float | None, text: str) -> None:
    assert uncertain(value, error) == text
