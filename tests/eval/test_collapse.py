"""What counts as collapsed: one point or one direction, and nothing that an untrained network does."""

import math

import pytest
import torch

from ssl_bench.eval.collapse import collapsed, spread
from ssl_bench.models.backbone import create_backbone


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_even_embeddings_have_a_std_of_one_over_root_d_and_full_rank() -> None:
    found = spread(randn(4000, 16))
    assert found["z_std"] == pytest.approx(1 / math.sqrt(16), rel=0.02)
    assert found["effective_rank"] == pytest.approx(16, rel=0.02)
    assert (found["dimensions"], found["n_images"]) == (16, 4000)
    assert not collapsed(found)


def test_one_point_and_one_direction_are_a_collapse() -> None:
    point = spread(randn(1, 64) + 1e-4 * randn(500, 64, seed=1))
    assert point["effective_rank"] > 50  # of noise: the spread tells it
    assert collapsed(point)
    line = spread(randn(500, 1) @ randn(1, 64, seed=1))
    assert line["z_std"] * 8 > 0.5  # both ends of a line are far apart: the rank tells it
    assert collapsed(line)
    assert collapsed(spread(torch.zeros(10, 4)))


def test_an_untrained_network_and_numbers_that_are_not_finite_are_no_collapse() -> None:
    backbone, _ = create_backbone("resnet18", stem="imagenet")
    with torch.no_grad():
        z = backbone.eval()(randn(40, 3, 32, 32))
    assert not collapsed(spread(z))
    lost = spread(torch.full((4, 3), float("nan")))
    assert math.isnan(lost["z_std"])
    assert not collapsed(lost)
