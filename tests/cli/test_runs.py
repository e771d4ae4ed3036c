"""show, compare and resume: runs are found by the start of their names, and gone on with by their own recipes."""

import json
import shutil

import pytest
import torch
from commands import TINY_PRETRAIN, metrics, results
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import cli, pretrain

CONSTANT = [*TINY_PRETRAIN, "eval=none", "schedule=constant", "checkpoint.final=true"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs a (2 steps, lr 5), b (4 steps, lr 5) and c (2 steps, lr 1, warm-up and cosine)."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in (
            ("tiny-a-1234", [*CONSTANT, "steps=2"]),
            ("tiny-b-1299", [*CONSTANT, "steps=4"]),
            ("other/tiny-c-5678", [*TINY_PRETRAIN, "steps=2", "optimizer.lr=1", "checkpoint.final=true"]),
        ):
            assert pretrain.main([*words, f"run_dir=runs/{name}"]) == 0
    return folder / "runs"


@pytest.fixture
def runs(made, here):
    shutil.copytree(made, here / "runs")
    return here / "runs"


def asked(*words: str):
    return CliRunner().invoke(cli.app, list(words))


def line_of(done) -> str:
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


@pytest.mark.parametrize("word", ["tiny-a", "1234", "runs/tiny-a-1234", "runs/tiny-a"])
@pytest.mark.usefixtures("runs")
def test_a_run_is_found_by_the_start_of_its_name(word):
    done = asked("show", word)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("runs/tiny-a-1234: finished\n")


def test_show_says_what_it_was_what_came_out_and_what_is_there(runs):
    text = asked("show", "tiny-c").stdout
    assert "tiny_net:TinyTwins on digits, tiny_smooth, lars lr 1, batch 96\n" in text
    assert "  progress   step 2 of 2, loss " in text
    recipe = text.partition("recipe (what differs from the defaults):\n")[2].partition("results:")[0]
    shown = dict(line.split(maxsplit=1) for line in recipe.splitlines())
    assert shown.items() >= {"data": "digits", "optimizer.lr": "1.0", "batch_size": "96"}.items()
    assert shown["augment.crop_scale"] == "[0.3,1.0]"
    assert "augment.flip" not in shown
    (entry,) = results(runs / "other/tiny-c-5678")["evaluations"]
    assert f"knn-v1             trained    top-1 {entry['metrics']['top1']:.2f}% of 355\n" in text
    assert "backbone.safetensors" in text
    assert "checkpoints/" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.usefixtures("runs")
def test_what_is_no_run_or_several_is_one_line(here):
    (here / "empty").mkdir()
    assert line_of(asked("show", "tiny-")).startswith(
        "error: RUN must be one run, got 'tiny-', with which 3 begin: runs/other/tiny-c-5678, runs/tiny-a-1234, "
    )
    missing = "error: RUN must be a run's folder, or the start of its name in runs, got 'x', which is none"
    assert line_of(asked("show", "x")) == missing
    assert line_of(asked("resume", "x")) == missing
    assert line_of(asked("show", "empty")) == "error: empty: not a run directory, it has no run.json"
    assert line_of(asked("compare", "tiny-a")) == "error: compare: RUN must be given twice or more, got 1"
    assert "--y must be a metric that one of the runs logged" in line_of(
        asked("compare", "tiny-a", "tiny-b", "-o", "x.svg", "--y", "lss")
    )
    assert line_of(asked("compare", "1234", "tiny-a")).startswith("error: compare: RUN must be different runs")


def test_compare_shows_the_differences_and_draws_the_curves(runs, here):
    done = asked("compare", "tiny-b", "tiny-c", "-o", "curves.svg")
    assert done.exit_code == 0, done.output
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in done.stdout.splitlines() if line.strip()}
    assert rows["optimizer.lr"] == ["5.0", "1.0"]
    assert rows["steps"] == ["4", "2"]
    assert rows["schedule.target"] == ["constant", "warmup_cosine"]
    assert "batch_size" not in rows
    assert rows["status"] == [results(runs / one)["status"].split()[-1] for one in ("tiny-b-1299", "other/tiny-c-5678")]
    last = [metrics(runs / one)[-1]["loss"] for one in ("tiny-b-1299", "other/tiny-c-5678")]
    assert rows["loss"] == [f"{loss:.4g}" for loss in last]
    picture = (here / "curves.svg").read_text()
    assert "A: tiny_net:TinyTwins, digits, lars lr 5.0" in picture
    assert "B: tiny_net:TinyTwins, digits, lars lr 1.0" in picture


def test_an_interrupted_run_goes_on_with_nothing_retyped(runs):
    run = runs / "tiny-b-1299"
    whole = {"weights": load_file(run / "backbone.safetensors"), "rows": metrics(run)}
    for name in ("results.json", "backbone.safetensors"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text(lines[0])
    refused = line_of(asked("resume", "tiny-b"))
    assert "method.target must be built in or an installed entry point, got 'tiny_net:TinyTwins'" in refused
    assert "--trust imports it" in refused
    done = asked("resume", "tiny-b", "--trust")
    assert done.exit_code == 0, done.output
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in whole["rows"]]
    weights = load_file(run / "backbone.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole["weights"].items())
    again = asked("resume", "tiny-b", "--trust")
    assert again.exit_code == 0
    assert "has ended already" in again.stderr


def test_a_longer_run_is_what_a_start_with_that_length_gives(runs):
    before = {path.name: path.read_bytes() for path in (runs / "tiny-a-1234").iterdir() if path.is_file()}
    done = asked("resume", "tiny-a", "steps=4", "--trust")
    assert done.exit_code == 0, done.output
    (made,) = (path for path in runs.iterdir() if path.name.startswith("digits-"))
    direct = runs / "tiny-b-1299"
    heads = [json.loads((folder / "run.json").read_text()) for folder in (made, direct)]
    assert heads[0]["identity"] == heads[1]["identity"]
    assert heads[0]["plan"] == heads[1]["plan"]
    assert heads[0]["continued_from"]["step"] == 2
    assert [row["loss"] for row in metrics(made)] == [row["loss"] for row in metrics(direct)]
    one, other = (load_file(folder / "backbone.safetensors") for folder in (made, direct))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert before == {path.name: path.read_bytes() for path in (runs / "tiny-a-1234").iterdir() if path.is_file()}
    again = asked("resume", "tiny-a", "steps=4", "--trust")
    assert "has ended already" in again.stderr


def test_a_length_that_cannot_be_changed_is_one_line(runs):
    cosine = line_of(asked("resume", "tiny-c", "steps=4", "--trust"))
    assert cosine.startswith("error: steps cannot be changed from 2 to 4: schedule=warmup_cosine depends on the length")
    assert "more than the 2 that the run has done, got 1" in line_of(asked("resume", "tiny-a", "steps=1", "--trust"))
    assert "give steps or epochs, not both" in line_of(asked("resume", "tiny-a", "steps=3", "epochs=3", "--trust"))
    assert "seed is fixed by the run's record" in line_of(asked("resume", "tiny-a", "seed=1", "--trust"))
    shutil.rmtree(runs / "tiny-a-1234/checkpoints")
    assert "must have a checkpoint to go on from, got none" in line_of(asked("resume", "tiny-a", "steps=4", "--trust"))
    assert sorted(path.name for path in runs.iterdir()) == ["other", "tiny-a-1234", "tiny-b-1299"]


def test_a_method_that_knows_the_runs_length_cannot_be_made_longer():
    words = ["data=digits", "model.stem=imagenet", "method=byol", "batch_size=8", "device=cpu", "eval=none", "steps=1"]
    words += ["method.projector=[8,8]", "method.predictor=[8]", "schedule=constant", "checkpoint.final=true"]
    assert pretrain.main([*words, "run_dir=r"]) == 0
    assert "method=byol follows the progress of the run (begin_step)" in line_of(asked("resume", "r", "steps=2"))
