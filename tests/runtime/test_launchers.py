"""Real launchers, real processes: signals, exit codes, errors that one process meets, and no orphans."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import SCRIPTS, TINY_PRETRAIN, environment, metrics, run, script
from waiting import wait_for

WORDS = (*TINY_PRETRAIN, "run_dir=r", "resume=auto", "checkpoint.every_steps=0", "eval.protocols=[]")
LONG = (*WORDS, "method=faults:SlowSteps", "steps=400")
OURS = [sys.executable, "-m", "ssl_bench", "pretrain", "--processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
LAUNCHERS = {
    "ours": OURS,
    "torchrun": [*TORCHRUN, str(SCRIPTS / "pretrain.py")],
    "accelerate": [*ACCELERATE, str(SCRIPTS / "pretrain.py")],
}


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """Starts a run and waits for its first step."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    rows = folder / "r/metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (rows.exists() and rows.stat().st_size > 0), 120)
    return process


def workers(folder: Path) -> list[psutil.Process]:
    """The processes that train in a folder, launchers left out."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        trains = "ssl_bench.pretrain" in words or str(SCRIPTS / "pretrain.py") in words[1:3]
        if trains and process.info["cwd"] == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_our_launcher_passes_a_signal_on_and_returns_the_requeue_code(tmp_path, number):
    process = start(tmp_path, [*OURS, *LONG])
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.count(f"{number.name}: finishing this step") == 2
    assert (tmp_path / "r/requeue").exists()
    assert list((tmp_path / "r/checkpoints").glob("step-*"))
    assert not workers(tmp_path)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_its_end(tmp_path):
    process = start(tmp_path, [*OURS, *LONG, "steps=6"])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = run([*OURS, *LONG, "steps=6"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "r/requeue").exists()
    assert [row["step"] for row in metrics(tmp_path / "r")] == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("ours", signal.SIGKILL),
        ("torchrun", signal.SIGTERM),
        ("torchrun", signal.SIGUSR1),  # kills torchrun's agent
        ("torchrun", signal.SIGKILL),
        ("accelerate", signal.SIGTERM),  # kills the launcher
        ("accelerate", signal.SIGKILL),
    ],
)
def test_the_workers_of_a_launcher_that_dies_save_and_end(tmp_path, launcher, number):
    process = start(tmp_path, [*LAUNCHERS[launcher], *LONG])
    assert workers(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not workers(tmp_path), 60)
    assert process.returncode != 0
    assert (tmp_path / "r/requeue").exists()  # for a batch script, as the exit code is the launcher's own
    (checkpoint,) = (tmp_path / "r/checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == metrics(tmp_path / "r")[-1]["step"]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_others(tmp_path):
    process = start(tmp_path, [*OURS, *LONG])
    next(one for one in workers(tmp_path) if one.environ()["RANK"] == "1").kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: 1 of 2 processes killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not workers(tmp_path)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "method"),
    [
        ("torchrun", "FailsLater"),
        *(
            pytest.param(launcher, method, marks=pytest.mark.slow)
            for launcher, method in (("ours", "FailsLater"), ("ours", "FailsAtStart"), ("torchrun", "FailsAtStart"))
        ),
    ],
)
def test_an_error_that_one_process_meets_is_said_and_ends_all(tmp_path, launcher, method):
    done = run([*LAUNCHERS[launcher], *WORDS, f"method=faults:{method}", "steps=400"], tmp_path, timeout=90)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: only this process has this trouble"]
    assert done.returncode == (2 if launcher == "ours" else 1)
    if launcher == "ours":  # torchrun has a traceback of its own
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_error_that_all_meet_is_said_once(tmp_path):
    done = run([*LAUNCHERS["torchrun"], *WORDS, "steps=1", "optimizer.lr=much"], tmp_path, timeout=90)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: rank ")
    assert "optimizer.lr must be a valid number, got 'much'" in errors[0]


@pytest.mark.slow
def test_a_parameter_that_no_loss_reaches_is_named(tmp_path):
    done = run([*OURS, *WORDS, "method=faults:Unused", "steps=2"], tmp_path, timeout=90)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "got none of left_over.weight, left_over.bias: remove it, or give it requires_grad=False" in error


def test_a_left_over_world_size_says_what_is_waited_for(tmp_path):
    process = subprocess.Popen(
        script("pretrain", (*WORDS, "steps=1")), cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=environment(WORLD_SIZE="2", RANK="0", MASTER_PORT=str(free_port())),
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("rank 0: waiting up to 300 s for the other 1 of 2 processes at 127.0.0.1:")
    assert "(WORLD_SIZE=2 RANK=0 in the environment; for a run of one process unset WORLD_SIZE and RANK)" in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ((("seed=0",), ("seed=1",)), "seed: 0 on rank 0, 1 on rank 1"),
        pytest.param(
            (("log_every=1",), ("log_every=3",)), "log_every: 1 on rank 0, 3 on rank 1", marks=pytest.mark.slow
        ),
        pytest.param((("data=faults:other_images",),) * 2, "train pixels: ", marks=pytest.mark.slow),
    ],
)
def test_processes_that_would_run_different_things_are_told_so(tmp_path, words, difference):
    port, processes = str(free_port()), []
    for rank in (0, 1):
        env = environment(WORLD_SIZE="2", RANK=str(rank), MASTER_PORT=port, SSL_BENCH_CACHE=str(tmp_path / f"c{rank}"))
        command = script("pretrain", (*WORDS, "steps=2", "batch_size=32", *words[rank]))
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    said = "".join(process.communicate(timeout=120)[1] for process in processes)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "all processes must run the same, got " in errors[0]
    assert difference in errors[0]
    assert [process.returncode for process in processes] == [2, 2]
    assert "Traceback" not in said


# Other people's shells ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_its_own_outlives_the_shell_that_started_it(tmp_path):
    inner = f"{sys.executable} {SCRIPTS / 'pretrain.py'} {' '.join(map(repr, (*WORDS, 'steps=3')))}"
    subprocess.run(["sh", "-c", f"{inner} 2>log & exit 0"], cwd=tmp_path, env=environment(), check=True)
    wait_for(lambda: (tmp_path / "r/results.json").exists(), 120)
    assert "SIGTERM" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "module", ["pydantic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("typer", "torch"))]
)
def test_a_ctrl_c_in_the_first_second_is_no_traceback(tmp_path, module):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "class Hook:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Hook())\n"
        f"sys.argv = ['ssl-bench', 'pretrain', *{list(WORDS)!r}, 'steps=1']\n"
        "from ssl_bench.cli import main\n"
        "main()\n"
    )
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode in (-signal.SIGINT, 130, 75)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_plug_in_may_bear_the_name_of_one_of_the_suites_folders(tmp_path):
    (tmp_path / "training.py").write_text("from tiny_net import TinyTwins as Mine\n")
    (tmp_path / "models.py").write_text("from ssl_bench.optim.schedules import constant as steady\n")
    words = (*WORDS, "method=training:Mine", "schedule=models:steady", "steps=1")
    done = run(script("pretrain", words), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_kernel_sends_a_worker_sigterm_when_its_launcher_dies():
    code = (
        "import os, signal, sys, time\n"
        "from ssl_bench.runtime.peers import LAUNCHER, follow_parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked to stop', flush=True), os._exit(0)))\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.readline() if {late} else None\n"
        "follow_parent()\n"
        "print('follows', flush=True)\n"
        "time.sleep(60)\n"
    )
    for late in (False, True):  # dead before the kernel was asked
        starter = (
            "import os, subprocess, sys\n"
            f"subprocess.Popen([sys.executable, '-c', {code.replace('{late}', str(late))!r}], "
            "env={**os.environ, 'SSL_BENCH_LAUNCHER': str(os.getpid())}).wait()\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline().strip().isdecimal()
        if not late:
            assert parent.stdout.readline() == "follows\n"
        parent.kill()
        parent.wait()
        if late:
            time.sleep(0.2)
            os.write(parent.stdin.fileno(), b"\n")
        assert parent.stdout.readline() == "asked to stop\n"
        parent.stdin.close()
        parent.stdout.close()
