"""The commands as a user meets them: what they print, refuse and leave behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from commands import TINY_CLASSIFY, TINY_PRETRAIN, fails, metrics, results
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import classify, cli, pretrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pretrain_leaves_a_complete_record(here):
    assert (
        pretrain.main([*TINY_PRETRAIN, "steps=4", "run_dir=r", "eval.baseline=true", "eval.online_every_epochs=0.1"])
        == 0
    )
    head = json.loads((here / "r/run.json").read_text())
    assert head["recipe"]["optimizer"]["lr"] == 5.0
    assert head["plan"]["total_steps"] == 4
    assert {group["lr"] for group in head["param_groups"]} == {5.0, 1e-3}
    assert sum(group["elements"] for group in head["param_groups"]) > 0
    assert [row["step"] for row in metrics(here / "r")] == [1, 2, 3, 4]
    assert "online_top1" in metrics(here / "r")[-1]
    assert not (here / "r/checkpoints").exists()
    ended = results(here / "r")
    assert ended["status"] == "finished"
    assert [(e["protocol"], e["model"], e["n_test"]) for e in ended["evaluations"]] == [
        ("knn-v1", "trained", 355),
        ("knn-v1", "untrained", 355),
    ]
    table = pq.read_table(here / "r/telemetry.parquet")
    assert set(table["step"].to_pylist()) == {1, 2, 3, 4}


def test_classify_measures_the_test_set_as_it_goes(here):
    words = [
        *TINY_CLASSIFY,
        "steps=6",
        "run_dir=r",
        "eval.test_every_epochs=0.1",
        "eval.baseline=true",
        "chunk_size=48",
    ]
    assert classify.main(words) == 0
    rows = metrics(here / "r")
    assert [row["step"] for row in rows if "test_top1" in row] == [2, 4, 6]
    (trained, untrained) = results(here / "r")["evaluations"]
    assert (trained["protocol"], trained["n_test"], untrained["model"]) == ("test-v1", 355, "untrained")
    assert trained["metrics"]["top1"] == rows[-1]["test_top1"]
    assert trained["metrics"]["top1"] <= trained["metrics"]["top5"] <= 100


def test_backbone_loads_into_timm(here):
    words = ["data=digits", "steps=1", "batch_size=8", "model.stem=imagenet", "method.projector=[16,16]", "run_dir=r"]
    assert pretrain.main([*words, "eval=none", "device=cpu"]) == 0
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(here / "r/backbone.safetensors"))
    saved = load_file(here / "r/backbone.safetensors")
    assert (model.conv1.weight == saved["conv1.weight"]).all()


def test_chunks_give_the_same_run_without_batch_norm_and_say_so_with_it(here):
    plain = ["model.name=tiny_plain", "method.projector=[64]", "steps=5"]  # one linear layer, no batch norm
    for name, more in (("whole", plain), ("parts", [*plain, "chunk_size=32"]), ("norm", ["chunk_size=32", "steps=1"])):
        assert pretrain.main([*TINY_PRETRAIN, f"run_dir={name}", "eval=none", *more]) == 0
    for one, other in zip(metrics(here / "whole"), metrics(here / "parts"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    notes = [json.loads((here / f"{name}/run.json").read_text())["batch_norm"] for name in ("parts", "norm")]
    assert notes == ["none", "batch norm over 32 of 96 images"]


def test_a_tracker_gets_every_line(here):
    assert pretrain.main([*TINY_PRETRAIN, "steps=2", "run_dir=r", "eval=none", "tracker=tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (path.parent for path in (here / "r/ssl_bench").glob("events*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in metrics(here / "r")])


def test_one_process_runs_recipes_of_different_precision(here):
    for precision in ("fp32", "bf16"):
        words = [*TINY_PRETRAIN, "steps=1", f"run_dir={precision}", "eval=none", f"precision={precision}"]
        assert pretrain.main(words) == 0
    assert metrics(here / "bf16")[0]["loss"] != metrics(here / "fp32")[0]["loss"]


def test_pretraining_starts_from_a_checkpoint_and_knows_it_again(here, capsys):
    words = [
        "data=digits",
        "batch_size=8",
        "model.stem=imagenet",
        "method.projector=[16,16]",
        "device=cpu",
        "eval=none",
    ]
    assert pretrain.main([*words, "steps=1", "run_dir=a"]) == 0
    start = ["steps=1", "model.checkpoint=a", "optimizer.lr=0", "param_groups.lr_1d=0", "run_dir=b"]
    assert pretrain.main([*words, *start]) == 0
    assert "checkpoint a/backbone.safetensors: 100 of 100 tensors loaded" in capsys.readouterr().err
    one, other = (load_file(here / f"{run}/backbone.safetensors") for run in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one if "running" not in name and "num_" not in name)
    # The same path with other weights is another experiment, and said so before anything runs.
    (here / "a/backbone.safetensors").write_bytes((here / "b/backbone.safetensors").read_bytes())
    error = fails(capsys, pretrain.main, [*words, *start, "resume=auto"])
    assert "it holds a run of another recipe: model.checkpoint_sha256: the run has" in error
    again = ["evaluate", "b", "model.checkpoint=a", "eval.protocols=[knn-v1]", "eval.baseline=true"]
    refused = CliRunner().invoke(cli.app, again)
    assert refused.exit_code == 2
    assert "model.checkpoint must be the file that the run started from, SHA-256" in refused.stderr


@pytest.mark.parametrize(
    ("track", "model", "layer"),
    [
        ("pretrain", "vit_tiny", "blocks.11.attn.qkv"),
        ("classify", "convnext_atto", "stages.3.blocks.1.mlp.fc2"),
        pytest.param("classify", "vit_tiny", "blocks.0.attn.proj", marks=pytest.mark.slow),
        pytest.param("pretrain", "convnext_atto", "stages.0.blocks.0.conv_dw", marks=pytest.mark.slow),
    ],
)
def test_layers_of_any_model_are_named_in_the_telemetry(here, track, model, layer):
    """One row for each trainable tensor, by its module's name."""
    main = {"pretrain": pretrain.main, "classify": classify.main}[track]
    words = ["data=digits", f"model={model}", "steps=1", "batch_size=4", "telemetry.every=1", "run_dir=r", "device=cpu"]
    assert (
        main([*words, *(["method.projector=[8,8]", "eval=none"] if track == "pretrain" else ["eval.baseline=false"])])
        == 0
    )
    table = pq.read_table(here / "r/telemetry.parquet").to_pylist()
    head = json.loads((here / "r/run.json").read_text())
    assert sorted(row["layer"] for row in table) == sorted(
        name for group in head["param_groups"] for name in group["param_names"]
    )
    (row,) = (row for row in table if row["layer"] == f"backbone.{layer}.weight")
    assert row["weight_norm"] > 0
    assert row["grad_norm"] > 0
    assert row["ratio"] > 0


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(here, capsys, monkeypatch):
    import tiny_net

    monkeypatch.setattr(tiny_net.BrokenTwins, "calls", 0)
    words = [*TINY_PRETRAIN, "method=tiny_net:BrokenTwins", "steps=40", "run_dir=r", "log_every=10"]
    assert pretrain.main(words) == 0
    ended = results(here / "r")
    assert (ended["status"], ended["step"], ended["layer"], ended["evaluations"]) == (
        "diverged",
        3,
        "backbone.0.weight",
        [],
    )
    assert metrics(here / "r")[-1]["step"] == 10
    assert "not finite from step 3 on (first in backbone.0.weight)" in capsys.readouterr().err


@pytest.mark.parametrize("main", [pretrain.main, classify.main])
def test_help_names_every_key_of_the_track(main, capsys):
    from ssl_bench.recipe.compose import known_keys

    assert main(["--help", "optimizer=tvlars"]) == 0
    text = capsys.readouterr().out
    other = {
        "pretrain": ("augment.pad", "augment.rotation", "eval.test_every"),
        "classify": ("augment.", "eval.", "method"),
    }
    skipped = other["pretrain" if main is pretrain.main else "classify"]
    for name in known_keys():
        if not name.startswith(skipped):
            assert name in text
    assert "optimizer.gamma_min" in text


def test_the_console_script_lists_its_commands():
    installed = shutil.which("ssl-bench", path=str(Path(sys.executable).parent))
    assert installed, "the package is not installed"
    done = subprocess.run([installed, "--help"], capture_output=True, text=True, check=True)
    for command in ("pretrain", "classify", "evaluate", "demo"):
        assert command in done.stdout
