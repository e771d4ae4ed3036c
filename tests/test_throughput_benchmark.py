"""The benchmarks of whole steps run, at sizes that measure nothing, so that they cannot rot; no time is asserted."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its file's name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == BENCHMARKS
        return module

    return imported


def test_every_contestant_runs_and_is_recorded(load, tmp_path, capsys):
    pytest.importorskip("lightly")
    rows = load("throughput").main(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    assert len(rows) == 10
    assert {row["track"] for row in rows} == {"pretrain", "classify"}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [row["time_over_bare"] for row in rows if row["what"].startswith("bare")] == [1.0, 1.0]
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert record["rows"] == rows
    assert record["packages"]["torch"]
    assert "lightly end to end" in capsys.readouterr().out


def test_a_sweep_times_bare_and_ours_at_each_size(load):
    rows = load("throughput").main(
        ["--quick", "--sweep", "projector", "--values", "8", "24", "--batch", "4", "--tracks", "pretrain", "classify"]
    )
    assert [(row["projector"], row["what"].split(",")[0]) for row in rows] == [
        (8, "bare compute"), (8, "ssl_bench end to end"), (24, "bare compute"), (24, "ssl_bench end to end"),
    ]  # fmt: skip


def test_the_swept_size_is_the_one_that_is_built(load, monkeypatch):
    throughput = load("throughput")
    built = []

    def contestants(_track, sizes, *, peers):
        built.append((sizes.batch, sizes.pixels, sizes.projector, sizes.steps, peers))
        return {"a": lambda _steps: None, "b": lambda _steps: None}

    monkeypatch.setattr(throughput, "contestants", contestants)
    sizes = throughput.Sizes(batch=512, steps=4, turns=1)
    for name, values in (("batch", (1024, 4096)), ("pixels", (96,)), ("projector", (1024,))):
        list(throughput.sweep("pretrain", sizes, name, values))
    paper = (2048, 2048, 4096)
    assert built == [
        (1024, 32, paper, 2, False), (4096, 32, paper, 1, False), (512, 96, paper, 4, False),
        (512, 32, (1024, 1024, 1024), 4, False),
    ]  # fmt: skip
    assert list(throughput.sweep("classify", sizes, "projector", (1024,))) == []


def test_the_bare_step_trains_and_ours_sees_new_views(load):
    throughput = load("throughput")
    for track in ("pretrain", "classify"):
        trainer = throughput.build_trainer(track, throughput.QUICK)
        before = [p.detach().clone() for p in trainer.module.parameters()]
        throughput.bare(trainer)(1)
        after = [p.detach().clone() for p in trainer.module.parameters()]
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        throughput.end_to_end(trainer)(2)
        throughput.end_to_end(trainer)(1)
        assert trainer.step == 3


def test_the_profile_books_every_part(load, tmp_path, capsys):
    results = load("profile_step").main(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    for result in results:
        shares = {name: row["share"] for name, row in result["parts"].items()}
        assert sum(shares.values()) == pytest.approx(1)
        # A classifier's loss is part of its forward.
        booked = set(shares) - ({"loss"} if result["track"] == "classify" else set())
        assert all(shares[name] > 0 for name in booked)
        assert len(result["operations"]) == 12
    assert json.loads((tmp_path / "new" / "out.json").read_text())["results"] == results
    assert "augmentation" in capsys.readouterr().out
