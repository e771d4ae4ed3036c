"""Reading run directories: damage by name, the status of every kind of run, the sound among the others."""

import json
import math
from pathlib import Path

import pytest
from made_run import RECIPE, begun, ended, open_run

from ssl_bench.records.reader import RecordError, _is_plain, find_runs, iterate_metrics, read_run
from ssl_bench.records.storage import jsonable


def test_metrics_damaged_in_the_middle_are_an_error_that_names_the_line(tmp_path: Path) -> None:
    with open_run(begun(tmp_path)) as run:
        run.truncate_to(0)
        for step in (1, 2, 3):
            run.log({"step": step})
        path = tmp_path / "metrics.jsonl"
        path.write_text(path.read_text().replace('{"step": 2}', '{"st###'))
        with pytest.raises(RecordError, match=r"metrics\.jsonl: damaged: line 2 of 3"):
            read_run(tmp_path)


def test_the_status_of_every_kind_of_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        run.write_provenance({})
        assert read_run(tmp_path / "a").status == "running"
    assert read_run(tmp_path / "a").status == "interrupted"
    for status in ("finished", "diverged", "collapsed", "at chance"):
        record = read_run(ended(tmp_path / status, status))
        assert record.status == status
        assert record.recipe == jsonable(RECIPE)
        assert record.identity == "id0"


def test_find_runs_lists_the_sound_and_the_skipped_with_the_reason(tmp_path: Path) -> None:
    ended(tmp_path / "study" / "cell1")
    begun(tmp_path / "cell2")
    (tmp_path / "cell2" / "checkpoints").mkdir()
    for name, text in (
        ("torn", '{"format": 1, "rec'),
        ("old", '{"format": 0}'),
        ("other", "[1]"),
        ("bare", '{"format": 1}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    ended(tmp_path / "results")
    (tmp_path / "results" / "results.json").write_text('{"format": 1, "status": "great", "evaluations": []}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    found, skipped = find_runs(tmp_path)
    assert [record.folder.name for record in found] == ["cell2", "cell1"]
    reasons = {entry.folder.name: entry.reason for entry in skipped}
    assert reasons.keys() == {"torn", "old", "other", "bare", "results", "foreign"}
    assert "run.json: damaged:" in reasons["torn"]
    assert "its format is 0, this version reads 1" in reasons["old"]
    assert "not written by ssl_bench" in reasons["other"]
    assert "damaged: 'identity': field required" in reasons["bare"]
    assert "damaged: 'status': input should be" in reasons["results"]
    assert "got 'great'" in reasons["results"]
    assert "not a run directory" in reasons["foreign"]
    assert not any("\n" in reason for reason in reasons.values())
    with pytest.raises(RecordError, match="no such folder"):
        find_runs(tmp_path / "absent")


def test_metrics_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """A leaderboard of long runs needs their last rows alone: damage before it is found when all are read."""
    ended(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [f'{{"step": {step}, "epochs": {step / 4}, "loss": "nan"}}' for step in range(1, 9)]
    path.write_text("\n".join(["{damaged", *rows]) + '\n{"step": 9, "ep')
    ((record,), skipped) = find_runs(tmp_path)
    assert skipped == []
    assert record.last_metrics["step"] == 8
    assert math.isnan(record.last_metrics["loss"])
    with pytest.raises(RecordError, match="line 1 of 10"):
        _ = record.metrics
    path.write_text("\n".join(rows) + '\n{"step": 9, "ep')
    assert [row["step"] for row in read_run(tmp_path / "run").metrics] == list(range(1, 9))
    assert [row["step"] for row in iterate_metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (b'{"a": [1, 0.5, null, true, "text"]}', True),
        (b'{"a": "\\ud800"}', False),
        (json.dumps({"a": "\ud800"}).encode("utf-16-le"), False),
        (b'{"a": 9223372036854775808}', False),
        (b"[" * 65 + b"]" * 65, False),
    ],
)
def test_only_what_needs_no_look_is_read_without_one(raw, plain):
    assert _is_plain(raw) is plain
