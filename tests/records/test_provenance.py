"""What run.json says of the code, the machine and the parameter groups."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from made_run import RECIPE, open_run

from ssl_bench.records import provenance
from ssl_bench.records.storage import jsonable


def test_run_json_says_what_runs_and_is_kept_while_sessions_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-that-must-not-leak")
    model = torch.nn.Linear(3, 2)
    groups = [
        {"params": [model.weight], "param_names": ["weight"], "weight_decay": 0.1},
        {"params": [model.bias], "param_names": ["bias"], "lr": 0.5, "weight_decay": 0.0},
    ]
    collected = provenance.collect_provenance(
        track="pretrain",
        seeds={"run": 3, "probes": 4},
        world_size=2,
        param_groups=torch.optim.SGD(groups, lr=2.0).param_groups,
        device="cpu",
    )
    for step in (0, 7):
        with open_run(tmp_path) as run:
            run.write_provenance({**collected, "world_size": 2 + step}, step=step)
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert record["format"] == 1
    assert record["identity"] == "id0"
    assert record["recipe"] == jsonable(RECIPE)
    assert record["world_size"] == 2
    assert record["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["packages"].keys() >= {"python", "numpy", "torchvision", "timm", "accelerate"}
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gib"] > 0
    assert record["seeds"] == {"run": 3, "probes": 4}
    assert record["track"] == "pretrain"
    first, second = record["param_groups"]
    assert (first["lr"], first["weight_decay"], first["tensors"], first["elements"]) == (2.0, 0.1, 1, 6)
    assert (second["lr"], second["weight_decay"], second["param_names"]) == (0.5, 0.0, ["bias"])
    assert "must-not-leak" not in text
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(session["step"], session["world_size"]) for session in sessions] == [(0, 2), (7, 9)]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_package_s_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = provenance.code_version.__wrapped__  # anew, as another process does
    package = tmp_path / "ssl_bench"
    package.mkdir()
    (package / "__init__.py").write_text("1")
    monkeypatch.setattr("ssl_bench.__file__", str(package / "__init__.py"))
    assert look()["commit"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "readme").touch()
    git(tmp_path, "add", "readme")
    git(tmp_path, "commit", "-qm", "m")
    assert look()["commit"] is None  # it lies in somebody's checkout and is no part of it
    git(tmp_path, "add", "ssl_bench")
    git(tmp_path, "commit", "-qm", "m")
    assert look() == {
        "version": "0.1.0",
        "commit": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
    }
    (package / "__init__.py").write_text("2")
    assert look()["dirty"] is True


def test_settings_that_json_cannot_hold_are_recorded_as_text() -> None:
    class Odd:
        """Something without a text of its own."""

    weight = torch.nn.Parameter(torch.zeros(2))
    group = {
        "params": [weight], "lr": 0.1, "dtype": torch.bfloat16, "hook": torch.nn.functional.relu, "odd": Odd(),
        "device": torch.device("cpu"), "scale": torch.zeros(3), "step": torch.tensor(2), "betas": (0.9, 0.99),
    }  # fmt: skip
    (described,) = provenance.describe_groups([group])
    assert json.loads(json.dumps(described)) | {"tensors": 1} == {
        "lr": 0.1, "dtype": "torch.bfloat16", "hook": "torch.nn.functional.relu", "device": "cpu", "step": 2,
        "odd": f"{__name__}.test_settings_that_json_cannot_hold_are_recorded_as_text.<locals>.Odd",
        "scale": "tensor of (3,), torch.float32", "betas": [0.9, 0.99],
        "tensors": 1, "elements": 2, "param_names": [],
    }  # fmt: skip
