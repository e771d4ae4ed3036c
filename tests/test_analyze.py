"""`ssl-bench analyze`: snapshots of a run, what is measured of them, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import TINY_CLASSIFY, TINY_PRETRAIN
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import classify, cli, pretrain, sampling, views
from ssl_bench.compose import build
from ssl_bench.data import load_dataset
from ssl_bench.pipeline import Pipeline
from ssl_bench.recipe import Recipe
from ssl_bench.report.landscape import read_analysis
from ssl_bench.snapshots import Snapshots

SMALL = (
    "--images",
    "48",
    "--iterations",
    "3",
    "--samples",
    "2",
    "--noise-batch-sizes",
    "16,64",
    "--noise-images",
    "128",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's run and a pretraining's, with snapshots at the start, half-way and the end."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("steps=4", "checkpoint.snapshots=[0,0.5,1]")
    assert classify.main([*TINY_CLASSIFY, *words, f"run_dir={folder / 'clf'}"]) == 0
    assert pretrain.main([*TINY_PRETRAIN, *words, f"run_dir={folder / 'ssl'}", "eval.protocols=[]"]) == 0
    return folder


def analyze(run: Path, *words: str):
    return CliRunner().invoke(cli.app, ["analyze", str(run), *words])


def test_snapshots_hold_the_weights_of_their_steps(runs: Path) -> None:
    snapshots = Snapshots(runs / "clf")
    assert snapshots.steps() == [0, 2, 4]
    trained = load_file(runs / "clf/backbone.safetensors")
    last = load_file(snapshots.path(4))
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in trained.items())
    head = json.loads((runs / "clf/run.json").read_text())["recipe"]
    untrained = classify.build(_recipe(head), 10)
    assert all(torch.equal(v, load_file(snapshots.path(0))[k]) for k, v in untrained.state_dict().items())


def _recipe(plain: dict) -> Recipe:
    return build("classify", plain)


def test_snapshots_change_neither_identity_nor_run(runs: Path, tmp_path: Path) -> None:
    assert classify.main([*TINY_CLASSIFY, "steps=4", f"run_dir={tmp_path / 'r'}"]) == 0
    heads = [json.loads((run / "run.json").read_text()) for run in (runs / "clf", tmp_path / "r")]
    assert heads[0]["identity"] == heads[1]["identity"]
    files = [load_file(run / "backbone.safetensors") for run in (runs / "clf", tmp_path / "r")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.parametrize("track", ["clf", "ssl"])
def test_every_snapshot_is_measured(runs: Path, track: str) -> None:
    done = analyze(runs / track, *SMALL)
    assert done.exit_code == 0, done.output
    text = (runs / track / "analysis.json").read_text()
    found = read_analysis(runs / track)  # as the report reads it
    assert [row["step"] for row in found["sharpness"]] == [0, 2, 4]
    assert [(row["step"], row["batch_size"], row["batches"]) for row in found["gradient_noise"]] == [
        (step, size, 128 // size) for step in (0, 2, 4) for size in (16, 64)
    ]
    assert all(row["squared_error"] > 0 and row["weight_norm"] > 0 for row in _rows(found))
    assert json.loads(text)["settings"]["batch_norm"] == "train"
    # The same command gives the same numbers, the time of day aside.
    assert analyze(runs / track, *SMALL).exit_code == 0
    assert read_analysis(runs / track) == found
    assert analyze(runs / track, *SMALL, "--batch-norm", "eval", "--noise-batch-sizes", "").exit_code == 0
    other = read_analysis(runs / track)
    assert other["gradient_noise"] == []
    assert other["sharpness"][-1]["top_eigenvalue"] != found["sharpness"][-1]["top_eigenvalue"]


def _rows(found: dict) -> list[dict]:
    steps = {row["step"]: row for row in found["sharpness"]}
    return [{**steps[row["step"]], **row} for row in found["gradient_noise"]]


def test_the_loss_is_that_of_training_on_the_fixed_batch(runs: Path) -> None:
    assert analyze(runs / "clf", *SMALL).exit_code == 0
    recipe = _recipe(json.loads((runs / "clf/run.json").read_text())["recipe"])
    dataset = load_dataset("digits")
    pipeline = Pipeline(
        dataset.train, [views.classification_view(recipe, dataset)], [sampling.VIEW1],
        seed=sampling.derive_seed(0, sampling.ANALYSIS), batch_size=48, chunk_size=None, rank=0, world_size=1,
        device=torch.device("cpu"), with_labels=True,
    )  # fmt: skip
    images, labels = next(pipeline.batches(0, 1)).views(0)
    for row in read_analysis(runs / "clf")["sharpness"]:
        network = classify.build(recipe, 10)
        Snapshots(runs / "clf").load(int(row["step"]), network)
        logits = network.train().logits(images)
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--images", "1"), "images: got 1, allowed: at least 2"),
        (("--samples", "1"), "samples: got 1, allowed: at least 2"),
        (("--rho", "0"), "rho: got 0.0, allowed: a length above 0"),
        (("--batch-norm", "off"), "batch_norm: got 'off', allowed: train or eval"),
        (("--noise-batch-sizes", "16,x"), "got '16,x', allowed: whole numbers with commas"),
        (("--noise-batch-sizes", "4096"), "noise_batch_sizes: got 4096, allowed: 2 to 2048"),
        (("--images", "999999"), "got 999999, allowed: at most the 1442 of the train set"),
        (("batch_size=4",), "batch_size is fixed by the run's record"),
        (("device.path=3",), "unknown key"),
    ],
)
def test_it_refuses_in_one_line(runs: Path, words: tuple[str, ...], reason: str) -> None:
    done = analyze(runs / "clf", *words)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_it_says_what_to_do_where_there_are_no_snapshots(tmp_path: Path) -> None:
    assert classify.main([*TINY_CLASSIFY, "steps=1", f"run_dir={tmp_path / 'r'}"]) == 0
    done = analyze(tmp_path / "r")
    assert done.exit_code == 2
    assert "run it with checkpoint.snapshots=[0,0.5,1]" in done.stderr
    assert analyze(tmp_path / "nothing").exit_code == 2


def test_a_damaged_snapshot_is_named_and_one_that_is_not_finite_left_out(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "clf", tmp_path / "r")
    path = Snapshots(run).path(2)
    network = classify.build(_recipe(json.loads((run / "run.json").read_text())["recipe"]), 10)
    with torch.no_grad():
        network.head.weight.fill_(torch.nan)
    Snapshots(run).save(2, network)
    done = analyze(run, *SMALL)
    assert done.exit_code == 0
    assert "step 2: left out, the weights are not finite" in done.stderr
    assert [row["step"] for row in read_analysis(run)["sharpness"]] == [0, 4]
    path.write_bytes(path.read_bytes()[:1000])
    done = analyze(run, *SMALL)
    assert done.exit_code == 2
    assert f"snapshot {path}: damaged" in done.stderr
