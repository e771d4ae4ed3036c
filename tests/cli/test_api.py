"""The commands as Python functions, and the notebook that shows them."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from commands import TINY_PRETRAIN, environment, run
from tiny_net import TinyTwins
from torch import nn

import ssl_bench
from ssl_bench.cli.api import words

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(word.split("=", 1) for word in TINY_PRETRAIN)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class OwnTwins(TinyTwins):
    """A method that is named by its class."""


def test_a_run_as_an_object(here):
    result = ssl_bench.pretrain(TINY, steps=4, run_dir=here / "r", **{"optimizer.lr": 2}, method=OwnTwins)
    assert (result.run_dir, result.status) == (here / "r", "finished")
    assert result.recipe["optimizer"]["lr"] == 2.0
    assert result.recipe["method"]["target"] == f"{__name__}:OwnTwins"
    assert result.results == {**json.loads((here / "r/results.json").read_text())}
    assert {name: len(values) for name, values in result.metrics.items()} == dict.fromkeys(result.metrics, 4)
    rows = [json.loads(line) for line in (here / "r/metrics.jsonl").read_text().splitlines()]
    assert result.metrics["loss"].tolist() == [row["loss"] for row in rows]
    assert result.metrics["step"].tolist() == [1, 2, 3, 4]
    assert isinstance(result.backbone, nn.Module)
    assert not result.backbone.training
    assert result.backbone(torch.zeros(2, 3, 8, 8)).shape == (2, 32)
    assert repr(result).startswith("<Result r: ")
    again = ssl_bench.pretrain(TINY, steps=4, run_dir=here / "r", optimizer={"lr": 2}, method=OwnTwins, resume="auto")
    assert again.results == result.results
    (one,) = ssl_bench.evaluate(result, {"eval.protocols": ["rankme-v1"]}, eval={"baseline": False})
    assert one["protocol"] == "rankme-v1"
    assert {entry["protocol"] for entry in result.results["evaluations"]} == {"knn-v1", "rankme-v1"}
    page = ssl_bench.report(here / "r", here / "report", figures="none")
    assert page == here / "report/index.html"
    assert page.is_file()


@pytest.mark.usefixtures("here")
def test_a_classifier_and_a_run_of_before():
    keys = {key: value for key, value in TINY.items() if key.partition(".")[0] not in ("method", "eval")}
    result = ssl_bench.classify(keys, steps=2, run_dir="r", eval={"test_every_epochs": 0.1, "baseline": False})
    assert np.isnan(result.metrics["test_top1"][0])
    (entry,) = result.results["evaluations"]
    assert entry["metrics"]["top1"] == result.metrics["test_top1"][-1]
    found = ssl_bench.load("r")
    assert found.results == result.results
    assert all(
        torch.equal(a, b) for a, b in zip(found.backbone.parameters(), result.backbone.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"^nowhere: not a run directory, it has no run.json$"):
        ssl_bench.load("nowhere")


def test_code_of_somebody_elses_record_is_not_imported(here):
    result = ssl_bench.pretrain(TINY, steps=1, run_dir="r", eval="none")
    head = json.loads((here / "r/run.json").read_text())
    head["recipe"]["model"]["name"] = "evil:make"
    (here / "r/run.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match=r"model.name must be built in .* --trust imports it"):
        _ = ssl_bench.load(result.run_dir).backbone


@pytest.mark.slow
def test_a_study(here):
    base = {key: value for key, value in TINY.items() if key != "method"} | {"method": "tiny_net:TinyTwins"}
    lines = [f"  {key}: {json.dumps(value)}" for key, value in base.items()]
    blocks = "blocks:\n  - {track: pretrain, axes: [{optimizer.lr: [1]}]}"
    (here / "one.yaml").write_text("\n".join(["base:", *lines, blocks]))
    program = (
        "import ssl_bench\n"
        "found = ssl_bench.study('one.yaml', {'eval.protocols': []}, steps=1, workers=1, trust=True)\n"
        "print(sorted(found.states.values()), found.errors, [run.recipe['optimizer']['lr'] for run in found.runs])"
    )
    done = run([sys.executable, "-c", program], here)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['finished'] {} [1.0]\n"


def test_mistakes_are_exceptions_with_the_commands_line(here, capsys):
    from ssl_bench.pretrain import main

    for keys in ({"optimizer": "lasr"}, {"batch_size": 0}, {"run_dir": __file__}):
        with pytest.raises((ValueError, OSError)) as error:
            ssl_bench.pretrain({**TINY, "steps": 1}, **keys)
        assert main([*TINY_PRETRAIN, "steps=1", *words(keys)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {error.value}"
    with pytest.raises(ValueError, match="steps must be a number, text, true or false"):
        ssl_bench.pretrain(steps=1j)
    assert not list(here.iterdir())


def test_python_values_as_words():
    keys = {"steps": np.int64(4), "eval": {"protocols": ["knn-v1"], "baseline": False}, "chunk_size": None}
    more = {"optimizer": {"target": "tvlars", "lr": 2}, "augment.crop_scale": (0.2, 1), "data.path": Path("a b")}
    assert words({"steps": 3, "optimizer": "lars"}, {**keys, **more}) == [
        "steps=4",
        'eval.protocols=["knn-v1"]',
        "eval.baseline=false",
        "chunk_size=null",
        "optimizer=tvlars",
        "optimizer.lr=2",
        "augment.crop_scale=[0.2, 1]",
        "data.path=a b",
    ]


@pytest.mark.parametrize("first", ["", "import ssl_bench.pretrain, ssl_bench.study.grid, ssl_bench.report.build"])
def test_modules_are_functions_too_in_any_order_and_the_package_is_cheap(first):
    program = f"""
import sys, types
import ssl_bench
assert not {{"torch", "numpy", "typer"}} & sys.modules.keys()
{first}
from ssl_bench import study, report, classify
import ssl_bench.pretrain as module
assert module is ssl_bench.pretrain and isinstance(module, types.ModuleType) and callable(module.main)
assert not {{"torch", "typer"}} & sys.modules.keys() or {bool(first)}
import ssl_bench.study.cells
assert ssl_bench.study is study and study.cells
assert {{"pretrain", "study", "load", "Result"}} <= set(dir(ssl_bench))
try:
    ssl_bench.study("nothing")
except ValueError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pretrain", "classify", "study", "report"])
def test_help_shows_the_functions_signature(name):
    assert getattr(ssl_bench, name) is importlib.import_module(f"ssl_bench.{name}")
    function = getattr(importlib.import_module("ssl_bench.cli.api"), name)
    assert inspect.signature(getattr(ssl_bench, name)) == inspect.signature(function)


@pytest.mark.slow  # a type checker reads torch
def test_types_are_known_to_a_checker(tmp_path):
    (tmp_path / "use.py").write_text(
        "import ssl_bench\n"
        "result = ssl_bench.pretrain(data='digits', steps=1)\n"
        "reveal_type(result.backbone)\n"
        "reveal_type(ssl_bench.study('smoke').runs[0])\n"
        "ssl_bench.report(3)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", "use.py"]
    done = run(mypy, tmp_path, MYPYPATH=str(ROOT))
    assert 'note: Revealed type is "torch.nn.modules.module.Module"' in done.stdout
    assert 'note: Revealed type is "ssl_bench.cli.api.Result"' in done.stdout
    assert 'use.py:5: error: Argument 1 to "report" has incompatible type "int"' in done.stdout
    assert done.stdout.count("error:") == 1, done.stdout


def test_the_notebook_runs(tmp_path):
    source = ROOT / "examples/first_steps.ipynb"
    assert all(not cell.get("outputs") for cell in nbformat.read(source, as_version=4).cells), "strip its outputs"
    shutil.copy(source, tmp_path / "first_steps.ipynb")
    execute = [sys.executable, "-m", "jupyter", "execute", "--inplace", "first_steps.ipynb"]
    done = subprocess.run(execute, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "first_steps.ipynb", as_version=4).cells
    shown = [json.dumps(cell.outputs) for cell in cells if cell.cell_type == "code"]
    assert "<Result digits-barlow_twins-resnet18-tvlars-b" in shown[1]
    assert "image/png" in shown[4]
    assert "torch.Size([4, 512])" in shown[5]
    assert "unknown optimizer 'lasr'; did you mean 'lars'?" in shown[8]
    assert (tmp_path / "report/index.html").is_file()
