"""``ssl-bench study --dry-run``: a step is measured in a process of its own, which does not outlive the command."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import TINY_CLASSIFY, environment, run
from waiting import wait_for


def dry_run(folder: Path, *arguments: str) -> list[str]:
    """The command for a study of one tiny cell, with these arguments besides."""
    base = dict(word.split("=", 1) for word in TINY_CLASSIFY) | {"steps": "20"}
    (folder / "one.yaml").write_text(yaml.safe_dump({"base": base, "blocks": [{"track": "classify"}]}))
    return [
        sys.executable,
        "-m",
        "ssl_bench",
        "study",
        "one.yaml",
        "--trust",
        "--dry-run",
        "--workers=1",
        *arguments,
    ]


def test_a_workload_without_runs_is_measured(tmp_path: Path) -> None:
    done = run(dry_run(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"digits .*: (\d+) images/s", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 0
    assert "missing" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_warm_up_longer_than_the_measurement_is_left_out(tmp_path: Path) -> None:
    base = {
        "data": "digits", "model": "resnet18", "batch_size": 32, "epochs": 100, "device": "cpu", "optimizer": "lars",
        "optimizer.lr": 1, "protocol": "paper", "schedule.warmup_epochs": 30,
    }  # fmt: skip
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"base": base, "blocks": [{"track": "classify"}]}))
    command = [sys.executable, "-m", "ssl_bench", "study", "long.yaml", "--dry-run", "--workers=1"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"digits .*: \d+ images/s", done.stdout), done.stdout


def has_ended(pid: int) -> bool:
    """Whether a process that need not be our child is gone, or is a zombie that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_the_measuring_process_ends_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    marker = tmp_path / "marker"
    command = dry_run(tmp_path, "schedule=endless:endless_schedule", f"schedule.marker={marker}")
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as process:
        try:
            wait_for(lambda: marker.exists() or process.poll() is not None, 120)
            child = int(marker.read_text())
            try:
                assert not has_ended(child)
                process.send_signal(number)
                process.wait(60)
                wait_for(lambda: has_ended(child), 30)
            finally:
                if not has_ended(child):
                    os.kill(child, signal.SIGKILL)
        finally:
            process.kill()
