"""Resident and streaming sources: the same bytes in the same order, and the memory that decides between them."""

import itertools
import threading
from pathlib import Path

import psutil
import pytest
import torch
from made_data import parquet_set

from ssl_bench.data import dataset as data_module
from ssl_bench.data.dataset import load_dataset
from ssl_bench.data.sources import ResidentSource, StreamingSource
from ssl_bench.runtime import memory
from ssl_bench.runtime.memory import available_memory, cgroup_limit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parquet_set(tmp_path / "set", n_train=40)
    return tmp_path / "set"


def some_indices(n: int) -> list[torch.Tensor]:
    """Batches of several lengths, one with a repeated index, one of a single image."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return [order[:16], torch.tensor([3, 3, 0, 39, 3]), order[16:], order[5:6]]


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_the_resident_ones(folder, workers):
    resident = load_dataset("cifar10", path=folder, resident=True)
    streaming = load_dataset("cifar10", path=folder, resident=False, workers=workers)
    assert isinstance(resident.train, ResidentSource)
    assert isinstance(streaming.train, StreamingSource)
    assert streaming.train.image_shape == resident.train.image_shape == (3, 8, 8)
    assert torch.equal(streaming.train.labels, resident.train.labels)
    images, indices = resident.train.images, some_indices(40)
    for _ in range(2):  # the second pass reuses the workers
        for source in (resident.train, streaming.train):
            batches = list(source.batches(iter(indices)))
            assert len(batches) == len(indices)
            assert all(torch.equal(batch, images[index]) for batch, index in zip(batches, indices, strict=True))


def test_reading_ahead_needs_no_processes_no_shared_memory_and_leaves_no_threads(folder):
    """A container's /dev/shm holds 64 MB, less than a batch of 512 images at 224 pixels."""
    source = load_dataset("cifar10", path=folder, resident=False, workers=2).train
    before, threads = psutil.Process().children(), threading.active_count()
    batches = source.batches(iter(some_indices(40) * 3))
    first = next(batches)
    assert psutil.Process().children() == before
    assert not first.is_shared()
    assert threads < threading.active_count() <= threads + 2
    list(batches)
    assert threading.active_count() == threads
    abandoned = source.batches(torch.tensor([0]) for _ in itertools.count())
    next(abandoned)
    abandoned.close()
    assert threading.active_count() == threads


def test_a_set_in_memory_streams_too():
    resident, streaming = (load_dataset("digits", resident=resident).test for resident in (True, False))
    indices = [torch.tensor([300, 1]), torch.tensor([7])]
    for one, other in zip(resident.batches(indices), streaming.batches(indices), strict=True):
        assert torch.equal(one, other)


def test_passes_may_be_endless_abandoned_and_interleaved(folder):
    """A training run reads on while an evaluation in its middle reads the same source."""
    source = load_dataset("cifar10", path=folder, resident=False).train
    images = load_dataset("cifar10", path=folder, resident=True).train.images
    endless = source.batches(torch.tensor([step % 40, (step + 1) % 40]) for step in itertools.count())
    assert torch.equal(next(endless), images[[0, 1]])
    evaluation = [batch.clone() for batch in source.batches(torch.arange(40).split(9))]
    assert torch.equal(torch.cat(evaluation), images)
    assert torch.equal(next(endless), images[[1, 2]])
    endless.close()
    assert torch.equal(torch.cat(list(source.batches(torch.arange(40).split(7)))), images)


def test_streaming_leaves_the_global_generator_alone(folder):
    source = load_dataset("cifar10", path=folder, resident=False).train
    before = torch.get_rng_state()
    for _ in range(2):
        list(source.batches([torch.tensor([1])]))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_index_outside_the_split_is_an_error(folder):
    for resident in (True, False):
        source = load_dataset("cifar10", path=folder, resident=resident, workers=0).train
        with pytest.raises(IndexError):
            list(source.batches([torch.tensor([40])]))


def test_auto_streams_what_takes_more_than_half_of_the_memory(folder, monkeypatch):
    n_bytes = (40 + 10) * 3 * 8 * 8
    for free, kind in ((2 * n_bytes, ResidentSource), (2 * n_bytes - 1, StreamingSource)):
        monkeypatch.setattr(data_module, "available_memory", lambda free=free: free)
        data = load_dataset("cifar10", path=folder)
        assert type(data.train) is type(data.test) is kind
        assert isinstance(load_dataset("cifar10", path=folder, resident=True).train, ResidentSource)
        assert isinstance(load_dataset("cifar10", path=folder, resident=False).train, StreamingSource)


def test_moving_keeps_the_images(folder):
    for resident in (True, False):
        data = load_dataset("cifar10", path=folder, resident=resident)
        moved = data.to("cpu")
        (one,), (other,) = (part.train.batches([torch.tensor([4])]) for part in (moved, data))
        assert torch.equal(one, other)
        assert (moved.mean, len(moved.test)) == (data.mean, 10)


def test_the_tightest_memory_limit_of_the_control_groups_counts(tmp_path):
    inside = tmp_path / "fs" / "slurm" / "job"
    inside.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=systemd:/elsewhere\n0::/slurm/job\n")
    assert cgroup_limit(tmp_path / "fs", membership) is None
    (inside / "memory.max").write_text("max\n")
    (inside.parent / "memory.max").write_text("4096\n")
    assert cgroup_limit(tmp_path / "fs", membership) == 4096
    (inside / "memory.max").write_text("1024\n")
    assert cgroup_limit(tmp_path / "fs", membership) == 1024
    assert cgroup_limit(tmp_path / "fs", tmp_path / "no such file") is None


def test_available_memory_respects_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_limit", lambda: None)
    assert 0 < available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 4096)
    assert available_memory() == 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu(folder, monkeypatch):
    images = load_dataset("cifar10", path=folder, resident=True).train.images
    indices = some_indices(40)
    for resident, kind in ((True, ResidentSource), (False, StreamingSource), ("auto", ResidentSource)):
        source = load_dataset("cifar10", path=folder, resident=resident).train.to("cuda")
        assert isinstance(source, kind)
        batches = list(source.batches(indices))
        assert all(batch.is_cuda for batch in batches)
        assert all(torch.equal(batch.cpu(), images[index]) for batch, index in zip(batches, indices, strict=True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (images.numel(), 0))
    assert isinstance(load_dataset("cifar10", path=folder).train.to("cuda"), StreamingSource)
    assert isinstance(load_dataset("cifar10", path=folder, resident=True).train.to("cuda"), ResidentSource)
