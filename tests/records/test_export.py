"""`ssl-bench export`: records without weights and without this machine's paths, read like the runs."""

import json
import shutil
from pathlib import Path

import pytest
from commands import TINY_CLASSIFY
from made_run import begun
from typer.testing import CliRunner

from ssl_bench import classify, cli
from ssl_bench.records.export import _cut
from ssl_bench.records.reader import find_runs, read_run
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
    about = {"settings": {"images": 8}, "sharpness": [{"step": 2, "sam": 0.1}], "note": str(folder / "study/a")}
    (folder / "study/a/analysis.json").write_text(json.dumps(about))
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
        "run.json", "metrics.jsonl", "results.json", "sessions.jsonl", "telemetry.parquet", "analysis.json",
    }  # fmt: skip
    for path in files:
        assert str(runs.parent).encode() not in path.read_bytes(), path
    assert CliRunner().invoke(cli.app, ["export", str(runs), "-o", str(tmp_path / "out"), "--no-layers"]).exit_code == 0
    assert not (tmp_path / "out/study/a/telemetry.parquet").exists()  # nor an earlier copy's
    assert read_run(tmp_path / "out/study/a").metrics == read_run(runs / "study/a").metrics
    before, after = (read_run(folder / "study/a").provenance["argv"] for folder in (runs, tmp_path / "out"))
    assert before[-1] == f"run_dir={runs / 'study/a'}"
    assert (after[0], after[-1]) == ("classify.py", "run_dir=a")
    assert after[1:-2] == before[1:-2]
    assert export(runs, tmp_path / "out").exit_code == 0  # once more, in place
    assert len(find_runs(tmp_path / "out")[0]) == 1


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("/home/u/lr=1/run", "run"), ("data.path=/data/user/split=train/x", "data.path=x"), ("/my files/a b", "a b"),
        ("a=[/home/u/x,/home/u/y]", "a=[x,y]"), ("data={path:/home/u/x}", "data={path:x}"), ("/", "/"),
        ("optimizer.lr=1/2", "optimizer.lr=1/2"), ("images/s", "images/s"), ("org/name", "org/name"),
    ],
)  # fmt: skip
def test_paths_are_cut_wherever_they_stand(text: str, cut: str) -> None:
    assert _cut(text) == cut


def test_a_damaged_record_is_named_and_costs_no_other(runs: Path, tmp_path: Path) -> None:
    both = tmp_path / "runs"
    shutil.copytree(runs / "study/a", both / "good")
    shutil.copytree(runs / "study/a", both / "bad")
    with open(both / "bad/sessions.jsonl", "a") as file:
        file.write('{"started": "20\n')
    done = export(both, tmp_path / "out")
    assert done.exit_code == 0
    assert f"left out: {both / 'bad/sessions.jsonl'}: damaged" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]


def test_a_single_run_goes_to_its_own_folder_and_another_ones_place_is_refused(runs: Path, tmp_path: Path) -> None:
    assert export(runs / "study/a", tmp_path / "out").exit_code == 0
    assert read_run(tmp_path / "out/a").status == read_run(runs / "study/a").status
    (tmp_path / "out/a/telemetry.parquet").write_text("of an earlier state")
    other = shutil.copytree(runs / "study/a", tmp_path / "other/a")
    (other / "telemetry.parquet").unlink()
    assert export(other, tmp_path / "out").exit_code == 0  # the same run: replaced whole
    assert not (tmp_path / "out/a/telemetry.parquet").exists()
    head = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**head, "identity": "0" * 16}))
    done = export(other, tmp_path / "out")
    assert done.exit_code == 2
    assert "it holds the record of another run" in done.stderr


def test_folders_of_one_name_stay_two_data_sets(runs: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        run = shutil.copytree(runs / "study/a", tmp_path / "runs" / place)
        head = json.loads((run / "run.json").read_text())
        head["recipe"]["data"] |= {"name": "folder", "path": f"/{place}/train"}
        (run / "run.json").write_text(json.dumps(head))
    assert export(tmp_path / "runs", tmp_path / "out").exit_code == 0
    names = [read_run(tmp_path / "out" / place).recipe["data"]["path"] for place in ("one", "two")]
    assert all(name.startswith("train-") for name in names)
    assert names[0] != names[1]


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
