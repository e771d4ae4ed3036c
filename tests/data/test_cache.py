"""The cache of decoded images: whole or absent, written once, whatever the disk and other processes do."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import encode, parquet_set, pixels, write_parquet

from ssl_bench.data import cache as image_cache
from ssl_bench.data import decode as decode_module
from ssl_bench.data import decoded as decoded_module
from ssl_bench.data.cache import read_meta
from ssl_bench.data.dataset import Dataset, load_dataset
from ssl_bench.runtime.interrupt import Interrupt, Stopped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parquet_set(tmp_path / "set")
    return tmp_path / "set"


def images(data: Dataset) -> torch.Tensor:
    return torch.cat(
        [batch for split in (data.train, data.test) for batch in split.batches([torch.arange(len(split))])]
    )


def cached_sets(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def refuse_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_blocks(*_arguments: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoded_module, "decode_blocks", decode_blocks)


def test_reopening_decodes_nothing_and_gives_the_same(folder, cache, monkeypatch):
    first = load_dataset("cifar10", path=folder, cache_dir=cache)
    refuse_decoding(monkeypatch)
    again = load_dataset("cifar10", path=folder, cache_dir=cache)
    assert torch.equal(images(again), images(first))
    assert torch.equal(again.train.labels, first.train.labels)
    assert torch.equal(again.test.labels, first.test.labels)
    assert (again.classes, again.mean, again.std) == (first.classes, first.mean, first.std)
    assert len(cached_sets(cache)) == 1


def test_writing_to_the_images_does_not_reach_the_cache(folder, cache):
    first = load_dataset("cifar10", path=folder, cache_dir=cache)
    before = images(first)
    first.train.images.zero_()
    assert torch.equal(images(load_dataset("cifar10", path=folder, cache_dir=cache)), before)


def test_a_changed_file_another_size_or_another_name_is_decoded_anew(folder, cache):
    before = images(load_dataset("cifar10", path=folder, cache_dir=cache))
    new = pixels(20, seed=9)
    write_parquet(
        folder / "train-00000-of-00001.parquet", [encode(image) for image in new], [i % 10 for i in range(20)]
    )
    after = images(load_dataset("cifar10", path=folder, cache_dir=cache))
    assert not torch.equal(after[:20], before[:20])
    np.testing.assert_array_equal(after[:20].permute(0, 2, 3, 1).numpy(), new)
    assert load_dataset("cifar10", path=folder, cache_dir=cache, size=4).train.image_shape == (3, 4, 4)
    load_dataset("hf", path=folder, cache_dir=cache)
    assert len(cached_sets(cache)) == 4


def test_a_copy_that_is_not_whole_is_replaced(folder, cache):
    before = images(load_dataset("cifar10", path=folder, cache_dir=cache))
    (copy,) = cached_sets(cache)
    os.truncate(copy / "train.images", 100)
    assert torch.equal(images(load_dataset("cifar10", path=folder, cache_dir=cache)), before)
    (copy / "meta.json").write_text("{")
    assert torch.equal(images(load_dataset("cifar10", path=folder, cache_dir=cache)), before)
    assert cached_sets(cache) == [copy]


def test_an_unwritable_cache_is_said_and_done_without(folder, tmp_path, cache, caplog):
    expected = images(load_dataset("cifar10", path=folder, cache_dir=cache))
    (tmp_path / "file").write_text("no folder")
    data = load_dataset("cifar10", path=folder, cache_dir=tmp_path / "file" / "cache")
    assert "not cached on disk" in caplog.text
    assert str(tmp_path / "file") in caplog.text
    assert torch.equal(images(data), expected)


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets every file take `after` bytes, part of a write included, as a disk does that fills up."""

    class Disk:
        def __init__(self, path: Path, *_arguments: object, **_options: object) -> None:
            self.file, self.left = open(path, "wb+", buffering=0), after  # noqa: SIM115
            self.seek, self.read, self.truncate = self.file.seek, self.file.read, self.file.truncate

        def __enter__(self) -> "Disk":
            return self

        def __exit__(self, *_arguments: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, block: memoryview) -> int:
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(block[: self.left])
            self.left -= written
            return written

    monkeypatch.setattr(image_cache, "open", Disk, raising=False)


def test_a_disk_that_fills_up_leaves_nothing_and_the_set_in_memory(folder, tmp_path, cache, caplog, monkeypatch):
    expected = images(load_dataset("cifar10", path=folder, cache_dir=tmp_path / "other"))
    full_disk(monkeypatch, after=2_000)
    data = load_dataset("cifar10", path=folder, cache_dir=cache)
    assert "No space left on device" in caplog.text
    assert torch.equal(images(data), expected)
    assert cached_sets(cache) == []


def test_a_write_that_takes_only_a_part_is_continued():
    class Halves:
        taken = b""

        def write(self, block: memoryview) -> int:
            half = (len(block) + 1) // 2
            self.taken += bytes(block[:half])
            return half

    blocks = [np.arange(7, dtype=np.uint8), np.arange(12, dtype=np.int64).reshape(3, 4)]
    file = Halves()
    for block in blocks:
        image_cache.write_all(file, block)
    assert file.taken == b"".join(block.tobytes() for block in blocks)


def test_too_little_room_is_said_before_decoding(folder, cache, caplog, monkeypatch):
    class Usage:
        free = 100

    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _path: Usage)
    load_dataset("cifar10", path=folder, cache_dir=cache)
    assert "needs 0.00 GiB, 0.00 GiB are free" in caplog.text
    assert cached_sets(cache) == []
    monkeypatch.setattr(decoded_module, "available_memory", lambda: 100)
    refuse_decoding(monkeypatch)
    with pytest.raises(OSError, match=r"cifar10: .* GiB decoded fit neither into memory .* set SSL_BENCH_CACHE"):
        load_dataset("cifar10", path=folder, cache_dir=cache)


@pytest.mark.parametrize("content", ["null", "[]", "3", '{"content": null, "digest": ""}', "{" * 5000, ""])
def test_a_description_that_is_none_is_decoded_anew(folder, cache, content):
    before = images(load_dataset("cifar10", path=folder, cache_dir=cache))
    (copy,) = cached_sets(cache)
    (copy / "meta.json").write_text(content)
    assert torch.equal(images(load_dataset("cifar10", path=folder, cache_dir=cache)), before)


def test_a_changed_description_is_decoded_anew(folder, cache):
    before = load_dataset("cifar10", path=folder, cache_dir=cache)
    (copy,) = cached_sets(cache)
    text = (copy / "meta.json").read_text()
    changed = text.replace(f'"std": [{before.std[0]}', '"std": [0.5')
    assert changed != text
    (copy / "meta.json").write_text(changed)
    assert load_dataset("cifar10", path=folder, cache_dir=cache).std == before.std


@pytest.mark.parametrize("name", ["train.images", "test.images", "train.labels", "test.labels"])
def test_changed_bytes_are_refused(folder, cache, name):
    load_dataset("cifar10", path=folder, cache_dir=cache)
    (copy,) = cached_sets(cache)
    with open(copy / name, "r+b") as file:
        file.seek(8)
        byte = file.read(1)
        file.seek(8)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(
        ValueError, match=rf"{name}: block 0 of 1 is not what was written .*ssl-bench data clear cifar10-"
    ):
        load_dataset("cifar10", path=folder, cache_dir=cache)


def test_of_a_large_copy_some_blocks_are_looked_at_and_with_time_all(folder, cache, monkeypatch):
    monkeypatch.setattr(decode_module, "_BLOCK_BYTES", 3 * 8 * 8)  # an image is a block
    load_dataset("cifar10", path=folder, cache_dir=cache)
    (copy,) = cached_sets(cache)
    meta = read_meta(copy)
    assert len(meta.files["train.images"].digests) == 20
    whole = list(image_cache.damaged_blocks(copy, meta))
    assert sum(size for _, _, size, _ in whole) == sum(file.size for file in meta.files.values())
    seen = set()
    for _ in range(200):
        read = list(image_cache.damaged_blocks(copy, meta, limit=4 * 3 * 8 * 8 * 2))
        assert sum(size for name, _, size, _ in read if name == "train.images") == 2 * 3 * 8 * 8
        assert {name for name, *_ in read} == set(meta.files)
        seen |= {(name, number) for name, number, *_ in read}
    assert seen == {(name, number) for name, number, *_ in whole}


def test_the_digest_says_whether_two_data_sets_are_equal(folder, tmp_path, cache):
    one = load_dataset("cifar10", path=folder, cache_dir=cache)
    shutil.copytree(folder, tmp_path / "moved")
    moved = load_dataset("cifar10", path=tmp_path / "moved", cache_dir=cache)
    assert (moved.digest, moved.content) == (one.digest, one.content)
    (tmp_path / "file").touch()
    in_memory = load_dataset("cifar10", path=folder, cache_dir=tmp_path / "file" / "x")
    assert in_memory.content == one.content
    write_parquet(folder / "test-00000-of-00001.parquet", [encode(image) for image in pixels(10)], [0] * 10)
    other = load_dataset("cifar10", path=folder, cache_dir=cache)
    assert other.digest != one.digest
    assert other.content != one.content


# Decodes slowly, so that the processes overlap; prints whether it decoded and what it got.
CHILD = """
import hashlib, sys, time
from pathlib import Path
import torch
from ssl_bench.data import dataset as data, decoded as module
decoded, original, go = [], module.decode_blocks, Path(sys.argv[3])

def decode_blocks(*arguments):
    decoded.append(1)
    print("decoding", flush=True)
    time.sleep(float(sys.argv[4]))
    return original(*arguments)

module.decode_blocks = decode_blocks
print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
loaded = data.load_dataset("cifar10", path=sys.argv[1], cache_dir=sys.argv[2])
digest = hashlib.sha256()
for split in (loaded.train, loaded.test):
    for batch in split.batches([torch.arange(len(split))]):
        digest.update(batch.numpy().tobytes())
print("done", len(decoded), digest.hexdigest(), flush=True)
"""


def start_child(folder: Path, cache: Path, go: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), str(cache), str(go), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_of_two_processes_at_once_one_decodes_and_both_get_the_same(folder, cache, tmp_path):
    children = [start_child(folder, cache, tmp_path / "go", seconds=0.5) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    outputs = [child.communicate(timeout=60)[0].split("\n")[-2].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(output[1] for output in outputs) == ["0", "2"]  # train and test by one of them
    assert outputs[0][2] == outputs[1][2]


def test_a_process_killed_while_decoding_leaves_no_lock_and_no_cached_set(folder, cache, tmp_path):
    (tmp_path / "go").touch()
    child = start_child(folder, cache, tmp_path / "go", seconds=60)
    with child.stdout as output:
        assert [output.readline(), output.readline()] == ["ready\n", "decoding\n"]
        child.send_signal(signal.SIGKILL)
        child.wait()
    (partial,) = cached_sets(cache)
    assert partial.suffix == ".partial"
    data = load_dataset("cifar10", path=folder, cache_dir=cache)
    assert len(data.train) == 20
    (copy,) = cached_sets(cache)
    assert read_meta(copy).counts == {"train": 20, "test": 10}


def stopped_after(monkeypatch: pytest.MonkeyPatch, blocks: int, stop: BaseException | None) -> list[int]:
    """Makes an image a block, and has decoding stop after so many; returns the list of the blocks that it decodes."""
    monkeypatch.setattr(decode_module, "_BLOCK_BYTES", 3 * 8 * 8)
    decoded: list[int] = []

    def decode_blocks(split, size, shape, first):
        for number, block in enumerate(decode_module.decode_blocks(split, size, shape, first), first):
            if stop is not None and len(decoded) == blocks:
                raise stop
            decoded.append(number)
            yield block

    monkeypatch.setattr(decoded_module, "decode_blocks", decode_blocks)
    return decoded


@pytest.mark.parametrize("stop", [Stopped("by SIGTERM"), KeyboardInterrupt()], ids=["signal", "ctrl-c"])
@pytest.mark.parametrize("done", [7, 23])  # in the train and in the test split
def test_decoding_goes_on_where_it_was_stopped(folder, cache, tmp_path, monkeypatch, stop, done):
    expected = load_dataset("cifar10", path=folder, cache_dir=tmp_path / "other")
    assert stopped_after(monkeypatch, done, stop) == []
    with pytest.raises(type(stop)):
        load_dataset("cifar10", path=folder, cache_dir=cache)
    decoded = stopped_after(monkeypatch, 0, None)
    data = load_dataset("cifar10", path=folder, cache_dir=cache)
    assert decoded == [*range(done, 20), *range(max(0, done - 20), 10)]
    assert torch.equal(images(data), images(expected))
    assert (data.mean, data.std) == (expected.mean, expected.std)
    assert torch.equal(data.train.labels, expected.train.labels)


@pytest.mark.parametrize("fault", ["changed byte", "cut off", "torn line", "another Pillow", "nonsense"])
def test_what_was_left_damaged_is_decoded_again(folder, cache, tmp_path, monkeypatch, fault):
    expected = load_dataset("cifar10", path=folder, cache_dir=tmp_path / "other")
    stopped_after(monkeypatch, 7, Stopped())
    with pytest.raises(Stopped):
        load_dataset("cifar10", path=folder, cache_dir=cache)
    (partial,) = cached_sets(cache)
    journal = partial / "blocks.jsonl"
    if fault == "changed byte":
        data = bytearray((partial / "train.images").read_bytes())
        data[3 * 8 * 8 * 4] ^= 1
        (partial / "train.images").write_bytes(data)
    elif fault == "cut off":
        os.truncate(partial / "train.images", 3 * 8 * 8 * 4 + 5)
    elif fault == "torn line":
        journal.write_text(journal.read_text()[:-70])
    elif fault == "another Pillow":
        monkeypatch.setattr(decoded_module, "_WRITER", "pillow 0.1")
    else:
        journal.write_bytes(b"\0\xff nonsense")
    decoded = stopped_after(monkeypatch, 0, None)
    data = load_dataset("cifar10", path=folder, cache_dir=cache)
    first = {"changed byte": 4, "cut off": 4, "torn line": decoded[0], "another Pillow": 0, "nonsense": 0}[fault]
    assert decoded == [*range(first, 20), *range(10)]
    assert torch.equal(images(data), images(expected))
    assert data.std == expected.std


def test_a_signal_stops_decoding_and_the_wait_for_another_process(folder, cache, monkeypatch):
    monkeypatch.setattr(decode_module, "_BLOCK_BYTES", 3 * 8 * 8)
    with Interrupt():
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped, match="decoding stopped by SIGHUP"):
            load_dataset("cifar10", path=folder, cache_dir=cache)
        (partial,) = cached_sets(cache)
        with (
            image_cache.FileLock(cache / f"{partial.stem}.lock"),
            pytest.raises(Stopped, match="waiting for another process's decoding stopped by SIGHUP"),
        ):
            load_dataset("cifar10", path=folder, cache_dir=cache)
    assert len(load_dataset("cifar10", path=folder, cache_dir=cache).train) == 20


def test_a_cache_folder_in_the_home_directory(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SSL_BENCH_CACHE", "~/images")
    load_dataset("cifar10", path=folder)
    load_dataset("cifar10", path=folder, size=4, cache_dir="~/images")
    assert len(cached_sets(tmp_path / "home" / "images")) == 2
