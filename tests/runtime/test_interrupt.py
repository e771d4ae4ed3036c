"""Signals sent to real processes: the flag, the answers, the second signal, and the handlers put back."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest
import torch

from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, SIGNALS, Agreement, Interrupt, Stopped, stop_if_requested

# A stand-in for the loop: it works until it is asked to stop, "saves" for a moment and exits as a run does.
CHILD = """
import sys, time
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.requested:
        time.sleep(0.005)
    print("stopping", interrupt.signal_name, flush=True)
    sys.stdin.readline() if {wait} else None
    with interrupt.saving():
        print("saving", flush=True)
        sys.stdin.readline()
    print("saved", flush=True)
sys.exit(REQUEUE_EXIT_CODE)
"""


@contextmanager
def child(*, wait: bool = False) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    code = textwrap.dedent(CHILD.format(wait=wait))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_requeue_code_is_ex_tempfail() -> None:
    assert REQUEUE_EXIT_CODE == os.EX_TEMPFAIL == 75


@pytest.mark.parametrize(
    "first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_finishes_the_step_and_later_ones_while_saving_change_nothing(first: signal.Signals) -> None:
    with child() as process:
        assert process.stdout is not None
        process.send_signal(first)
        assert process.stdout.readline() == f"stopping {first.name}\n"
        assert process.stdout.readline() == "saving\n"
        for number in (*SIGNALS, *SIGNALS):
            process.send_signal(number)
        out, err = process.communicate("\n", timeout=30)
    assert process.returncode == REQUEUE_EXIT_CODE
    assert out == "saved\n"
    assert f"{first.name}: finishing this step, then saving and exiting with code 75" in err
    # Equal signals that are pending together are delivered once, so each kind is answered at least once.
    for number in SIGNALS:
        assert f"{number.name}: ignored, a checkpoint is being written" in err


def test_a_second_sigterm_outside_the_save_is_answered_and_ignored() -> None:
    with child(wait=True) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping SIGTERM\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "finishing this step" in process.stderr.readline()
        assert "SIGTERM: ignored, already stopping after SIGTERM" in process.stderr.readline()
        process.communicate("\n\n", timeout=30)
    assert process.returncode == REQUEUE_EXIT_CODE


def test_a_second_ctrl_c_kills_but_not_the_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal_name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's copy of the same key press
        monkeypatch.setattr("ssl_bench.runtime.interrupt._SECOND_CTRL_C_AFTER", -1.0)
        with interrupt.saving():
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_also_after_an_error() -> None:
    def own(number: int, frame: object) -> None: ...

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGUSR1, own)
        with suppress(RuntimeError), Interrupt():
            assert signal.getsignal(signal.SIGUSR1) is not own
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_knows_no_context_can_ask_too() -> None:
    stop_if_requested("reading")  # outside any context
    with Interrupt():
        stop_if_requested("reading")
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped, match=r"^reading stopped by SIGHUP$"):
            stop_if_requested("reading")
    stop_if_requested("reading")


def test_in_another_thread_it_is_a_flag_that_nobody_sets() -> None:
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append(interrupt.agreed())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) == before


AGREEMENT = """
import os, signal, sys
import torch.distributed as dist
from ssl_bench.runtime.interrupt import Interrupt
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
with Interrupt() as interrupt:
    before = interrupt.agreed()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    print(before, interrupt.requested, interrupt.agreed())
dist.destroy_process_group()
"""


def test_a_signal_to_one_process_stops_all(tmp_path: os.PathLike[str]) -> None:
    store = f"file://{os.fspath(tmp_path)}/store"
    processes = [
        subprocess.Popen([sys.executable, "-c", AGREEMENT, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert answers == [["False", "False", "True"], ["False", "True", "True"]]


def test_alone_agreed_is_the_own_flag() -> None:
    with Interrupt() as interrupt:
        assert interrupt.agreed(torch.device("cpu")) is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.agreed(torch.device("cpu")) is True


def test_outside_of_the_steps_a_signal_ends_at_once_but_for_what_is_being_saved() -> None:
    with Interrupt(at_once=True) as interrupt:
        with interrupt.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
    with Interrupt(at_once=True) as interrupt, interrupt.saving():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.is_saving
    with Interrupt(at_once=True), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGHUP)


def test_processes_agree_by_elapsed_time_in_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []
    monkeypatch.setattr("ssl_bench.runtime.interrupt.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ssl_bench.runtime.interrupt._maximum", lambda values, _device: (looks.append(step), values)[1])
    agreement = Agreement(Interrupt(), "cpu")
    for step in range(1, 400):
        now[0] += 0.05 if step < 300 else 3.0
        agreement.reached(step)
    quick = [step for step in looks if 60 < step < 300]
    assert {after - before for before, after in pairwise(quick)} <= {19, 20}  # once a second
    slow = [step for step in looks if step > 320]
    assert slow == list(range(slow[0], 400))  # at every step, where a step takes longer than that
