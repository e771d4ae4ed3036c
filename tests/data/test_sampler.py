"""The sampler and its randomness are pure functions of (seed, step), whole epochs are permutations."""

import pytest
import torch

from ssl_bench.augment.views import Labels, Normalize
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.data.sampler import batch_indices, local_positions, span, steps_per_epoch
from ssl_bench.data.sources import ResidentSource, Source, StreamingSource
from ssl_bench.runtime.seeds import derive_seed, generator


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (7, 5), (50, 49)])
def test_every_epoch_is_a_permutation_and_no_batch_is_short(size, batch):
    steps = 3 * size
    batches = [batch_indices(seed=1, step=step, batch_size=batch, size=size) for step in range(steps)]
    assert all(len(indices) == batch for indices in batches)
    stream = torch.cat(batches)
    for epoch in range(steps * batch // size):
        assert torch.equal(stream[epoch * size : (epoch + 1) * size].sort().values, torch.arange(size))


def test_a_step_does_not_depend_on_the_steps_before():
    late = batch_indices(3, 17, 6, 20)
    for step in range(17):
        batch_indices(3, step, 6, 20)
    assert torch.equal(batch_indices(3, 17, 6, 20), late)


def test_seeds_and_epochs_give_different_orders():
    first = batch_indices(0, 0, 64, 64)
    assert not torch.equal(first, batch_indices(1, 0, 64, 64))
    assert not torch.equal(first, batch_indices(0, 1, 64, 64))


def test_neighbouring_seeds_streams_and_indices_do_not_share_a_generator():
    seeds = {derive_seed(seed, stream, index) for seed in range(20) for stream in range(8) for index in range(20)}
    assert len(seeds) == 20 * 8 * 20
    means = torch.stack([torch.rand(1000, generator=generator(seed, 1, 0)).mean() for seed in range(200)])
    # 200 independent means of 1,000 uniform numbers: their spread is 1 / sqrt(12,000), to a few percent.
    assert means.std().item() == pytest.approx((1 / 12_000) ** 0.5, rel=0.2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [12, 24, 48])
def test_processes_share_every_chunk_without_overlap(world_size, chunk):
    ranks = [local_positions(48, chunk, rank, world_size) for rank in range(world_size)]
    assert all(len(slices) == 48 // chunk for slices in ranks)
    for number in range(48 // chunk):
        seen = [position for slices in ranks for position in range(48)[slices[number]]]
        assert sorted(seen) == list(range(number * chunk, (number + 1) * chunk))


@pytest.mark.parametrize(("size", "batch", "steps"), [(10, 4, 3), (10, 9, 2), (10, 10, 1), (12, 4, 3)])
def test_short_last_batches_make_every_epoch_a_permutation_of_its_own(size, batch, steps):
    assert steps_per_epoch(batch, size, "short") == steps
    for epoch in range(3):
        parts = [batch_indices(1, epoch * steps + k, batch, size, "short") for k in range(steps)]
        assert [len(part) for part in parts[:-1]] == [batch] * (steps - 1)
        assert len(parts[-1]) == size - batch * (steps - 1)
        # The chain of epochs is the same one; only where it is cut differs.
        chain = batch_indices(1, epoch, size, size)
        assert torch.equal(torch.cat(parts), chain)
        assert torch.equal(chain.sort().values, torch.arange(size))


@pytest.mark.parametrize("last_batch", ["carry", "short"])
def test_steps_take_the_chain_of_epochs_place_by_place(last_batch):
    places = [span(step, 4, 10, last_batch) for step in range(12)]
    assert [place for part in places for place in part] == list(range(places[-1].stop))
    assert steps_per_epoch(4, 10) == 2.5


def test_where_the_batch_size_divides_the_epoch_no_batch_is_short():
    for step in range(8):
        assert torch.equal(batch_indices(5, step, 4, 12, "short"), batch_indices(5, step, 4, 12))


def numbered(size: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are their own index, and labels that are it too."""
    index = torch.arange(size)
    return index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), index


def pipeline(source: Source, *, rank: int = 0, world_size: int = 1, chunk_size: int | None = None) -> Pipeline:
    return Pipeline(
        source, [Normalize((0.0,) * 3, (1 / 255,) * 3), Labels()], seed=3, batch_size=8, chunk_size=chunk_size,
        rank=rank, world_size=world_size, device=torch.device("cpu"), last_batch="short",
    )  # fmt: skip


@pytest.mark.parametrize(("world_size", "chunk_size"), [(1, None), (2, None), (1, 4)])
def test_processes_and_chunks_share_a_short_batch_evenly(world_size, chunk_size):
    """22 images in batches of 8, 8 and 6."""
    source = ResidentSource(*numbered())
    ranks = [pipeline(source, rank=rank, world_size=world_size, chunk_size=chunk_size) for rank in range(world_size)]
    for step, batches in enumerate(zip(*(one.batches(0, 7) for one in ranks), strict=True)):
        expected = batch_indices(3, step, 8, 22, "short")
        assert len(expected) == (6 if step % 3 == 2 else 8)
        seen = []
        for chunk in range(ranks[0].n_chunks):
            for batch in batches:
                images, labels = batch.views(chunk)
                assert len(labels) == len(expected) // (world_size * ranks[0].n_chunks)
                assert torch.equal(images[:, 0, 0, 0].round().long(), labels)
                seen += labels.tolist()
        assert seen == expected.tolist()
    assert [ranks[0].samples(steps) for steps in range(5)] == [0, 8, 16, 22, 30]
    assert ranks[0].steps_per_epoch == 3


def test_short_batches_are_the_same_from_any_step_on_and_when_streamed():
    images, labels = numbered()
    whole = [batch.views(0)[1] for batch in pipeline(ResidentSource(images, labels)).batches(0, 7)]
    for start in (1, 2, 5):
        late = [batch.views(0)[1] for batch in pipeline(StreamingSource(images, labels, workers=0)).batches(start, 7)]
        assert all(torch.equal(a, b) for a, b in zip(late, whole[start:], strict=True))


@pytest.mark.parametrize(("world_size", "chunk_size", "parts"), [(4, None, "1 chunks x 4"), (1, 2, "4 chunks x 1")])
def test_a_short_batch_that_cannot_be_shared_evenly_is_refused(world_size, chunk_size, parts):
    source = ResidentSource(*numbered())
    message = rf"last_batch must be carry, got short: the last 6 of 22 images do not divide by {parts} proc"
    with pytest.raises(ValueError, match=message):
        pipeline(source, world_size=world_size, chunk_size=chunk_size)


@pytest.mark.parametrize(("size", "world_size", "chunk_size"), [(17, 1, None), (18, 2, None), (18, 1, 4)])
def test_a_short_batch_of_single_images_is_refused(size, world_size, chunk_size):
    """Batch norm would raise at the end of the first epoch."""
    with pytest.raises(ValueError, match=r"last_batch must be carry, got short: .*one at a time"):
        pipeline(ResidentSource(*numbered(size)), world_size=world_size, chunk_size=chunk_size)
