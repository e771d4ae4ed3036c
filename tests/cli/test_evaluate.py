"""Evaluating a saved run, or a backbone that no run has trained."""

import json
import re
import shutil

import pytest
import timm
import torch
from commands import TINY_PRETRAIN, results
from made_data import pixels, write_images
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import cli, pretrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_evaluate_adds_to_the_record(here):
    assert pretrain.main([*TINY_PRETRAIN, "steps=1", "run_dir=r", "eval.baseline=true"]) == 0
    before = results(here / "r")["evaluations"]
    done = CliRunner().invoke(cli.app, ["evaluate", "r", "device=cpu"])
    assert done.exit_code == 0, done.output
    after = results(here / "r")["evaluations"]  # replaced, by the same numbers
    assert [(e["model"], e["metrics"]) for e in after] == [(e["model"], e["metrics"]) for e in before]
    more = ["eval.protocols=[linear-cached-v1,pca-2d-v1]", "eval.baseline=false"]
    done = CliRunner().invoke(cli.app, ["evaluate", "r", *more])
    assert done.exit_code == 0, done.output
    entries = results(here / "r")["evaluations"]
    assert [entry["protocol"] for entry in entries] == ["knn-v1", "knn-v1", "linear-cached-v1", "pca-2d-v1"]
    assert len(entries[3]["points"]["x"].split()) == entries[3]["n_test"] == 355
    assert entries[3]["points"]["classes"] == list("0123456789")
    assert re.search(
        r"pca-2d-v1 +trained +explained [\d.]+, explained_1 [\d.]+, explained_2 [\d.]+ of 355\n", done.output
    )
    refused = CliRunner().invoke(cli.app, ["evaluate", "r", "batch_size=4"])
    assert refused.exit_code == 2
    assert "batch_size is fixed by the run's record" in refused.output


def test_evaluate_takes_a_backbone_that_no_run_has_trained(here):
    """Barlow Twins' layout of a checkpoint; the weights are those of a run, so the numbers are known."""
    words = ["data=digits", "steps=1", "batch_size=8", "model.stem=imagenet", "method.projector=[16,16]", "run_dir=r"]
    assert pretrain.main([*words, "eval.protocols=[knn-v1]", "eval.baseline=false", "device=cpu"]) == 0
    state = {f"module.backbone.{name}": tensor for name, tensor in load_file(here / "r/backbone.safetensors").items()}
    torch.save({"epoch": 1, "model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}, "bt.pth")
    given = ["evaluate", "data=digits", "model.stem=imagenet", "device=cpu", "eval.protocols=[knn-v1]"]
    done = CliRunner().invoke(cli.app, [*given, "model.checkpoint=bt.pth", "-o", "out"])
    assert done.exit_code == 0, done.output
    assert "checkpoint bt.pth: 100 of 100 tensors loaded (named model.module.backbone.*)" in done.stderr
    (path,) = (here / "out").iterdir()
    record = json.loads(path.read_text())
    assert [entry["model"] for entry in record["evaluations"]] == ["trained", "untrained"]
    assert record["evaluations"][0]["metrics"] == results(here / "r")["evaluations"][0]["metrics"]
    assert record["recipe"]["model"]["checkpoint_sha256"]
    assert set(record["recipe"]) == {"data", "model", "eval", "augment", "device", "seed"}
    assert record["packages"]["timm"] == timm.__version__
    for words, message in {
        (
            "model.name=resnet34",
            "model.checkpoint=bt.pth",
        ): "must fit the backbone in at least 90% of the tensors, got 55%",
        ("optimizer.lr=1",): "optimizer.lr has no effect on an evaluation (what has: data, model, eval, ",
        ("eval.protocols=[]",): "eval.protocols must name at least one evaluator, got none",
        ("model.name=resnet81",): "unknown model 'resnet81'",
    }.items():
        refused = CliRunner().invoke(cli.app, [*given, *words])
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (here / "evaluations").exists()


def test_a_backbones_evaluation_is_known_by_what_the_data_holds(here):
    for number, name in enumerate(("cat", "dog")):
        for split in ("train", "test"):
            write_images(here / "set" / split / name, pixels(12, 16, seed=number))
    shutil.copytree(here / "set", here / "moved")
    given = ["evaluate", "data=folder", "model.stem=imagenet", "device=cpu", "eval.protocols=[knn-v1]", "-o", "out"]

    def evaluated(folder: str) -> set[str]:
        done = CliRunner().invoke(cli.app, [*given, f"data.path={folder}"])
        assert done.exit_code == 0, done.output
        return {path.name for path in (here / "out").iterdir()}

    assert len(evaluated("set")) == len(evaluated("moved")) == 1
    write_images(here / "set" / "test" / "cat", pixels(12, 16, seed=9))
    assert len(evaluated("set")) == 2
