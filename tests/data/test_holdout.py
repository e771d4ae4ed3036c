"""A held-out part of the train set: fixed, stratified, disjoint from what is trained on."""

import pytest
import torch

from ssl_bench.data.dataset import hold_out, holdout_indices, load_dataset


def test_split_is_stratified_disjoint_and_complete():
    labels = torch.arange(300) % 3
    kept, held = holdout_indices(labels, 0.1)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(300))
    assert torch.equal(labels[held].bincount(), torch.tensor([10, 10, 10]))
    assert all(torch.equal(a, b) for a, b in zip((kept, held), holdout_indices(labels, 0.1), strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"data\.holdout must be between 0 and 1, got"):
        holdout_indices(torch.zeros(4, dtype=torch.int64), fraction)


def test_held_out_images_are_train_images_and_no_test_image_is_read():
    whole = load_dataset("digits")
    part = hold_out(whole, 0.1).to("cpu")
    kept, held = holdout_indices(whole.train.labels, 0.1)
    assert (len(part.train), len(part.test)) == (len(kept), len(held))
    assert torch.equal(part.test.labels, whole.train.labels[held])
    rows = [torch.tensor([0, 5]), torch.tensor([3])]
    for ours, theirs in zip(part.test.batches(rows), whole.train.batches(held[r] for r in rows), strict=True):
        assert torch.equal(ours, theirs)
