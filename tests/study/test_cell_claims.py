"""Claims: which worker has a cell, and when a dead one's falls to another."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_bench.study import claims as cell_claims
from ssl_bench.study.claims import CellClaim, holder


def test_a_claim_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    first = CellClaim.acquire(tmp_path, "a")
    assert first is not None
    assert CellClaim.acquire(tmp_path, "a") is None
    assert holder(tmp_path, "a") == f"process {os.getpid()} on {os.uname().nodename}"
    other = CellClaim.acquire(tmp_path, "a.b")  # another name, though it begins alike
    assert other is not None
    first.release()
    first.release()
    assert holder(tmp_path, "a") is None
    assert CellClaim.acquire(tmp_path, "a") is not None


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretends to run under another boot of a kernel, on another machine: locks say nothing then."""
    return lambda boot: monkeypatch.setattr(cell_claims, "_boot", lambda: boot)


def test_a_dead_workers_claim_on_another_machine_expires(
    tmp_path: Path, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere("theirs")
    claim = CellClaim.acquire(tmp_path, "a")
    assert claim is not None
    claim._lock.release()  # it dies: the lock is gone, the file stays
    elsewhere("ours")
    assert CellClaim.acquire(tmp_path, "a") is None
    old = time.time() - 100
    os.utime(claim.path, (old, old))
    assert CellClaim.acquire(tmp_path, "a", expiry=200) is None
    assert holder(tmp_path, "a", expiry=90) is None
    assert CellClaim.acquire(tmp_path, "a", expiry=90) is None  # a clock may have been set: it is watched for a while
    monkeypatch.setattr(cell_claims, "CONFIRM", 0.0)
    taken = CellClaim.acquire(tmp_path, "a", expiry=90)
    assert taken is not None
    assert [path.name for path in tmp_path.glob("a.claim-*")] == ["a.claim-2"]
    assert CellClaim.acquire(tmp_path, "a", expiry=90) is None


def test_clocks_that_were_set_neither_keep_a_dead_claim_nor_end_a_living_one(
    tmp_path: Path, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(cell_claims.time, "monotonic", lambda: now[0])
    elsewhere("theirs")
    claim = CellClaim.acquire(tmp_path, "a")
    assert claim is not None
    elsewhere("ours")
    # The clock was set back by a day, or the holder's runs ahead: the file lies in the future, and nobody touches it.
    later = time.time() + 86400
    os.utime(claim.path, (later, later))
    assert CellClaim.acquire(tmp_path, "a", expiry=90) is None
    now[0] += 91
    assert holder(tmp_path, "a", expiry=90) is None
    taken = CellClaim.acquire(tmp_path, "a", expiry=90)
    assert taken is not None
    taken.release()
    # The clock was set forward by a day: the file looks old, but its holder touches it again and again.
    elsewhere("theirs")
    living = CellClaim.acquire(tmp_path, "b")
    assert living is not None
    elsewhere("ours")
    for beat in range(20):
        old = time.time() - 86400 + beat
        os.utime(living.path, (old, old))
        assert CellClaim.acquire(tmp_path, "b", expiry=90) is None
        now[0] += 10
    # Under one kernel file times mean nothing.
    here = CellClaim.acquire(tmp_path, "c")
    assert here is not None
    os.utime(here.path, (0, 0))
    assert holder(tmp_path, "c") is not None
    assert CellClaim.acquire(tmp_path, "c") is None


def test_looking_at_a_claim_writes_nothing(tmp_path: Path, elsewhere: Callable[[str], None]) -> None:
    elsewhere("theirs")
    assert CellClaim.acquire(tmp_path, "a") is not None
    elsewhere("ours")
    before = tmp_path.stat().st_mtime_ns
    assert holder(tmp_path, "a") is not None
    assert tmp_path.stat().st_mtime_ns == before


def test_a_heartbeat_keeps_a_claim(
    tmp_path: Path, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_claims, "BEAT_EVERY", -1.0)
    elsewhere("theirs")
    claim = CellClaim.acquire(tmp_path, "a")
    assert claim is not None
    old = time.time() - 100
    os.utime(claim.path, (old, old))
    claim.beat()
    elsewhere("ours")
    assert CellClaim.acquire(tmp_path, "a", expiry=90) is None


def test_an_owner_takes_over_from_its_earlier_process(tmp_path: Path, elsewhere: Callable[[str], None]) -> None:
    elsewhere("the first node's")
    assert CellClaim.acquire(tmp_path, "a", owner="job 7") is not None
    elsewhere("the second node's")
    assert CellClaim.acquire(tmp_path, "a", owner="job 8") is None
    assert CellClaim.acquire(tmp_path, "a", owner="job 7") is not None


def test_who_is_slower_in_taking_over_steps_back(
    tmp_path: Path, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both saw the dead generation 1. The faster one made 2, ended, and a third worker has made 1 again.
    elsewhere("theirs")
    third = CellClaim.acquire(tmp_path, "a")
    assert third is not None
    elsewhere("ours")
    looks = iter([False])
    real = cell_claims._alive
    monkeypatch.setattr(cell_claims, "_alive", lambda *given: next(looks, None) is None and real(*given))
    assert CellClaim.acquire(tmp_path, "a") is None
    assert [path.name for path in tmp_path.glob("a.claim-*")] == ["a.claim-1"]
