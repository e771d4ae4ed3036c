"""Trackers: what each gets, one run across a resume, and nothing outside the run's folder."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY_PRETRAIN, environment, metrics, results, script

from ssl_bench.records.tracker import Tracker

WORDS = (*TINY_PRETRAIN, "run_dir=runs/r", "resume=auto", "checkpoint.every_steps=2")

# A run that stops after its second step as a killed one does, with a checkpoint behind it.
STOPPED = """
import os, sys
from ssl_bench import pretrain
from ssl_bench.training import session
whole = session.Session.log
def log(self, row):
    whole(self, row)
    if row["step"] == 3:
        self._tracker.close()
        os._exit(9)
session.Session.log = log
pretrain.main(sys.argv[1:])
"""


@pytest.fixture
def tracked(tmp_path, request):
    """A run with this tracker that was killed in its third step and went on; its folder."""
    kind = request.param
    pytest.importorskip({"tensorboard": "tensorboard"}.get(kind, kind))
    if kind == "mlflow":
        pytest.importorskip("sqlalchemy")
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    own = {name: value for name, value in environment().items() if not name.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    env = {**own, "HOME": str(tmp_path / "home"), "SSL_BENCH_STUDY": "mine"}
    env["SSL_BENCH_CACHE"] = str(tmp_path / "cache")
    words = (*WORDS, "steps=4", f"tracker={kind}")
    for command, code in (([sys.executable, "-c", STOPPED, *words], 9), (script("pretrain", words), 0)):
        done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "gets nothing" not in done.stderr
    assert "continuing" in done.stderr
    # Nothing outside the run's folder: neither in the current one nor at home (matplotlib's font cache is not theirs).
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "work/runs").iterdir()] == ["r"]
    found = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and "matplotlib" not in str(path)]
    assert not found
    return tmp_path / "work/runs/r"


def expected(folder: Path) -> tuple[list[float], float]:
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (knn,) = results(folder)["evaluations"]
    return [row["loss"] for row in rows], knn["metrics"]["top1"]


@pytest.mark.parametrize("tracked", ["tensorboard"], indirect=True)
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, top1 = expected(tracked)
    events = EventAccumulator(str(tracked / "ssl_bench"), purge_orphaned_data=True)
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars["loss"]] == pytest.approx(losses)
    assert scalars["knn-v1/trained/top1"] == [(4, pytest.approx(top1))]
    assert [step for step, _ in scalars["telemetry/ratio"]] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["curves"]
    assert {"name/text_summary", "study/text_summary", "status/text_summary"} <= set(events.Tags()["tensors"])
    assert len(list((tracked / "ssl_bench").iterdir())) == 2  # one run: a file for each session, and no folder
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize("tracked", ["mlflow"], indirect=True)
def test_mlflow(tracked):
    losses, top1 = expected(tracked)
    with sqlite3.connect(tracked / "mlflow/mlflow.db") as database:
        ((name,),) = database.execute("select name from runs")
        assert name.startswith("digits-tinytwins")
        logged = dict(database.execute("select key, value from params"))
        tags = dict(database.execute("select key, value from tags"))
        found = database.execute(
            "select step, value from metrics where key = 'loss' order by step, timestamp"
        ).fetchall()
        (final,) = database.execute("select value from metrics where key = 'knn-v1/trained/top1'")
    assert tags["group"] == "mine"
    assert (logged["optimizer.target"], logged["batch_size"]) == ("lars", "96")
    assert dict(found) == pytest.approx(dict(enumerate(losses, 1)))
    assert final[0] == pytest.approx(top1)
    assert list((tracked / "mlflow/artifacts").rglob("curves.png"))


@pytest.mark.parametrize("tracked", ["trackio"], indirect=True)
def test_trackio(tracked):
    losses, top1 = expected(tracked)
    (file,) = (tracked / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [
            (run, step, json.loads(text))
            for run, step, text in database.execute("select run_name, step, metrics from metrics")
        ]
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert len({run for run, _, _ in rows}) == 1
    assert {step: row["loss"] for _, step, row in rows if "loss" in row} == pytest.approx(dict(enumerate(losses, 1)))
    assert any(row.get("knn-v1/trained/top1") == pytest.approx(top1) for _, _, row in rows)
    assert any("telemetry/ratio" in row for _, _, row in rows)
    assert any("curves" in row for _, _, row in rows)
    assert any(config.get("optimizer.target") == "lars" for config in configs)
    assert any("mine" in str(config) for config in configs)


@pytest.mark.parametrize("tracked", ["wandb"], indirect=True)
def test_wandb_offline(tracked):
    """Each session leaves a folder, as W&B does offline, of one run: `wandb sync` joins them."""
    expected(tracked)
    sessions = sorted((tracked / "wandb").glob("offline-run-*"))
    kept = json.loads((tracked / "tracker.json").read_text())
    assert len(sessions) == 2
    assert {folder.name.rsplit("-", 1)[1] for folder in sessions} == {kept["id"]}
    data = b"".join(file.read_bytes() for file in (tracked / "wandb").rglob("*.wandb"))
    for word in (b"knn-v1/trained/top1", b"telemetry/ratio", b"mine", kept["name"].encode(), b"optimizer.target"):
        assert word in data
    assert list((tracked / "wandb").rglob("curves*.png"))


def test_a_tracker_that_does_not_start_is_one_line(tmp_path):
    class Broken:
        is_main_process, trackers = True, ()

        def init_trackers(self, *_: object, **__: object) -> None:
            raise RuntimeError("no\nnetwork")

    with pytest.raises(ValueError, match=r"^tracker=tensorboard must start, got no network$"):
        Tracker("tensorboard", tmp_path, "name", {}).start(Broken(), 0)
    assert not os.listdir(tmp_path)


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, capsys):
    class Gone:
        is_main_process, trackers = True, ()

        def init_trackers(self, *_: object, **__: object) -> None: ...

        def log(self, values: object, step: int) -> None:  # noqa: ARG002
            raise OSError("the server is gone")

    (tmp_path / "tracker.json").write_text('{"kind": "aim"}')  # as a session before has left it
    tracker = Tracker("aim", tmp_path, "name", {})
    tracker.start(Gone(), 3)
    tracker.log({"step": 4, "loss": 1.0})
    tracker.log({"step": 5, "loss": 1.0})
    tracker.finish({"status": "finished"})
    tracker.close()
    assert capsys.readouterr().err.strip() == "tracker=aim gets nothing from step 4 on: the server is gone"
