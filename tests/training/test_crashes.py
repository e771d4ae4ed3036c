"""Whatever stops a run, starting it again ends as if nothing had happened: real processes, real signals."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import TINY_PRETRAIN, environment, metrics, results, run, script
from tiny_disk import mounted

from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE

STEPS = 60
WORDS = (
    *TINY_PRETRAIN, "method=tiny_net:DropoutTwins", f"steps={STEPS}", "checkpoint.every_steps=7", "log_every=2",
    "checkpoint.final=true", "resume=auto", "deterministic=true",
)  # fmt: skip
COMMAND = script("pretrain", WORDS)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unharmed")
    done = run([*COMMAND, "run_dir=run"], folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def start(run_dir: Path) -> subprocess.Popen:
    command = [*COMMAND, f"run_dir={run_dir}"]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=run_dir.parent)


def lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the process neither came so far nor ended"


def assert_same_end(run_dir: Path, expected: Path, *, bitwise: bool = True) -> None:
    ignored = {"seconds", "images_per_second", "feature_seconds"}
    rows = [[{k: v for k, v in row.items() if k not in ignored} for row in metrics(one)] for one in (run_dir, expected)]
    assert [row["step"] for row in rows[0]] == list(range(2, STEPS + 1, 2))  # no gap, no double line
    if not bitwise:
        for mine, theirs in zip(*rows, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        return
    assert rows[0] == rows[1]
    for name in ("backbone.safetensors", "telemetry.parquet"):
        assert (run_dir / name).read_bytes() == (expected / name).read_bytes(), name
    states = [
        torch.load(one / f"checkpoints/step-{STEPS:08d}/state.pt", weights_only=True) for one in (run_dir, expected)
    ]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    ends = [results(one)["evaluations"] for one in (run_dir, expected)]
    assert [{k: v for k, v in e.items() if k not in ignored} for e in ends[0]] == [
        {k: v for k, v in e.items() if k not in ignored} for e in ends[1]
    ]


def test_killed_at_random_points_and_while_it_writes(unharmed, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(time.time_ns())
    points = sorted(draw.sample(range(1, STEPS // 2), 2))
    for point in points:
        process = start(run_dir)
        wait_for(lambda point=point: lines(run_dir) >= point, process)
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.communicate()
    process = start(run_dir)  # and once in the middle of a checkpoint
    checkpoints = run_dir / "checkpoints"
    wait_for(lambda: any(path.name.startswith(".") for path in checkpoints.glob(".*")), process)
    process.kill()
    process.communicate()
    done = run([*COMMAND, f"run_dir={run_dir}"], tmp_path)
    assert done.returncode == 0, f"killed after lines {points}: {done.stderr}"
    assert_same_end(run_dir, unharmed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_requeue_code(unharmed, tmp_path, number):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for(lambda: lines(run_dir) >= 5, process)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # impatient schedulers send a second one
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT_CODE, errors
    assert "resume=auto" in errors
    done = run([*COMMAND, f"run_dir={run_dir}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    assert_same_end(run_dir, unharmed)


def test_a_run_goes_on_at_another_world_size(tmp_path):
    # Without dropout, whose masks are each process's own. At lr=1 a ReLU of the projector flips near step 37 on some
    # processors, and the losses part from 2e-7 to 1e-4; at lr=0.3 they agree to 2e-7 over all 60 steps.
    words = (*WORDS, "method=tiny_net:TinyTwins", "optimizer.lr=0.3")
    whole = run([*script("pretrain", words), "run_dir=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = script("pretrain", (*words, "run_dir=run"), 2)
    two = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: lines(tmp_path / "run") >= 12, two)
    writer = re.search(r"process (\d+)", (tmp_path / "run" / ".lock").read_text())
    os.kill(int(writer[1]), signal.SIGKILL)  # torchrun ends the other one
    assert two.wait(timeout=60) != 0
    assert lines(tmp_path / "run") < STEPS // 2
    one = run([*script("pretrain", words), "run_dir=run"], tmp_path)
    assert one.returncode == 0, one.stderr
    assert "continuing" in one.stderr
    assert_same_end(tmp_path / "run", tmp_path / "whole", bitwise=False)


def test_a_full_disk_ends_the_run_with_clear_words_and_the_last_checkpoint_survives(unharmed, tmp_path):
    # A checkpoint of this network is about 0.2 MB; the third does not fit beside the two before and their successor.
    with mounted(tmp_path / "disk", "size=700k") as disk:
        done = run([*COMMAND, f"run_dir={disk / 'run'}", "checkpoint.keep=3"], tmp_path)
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert done.stderr.count("error:") == 1
        assert "Traceback" not in done.stderr
        shutil.copytree(disk / "run", tmp_path / "run")
    done = run([*COMMAND, f"run_dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    assert_same_end(tmp_path / "run", unharmed)


def test_another_recipe_is_refused_key_by_key_and_nothing_is_lost(unharmed, tmp_path):
    shutil.copytree(unharmed, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = run([*COMMAND, "run_dir=run", "optimizer.lr=4", "seed=1"], tmp_path)
    assert done.returncode == 2
    assert "optimizer.lr: the run has 5.0, asked for 4.0" in done.stderr
    assert "seed: the run has 0, asked for 1" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
