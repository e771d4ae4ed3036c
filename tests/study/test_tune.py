"""Tuning: equal trials, a fixed split, selection on held-out images alone, the test set once."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ssl_bench.data.dataset import holdout_indices
from ssl_bench.recipe.compose import compose
from ssl_bench.study import tune
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell, Study
from ssl_bench.study.search import SEARCHES, Arm, Choices, Range, load_search, points
from ssl_bench.study.tune import _Maker, tune_main
from ssl_bench.training import build

pytest.importorskip("optuna")

SEARCH: dict[str, Any] = {
    "track": "classify",
    "base": {"data": "digits", "steps": 3},
    "trials": 4,
    "select": "test-v1",
    "seeds": [0, 1],
    "arms": [
        {"set": {"optimizer": "lars"}, "space": {"optimizer.lr": {"low": 0.5, "high": 8.0, "log": True}}},
        {"set": {"optimizer": "sgd"}, "space": {"optimizer.lr": {"low": 0.01, "high": 0.5, "log": True}}},
    ],
}


ONE = {"low": 0.1, "high": 1.0}
LR = {"optimizer.lr": ONE}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "find.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# The space ------------------------------------------------------------------------------------------------------------


def test_points_are_a_pure_function_and_fill_the_space_evenly() -> None:
    arm = Arm({}, {"optimizer.lr": Range(0.01, 100.0, log=True), "schedule.power": Range(1, 4)})
    found = points(arm, 16, seed=3, whole=["schedule.power"])
    assert found == points(arm, 16, seed=3, whole=["schedule.power"])
    assert found != points(arm, 16, seed=4, whole=["schedule.power"])
    assert found[:5] == points(arm, 5, seed=3, whole=["schedule.power"])  # more trials continue the sequence
    rates = [float(point["optimizer.lr"]) for point in found]
    # Sobol: each quarter of the range, in logarithms, has a quarter of the points; random ones would miss this.
    assert [sum(low <= rate < 10 * low for rate in rates) for low in (0.01, 0.1, 1.0, 10.0)] == [4, 4, 4, 4]
    assert {point["schedule.power"] for point in found} == {"1", "2", "3", "4"}


def test_choices_are_written_as_on_the_command_line() -> None:
    arm = Arm({}, {"optimizer.nesterov": Choices([True, False]), "param_groups.lr_1d": Choices([None, 0.1])})
    found = points(arm, 8, seed=0)
    assert {point["optimizer.nesterov"] for point in found} == {"true", "false"}
    assert {point["param_groups.lr_1d"] for point in found} == {"null", "0.1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trails": 3}, r"search find: unknown key 'trails'; did you mean 'trials'\?"),
        ({"trials": 0}, "trials must be greater than 0, got 0"),
        ({"holdout": 1.0}, "holdout must be less than 1, got 1.0"),
        ({"arms": []}, r"arms must have at least 1 item, got \[\]"),
        ({"seeds": [1, 1]}, r"seeds must be different, got \[1, 1\]"),
        ({"track": "tune"}, "track must be 'pretrain' or 'classify', got 'tune'"),
        ({"arms": [{"set": {"optimizer": "lars"}, "space": {}}]}, "space must have at least 1 item, got {}"),
        ({"arms": [{"set": {}, "space": {"a": {"low": 1, "hihg": 2}}}]}, r"unknown key 'hihg'; did you mean 'high'\?"),
        (
            {"arms": [{"set": {}, "space": {"a": {"low": 0, "high": 1, "log": True}}}]},
            "a must have 0 < low < high, got low = 0, high = 1",
        ),
        ({"arms": [{"set": {"a": 1}, "space": {"a": {"low": 0, "high": 1}}}]}, "'a' is both set and searched"),
        ({"arms": SEARCH["arms"][:1] * 2}, "two arms are 'optimizer=lars'"),
        (
            {"arms": [*SEARCH["arms"], {"set": {"optimizer": "lamb"}, "space": {**LR, "param_groups.lr_1d": ONE}}]},
            r"search find: optimizer=lamb: space must be over what optimizer=lars searches \(optimizer.lr\), "
            r"got optimizer.lr, param_groups.lr_1d \(equal: false allows it\)",
        ),
    ],
)
def test_a_wrong_search_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_search(write(tmp_path, {**SEARCH, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in SEARCHES.glob("*.yaml")))
def test_shipped_searches_load(name: str) -> None:
    _, about, search = load_search(name)
    assert "Cost:" in about
    maker = tune._Maker(name, search, {}, {})
    cells = [trial.cell for arm in search.arms for trial in maker.trials(arm)]
    assert len(cells) == search.trials * len(search.arms)
    assert {cell.recipe.data.holdout for cell in cells} == {search.holdout}


ALIKE = [path.stem for path in SEARCHES.glob("*.yaml") if path.stem not in ("smoke", "demo")]


@pytest.mark.parametrize("name", ALIKE)
def test_shipped_comparisons_are_equal_for_every_arm(name: str) -> None:
    """The same tensors, the same four dimensions, the same trials; foreign optimizers and timm's included."""
    _, _, search = load_search(name)
    maker = tune._Maker(name, search, {}, {})
    assert search.equal
    for arm in search.arms:
        trials = maker.trials(arm)
        assert len(trials) == search.trials
        assert arm.dimensions == [
            "optimizer.lr",
            "optimizer.weight_decay",
            "param_groups.lr_1d",
            "the warm-up, phi or frozen layers",
        ]
        rates = set()
        for trial in trials[:3]:
            recipe = trial.cell.recipe
            layers = {"fc": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)}
            optimizer, _ = build.optimizer(recipe, nn.Sequential(OrderedDict(layers)), build.plan(recipe, 45_000))
            groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
            assert len(groups) == 6
            for name, group in groups.items():
                matrix = name in ("fc.weight", "head.weight")
                lr = recipe.optimizer.options["lr"] if matrix else recipe.param_groups.lr_1d
                assert (group["weight_decay"] > 0, group["initial_lr"]) == (matrix, lr)
            rates.add(recipe.param_groups.lr_1d)
        assert len(rates) == 3  # searched, and not set by the protocol


def test_arms_that_treat_tensors_differently_are_refused(tmp_path: Path) -> None:
    """protocol=paper leaves no tensor out of LARS, but SGD's are its own."""
    search = {**SEARCH, "base": {**SEARCH["base"], "protocol": "paper"}}
    expected = r"search find: optimizer=sgd: param_groups must be those of optimizer=lars, .*'adapt_1d': True.*, got "
    with pytest.raises(ValueError, match=expected):
        tune_main(write(tmp_path, search), runs=tmp_path / "runs")


@pytest.mark.parametrize("track", ["pretrain", "classify"])
def test_fair_gives_1d_tensors_the_lr_of_the_rule_that_moves_them(track: str) -> None:
    expected = {"lars": 0.01, "larc": 0.01, "tvlars": 0.01, "sgd": 0.01, "nesterov": 0.01} | dict.fromkeys(
        ("lamb", "lambc", "adamw", "muon", "soap"), 1e-3
    )
    for name, lr_1d in expected.items():
        found = compose(track, [f"optimizer={name}"]).param_groups
        assert found.lr_1d == (lr_1d if lr_1d < 0.01 or track == "pretrain" else 0.1), name
        assert (found.decay_1d, found.adapt_1d) == (False, False)
    assert compose(track, ["optimizer=timm", "optimizer.name=lion", "optimizer.lr=1"]).param_groups.lr_1d is None


def test_the_keys_own_type_decides_whether_a_ranges_values_are_whole(tmp_path: Path) -> None:
    space = {
        "optimizer.lr": {"low": 1, "high": 8},
        "batch_size": {"low": 8, "high": 16},
        "optimizer.momentum": {"choices": [0.8, 0.9]},
        "epochs": {"low": 1, "high": 3},
    }
    content = {**SEARCH, "trials": 8, "arms": [{"set": {"optimizer": "lars"}, "space": space}]}
    content["base"] = {key: value for key, value in SEARCH["base"].items() if key not in ("epochs", "steps")}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    name, _, search = load_search(tmp_path / "s.yaml")
    recipes = [trial.cell.recipe for trial in _Maker(name, search, {}, {}).trials(search.arms[0])]
    rates = sorted(recipe.optimizer.options["lr"] for recipe in recipes)
    assert len({*rates}) == 8  # one in each eighth of the interval, as Sobol's points are; whole ones can only repeat
    assert [1 + int((rate - 1) / 7 * 8) for rate in rates] == list(range(1, 9))
    assert any(recipe.epochs != round(recipe.epochs) for recipe in recipes)
    assert len({recipe.batch_size for recipe in recipes}) > 4


# The split ------------------------------------------------------------------------------------------------------------


def test_the_held_out_part_is_fixed_a_tenth_of_each_class_and_disjoint() -> None:
    labels = torch.arange(1000) % 7
    kept, held = holdout_indices(labels, 0.1)
    again = holdout_indices(labels.clone(), 0.1)
    assert torch.equal(held, again[1])
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1000))
    for label in range(7):
        size = int((labels == label).sum())
        assert int((labels[held] == label).sum()) == round(size / 10)


# The search -----------------------------------------------------------------------------------------------------------


def launcher(store_results: Callable[[Cell], dict[str, Any]], seen: list[Sequence[Cell]]) -> Callable[..., int]:
    """Stands in for `run_study`: writes what the runs would."""

    def run(study: Study, store: CellStore, **_: Any) -> int:
        seen.append(study.cells)
        for cell in study.cells:
            folder = store.folder(cell)
            folder.mkdir(parents=True, exist_ok=True)
            results = {"format": 1, "status": "finished", "evaluations": [], **store_results(cell)}
            (folder / "results.json").write_text(json.dumps(results))
        return 0

    return run


def scored(cell: Cell) -> dict[str, Any]:
    """The smaller the learning rate, the better; the test images tell the opposite; one trial diverges."""
    lr = cell.recipe.optimizer.options["lr"]
    if cell.recipe.optimizer.target == "lars" and lr < 1:
        return {"status": "diverged"}
    top1 = -lr if cell.recipe.data.holdout else lr
    trained = {"protocol": "test-v1", "model": "trained", "metrics": {"top1": top1}}
    return {"evaluations": [{"protocol": "test-v1", "model": "untrained", "metrics": {"top1": 99.0}}, trained]}


def test_the_best_held_out_trial_is_tested_once_per_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Sequence[Cell]] = []
    monkeypatch.setattr(tune, "run_study", launcher(scored, seen))
    assert tune_main(write(tmp_path, SEARCH), runs=tmp_path / "runs") == 0
    trials, finals = seen
    targets = [cell.recipe.optimizer.target for cell in trials]
    assert targets == ["lars"] * 4 + ["sgd"] * 4  # the same number for each
    assert {cell.recipe.data.holdout for cell in trials} == {0.1}
    assert {cell.recipe.seed for cell in trials} == {0}
    assert {cell.recipe.data.holdout for cell in finals} == {0.0}
    assert {cell.recipe.eval.test_every_epochs for cell in [*trials, *finals]} == {0.0}  # no curve to select from
    assert [(cell.recipe.optimizer.target, cell.recipe.seed) for cell in finals] == [
        ("lars", 0), ("lars", 1), ("sgd", 0), ("sgd", 1),
    ]  # fmt: skip
    for target in ("lars", "sgd"):
        rates = [c.recipe.optimizer.options["lr"] for c in trials if c.recipe.optimizer.target == target]
        alive = [rate for rate in rates if target == "sgd" or rate >= 1]
        chosen = {c.recipe.optimizer.options["lr"] for c in finals if c.recipe.optimizer.target == target}
        assert chosen == {min(alive)}

    record = json.loads((tmp_path / "runs" / "find" / "tune.json").read_text())
    assert record["holdout"]["fraction"] == 0.1
    assert record["holdout"]["images"] == len(record["holdout"]["indices"])
    assert 10 * record["holdout"]["images"] == pytest.approx(record["holdout"]["of"], rel=0.02)
    lars = record["arms"]["optimizer=lars"]
    assert len(lars["trials"]) == 4
    assert {trial["status"] for trial in lars["trials"]} == {"finished", "diverged"}
    assert [test["seed"] for test in lars["test"]] == [0, 1]
    out = capsys.readouterr().out
    assert "(n = 2)" in out
    assert "99.00" not in out  # the untrained network's


def test_an_optimizer_whose_trials_all_diverge_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Sequence[Cell]] = []
    monkeypatch.setattr(tune, "run_study", launcher(lambda _: {"status": "diverged"}, seen))
    assert tune_main(write(tmp_path, SEARCH), runs=tmp_path / "runs") == 0
    assert "optimizer=lars: 4 diverged" in capsys.readouterr().out
    assert list(seen[1]) == []


def test_a_collapse_is_a_word_and_no_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def results(cell: Cell) -> dict[str, Any]:
        collapsed = not cell.recipe.data.holdout and cell.recipe.seed == 1
        trained = {"protocol": "test-v1", "model": "trained", "metrics": {"top1": 10.0 if collapsed else 50.0}}
        return {"status": "collapsed" if collapsed else "finished", "evaluations": [trained]}

    monkeypatch.setattr(tune, "run_study", launcher(results, []))
    assert tune_main(write(tmp_path, SEARCH), runs=tmp_path / "runs") == 0
    assert "optimizer=sgd: held out 50.00, test 50.00 (n = 1), 1 collapsed;" in capsys.readouterr().out


def test_nothing_is_selected_while_trials_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Study] = []

    def run(study: Study, *_: Any, **__: Any) -> int:
        calls.append(study)
        return 1

    monkeypatch.setattr(tune, "run_study", run)
    assert tune_main(write(tmp_path, SEARCH), runs=tmp_path / "runs") == 1
    assert len(calls) == 1
    assert not (tmp_path / "runs").exists()


def test_what_the_search_chooses_cannot_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"search find: optimizer.lr is chosen by the search"):
        tune_main(write(tmp_path, SEARCH), runs=tmp_path / "runs", overrides=["optimizer.lr=1"])


def test_an_unknown_protocol_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "run_study", launcher(scored, []))
    expected = r"select must be a protocol with a top-1 of its runs \(test-v1\), got 'knn-v1'"
    with pytest.raises(ValueError, match=expected):
        tune_main(write(tmp_path, {**SEARCH, "select": "knn-v1"}), runs=tmp_path / "runs")


@pytest.mark.slow
def test_tuning_for_real(tmp_path: Path) -> None:
    search = {**SEARCH, "trials": 1, "seeds": [0], "arms": SEARCH["arms"][1:]}
    search["base"] = {"data": "digits", "model.stem": "imagenet", "steps": 2, "batch_size": 64, "eval.baseline": False}
    assert tune_main(write(tmp_path, search), runs=tmp_path / "runs", workers=1) == 0
    arm = json.loads((tmp_path / "runs" / "find" / "tune.json").read_text())["arms"]["optimizer=sgd"]
    assert 0 <= arm["trials"][0]["top1"] <= 100
    assert len(arm["test"]) == 1
