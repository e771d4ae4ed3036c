"""Claims on a run directory, between real processes and within one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_run import open_run

from ssl_bench.records.lock import InUseError, claim, is_claimed

HOLDER = """
import sys, time
from pathlib import Path
from ssl_bench.records.lock import claim
lock = claim(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""

# The worker of a data loader, forked while the claim is held, survives its killed parent for a while.
HOLDER_WITH_WORKER = """
import os, sys, time
from pathlib import Path
from ssl_bench.records.lock import claim
lock = claim(Path(sys.argv[1]))
worker = os.fork()
if worker == 0:
    time.sleep(20)
    os._exit(0)
time.sleep(0.2)
print("ready", worker, flush=True)
time.sleep(60)
"""


@contextmanager
def other_process(code: str, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that has printed its first line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            yield process
        finally:
            process.kill()


def test_a_directory_in_use_is_refused_with_the_process_and_free_once_that_is_killed(tmp_path: Path) -> None:
    with other_process(HOLDER, tmp_path) as process:
        assert is_claimed(tmp_path)
        with pytest.raises(InUseError, match=rf"{tmp_path}: in use by process {process.pid} on "):
            open_run(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_claimed(tmp_path)
        open_run(tmp_path).close()


def test_a_forked_worker_does_not_keep_its_dead_parent_s_claim(tmp_path: Path) -> None:
    with other_process(HOLDER_WITH_WORKER, tmp_path) as process:
        assert is_claimed(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_claimed(tmp_path)
        claim(tmp_path).release()


def test_claims_exclude_each_other_within_a_process_too_and_end_with_close(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            open_run(tmp_path)
        run.close()
        run.close()
        open_run(tmp_path).close()
