"""The queue holds the last rows that it was given, whatever its size and the order in which they came."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.methods.parts.memory_queue import Queue


def batch(n: int, seed: int, dim: int = 3) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def in_order(z: Tensor) -> list[list[float]]:
    """The rows in the order in which the queue takes them."""
    return sorted(z.tolist())


@pytest.mark.parametrize(
    "size", [4, 8, 10, 11, 12, 100]
)  # one batch, batches that do and do not fit, one that is never full
def test_rows_and_pointer_are_those_of_a_ring_written_row_by_row(size):
    torch.manual_seed(0)
    queue = Queue(size, 3)
    ring, at = queue.rows.tolist(), 0
    for step in range(9):
        queue.enqueue(batch(4, step))
        for row in in_order(batch(4, step)):
            ring[at] = row
            at = (at + 1) % size
        assert queue.rows.tolist() == ring
        assert int(queue.pointer) == at


def test_the_order_of_the_rows_does_not_matter():
    queues = []
    for flip in (False, True):
        torch.manual_seed(0)
        queue = Queue(10, 3)
        for step in range(4):
            rows = batch(4, step)
            queue.enqueue(rows.flip(0) if flip else rows)
        queues.append(queue.state_dict())
    assert queues[0].keys() == queues[1].keys() == {"rows", "pointer"}
    assert all(torch.equal(queues[0][name], queues[1][name]) for name in queues[0])


def test_of_a_batch_that_is_larger_evenly_many_rows_are_kept():
    queue = Queue(3, 3)
    queue.enqueue(batch(7, 0))
    assert queue.rows.tolist() == [in_order(batch(7, 0))[index] for index in (0, 2, 4)]
    assert int(queue.pointer) == 0


def test_it_starts_with_random_rows_of_length_one_and_is_written_in_place():
    queue = Queue(50, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    assert queue.rows.std(dim=0).min() > 0.2
    places = [buffer.data_ptr() for buffer in queue.buffers()]
    z = batch(4, 0, 8).requires_grad_()
    queue.enqueue(z)
    assert [buffer.data_ptr() for buffer in queue.buffers()] == places
    assert not queue.rows.requires_grad


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^queue must be > 0, got 0$"):
        Queue(0, 3)
