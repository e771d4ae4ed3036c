"""One bad record does not stop the report: any damage to any file of a run costs at most that run."""

import json
import shutil
from pathlib import Path

import pytest
from damaged_records import damage
from synthetic_runs import analysis_of, write_run
from typer.testing import CliRunner

from ssl_bench.cli.app import app
from ssl_bench.report import build
from ssl_bench.report.build import write_report

QUICK, MANY = 60, 1_500


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sound runs, of which one will be damaged."""
    folder = tmp_path_factory.mktemp("sound")
    analysis = analysis_of((5, 10), (50, 20), noise={64: 4.0, 256: 1.0})
    for name, settings in {"a": {}, "b": {"seed": 1}, "victim": {"optimizer": "tvlars", "decay": 1e-4}}.items():
        write_run(folder / name, steps=20, analysis=analysis, **settings)  # type: ignore[arg-type]
    return folder


def survives(sound: Path, folder: Path, seed: int, *, figures: str = "none") -> None:
    runs, out = folder / "runs", folder / "out"
    for path in (runs, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, runs)
    told = damage(runs / "victim", seed)
    try:
        write_report(runs, out, figures=figures)  # type: ignore[arg-type]
    except Exception as error:
        pytest.fail(f"{told}: {type(error).__name__}: {error}")
    board = (out / "tables" / "leaderboard.csv").read_text()
    assert "LARS" in board, told
    skipped = (out / "report.md").read_text().split("## Skipped")[1]
    assert "TVLARS" in board or "victim" in skipped, told  # never lost without a word


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_any_damage_costs_at_most_the_run(sound: Path, tmp_path: Path) -> None:
    for seed in range(QUICK):
        survives(sound, tmp_path, seed)


def test_any_damage_leaves_the_figures(sound: Path, tmp_path: Path) -> None:
    survives(sound, tmp_path, 7, figures="all")


@pytest.mark.slow
def test_much_damage(sound: Path, tmp_path: Path) -> None:
    for seed in range(QUICK, QUICK + MANY):
        survives(sound, tmp_path, seed, figures="all" if seed % 100 == 0 else "none")


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("metrics.jsonl", '"epochs": 0.2', '"epochs": null, "was": 0.2', ""),
        ("run.json", '"batch_size": 512', '"batch_size": "many"', "recipe.batch_size: input should be a valid integer"),
        ("run.json", '"target": "tvlars"', '"target": ["tvlars"]', "recipe.optimizer.target: input should be a valid"),
        ("run.json", '"total_steps": 20', '"total_steps": -3', "damaged: 'plan.total_steps': input should be greater"),
        ("results.json", '"protocol": "test-v1"', '"protocol": 7', "damaged: 'evaluations.0.protocol': input should"),
        ("run.json", '"plan": {', '"deep": ' + 100 * "[" + 100 * "]" + ', "plan": {', "nests more than 64 levels"),
        ("run.json", '"plan": {', f'"big": {10**30}, "plan": {{', "an integer of more than 63 bits"),
    ],
)
def test_the_reason_is_told(sound: Path, tmp_path: Path, file: str, old: str, new: str, reason: str) -> None:
    shutil.copytree(sound, tmp_path / "runs")
    path = tmp_path / "runs" / "victim" / file
    document = json.dumps(json.loads(path.read_text())) if path.suffix == ".json" else path.read_text()
    assert old in document
    path.write_text(document.replace(old, new, 1) + "\n")
    write_report(tmp_path / "runs", tmp_path / "out", figures="none")
    skipped = (tmp_path / "out" / "report.md").read_text().split("## Skipped")[1]
    assert reason in skipped.replace("\\", "")
    assert ("victim" in skipped) == bool(reason)
    answer = CliRunner().invoke(app, ["leaderboard", str(tmp_path / "runs")])
    assert answer.exit_code == 0
    assert reason[:20] in answer.output.replace("\n", " ")


@pytest.mark.parametrize(("file", "lacking"), [("telemetry.parquet", "layers"), ("metrics.jsonl", "curves")])
def test_a_damaged_file_of_curves_costs_no_numbers(sound: Path, tmp_path: Path, file: str, lacking: str) -> None:
    shutil.copytree(sound, tmp_path / "runs")
    (tmp_path / "runs" / "victim" / file).write_text("{}\n{}\n")
    write_report(tmp_path / "runs", tmp_path / "out", figures="none")
    assert "TVLARS" in (tmp_path / "out" / "tables" / "leaderboard.csv").read_text()
    skipped = (tmp_path / "out" / "report.md").read_text().split("## Skipped")[1]
    assert f"the report shows this run without its {lacking}" in skipped


def test_a_run_that_no_schema_refuses_is_found_and_left_out(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.check_claims

    def fails(collection, load):  # type: ignore[no-untyped-def]
        if any(run.record.folder.name == "victim" for run in collection.results):
            raise TypeError("what no one foresaw")
        return real(collection, load)

    monkeypatch.setattr(build, "check_claims", fails)
    write_report(sound, tmp_path / "out", figures="none")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "victim: the report fails on it: what no one foresaw" in text
    monkeypatch.setattr(build, "check_claims", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the report's own is no run's
        write_report(sound, tmp_path / "out", figures="none")
