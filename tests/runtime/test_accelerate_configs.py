"""configs/accelerate: each is whole to accelerate's own loader, and the CPU one starts a run without its warnings."""

import logging
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from commands import SCRIPTS, TINY_PRETRAIN, results, run

from ssl_bench.runtime import peers

CONFIGS = Path(__file__).resolve().parents[2] / "configs/accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("cpu", "NO", 1, 1),
        ("one_gpu", "NO", 1, 1),
        ("eight_gpus", "MULTI_GPU", 1, 8),
        ("two_nodes", "MULTI_GPU", 2, 16),
    ],
)
def test_accelerate_reads_it_and_warns_of_nothing(name, kind, machines, processes, caplog):
    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert (config.mixed_precision, config.use_cpu) == ("no", name == "cpu")
    ip = ["--main_process_ip", "10.0.0.1", "--machine_rank", "1"] if machines > 1 else []
    arguments = launch_command_parser().parse_args(["--config_file", path, *ip, "pretrain.py"])
    with caplog.at_level(logging.WARNING):
        found, _, _ = _validate_launch_command(arguments)
    assert found.num_processes == processes
    assert found.multi_gpu == (kind == "MULTI_GPU")
    assert "were not passed" not in caplog.text


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {"cpu", "one_gpu", "eight_gpus", "two_nodes"}


@pytest.mark.slow
def test_the_cpus_starts_a_run_without_a_page_of_warnings(tmp_path):
    words = [str(SCRIPTS / "pretrain.py"), *TINY_PRETRAIN, "steps=1", "eval=none", "run_dir=r"]
    words.remove("device=cpu")
    done = run([*LAUNCH, "--config_file", str(CONFIGS / "cpu.yaml"), *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "r")["step"] == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("r: CPU (")
    assert lines[0].endswith(", 1 process, fp32, 1 step")


@pytest.mark.slow
def test_processes_and_precision_that_a_cpu_run_does_not_get_are_said(tmp_path):
    words = [str(SCRIPTS / "pretrain.py"), *TINY_PRETRAIN, "steps=1", "eval=none", "run_dir=r"]
    text = (CONFIGS / "cpu.yaml").read_text().replace("num_processes: 1", "num_processes: 2")
    (tmp_path / "two.yaml").write_text(text)
    done = run([*LAUNCH, "--config_file", "two.yaml", "--mixed_precision", "bf16", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    asked = "ACCELERATE_MIXED_PRECISION=bf16, 2 processes, of which accelerate starts one on the CPU"
    assert f", fp32, 1 step; ignored, as the recipe decides: {asked} (ssl-bench --processes 2)" in done.stderr


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["python", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "pretrain.py", "steps=1"], 2),
        (["python", "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "eight_gpus.yaml"), "a.py"], 8),
        (["python", "/venv/bin/accelerate", "launch", "--no_such_option", "--num_processes", "x"], 0),
        (["bash", "launch", "accelerate"], 0),
        (["bash"], 0),
    ],
)
def test_what_accelerate_was_asked_for(words, count, monkeypatch, capsys):
    monkeypatch.setattr(peers.Path, "read_bytes", lambda _path: "\0".join([*words, ""]).encode())
    assert peers.asked_of_accelerate() == count
    capsys.readouterr()
