"""A run killed at random records the same as one that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

# A run in miniature: it logs every step, checkpoints every third, and is killed wherever it is.
MINIATURE = """
import sys, time
from pathlib import Path
import torch
from ssl_bench.records.checkpoint import Checkpoints
from ssl_bench.records.writer import Run
torch.set_num_threads(1)
folder, tick = Path(sys.argv[1]), lambda: None
def step_once(x, k):
    return torch.cos(x * 1.1 + k)
def once():
    with Run.open(folder, {"seed": 1}, "id", resume="auto", main_process=True) as run:
        if run.results is not None:
            return run.tidy()  # as a session does: the kill may have come between results and telemetry
        checkpoints = Checkpoints(folder / "checkpoints")
        step, x = None, torch.ones(1000)
        latest = checkpoints.load_latest()
        if latest is not None:
            step, state, _ = latest
            x = state["x"]
        run.truncate_to(step)
        step = step or 0
        run.write_provenance({}, step=step)
        pending = []
        while step < 36:
            tick()
            x = step_once(x, step)
            step += 1
            pending.append((step, float(x.sum())))
            run.log({"step": step, "loss": float(x.mean())})
            if step % 3 == 0:
                ks, sums = zip(*pending)
                run.log_telemetry({"step": list(ks), "layer": ["x"] * len(ks), "sum": list(sums)})
                pending = []
                run.sync()
                checkpoints.save(step, {"x": x}, {})
        run.finish({"status": "finished", "sum": float(x.sum()), "evaluations": []})
"""

# The whole run once, then a second one that is killed a moment after some steps, 0 to 8 of them, until it has ended.
# Each is forked from a parent that never ran anything itself: threads do not survive a fork.
KILLED = (
    MINIATURE
    + """
import os, random, signal
def forked(path):
    global folder, tick
    steps, end = os.pipe()
    child = os.fork()
    if child == 0:
        folder, tick = path, lambda: os.write(end, b".")
        once()
        os._exit(0)
    os.close(end)
    return child, steps
def ended(child):
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
    return os.WIFEXITED(status)
random, kills = random.Random(1), 0
assert ended(forked(Path(sys.argv[1]))[0])
while True:
    child, steps = forked(Path(sys.argv[2]))
    if kills < 25:
        for _ in range(random.randint(0, 8)):
            os.read(steps, 1)
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
    if ended(child):
        break
    kills += 1
print(kills)
"""
)


def test_a_run_killed_again_and_again_records_the_same_as_one_never_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(whole), str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2, "too few kills for the test to mean anything"
    for name in ("metrics.jsonl", "telemetry.parquet", "results.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (killed / "telemetry").exists()
    sessions = [json.loads(line) for line in (killed / "sessions.jsonl").read_text().splitlines()]
    assert any(session["step"] > 0 for session in sessions), "no kill came after a checkpoint"
    assert sorted(session["step"] for session in sessions) == [session["step"] for session in sessions]
