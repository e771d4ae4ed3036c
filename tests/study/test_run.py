"""Studies: expansion to the paper's grid, strictness, states, estimates, what is printed."""

import json
import os
import shlex
from itertools import product
from pathlib import Path

import pytest
import yaml

from ssl_bench.recipe.compose import choices, compose
from ssl_bench.runtime.console import duration
from ssl_bench.study import run as study_module
from ssl_bench.study.cells import CellStore
from ssl_bench.study.estimate import Speed, speeds, total_seconds, workload
from ssl_bench.study.grid import Study, load_study
from ssl_bench.study.launch import print_commands
from ssl_bench.study.run import status_main, study_main

LEARNING_RATES = {
    512: (1, 2, 3),
    1024: (2, 3, 4),
    2048: (5, 6, 7),
    4096: (8, 9, 10),
    8192: (10, 12, 15),
    16384: (15, 17, 19),
}


def write(folder: Path, content: dict | str, name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def tiny(**block: object) -> dict:
    """A study of two cells on digits."""
    axes = [{"optimizer.lr": [1, 2]}]
    return {"base": {"data": "digits"}, "blocks": [{"track": "classify", "axes": axes, **block}]}


def paper_key(cell) -> tuple:  # type: ignore[no-untyped-def]
    recipe = cell.recipe
    lr = recipe.optimizer.options["lr"]
    return (cell.track, recipe.data.name, recipe.batch_size, lr, recipe.optimizer.target)


@pytest.fixture(scope="module")
def table1() -> Study:
    return load_study("table1")


def test_table1_is_the_papers_grid_each_cell_once(table1: Study) -> None:
    expected = {
        (track, data, batch_size, float(lr), optimizer)
        for track, data, optimizer in product(
            ("classify", "pretrain"), ("cifar10", "tiny_imagenet"), ("lars", "lamb", "tvlars")
        )
        for batch_size, rates in LEARNING_RATES.items()
        for lr in rates
    }
    assert len(expected) == 216
    assert len(table1.cells) == 216
    assert {paper_key(cell) for cell in table1.cells} == expected
    assert len({cell.identity for cell in table1.cells}) == 216


def test_table1_reads_the_text_of_the_paper(table1: Study) -> None:
    for cell in table1.cells:
        recipe, pretrain = cell.recipe, cell.track == "pretrain"
        assert recipe.model.name == ("resnet34" if recipe.data.name == "tiny_imagenet" else "resnet18")
        assert recipe.epochs == (1000 if pretrain else 100)
        options = recipe.optimizer.options
        assert options["weight_decay"] == 5e-4
        if recipe.optimizer.target == "tvlars":
            assert options["decay"] == (1e-5 if pretrain else 1e-4)
            assert options["delay_epochs"] == 10
            assert options["variant"] == "paper"
            assert recipe.schedule.target == "constant"
        else:
            assert recipe.schedule.target == "warmup_cosine"
            assert recipe.schedule.options["warmup_epochs"] == 20
        if pretrain:
            assert recipe.method.target == "barlow_twins"
            assert list(recipe.method.options["projector"]) == [2048, 2048, 4096]
            assert "paper-probe" in recipe.eval.protocols


def test_a_cells_words_compose_to_its_recipe(table1: Study) -> None:
    for cell in table1.cells[::43]:
        recipe = compose(cell.track, cell.arguments())
        assert recipe.to_dict() == cell.recipe.to_dict()
        assert recipe.identity() == cell.identity


def test_axes_multiply_lists_in_an_axis_go_together_and_seeds_pair(tmp_path: Path) -> None:
    axes = [{"batch_size": [64, 128], "optimizer.lr": [1, 2]}, [{}, {"optimizer.momentum": 0.5}]]
    content = {"base": {"data": "digits", "steps": 5}, "seeds": [3, 4], "blocks": [{"track": "classify", "axes": axes}]}
    cells = load_study(write(tmp_path, content)).cells
    found = {
        (c.recipe.batch_size, c.recipe.optimizer.options["lr"], c.recipe.optimizer.options["momentum"], c.recipe.seed)
        for c in cells
    }
    assert found == {(b, lr, m, s) for (b, lr), m, s in product([(64, 1), (128, 2)], [0.9, 0.5], [3, 4])}
    assert len(cells) == 8
    assert cells[0].varied == {"batch_size": "64", "optimizer.lr": "1", "seed": "3"}


def test_overrides_seeds_and_data_paths_reach_every_cell(tmp_path: Path) -> None:
    path = write(tmp_path, tiny())
    study = load_study(path, overrides=["steps=7", "data.cache_dir=/x"], seeds=[5, 6], data_paths={"digits": "/d/e"})
    assert len(study.cells) == 4
    assert {cell.recipe.seed for cell in study.cells} == {5, 6}
    assert {(cell.recipe.steps, cell.recipe.epochs, cell.recipe.data.path) for cell in study.cells} == {
        (7, None, "/d/e")
    }
    # Where the images lie does not make another experiment.
    assert [c.identity for c in study.cells] == [
        c.identity for c in load_study(path, overrides=["steps=7"], seeds=[5, 6]).cells
    ]


def test_included_studies_keep_their_base_and_seeds(tmp_path: Path) -> None:
    write(tmp_path, {**tiny(), "seeds": [1]}, "inner")
    outer = write(
        tmp_path, {"base": {"steps": 3}, "include": ["inner"], "seeds": [2], "blocks": tiny()["blocks"]}, "outer"
    )
    cells = load_study(outer, overrides=["batch_size=64"]).cells
    assert [(c.recipe.data.name, c.recipe.seed, c.study) for c in cells] == [("digits", 1, "outer")] * 2 + [
        ("cifar10", 2, "outer")
    ] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"blcks": []}, r"study tiny: unknown key 'blcks'; did you mean 'blocks'\?"),
        (tiny(sets={}), r"block 1: unknown key 'sets'; did you mean 'set'\?"),
        ({"base": {"data": "digits"}}, "study tiny must have blocks or include, got neither"),
        ({"blocks": []}, "an empty grid"),
        (tiny(axes=[{"optimizer.lr": []}]), r"axis 1: optimizer.lr must be a list of at least one value, got \[\]"),
        (tiny(axes=[{}]), "axis 1 must be .*, got {}"),
        (tiny(axes=[[]]), r"axis 1 must be .*, got \[\]"),
        (tiny(axes=[{"optimizer.lr": [1, 2], "seed": [1]}]), "must have the same length, got optimizer.lr=2 seed=1"),
        (tiny(axes=[{"seed": [1]}, {"seed": [2]}]), "'seed' is in two axes"),
        (tiny(axes=[{"optimizer.lr": [1, 1.0]}]), "the same experiment .*optimizer.lr=1' and '.*optimizer.lr=1.0'"),
        (tiny(track="pretraining"), "track must be pretrain or classify, got 'pretraining'"),
        (tiny(set={"optimizer.mometum": 0.5}), r"optimizer.lr=1: unknown key 'optimizer.mometum'; did you mean"),
        (tiny(set={"optimizer": {"lr": 1}}), "set: optimizer must be one value, got a mapping"),
        (tiny(set={"run_dir": "x"}), "run_dir is set for each cell"),
        ({**tiny(), "seeds": []}, r"seeds must be a list of different integers >= 0, got \[\]"),
        ({**tiny(), "seeds": [1, 1]}, r"seeds must be a list of different integers >= 0, got \[1, 1\]"),
        ({**tiny(), "include": ["tiny"]}, "includes itself"),
        ({**tiny(), "include": ["smok"]}, r"unknown study 'smok'; did you mean 'smoke'\?"),
        ("blocks: []\nblocks: []", 'study tiny: invalid YAML in line 2: found duplicate key "blocks"'),
        ("a: [", "study tiny: invalid YAML"),
        ("- 1", r"must be a mapping of keys to values, got \[1\]"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(content: dict | str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_study(path)
    assert "\n" not in str(caught.value)


def test_overriding_what_a_study_varies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two cells are the same experiment"):
        load_study(write(tmp_path, tiny()), overrides=["optimizer.lr=3"])


def test_an_unknown_study_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown study 'tabel1'; did you mean 'table1'\? \(known: .*decay, .*smoke"):
        load_study("tabel1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in choices("study") if name == "table1_cell" or not name.startswith("table1")]
)
def test_shipped_studies_expand_and_state_their_cost(name: str) -> None:
    sizes = {
        "bt_cifar10_b512": 9,
        "controls": 144,
        "decay": 108,
        "families": 16,
        "lr_of_batch": 252,
        "methods": 270,
        "protocols": 174,
        "short_clf_cifar10": 19,
        "smoke": 12,
        "smoke_cifar10": 18,
        "table1_cell": 8,
        "warmup": 72,
    }
    study = load_study(name, trust=True)  # one names a backbone in examples/
    assert len(study.cells) == sizes[name]
    assert "Cost:" in study.about
    assert "Expect" in study.about


@pytest.mark.slow
def test_studies_share_runs_where_their_experiments_are_equal(table1: Study) -> None:
    shared = {cell.identity for cell in load_study("warmup").cells} & {cell.identity for cell in table1.cells}
    assert len(shared) == 36  # LARS and LAMB with warm-up, 18 each


def record(folder: Path, identity: str, status: str | None = "finished", **extra: object) -> None:
    """A run directory as far as a study looks into it."""
    folder.mkdir(parents=True)
    head = {"format": 1, "identity": identity, "recipe": {"batch_size": 64}, "plan": {"steps_per_epoch": 10.0}, **extra}
    (folder / "run.json").write_text(json.dumps(head))
    if status:
        (folder / "results.json").write_text(json.dumps({"format": 1, "status": status, "evaluations": []}))


@pytest.fixture
def small(tmp_path: Path) -> Study:
    axes = [{"optimizer.lr": [1, 2, 3, 4, 5, 6]}]
    return load_study(write(tmp_path, tiny(axes=axes), "small"))


def test_status_tells_every_state_apart(small: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CellStore(tmp_path / "runs")
    finished, diverged, interrupted, failed, running, _ = small.cells
    record(store.folder(finished), finished.identity)
    record(store.folder(diverged), diverged.identity, "diverged")
    record(store.folder(interrupted), interrupted.identity, None)
    store.fail(failed, code=2, command=["x"], reason="no such folder")
    claim = store.claim(running)
    assert claim is not None
    code = status_main(tmp_path / "small.yaml", runs=tmp_path / "runs")
    out = capsys.readouterr().out
    assert code == 1
    assert "6 cells: 1 finished, 1 diverged, 1 failed, 1 running, 1 interrupted, 1 missing" in out
    assert "failed      classify data=digits optimizer.lr=4: no such folder" in out
    assert f"running     classify data=digits optimizer.lr=5: process {os.getpid()} on" in out
    assert "optimizer.lr=1" not in out  # a finished one is not listed
    claim.release()
    assert store.state(running).status == "missing"


def test_a_damaged_record_is_listed_and_not_fatal(small: Study, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "runs")
    cell = small.cells[0]
    record(store.folder(cell), cell.identity)
    (store.folder(cell) / "results.json").write_text("{")
    state = store.state(cell)
    assert state.status == "failed"
    assert "results.json: damaged" in state.detail


def test_a_run_of_another_study_is_not_done_twice(small: Study, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "runs")
    cell = small.cells[0]
    record(tmp_path / "runs" / "elsewhere" / cell.name, cell.identity)
    assert store.state(cell).status == "finished"
    assert store.folder(small.cells[1]) == tmp_path / "runs" / "small" / small.cells[1].name


@pytest.mark.parametrize("study", ["small", "elsewhere"])
def test_a_run_is_found_by_its_identity_whatever_its_name(small: Study, tmp_path: Path, study: str) -> None:
    store = CellStore(tmp_path / "runs")
    first, second, *_ = small.cells
    folder = tmp_path / "runs" / study
    record(folder / f"digits-clf-sgd-b8-s0-{first.identity}", first.identity)  # an earlier version's name
    assert store.state(first).status == "finished"
    assert store.state(second).status == "missing"
    record(folder / f"best-{second.identity}", second.identity)  # made after the folder was read
    assert store.state(second).status == "finished"
    os.utime(folder, (1, 1))  # so long unchanged that its listing is kept
    assert store.folder(first) == folder / f"digits-clf-sgd-b8-s0-{first.identity}"
    (folder / f"best-{second.identity}").rename(folder / "best")
    assert store.state(second).status == "missing"


def test_printed_commands_parse_back_to_the_same_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny(set={"eval.protocols": ["knn-v1", "linear-cached-v1"], "data.cache_dir": "/a b/c"})
    study = load_study(write(tmp_path, content), trust=True)
    done, left = study.cells
    record(tmp_path / "runs" / "tiny" / done.name, done.identity)
    assert study_main(tmp_path / "tiny.yaml", runs=tmp_path / "runs", print_commands=True, trust=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == print_commands([left], CellStore(tmp_path / "runs"))
    arguments = shlex.split(lines[0])
    assert arguments[:4] == ["accelerate", "launch", "-m", "ssl_bench.classify"]
    recipe = compose("classify", arguments[4:])
    assert recipe.identity() == left.identity
    assert recipe.run_dir == str(tmp_path / "runs" / "tiny" / left.name)
    assert recipe.resume == "auto"
    assert recipe.data.cache_dir == "/a b/c"


def test_the_time_is_estimated_from_the_studys_own_runs(small: Study, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "runs")
    done, left = small.cells[0], small.cells[1]
    record(store.folder(done), done.identity)
    rows = [{"step": step, "images_per_second": rate} for step, rate in ((1, 5.0), (2, 320.0), (3, 320.0))]
    (store.folder(done) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = speeds(small.cells, store, measure=False)
    assert known == {workload(left.recipe): Speed(320.0, 640.0)}  # 64 images x 10 steps per epoch
    epochs = left.recipe.epochs
    assert epochs is not None
    assert total_seconds([left, left], known) == (2 * epochs * 640 / 320, 0)
    assert [duration(s) for s in (40, 720, 12600, 10**6)] == ["40 s", "12 min", "3.5 h", "11.6 days"]


@pytest.mark.usefixtures("small")
def test_a_speed_that_cannot_be_measured_is_said_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_module, "speeds", lambda cells, _: {workload(c.recipe): "no data" for c in cells})
    assert study_main(tmp_path / "small.yaml", runs=tmp_path / "runs", dry_run=True, workers=1) == 0
    out = capsys.readouterr().out
    assert out.count("missing") == 7
    assert "unknown: no data" in out
    assert "and 6 cells of unknown speed" in out


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(ValueError, match="launcher must be local or slurm, got 'condor'"):
        study_main("smoke", launcher="condor")
