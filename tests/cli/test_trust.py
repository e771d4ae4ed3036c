"""Measuring a run that somebody else made: what its record names is neither imported nor read without --trust."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import TINY_PRETRAIN, results
from typer.testing import CliRunner

from ssl_bench import cli, pretrain

PATHS = ("data.path", "eval.data_path", "model.checkpoint", "model.pretrained")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with snapshots, of a method that lies in a file of the user's."""
    folder = tmp_path_factory.mktemp("made") / "r"
    words = [*TINY_PRETRAIN, "steps=2", "checkpoint.snapshots=[1]", "eval.protocols=[]", f"run_dir={folder}"]
    assert pretrain.main(words) == 0
    return folder


@pytest.fixture
def theirs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the current folder, beside a file that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    shutil.copytree(run, "r")
    Path("evil.py").write_text("open('ran', 'w').close()")
    return Path("r")


def record(folder: Path, key: str, value: Any) -> None:
    head = json.loads((folder / "run.json").read_text())
    section, _, name = key.partition(".")
    head["recipe"][section] = {**head["recipe"][section], name: value} if name else value
    (folder / "run.json").write_text(json.dumps(head))


def command(name: str, *words: str) -> Result:
    more = ["--images", "8", "--noise-batch-sizes", ""] if name == "analyze" else []
    return CliRunner().invoke(cli.app, [name, "r", *words, *more])


@pytest.mark.parametrize("key", ["method.target", "optimizer.target", "schedule.target", "tracker", "run_dir"])
def test_evaluate_builds_no_more_than_it_needs(theirs: Path, key: str) -> None:
    record(theirs, key, "evil:Thing")
    done = command("evaluate", "eval.protocols=[knn-v1]")
    assert done.exit_code == 0, done.stderr
    assert results(theirs)["evaluations"][0]["protocol"] == "knn-v1"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.name", "evil:find"), ("model.name", "evil:net"), ("eval.protocols", ["evil:Probe"]),
        ("data.path", "/theirs"), ("eval.data", "evil:find"), ("eval.data_path", "/theirs"),
        ("model.checkpoint", "/theirs"), ("model.pretrained", "/theirs"),
        ("method.target", "evil:Method"),
    ],
)  # fmt: skip
def test_what_would_be_imported_or_read_needs_trust(theirs: Path, key: str, value: Any) -> None:
    record(theirs, key, value)
    for name in ("evaluate", "analyze"):
        if (name, key.partition(".")[0]) in (("evaluate", "method"), ("analyze", "eval")):
            continue
        refused = command(name)
        assert refused.exit_code == 2
        wanted = "be given on the command line" if key in PATHS else "be built in or an installed entry point"
        assert f"error: {key} must {wanted}, got {value!r} from r/run.json: --trust" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert not Path("ran").exists()
    command("analyze" if key == "method.target" else "evaluate", "--trust")
    assert Path("ran").exists() == (key not in PATHS)


def test_a_trusted_record_is_measured(theirs: Path) -> None:
    refused = command("analyze")
    assert "method.target must be built in" in refused.stderr
    done = command("analyze", "--trust")
    assert done.exit_code == 0, done.stderr
    assert (theirs / "analysis.json").exists()


def test_the_users_own_word_and_a_recorded_cache_need_no_trust(theirs: Path) -> None:
    record(theirs, "eval.protocols", ["evil:Probe"])
    record(theirs, "data.cache_dir", "/proc/theirs")
    done = command("evaluate", "eval.protocols=[knn-v1]")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("recipe", [{}, {"track": "pretrain", "data": [1]}, {"track": "pretrain", "optimizer": 3}])
def test_a_recipe_that_is_none_is_one_line(theirs: Path, recipe: dict[str, Any]) -> None:
    head = json.loads((theirs / "run.json").read_text())
    (theirs / "run.json").write_text(json.dumps({**head, "recipe": recipe}))
    for name in ("evaluate", "analyze"):
        refused = command(name)
        assert refused.exit_code in (0, 2) or refused.exception is None
        assert "Traceback" not in refused.stderr


def test_a_folder_that_may_only_be_read_is_measured_and_then_refused(theirs: Path) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError(f"{theirs / '.lock'}: locking: Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_bench.cli.evaluate.add_evaluations", refuse)
        done = command("evaluate", "eval.protocols=[knn-v1]")
    assert done.exit_code == 2
    assert "top-1" in done.stdout
    assert "Read-only file system" in done.stderr
