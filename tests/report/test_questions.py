"""The questions besides accuracy, on curves whose answer is known."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from synthetic_runs import analysis_of, write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report import questions
from ssl_bench.report.aggregate import Collection, Result, gather
from ssl_bench.report.curves import Curves
from ssl_bench.report.tables import Table

PER_EPOCH = 50_000 / 512


def collect(folder: Path) -> Collection:
    return gather(*find_runs(folder))


def curve(points: Mapping[float, float]) -> Curves:
    """Test accuracy by step; half a second and 512 images a step."""
    steps = np.array(list(points), dtype=float)
    clocks = {"step": steps, "samples": 512 * steps, "seconds": steps / 2}
    return Curves(clocks | {"test_top1": np.array(list(points.values()), dtype=float)})


def by_folder(curves: Mapping[str, Mapping[float, float]]) -> object:
    return lambda run: curve(curves[run.record.folder.name])


def shown(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[row], strict=True))


def test_the_time_to_a_target_that_comes_from_the_data(tmp_path: Path) -> None:
    courses = {}
    for seed in range(3):
        courses[f"lars{seed}"] = {10: 50.0, 20: 69.5, 30: 70.0 + seed}  # median at the end 71: the target is 70
        courses[f"lamb{seed}"] = {10: 69.0, 20: 70.5, 30: 70.5} if seed else {10: 60.0, 20: 61.0, 30: 62.0}
        for name in ("lars", "lamb"):
            write_run(tmp_path / f"{name}{seed}", optimizer=name, seed=seed, telemetry=False)
    write_run(tmp_path / "lost", optimizer="tvlars", status="diverged", telemetry=False)
    table = questions.time_to_target(collect(tmp_path), by_folder(courses))  # type: ignore[arg-type]
    lars, lamb = shown(table, 0), shown(table, 1)
    assert (lars["target %"], lars["reached"], lars["steps"], lars["× the fastest"]) == (
        "70.00",
        "3 of 3",
        "30",
        "1.50",
    )
    # Of 20, 20 and never the median is 20: half of the seeds and more are there.
    assert (lamb["reached"], lamb["steps"], lamb["samples"], lamb["seconds"]) == ("2 of 3", "20", "1.024e+04", "10")
    assert len(table.rows) == 2


def write_grid(folder: Path, best: Mapping[int, float], *, seeds: int = 2) -> None:
    """LARS at five rates a factor of two apart, best near ``best`` by batch size: a parabola in log lr."""
    for batch_size, rate in best.items():
        for lr in (0.5, 1.0, 2.0, 4.0, 8.0):
            for seed in range(seeds):
                top1 = 80 - 2 * math.log(lr / rate * (batch_size / 1024) ** (0.02 - 0.04 * seed)) ** 2
                name = folder / f"{batch_size}-{lr}-{seed}"
                write_run(name, batch_size=batch_size, lr=lr, seed=seed, top1=top1, telemetry=False)


def test_the_rate_against_the_batch_size(tmp_path: Path) -> None:
    write_grid(tmp_path, {256: 1.1, 1024: 2.2, 4096: 4.4})
    table = questions.rate_scaling(collect(tmp_path))
    row = shown(table, 0)
    assert row["best lr by batch size"] == "256: 1.1, 1024: 2.2, 4096: 4.4"
    assert (row["at the grid's edge"], row["exponent"], row["fits"]) == ("0 of 6", "0.50", "square root")
    assert [record["exponent"] for record in table.records] == pytest.approx([0.48, 0.52])
    half = scipy.stats.t.ppf(0.975, 1) * 0.02
    assert row["95% interval"] == f"{0.5 - half:.2f} … {0.5 + half:.2f}"


def test_a_best_rate_at_the_grids_edge_is_said_and_one_seed_decides_nothing(tmp_path: Path) -> None:
    write_grid(tmp_path, {256: 0.1, 1024: 2.0}, seeds=1)
    row = shown(questions.rate_scaling(collect(tmp_path)), 0)
    assert (row["at the grid's edge"], row["95% interval"], row["fits"]) == ("1 of 2", "–", "undecided (n = 1)")
    assert row["best lr by batch size"] == "256: 0.5, 1024: 2"


def test_the_critical_batch_stands_beside_the_noise_scale(tmp_path: Path) -> None:
    courses, noise = {}, {64: 2.0, 256: 0.5}
    for batch_size in (256, 1024, 4096):
        for seed in range(2):
            there = 100 * (1 + 1000 / batch_size)
            name = f"{batch_size}-{seed}"
            courses[name] = {there - 1: 50.0, there: 79.5, there + 500: 80.0}
            analysis = analysis_of((50, 10), noise=noise)
            write_run(tmp_path / name, batch_size=batch_size, seed=seed, telemetry=False, analysis=analysis)
    table = questions.critical_batches(collect(tmp_path), by_folder(courses))  # type: ignore[arg-type]
    row = shown(table, 0)
    assert (row["target %"], row["least steps"], row["critical batch"]) == ("79.00", "100", "1e+03")
    assert row["noise scale"] == f"{64 * 2.0 / 0.5:.3g}"  # B x error / |E g|^2, alike at both sizes
    assert [record["critical_batch"] for record in table.records] == pytest.approx([1000, 1000])


def test_the_early_ranking_is_compared_with_the_end(tmp_path: Path) -> None:
    courses = {}
    finals = [50.0, 60.0, 70.0, 80.0]
    early = [20.0, 10.0, 30.0, 40.0]
    for index, (first, last) in enumerate(zip(early, finals, strict=True)):
        courses[f"{index}"] = {6: first, 45: last - 1, 60: last}
        write_run(tmp_path / f"{index}", lr=1.0 + index, top1=last, telemetry=False)
    table = questions.early_ranking(collect(tmp_path), by_folder(courses))  # type: ignore[arg-type]
    expected = scipy.stats.spearmanr(early, finals).statistic
    assert shown(table, 0)["recipes"] == "4"
    assert [record["spearman"] for record in table.records] == pytest.approx([expected, expected, expected, 1.0])


def test_aggregates_are_over_shared_settings(tmp_path: Path) -> None:
    tops = {512: {"lars": 80.0, "lamb": 70.0}, 1024: {"lars": 60.0, "lamb": 65.0}, 2048: {"lars": 60.0}}
    for batch_size, each in tops.items():
        for optimizer, top1 in each.items():
            for seed in range(2):
                name = tmp_path / f"{batch_size}-{optimizer}-{seed}"
                write_run(name, batch_size=batch_size, optimizer=optimizer, seed=seed, top1=top1, telemetry=False)
    table = questions.aggregates(collect(tmp_path))
    lars, lamb = shown(table, 0), shown(table, 1)
    assert (lars["optimizer"], lars["settings"], lars["runs"]) == ("LARS", "2", "4")
    # (80 - 10) / 90 twice and (60 - 10) / 90 twice: the middle half has one of each.
    assert float(lars["interquartile mean"]) == pytest.approx((70 + 50) / 180, abs=1e-3)
    assert float(lamb["mean"]) == pytest.approx((60 + 55) / 180, abs=1e-3)
    assert (lars["P(best)"], lamb["P(best)"]) == ("0.50", "0.50")


def test_methods_stand_beside_methods(tmp_path: Path) -> None:
    for method, top1 in {"barlow_twins": 60.0, "simclr": 65.0}.items():
        for seed in range(2):
            name = tmp_path / f"{method}{seed}"
            write_run(name, track="pretrain", method=method, top1=top1 + seed, seed=seed, telemetry=False)
    write_run(tmp_path / "lamb", track="pretrain", optimizer="lamb", telemetry=False)  # under one method alone
    write_run(tmp_path / "clf", telemetry=False)
    table = questions.methods(collect(tmp_path))
    assert table.columns[3:] == ("barlow_twins", "simclr")
    assert table.rows == [("cifar10", "512", "LARS", "60.50 ± 0.71 (n = 2)", "65.50 ± 0.71 (n = 2)")]


def test_a_study_without_curves_has_no_such_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "a", telemetry=False)

    def nothing(_: Result) -> Curves:
        return Curves({})

    collection = collect(tmp_path)
    tables = [questions.time_to_target(collection, nothing), questions.critical_batches(collection, nothing)]
    tables += [questions.early_ranking(collection, nothing), questions.rate_scaling(collection)]
    assert not any(table.rows for table in [*tables, questions.aggregates(collection)])
