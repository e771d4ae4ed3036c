"""`ssl-bench export`: records without weights and without this machine's paths, read like the runs."""

from pathlib import Path

import pytest
from commands import TINY_CLASSIFY
from made_run import begun
from typer.testing import CliRunner

from ssl_bench import classify, cli
from ssl_bench.reading import find_runs, read_run
from ssl_bench.report.curves import load_curves


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that has ended, with a snapshot, and one that has not."""
    folder = tmp_path_factory.mktemp("all") / "runs"
    words = ("steps=2", "checkpoint.snapshots=[1]", f"data.cache_dir={folder.parent / 'cache'}")
    words = (*TINY_CLASSIFY, *words, f"run_dir={folder / 'study/a'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(folder / "classify.py"), *words])  # which the record keeps
        assert classify.main(list(words)) == 0
    begun(folder / "study/b")
    return folder


def export(runs: Path, output: Path):
    return CliRunner().invoke(cli.app, ["export", str(runs), "-o", str(output)])


def test_a_copy_says_what_the_run_said(runs: Path, tmp_path: Path) -> None:
    done = export(runs, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"1 records in {tmp_path / 'out'}\n"
    assert "study/b: the run is interrupted" in done.stderr
    run, copy = read_run(runs / "study/a"), read_run(tmp_path / "out/study/a")
    assert (copy.status, copy.identity, copy.metrics, copy.results) == (
        run.status, run.identity, run.metrics, run.results,
    )  # fmt: skip
    assert copy.recipe["optimizer"] == run.recipe["optimizer"]
    assert copy.recipe["data"]["cache_dir"] == "cache"
    assert load_curves(copy).telemetry.keys() == load_curves(run).telemetry.keys()


def test_it_is_small_and_knows_nothing_of_the_machine(runs: Path, tmp_path: Path) -> None:
    export(runs, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "run.json", "metrics.jsonl", "results.json", "sessions.jsonl", "telemetry.parquet",
    }  # fmt: skip
    for path in files:
        assert str(runs.parent).encode() not in path.read_bytes(), path
    before, after = (read_run(folder / "study/a").provenance["argv"] for folder in (runs, tmp_path / "out"))
    assert before[-1] == f"run_dir={runs / 'study/a'}"
    assert (after[0], after[-1]) == ("classify.py", "run_dir=a")
    assert after[1:-2] == before[1:-2]
    assert export(runs, tmp_path / "out").exit_code == 0  # once more, in place
    assert len(find_runs(tmp_path / "out")[0]) == 1


def test_it_refuses_a_place_among_the_runs_and_a_folder_without_ended_ones(runs: Path, tmp_path: Path) -> None:
    for output in (runs, runs / "copies", runs.parent):
        done = export(runs, output)
        assert done.exit_code == 2
        assert "neither inside" in done.stderr
    begun(tmp_path / "runs/b")
    done = export(tmp_path / "runs", tmp_path / "out")
    assert done.exit_code == 2
    assert "no run that has ended" in done.stderr
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "nothing", tmp_path / "out").exit_code == 2
