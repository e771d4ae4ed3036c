"""Stands in for a run in the tests of launchers: ``fake_run.py BEHAVIOUR RUN_DIR IDENTITY COUNTER``, in milliseconds.

Appends a line to COUNTER when it starts. BEHAVIOUR: "ok", "diverged", "crash", "silent" (success without a record),
"requeue" (stops once with code 75, then ends well), "wait" (until asked to stop, then code 75), or "slow" (0.3 s, at
step 5 of 10).
"""

import json
import signal
import sys
import time
from pathlib import Path

behaviour, run_dir, identity, counter = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
run_dir.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(counter, "a") as file:
    file.write(f"{run_dir.name}\n")
if behaviour == "crash":
    print("Traceback (most recent call last):", file=sys.stderr)
    sys.exit("RuntimeError: a crash")
if behaviour == "silent":
    sys.exit(0)
head = {"format": 1, "identity": identity, "recipe": {"batch_size": 10}, "plan": {"total_steps": 10}}
(run_dir / "run.json").write_text(json.dumps(head))
if behaviour == "requeue" and counter.read_text().count(run_dir.name) == 1:
    sys.exit(75)
if behaviour == "wait":
    time.sleep(60)
if behaviour == "slow":
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 5, "images_per_second": 100.0}) + "\n")
    time.sleep(0.3)
status = "diverged" if behaviour == "diverged" else "finished"
entry = {"protocol": "test-v1", "model": "trained", "metrics": {"top1": float(len(run_dir.name))}}
evaluations = [] if status == "diverged" else [entry]
(run_dir / "results.json").write_text(json.dumps({"format": 1, "status": status, "evaluations": evaluations}))
