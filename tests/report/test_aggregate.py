"""Cells: what belongs together, what a failed run says, and what is skipped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import evaluation, recipe_of, write_run

from ssl_bench.recipe.compose import compose
from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Collection, gather


def collect(folder: Path) -> Collection:
    return gather(*find_runs(folder))


def test_seeds_of_one_recipe_are_one_cell(tmp_path: Path) -> None:
    for seed, top1 in enumerate((70.0, 71.0, 75.0)):
        write_run(tmp_path / f"a{seed}", seed=seed, top1=top1)
    write_run(tmp_path / "b", lr=2.0)
    first, second = collect(tmp_path).cells
    assert (first.lr, second.lr) == (1.0, 2.0)
    assert first.top1("test-v1") == {0: 70.0, 1: 71.0, 2: 75.0}
    assert first.text("test-v1") == "72.00 ± 2.65 (n = 3)"
    assert second.text("test-v1") == "70.00 (n = 1)"
    assert first.untrained("test-v1").mean == 22.0
    assert (first.problem, first.dataset, first.batch_size, first.optimizer) == (
        "classification",
        "cifar10",
        512,
        "LARS",
    )
    assert first.variant == second.variant == ""


def test_a_lost_seed_counts_as_chance_and_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", seed=0, top1=70.0)
    write_run(tmp_path / "bad", seed=1, status="diverged")
    write_run(tmp_path / "gone", seed=2, status="collapsed")
    write_run(tmp_path / "lost/a", seed=0, lr=2.0, status="diverged")
    write_run(tmp_path / "lost/b", seed=1, lr=2.0, status="diverged")
    write_run(tmp_path / "mixed/a", seed=0, lr=3.0, status="diverged")
    write_run(tmp_path / "mixed/b", seed=1, lr=3.0, status="collapsed")
    write_run(tmp_path / "open", lr=4.0, status=None)
    cells = collect(tmp_path).cells
    assert cells[0].top1("test-v1") == {0: 70.0, 1: 10.0, 2: 10.0}
    assert cells[0].finished("test-v1") == {0: 70.0}
    assert cells[1].summary("test-v1").mean == 10
    assert cells[3].summary("test-v1").mean is None
    texts = [cell.text("test-v1") for cell in cells]
    assert texts == [
        "30.00 ± 34.64 (n = 3; 1 diverged; 1 collapsed)",
        "diverged (n = 2)",
        "1 diverged, 1 collapsed",
        "interrupted (n = 1)",
    ]


def test_variants_are_named_by_what_differs(tmp_path: Path) -> None:
    polynomial = {"target": "polynomial", "power": 2.0}
    write_run(tmp_path / "wa", schedule={"target": "warmup_cosine", "warmup_fraction": 0.25})
    write_run(tmp_path / "nowa", schedule=polynomial)
    write_run(tmp_path / "nowa3", schedule={"target": "polynomial", "power": 3.0})
    write_run(tmp_path / "slow", optimizer="tvlars", decay=1e-5)
    write_run(tmp_path / "fast", optimizer="tvlars", decay=1e-2)
    write_run(tmp_path / "other", optimizer="tvlars", decay=1e-3, batch_size=1024)
    write_run(tmp_path / "lamb", optimizer="lamb")
    arms = {Path(cell.results[0].record.folder).name: cell.arm for cell in collect(tmp_path).cells}
    assert arms == {
        "wa": "LARS (schedule=warmup_cosine)",
        "nowa": "LARS (schedule=polynomial, schedule.power=2)",
        "nowa3": "LARS (schedule=polynomial, schedule.power=3)",
        "slow": "TVLARS (optimizer.decay=1e-05)",
        "fast": "TVLARS (optimizer.decay=0.01)",
        "other": "TVLARS (optimizer.decay=0.001)",
        "lamb": "LAMB",
    }


def test_what_is_only_watched_makes_no_cell_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1)
    path = tmp_path / "b" / "run.json"
    head = json.loads(path.read_text())
    head["recipe"]["telemetry"]["every"] = 1
    head["recipe"]["run_dir"] = "elsewhere"
    head["recipe"]["data"]["path"] = "elsewhere too"
    path.write_text(json.dumps(head))
    (cell,) = collect(tmp_path).cells
    assert len(cell.results) == 2


def test_a_copied_run_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status=None)
    write_run(tmp_path / "b")
    collection = collect(tmp_path)
    assert [cell.text("test-v1") for cell in collection.cells] == ["70.00 (n = 1)"]  # the ended one
    (skipped,) = collection.skipped
    assert skipped.folder == tmp_path / "a"
    assert "the same run as" in skipped.reason


def test_a_searchs_trials_are_not_compared_with_runs_on_the_test_set(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"final-{seed}", recipe=replace(recipe_of(), seed=seed))
    held_out = replace(recipe_of(), data=replace(recipe_of().data, holdout=0.1))
    write_run(tmp_path / "trial", top1=99.0, recipe=held_out)
    collection = collect(tmp_path)
    assert [cell.text("test-v1") for cell in collection.cells] == ["70.00 ± 0.00 (n = 2)"]
    (skipped,) = collection.skipped
    assert skipped.reason.endswith("trials that were evaluated on held-out train images and not on the test set: 1")
    # Where there is nothing else they are what there is to compare.
    write_run(tmp_path / "search" / "trial", top1=99.0, recipe=held_out)
    assert [cell.text("test-v1") for cell in collect(tmp_path / "search").cells] == ["99.00 (n = 1)"]


FOREIGN = '{"format": 1, "identity": "x", "recipe": {"seed": %s}}'


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "run.json").write_text("{"), "damaged"),
        (lambda run: (run / "run.json").write_text('{"some": "thing"}'), "no 'format'"),
        (lambda run: (run / "run.json").write_text('{"format": 99}'), "format is 99"),
        (
            lambda run: (run / "run.json").write_text('{"format": 1, "identity": "x", "recipe": {"seed": 0}}'),
            "not a benchm",
        ),
        (
            lambda run: (run / "run.json").write_text('{"format": 1, "identity": "x", "recipe": {"seed": "?"}}'),
            "not a ben",
        ),
        (lambda run: (run / "results.json").write_text('{"format": 1, "status": "odd"}'), "got 'odd'"),
        (lambda run: (run / "run.json").unlink(), "no run.json"),
    ],
)
def test_damaged_and_foreign_records_are_passed_over(tmp_path: Path, damage: object, reason: str) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", seed=1)
    damage(tmp_path / "bad")  # type: ignore[operator]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("miaow")
    collection = collect(tmp_path)
    assert [len(cell.results) for cell in collection.cells] == [1]
    assert [entry.folder.name for entry in collection.skipped] == ["bad", "photos"]
    assert reason in collection.skipped[0].reason
    assert all("\n" not in entry.reason for entry in collection.skipped)


def test_the_headline_protocol_covers_the_most_runs(tmp_path: Path) -> None:
    few = [evaluation("knn-v1", "trained", 60.0, 10.0, ())]
    write_run(tmp_path / "a", track="pretrain")
    write_run(tmp_path / "b", track="pretrain", lr=2.0, evaluations=few)
    collection = collect(tmp_path)
    assert collection.protocols("barlow_twins") == ["knn-v1", "linear-cached-v1"]
    assert collection.headline("barlow_twins") == "knn-v1"
    assert collection.cells[1].text("linear-cached-v1") == "not measured by linear-cached-v1"


def test_monitors_are_no_results_and_probe_seeds_join(tmp_path: Path) -> None:
    entries = [
        evaluation("online", "trained", 99.0, 10.0, ()),
        evaluation("linear-cached-v1", "trained", 0.0, 10.0, (60.0, 62.0)),
        evaluation("linear-cached-v1", "trained", 0.0, 10.0, (64.0, 66.0)),
    ]
    write_run(tmp_path / "a", track="pretrain", evaluations=entries)
    collection = collect(tmp_path)
    assert collection.protocols("barlow_twins") == ["linear-cached-v1"]
    score = collection.results[0].scores["linear-cached-v1"]
    assert score.top1 == 63.0
    assert score.probes == (60.0, 62.0, 64.0, 66.0)


def test_an_optimizer_is_called_by_the_fields_name_and_one_from_outside_by_its_own(tmp_path: Path) -> None:
    expected = {
        "lars": "LARS", "larc": "LARC", "lamb": "LAMB", "lambc": "LAMBC", "tvlars": "TVLARS", "clars": "CLARS",
        "sgd": "SGD", "nesterov": "Nesterov SGD", "adamw": "AdamW", "muon": "Muon", "soap": "SOAP", "splus": "SPlus",
    }  # fmt: skip
    for name in expected:
        write_run(tmp_path / name, telemetry=False, recipe=compose("classify", ["data=cifar10", f"optimizer={name}"]))
    # timm's LARS is another implementation of it than the suite's, which "LARS" means.
    timm = compose("classify", ["data=cifar10", "optimizer=timm", "optimizer.name=lars", "optimizer.lr=1"])
    write_run(tmp_path / "timm", telemetry=False, recipe=timm)
    cells = collect(tmp_path).cells
    assert {Path(cell.results[0].record.folder).name: cell.optimizer for cell in cells} == {**expected, "timm": "lars"}
    in_order = [name for name in expected.values() if name not in ("SOAP", "SPlus")]  # the others come after them
    assert [cell.optimizer for cell in cells][: len(in_order)] == in_order
