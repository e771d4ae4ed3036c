"""The examples: TVLARS in other people's training loops, and plug-ins as an installed package."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import environment, metrics, results

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", ["plain_pytorch", "lightning_module", "transformers_trainer"])
def test_the_loop_trains(name, tmp_path):
    needs = {"lightning_module": ("lightning", "pytorch_lightning"), "transformers_trainer": ("transformers",)}
    if name in needs and not any(map(find_spec, needs[name])):
        pytest.skip(f"needs one of {', '.join(needs[name])}")
    words = [
        sys.executable,
        "-W",
        "error::UserWarning:ssl_bench",
        str(EXAMPLES / f"{name}.py"),
        "--steps",
        "2",
        "--batch-size",
        "16",
    ]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert [int(words[1]) for words in steps] == [1, 2]
    assert all(math.isfinite(float(words[3])) for words in steps)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package, installed into a folder."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "package"
    subprocess.run(["cp", "-r", EXAMPLES / "plugin_package", source], check=True)  # setuptools leaves a build/ behind
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*install, "--no-index", "--target", folder, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def command(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = environment()["PYTHONPATH"]
    return subprocess.run(
        [sys.executable, "-m", "ssl_bench", *words],
        cwd=cwd,
        env=environment(PYTHONPATH=f"{site}:{path}"),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_installed_package_serves_a_run(site, tmp_path):
    words = ("data=shapes", "method=bt_hsic", "method.projector=[16,16]", "optimizer=signum", "optimizer.lr=1e-4")
    rest = ("eval.protocols=[ridge-v1]", "model.stem=imagenet", "batch_size=64", "steps=2", "log_every=1")
    done = command(site, tmp_path, "pretrain", *words, *rest, "device=cpu", "run_dir=r")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "r")
    assert rows[0]["loss"] == pytest.approx(rows[0]["on_diagonal"] + 0.0051 * rows[0]["off_diagonal"], rel=1e-4)
    trained, untrained = results(tmp_path / "r")["evaluations"]
    assert (trained["protocol"], trained["n_test"]) == ("ridge-v1", 150)
    assert trained["chance"] == pytest.approx(100 / 3)
    assert untrained["metrics"]["top1"] > 50  # discs, squares and rings are no secret to random features


def test_the_installed_package_is_listed(site, tmp_path):
    listed = command(site, tmp_path, "list")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in ("bt_hsic", "signum", "ridge-v1", "shapes"))


@pytest.mark.slow
def test_the_installed_method_keeps_the_contract(site, tmp_path):
    done = command(site, tmp_path, "check-method", "bt_hsic", "method.projector=[16,16]")
    assert done.returncode == 0, done.stdout
