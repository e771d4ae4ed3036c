"""What doctor finds on machines that are in order and on those that are not."""

import importlib.metadata
import subprocess
from pathlib import Path

import faiss  # noqa: F401 (with its Swig classes, whose warnings at import are not this test's)
import pytest
import torch
from typer.testing import CliRunner

from ssl_bench import cli
from ssl_bench.cli import doctor

SMI = "| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: {cuda}     |\n"


@pytest.fixture
def driver(monkeypatch):
    """A machine whose nvidia-smi names a driver for that version of CUDA, and a torch for another."""

    def pretend(serves: str | None, built: str | None) -> None:
        def smi(*_words, **_options):
            if serves is None:
                raise FileNotFoundError("nvidia-smi")
            return subprocess.CompletedProcess([], 0, SMI.format(cuda=serves), "")

        monkeypatch.setattr(doctor.subprocess, "run", smi)
        monkeypatch.setattr(torch.version, "cuda", built)

    return pretend


@pytest.mark.parametrize(
    ("serves", "built", "level", "says"),
    [
        (None, "13.0", "ok", "no NVIDIA driver: runs are on the CPU"),
        (None, None, "ok", "a build without CUDA"),
        ("13.0", None, "fault", "pip install torch with CUDA"),
        ("11.4", "13.0", "fault", "install a newer driver, or a torch for CUDA 11.x"),
        ("12.2", "12.8", "ok", "driver 470.82.01 serves CUDA 12.2"),  # one major version: they fit
        ("13.1", "12.8", "ok", "serves CUDA 13.1"),
    ],
)
def test_the_driver_against_torchs_cuda(driver, serves, built, level, says):
    driver(serves, built)
    (found,) = doctor.torch_and_driver()
    assert found.level == level
    assert says in f"{found.text} {found.advice}"


def test_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: ["numpy", "torch==1.2.3"])
    (found,) = doctor.torchvision()
    assert found.level == "fault"
    assert "it needs torch ==1.2.3" in found.text
    assert "pip install 'torch==1.2.3', or the torchvision of torch" in found.advice


def test_it_says_what_triton_lacks(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _name: str(tmp_path))
    assert not list(doctor._kernels())
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    (found,) = doctor._kernels()
    assert (found.level, found.text) == ("note", "Triton cannot compile without a C compiler")
    monkeypatch.setenv("CC", "cc")
    (tmp_path / "Python.h").unlink()
    (found,) = doctor._kernels()
    assert found.text == f"Triton cannot compile without {tmp_path / 'Python.h'}"


def test_two_of_faiss_overwrite_each_other(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.9")
    (found,) = doctor.faiss()
    assert found.level == "fault"
    assert "pip uninstall faiss-cpu faiss-gpu" in found.advice

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert next(doctor.faiss()).text == "not installed"


def test_a_full_disk_and_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert next(doctor.disk("runs", tmp_path / "file/runs")).level == "fault"
    usage = type("usage", (), {"free": 100 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage)
    (found,) = doctor.disk("runs", tmp_path / "new/runs")
    assert (found.level, found.text) == ("fault", f"{tmp_path}/new/runs: 0.1 GiB free")


@pytest.mark.parametrize(
    ("text", "level", "says"),
    [
        ("", "ok", "no configuration of its own"),
        ("distributed_type: FSDP\nnum_processes: 4\n", "fault", "DistributedDataParallel is what runs here"),
        ("distributed_type: 'NO'\nmixed_precision: bf16\n", "note", "precision= of the recipe decides"),
        ("distributed_type: MULTI_GPU\nmixed_precision: 'no'\nnum_processes: 8\n", "ok", "MULTI_GPU, 8 processes"),
        ("[", "fault", "accelerate config default writes it anew"),
    ],
)
def test_accelerates_own_configuration(monkeypatch, tmp_path, text, level, says):
    from accelerate.commands.config import config_args

    path = tmp_path / "default_config.yaml"
    if text:
        path.write_text("compute_environment: LOCAL_MACHINE\n" + text if text != "[" else text)
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    (found,) = doctor.accelerate()
    assert found.level == level, found
    assert says in f"{found.text} {found.advice}"


def test_the_command_prints_a_line_each_and_its_code_is_1_with_a_fault(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 0, done.output
    shown = {line.split()[1] for line in done.stdout.splitlines() if line.startswith(("ok", "note"))}
    assert shown >= {"python", "torch", "gpu", "torchvision", "faiss", "memory", "cache", "accelerate", "runs"}
    assert done.stdout.endswith("0 faults\n")

    def broken():
        raise ImportError("libfoo.so: cannot open")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert "fault  broken      ImportError: libfoo.so: cannot open\n" in done.stdout
    assert not list(Path.cwd().iterdir())
