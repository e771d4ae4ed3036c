"""Checkpoints through kills, damage, a full disk and hostile files."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_disk import mounted

from ssl_bench.records.checkpoint import CheckpointError, Checkpoints
from ssl_bench.records.storage import TEMPORARY, remove_temporaries


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk") as disk:
        yield disk


def state(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": OrderedDict(weight=torch.full((300, 100), value), bias=torch.zeros(3, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"buffer": torch.arange(5), "t": 3}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "rng": torch.get_rng_state(),
        "python": (3, (1, 2, 3), None),
        "name": "tvlars",
    }


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def test_a_round_trip_returns_every_type_and_the_meta(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.load_latest() is None
    saved = state()
    folder = checkpoints.save(100, saved, {"identity": "abc", "world_size": 2})
    assert folder.name == "step-00000100"
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "meta.json", "state.pt"]
    loaded = Checkpoints(tmp_path / "checkpoints").load_latest()
    assert loaded is not None
    step, read, meta = loaded
    assert step == 100
    assert meta == {"format": 1, "step": 100, "identity": "abc", "world_size": 2}
    assert_same(read, saved)


def test_the_checksums_are_those_of_the_files_in_sha256sum_s_form(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(1, state(), {})
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_models_and_optimizers_as_torch_gives_them_are_accepted(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, {})
    read = checkpoints.load(1)[0]
    model.load_state_dict(read["model"])
    optimizer.load_state_dict(read["optimizer"])


def test_the_last_k_are_kept_and_a_step_is_written_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(step), {})
    assert checkpoints.steps() == [3, 4]
    before = (tmp_path / "step-00000004" / "state.pt").stat().st_mtime_ns
    checkpoints.save(4, state(4), {})
    assert (tmp_path / "step-00000004" / "state.pt").stat().st_mtime_ns == before
    resumed = Checkpoints(tmp_path, keep=2)
    resumed.load_latest()
    resumed.save(4, state(4), {})
    assert (tmp_path / "step-00000004" / "state.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": [1, {"b": np.float64(1)}]}, r"state\.a\[1\]\.b must be a tensor, .*, got a numpy\.float64"),
        ({"f": print}, r"state\.f must be .*, got a builtins\.builtin_function_or_method"),
        ({1.5: 0}, r"keys of state must be strings or integers, got 1\.5"),
    ],
)
def test_a_state_that_could_not_be_loaded_safely_is_refused_before_writing(
    tmp_path: Path, bad: dict[Any, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).save(1, bad, {})
    assert list(tmp_path.iterdir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("file", ["state.pt", "meta.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_newest_falls_back_says_so_and_is_replaced(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    Checkpoints(tmp_path, keep=3).save(10, state(10), {})
    Checkpoints(tmp_path, keep=3).save(20, state(20), {})
    damage(tmp_path / "step-00000020" / file)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, warn=said.append)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0] == 10
    assert_same(loaded[1]["model"], state(10)["model"])
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert "\n" not in said[0]
    # A checkpoint of the course taken now replaces the damaged one, which does not count among the kept.
    checkpoints.save(15, state(15), {})
    assert checkpoints.steps() == [15]
    checkpoints.save(20, state(21), {})
    assert_same(Checkpoints(tmp_path).load(20)[0]["model"], state(21)["model"])


def test_the_same_step_can_be_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(10, state(10), {})
    Checkpoints(tmp_path).save(20, state(20), {})
    flip(tmp_path / "step-00000020" / "state.pt")
    checkpoints = Checkpoints(tmp_path, warn=[].append)
    checkpoints.load_latest()
    checkpoints.save(20, state(22), {})
    assert checkpoints.steps() == [10, 20]
    assert_same(Checkpoints(tmp_path).load(20)[0]["model"], state(22)["model"])


def test_only_sound_checkpoints_of_the_present_course_count_among_the_kept(tmp_path: Path) -> None:
    for step in (10, 20):
        Checkpoints(tmp_path).save(step, state(step), {})
    flip(tmp_path / "step-00000020" / "state.pt")
    checkpoints = Checkpoints(tmp_path, keep=2, warn=[].append)
    checkpoints.load_latest()
    checkpoints.save(25, state(25), {})
    assert checkpoints.steps() == [10, 25]
    Checkpoints(tmp_path, keep=2).save(15, state(15), {})  # a run that went back further than it had to
    assert checkpoints.steps() == [10, 15]


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, warn=[].append)
    for step in (1, 2):
        flip(checkpoints.save(step, state(), {}) / "state.pt")
    with pytest.raises(CheckpointError, match=r"every one is damaged: .*step-00000002.*step-00000001"):
        checkpoints.load_latest()


def forge(folder: Path, file: str, data: bytes) -> None:
    """Replaces a file and makes its checksum fit, as somebody with write access could."""
    (folder / file).write_bytes(data)
    names = ("state.pt", "meta.json")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_a_malicious_pickle_with_a_fitting_checksum_is_never_run(tmp_path: Path, form: str) -> None:
    fired = tmp_path / "fired"
    checkpoints = Checkpoints(tmp_path / "checkpoints", warn=[].append)
    folder = checkpoints.save(1, state(), {})
    evil = tmp_path / "evil.pt"
    if form == "zip":
        torch.save({"model": Bomb(fired)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Bomb(fired)))
    forge(folder, "state.pt", evil.read_bytes())
    with pytest.raises(CheckpointError, match=r"state\.pt: refused by torch\.load"):
        checkpoints.load_latest()
    assert not fired.exists()
    if form == "zip":  # the bomb is live: without the guard it goes off
        torch.load(evil, weights_only=False)
        assert fired.exists()


def test_another_format_version_is_refused_by_name_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {})
    folder = checkpoints.save(2, state(), {})
    forge(folder, "meta.json", json.dumps({"format": 7, "step": 2}).encode())
    with pytest.raises(CheckpointError, match=r"step-00000002: its format is 7, this version reads 1"):
        checkpoints.load_latest()


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_litter(tiny_disk: Path) -> None:
    folder = tiny_disk / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, {"x": torch.ones(100_000)}, {})  # 0.4 of 4 MB
    free = shutil.disk_usage(tiny_disk).free
    for size in (2_000_000, free // 4, free // 4 - 1_200):  # the last two fail at the very end of the file
        with pytest.raises(CheckpointError, match=r"step-00000002: not written, .* untouched: No space left") as caught:
            checkpoints.save(2, {"x": torch.ones(size)}, {})
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
        assert shutil.disk_usage(tiny_disk).free == free
    loaded = Checkpoints(folder).load_latest()
    assert loaded is not None
    assert loaded[0] == 1
    checkpoints.save(2, {"x": torch.ones(100_000)}, {})
    assert checkpoints.steps() == [1, 2]


def test_a_write_that_fails_once_fails_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # enough for the other files
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            checkpoints.save(2, state(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_failing_system_call_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), {})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.save(2, state(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.load_latest() is not None


# Forks a process that saves without pause, kills it at a random point of its first to third save, and looks at what is
# there: 40 times. One interpreter does it all, for importing torch takes longer than the rest.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ssl_bench.records.checkpoint import Checkpoints
from ssl_bench.records.storage import TEMPORARY, remove_temporaries
torch.set_num_threads(1)
folder, random = sys.argv[1], random.Random(0)
damaged, litter, step = [], 0, 0
def save(checkpoints, step):
    checkpoints.save(step, {"step": step, "x": torch.full((250_000,), float(step))}, {"step_again": step})
began = time.monotonic()
save(Checkpoints(folder + "-trial"), 1)
took = time.monotonic() - began
for round in range(40):
    started, say = os.pipe()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(folder, keep=2)
        while True:
            step += 1
            os.write(say, b".")
            save(checkpoints, step)
    for _ in range(random.randint(1, 3)):
        os.read(started, 1)
    time.sleep(random.uniform(0.0, took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checkpoints = Checkpoints(folder, warn=damaged.append)
    litter += remove_temporaries(Path(folder)) > 0
    left = [name for name in os.listdir(folder) if name.startswith(TEMPORARY)] if os.path.isdir(folder) else []
    assert not left, left
    latest = checkpoints.load_latest()
    if latest is not None:
        read, state, meta = latest
        assert read >= step and state["step"] == meta["step_again"] == read, (read, step)
        assert torch.equal(state["x"], torch.full((250_000,), float(read)))
        step = read
assert not damaged, damaged
assert step > 0
checkpoints.save(step + 1, {}, {})
assert checkpoints.steps() == [step, step + 1], checkpoints.steps()
print(litter)
"""


def test_a_process_killed_at_forty_random_points_always_leaves_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10, "too few kills hit a write for the test to mean anything"


def test_only_what_a_dead_writer_left_is_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {})
    (tmp_path / f"{TEMPORARY}1234-step-00000002").mkdir()
    (tmp_path / f"{TEMPORARY}1234-step-00000002" / "state.pt").touch()
    (tmp_path / f"{TEMPORARY}meta.json").touch()
    assert remove_temporaries(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert remove_temporaries(tmp_path / "absent") == 0
