"""Which processes and device a run gets, and that the environment does not decide what it computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import TINY_PRETRAIN, metrics

from ssl_bench import pretrain
from ssl_bench.recipe.compose import compose
from ssl_bench.training import processes
from ssl_bench.training.processes import take_environment

RECIPE = compose("pretrain", ["data=digits", "epochs=1", "precision=bf16"])

# What `accelerate launch` sets for every process.
LAUNCHED = {
    "ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}  # fmt: skip


def test_what_accelerate_launch_sets_is_taken_without_a_word():
    environment = {**LAUNCHED, "PATH": "x", "ACCELERATE_CPU_AFFINITY": "1"}
    assert take_environment(RECIPE, on_cpu=False, environment=environment) == []
    assert environment == {"PATH": "x", "ACCELERATE_CPU_AFFINITY": "1"}


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("MIXED_PRECISION", "fp16", True), ("MIXED_PRECISION", "bf16", False), ("DYNAMO_BACKEND", "INDUCTOR", True),
        ("TORCH_DEVICE", "cuda:1", True), ("DOWNCAST_BF16", "true", True), ("NEVER_HEARD_OF", "3", True),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_named(name, value, named):
    environment = {**LAUNCHED, f"ACCELERATE_{name}": value}
    expected = [f"ACCELERATE_{name}={value}"] if named else []
    assert take_environment(RECIPE, on_cpu=True, environment=environment) == expected
    assert environment == {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "4",
            r"must be unset, got 4: the recipe decides \(chunk_size splits a batch here",
        ),
        ("USE_FSDP", "true", r"must be unset, got true: the recipe decides \(DistributedDataParallel"),
        ("USE_DEEPSPEED", "true", "must be unset, got true"),
        ("USE_CPU", "true", "must be unset, or device=cpu be given, got true: device=auto is a GPU"),
    ],
)
def test_another_way_to_compute_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"ACCELERATE_{name} {message}"):
        take_environment(RECIPE, on_cpu=False, environment={f"ACCELERATE_{name}": value})


def test_a_run_is_the_same_whatever_the_environment_says(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*TINY_PRETRAIN, "steps=3", "eval=none"]
    assert pretrain.main([*words, "run_dir=a"]) == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    capsys.readouterr()
    assert pretrain.main([*words, "run_dir=b"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    ignored = "ACCELERATE_DYNAMO_BACKEND=INDUCTOR, ACCELERATE_MIXED_PRECISION=bf16"
    assert first.endswith(f", fp32, 3 steps; ignored, as the recipe decides: {ignored}")
    assert [row["loss"] for row in metrics(tmp_path / "a")] == [row["loss"] for row in metrics(tmp_path / "b")]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert pretrain.main([*words, "run_dir=c"]) == 2
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be unset, got 4" in capsys.readouterr().err


# The device -----------------------------------------------------------------------------------------------------------


def test_a_gpu_that_cannot_be_used_is_refused_unless_the_cpu_is_asked_for(tmp_path: Path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(processes, "_NVIDIA", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ValueError, match=r"^device must be cpu, or the GPU be made usable, got auto: .*nvidia0 is here"
    ):
        processes.processes(RECIPE)
    assert processes.processes(replace(RECIPE, device="cpu")).device.type == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert processes.processes(RECIPE).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="is a build without CUDA"):
        processes.processes(RECIPE)
