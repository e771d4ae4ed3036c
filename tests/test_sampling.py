"""The sampler and its randomness are pure functions of (seed, step), whole epochs are permutations."""

import pytest
import torch

from ssl_bench.sampling import batch_indices, derive_seed, generator, local_positions


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
