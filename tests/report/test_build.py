"""The commands: what they write and print, and how they refuse."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from synthetic_runs import analysis_of, write_run
from typer.testing import CliRunner

from ssl_bench.cli.report import register
from ssl_bench.report import build
from ssl_bench.report.build import Loader, all_tables, write_report
from ssl_bench.report.claims import analysis
from ssl_bench.report.leaderboard import read_collection
from ssl_bench.report.scope import coverage
from ssl_bench.study.grid import load_study

runner = CliRunner()


def app() -> typer.Typer:
    commands = typer.Typer()
    register(commands)
    return commands


def test_report_writes_everything(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"a{seed}", seed=seed, steps=20, telemetry=seed == 0)
    write_run(tmp_path / "runs" / "b", optimizer="tvlars", steps=20, status="diverged", telemetry=False)
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "run.json").write_text("[]")
    answer = runner.invoke(app(), ["report", str(tmp_path / "runs"), "-o", str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.strip() == str(tmp_path / "out" / "index.html")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name in ("leaderboard", "table1", "results-classification", "comparisons"):
        assert {f"tables/{name}.md", f"tables/{name}.csv", f"tables/{name}.tex"} <= written
    for name in ("accuracy-classification-cifar10-512", "layers-classification-cifar10-512-LARS"):
        assert {f"figures/{name}.svg", f"figures/{name}.png"} <= written
    assert {"index.html", "report.md"} <= written
    text = (tmp_path / "out" / "report.md").read_text()
    for part in (
        "diverged (n = 1)",
        "Claims of the paper",
        "gamma_target",
        "c/run.json: not written by ssl_bench",
    ):
        assert part in text
    assert str(tmp_path) not in text
    # What made it, however it was called: here by no command line at all.
    assert re.search(r"Made: \d{4}-\d\d-\d\d \d\d:\d\d UTC, ssl_bench \d", text)
    assert "Command: ssl-bench report runs -o out\n" in text


def test_a_damaged_telemetry_costs_only_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", steps=20)
    (tmp_path / "runs" / "a" / "telemetry.parquet").write_bytes(b"PAR1 broken")
    write_report(tmp_path / "runs", tmp_path / "out")
    assert capsys.readouterr().err.count("telemetry.parquet is damaged") == 1
    assert "70.00 (n = 1)" in (tmp_path / "out" / "tables" / "leaderboard.md").read_text()


STUDY = """
base: {data: digits, model.stem: imagenet, batch_size: 256, steps: 30}
seeds: [0, 1]
blocks:
  - track: classify
    axes:
      - {optimizer: [lars, lamb], optimizer.lr: [2, 0.01]}
"""


def test_a_new_report_leaves_nothing_of_the_earlier_one_and_touches_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    mine = [out / "notes.md", out / "figures/mine.txt", out / "figures/before.svg"]
    for path in mine:
        path.write_text("mine")
    write_report(tmp_path / "runs", out)  # no report was there: nothing is removed
    assert all(path.read_text() == "mine" for path in mine)
    stale = [out / "tables/stale.md", out / "figures/stale.svg"]
    for path in stale:
        path.write_text("old")
    names = {path.name for path in (out / "tables").iterdir()} - {"stale.md"}
    write_report(tmp_path / "runs", out)
    assert not any(path.exists() for path in stale)
    assert {path.name for path in (out / "tables").iterdir()} == names
    assert mine[0].exists()
    assert mine[1].exists()


def test_a_study_selects_its_runs_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(STUDY)
    study = load_study(tmp_path / "tiny.yaml")
    first, second, third, _ = study.cells
    write_run(tmp_path / "runs" / "a", recipe=replace(first.recipe, steps=10, precision="bf16"), telemetry=False)
    write_run(tmp_path / "runs" / "b", recipe=second.recipe, status="diverged", telemetry=False)
    write_run(tmp_path / "runs" / "c", recipe=replace(third.recipe, batch_size=128), telemetry=False)  # another study's
    collection = read_collection(tmp_path / "runs", study=study)
    assert sorted(result.record.folder.name for result in collection.results) == ["a", "b"]
    table = coverage(collection, study)
    assert [state for state, _ in table.rows] == ["diverged", "no run", "no run"]
    assert "optimizer.lr=0.01" in table.rows[1][1]
    assert len(table.records) == 4
    assert "4 runs: 2 no run, 1 finished, 1 diverged" in table.notes[0]
    assert table in all_tables(collection, Loader(), study=study)


def test_a_study_without_runs_or_of_no_name_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", telemetry=False)
    (tmp_path / "tiny.yaml").write_text(STUDY)
    cases = {str(tmp_path / "tiny.yaml"): "none of its 1 runs belongs to the study tiny", "tabel1": "table1"}
    for study, reason in cases.items():
        answer = runner.invoke(app(), ["report", str(tmp_path), "--study", study, "-o", str(tmp_path / "out")])
        assert answer.exit_code == 2
        assert reason in answer.stderr
        assert answer.stderr.count("\n") == 1


def test_leaderboard_is_printed(study: Path) -> None:
    answer = runner.invoke(app(), ["leaderboard", str(study)])
    assert answer.exit_code == 0, answer.output
    lines = [line for line in answer.stdout.splitlines() if "classification" in line and "│" in line]
    assert "LARS" in lines[0]
    assert "80.00 ± 0.50 (n = 3)" in lines[0]
    assert "diverged (n = 3)" in answer.stdout
    assert "skipped: " in answer.stdout


@pytest.mark.parametrize("command", ["report", "leaderboard"])
@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda _: None, "no such folder of runs"),
        (lambda folder: folder.mkdir(), "no run to report on"),
        (lambda folder: ((folder / "x").mkdir(parents=True), (folder / "x" / "cat.txt").touch()), "no run.json"),
    ],
)
def test_nothing_to_report_is_one_line(tmp_path: Path, command: str, prepare: object, reason: str) -> None:
    prepare(tmp_path / "runs")  # type: ignore[operator]
    answer = runner.invoke(app(), [command, str(tmp_path / "runs")])
    assert answer.exit_code == 2
    assert reason in answer.stderr
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, typer; from ssl_bench.cli.report import register; register(typer.Typer()); "
        "assert not {'numpy', 'matplotlib', 'torch', 'ssl_bench.report.build'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)


def test_few_layers_are_kept_and_all_can_be_had_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write_run(tmp_path / f"{seed}", seed=seed, steps=20)
    collection = read_collection(tmp_path)
    reads: list[str] = []
    real = build.load_layers
    monkeypatch.setattr(build, "load_layers", lambda folder: (reads.append(folder.name), real(folder))[1])
    monkeypatch.setattr(build, "_KEPT_BYTES", 0)
    load = Loader()
    first = [load(result).telemetry["weight_norm"].sum() for result in collection.results]
    assert [load(result).telemetry["weight_norm"].sum() for result in collection.results] == first
    assert reads == ["0", "1", "2", "0", "1", "2"]
    assert load(collection.results[2]).has("weight_norm")
    assert len(reads) == 6  # the last one is kept


def test_a_report_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[Path] = Counter()

    def counted(read_file: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def reads(folder: Path) -> Any:
            read[folder / read_file.__name__] += 1
            return read_file(folder)

        return reads

    for module, name in ((analysis, "read_analysis"), (build, "load_metrics"), (build, "load_layers")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    write_run(tmp_path / "runs" / "a", steps=20, analysis=analysis_of((5, 10), (50, 20), noise={64: 4.0, 256: 1.0}))
    write_report(tmp_path / "runs", tmp_path / "out")
    assert list(read.values()) == [1, 1, 1]
