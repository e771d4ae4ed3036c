"""`ssl-bench analyze`: snapshots of a run, what is measured of them, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TINY_CLASSIFY, TINY_PRETRAIN
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from ssl_bench import classify, cli, pretrain
from ssl_bench.data.dataset import load_dataset
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.methods import Classifier
from ssl_bench.recipe.compose import build as checked
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.snapshots import Snapshots
from ssl_bench.report.claims.analysis import Analysis, read_analysis
from ssl_bench.runtime import seeds
from ssl_bench.training import build

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
    return CliRunner().invoke(cli.app, ["analyze", str(run), "--trust", *words])  # its method is a plug-in


def test_snapshots_hold_the_weights_of_their_steps(runs: Path) -> None:
    snapshots = Snapshots(runs / "clf")
    assert snapshots.steps() == [0, 2, 4]
    trained = load_file(runs / "clf/backbone.safetensors")
    last = load_file(snapshots.path(4))
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in trained.items())
    head = json.loads((runs / "clf/run.json").read_text())["recipe"]
    untrained = build.classifier(_recipe(head), 10)
    assert all(torch.equal(v, load_file(snapshots.path(0))[k]) for k, v in untrained.state_dict().items())


def _recipe(plain: dict) -> Recipe:
    return checked("classify", plain)


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
    found = read_analysis(runs / track)  # as the report reads it
    assert [row["step"] for row in found.sharpness] == [0, 2, 4]
    assert [(row["step"], row["batch_size"], row["batches"]) for row in found.gradient_noise] == [
        (step, size, 128 // size) for step in (0, 2, 4) for size in (16, 64)
    ]
    assert all(row["squared_error"] > 0 and row["weight_norm"] > 0 for row in _rows(found))
    assert found.settings["batch_norm"] == "train"
    assert found.about["torch"]["cudnn_allow_tf32"] is False
    # The same command gives the same numbers, the time of day aside.
    assert analyze(runs / track, *SMALL).exit_code == 0
    again = read_analysis(runs / track)
    assert (again.sharpness, again.gradient_noise) == (found.sharpness, found.gradient_noise)
    assert analyze(runs / track, *SMALL, "--batch-norm", "eval", "--noise-batch-sizes", "").exit_code == 0
    other = read_analysis(runs / track)
    assert other.gradient_noise == ()
    assert other.sharpness[-1]["top_eigenvalue"] != found.sharpness[-1]["top_eigenvalue"]


def _rows(found: Analysis) -> list[dict]:
    steps = {row["step"]: row for row in found.sharpness}
    return [{**steps[row["step"]], **row} for row in found.gradient_noise]


def test_the_loss_is_that_of_training_on_the_fixed_batch(runs: Path) -> None:
    assert analyze(runs / "clf", *SMALL).exit_code == 0
    recipe = _recipe(json.loads((runs / "clf/run.json").read_text())["recipe"])
    dataset = load_dataset("digits")
    views = build.views(recipe, dataset, Classifier.views, SimpleNamespace(device=torch.device("cpu")))
    pipeline = Pipeline(
        dataset.train, views,
        seed=seeds.derive_seed(0, seeds.ANALYSIS), batch_size=48, chunk_size=None, rank=0, world_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    images, labels = next(pipeline.batches(0, 1)).views(0)
    for row in read_analysis(runs / "clf").sharpness:
        network = build.classifier(recipe, 10)
        Snapshots(runs / "clf").load(int(row["step"]), network)
        logits = network.train().logits(images)
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--images", "1"), "images must be at least 2, got 1"),
        (("--samples", "1"), "samples must be at least 2, got 1"),
        (("--rho", "0"), "rho must be > 0, got 0.0"),
        (("--batch-norm", "off"), "batch_norm must be train or eval, got 'off'"),
        (("--noise-batch-sizes", "16,x"), "must be whole numbers with commas, e.g. 64,256, got '16,x'"),
        (("--noise-batch-sizes", "4096"), "noise_batch_sizes must be 2 to 2048, got 4096"),
        (("--images", "999999"), "images must be at most the 1442 images of the train set, got 999999"),
        (("batch_size=4",), "batch_size is fixed by the run's record"),
        (("optimizer.lr=3",), "optimizer.lr is fixed by the run's record"),
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


def test_what_cannot_be_measured_is_named_and_costs_nothing_else(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "clf", tmp_path / "r")
    snapshots = Snapshots(run)
    network = build.classifier(_recipe(json.loads((run / "run.json").read_text())["recipe"]), 10)
    with torch.no_grad():
        network.head.weight.fill_(torch.nan)
    snapshots.save(2, network)
    snapshots.path(0).unlink()
    done = analyze(run, *SMALL)
    assert done.exit_code == 0
    assert "step 0: left out, the run kept no weights there" in done.stderr
    assert "step 2: left out, sharpness: the loss must be a finite scalar, got nan" in done.stderr
    assert [row["step"] for row in read_analysis(run).sharpness] == [4]
    path = snapshots.path(4)
    path.write_bytes(path.read_bytes()[:1000])
    done = analyze(run, *SMALL)
    assert done.exit_code == 2
    assert f"step 4: left out, snapshot {path}: damaged" in done.stderr
    assert "no snapshot could be measured" in done.stderr
    assert [row["step"] for row in read_analysis(run).sharpness] == [4]  # the earlier analysis stays


def test_tied_weights_are_kept_too(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    Snapshots(tmp_path).save(1, tied)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    Snapshots(tmp_path).load(1, other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tied.state_dict().items())
    with pytest.raises(ValueError, match="another network's"):
        Snapshots(tmp_path).load(1, nn.Linear(3, 3))


def test_a_nominal_divisor_is_the_measured_batchs_own_size(runs: Path, tmp_path: Path) -> None:
    """The released Barlow Twins divides by the recipe's batch size: on smaller batches that would be another loss."""
    run = shutil.copytree(runs / "ssl", tmp_path / "r")
    head = json.loads((run / "run.json").read_text())
    assert head["recipe"]["method"]["divisor"] is None
    head["recipe"]["method"]["divisor"] = head["recipe"]["batch_size"]
    (run / "run.json").write_text(json.dumps(head))
    assert analyze(runs / "ssl", *SMALL).exit_code == analyze(run, *SMALL).exit_code == 0
    assert read_analysis(run).sharpness == read_analysis(runs / "ssl").sharpness
