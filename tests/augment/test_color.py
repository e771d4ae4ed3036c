"""Colour: every operation equals torchvision's on float images, and the parameters its distribution."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torch import Tensor
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from ssl_bench.augment import color

ATOL = 3e-6  # float32 on [0, 1], a few roundings


def images(n: int = 6, pixels: int = 64) -> Tensor:
    x = torch.rand(n, 3, pixels, generator=torch.manual_seed(0))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # black, white, all pure colours
    x[:, :, :8] = corners.T
    x[:, :, 8:16] = torch.rand(8)  # greys have no hue
    x[:, :, 16:24] = (x[:, :, 16:24] * 4).round() / 4  # ties between channels
    return x.transpose(0, 1).contiguous()


def torchvisions(function: Callable[[Tensor, float], Tensor], planes: Tensor, values: Tensor) -> Tensor:
    """A function of torchvision, one sample at a time, on (3, n, P) planes."""
    samples = [function(planes[:, i, None], value) for i, value in enumerate(values.tolist())]
    return torch.stack([sample[:, 0] for sample in samples], 1)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_blend_equals_torchvision(operation: str) -> None:
    x = images()
    factor = torch.tensor([0.0, 0.3, 0.8, 1.0, 1.4, 2.5])
    number = ["brightness", "contrast", "saturation"].index(operation)
    others = [i for i in range(4) if i != number]
    order = torch.tensor([number, *others]).expand(6, 4)
    params = {"factors": factor[:, None].expand(6, 3), "order": order, "jitter": torch.ones(6, dtype=torch.bool)}
    ours = color.blend(x.clone(), color.blend_coefficients(params)[0][:, 0])
    theirs = torchvisions(getattr(F, f"adjust_{operation}"), x, factor)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_hue_equals_torchvision() -> None:
    shift = torch.tensor([-0.5, -0.1, 0.0, 0.05, 0.4, 0.5])
    x = images()
    ours = color.rotate_hue(x.clone(), shift[:, None])
    theirs = torchvisions(F.adjust_hue, x, shift)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_hue_is_finite_where_channels_nearly_agree() -> None:
    x = torch.full((3, 1, 5), 0.3)
    x[0, 0] += torch.tensor([0, 1e-7, -1e-7, 1e-6, -1e-6])
    before = x.clone()
    torch.testing.assert_close(color.rotate_hue(x, torch.tensor([[0.2]])), before, rtol=0, atol=ATOL)


def test_grey_and_solarize_equal_torchvisions_where_chosen() -> None:
    x = images()
    x[0, 0, 0] = 0.5
    grey = F.rgb_to_grayscale(x, 3)
    torch.testing.assert_close(color.luma(x), grey[0], rtol=0, atol=1e-6)
    chosen = torch.tensor([[1.0], [0.0]] * 3)  # every other sample
    for ours, theirs, atol in (
        (color.to_grey(x.clone(), chosen), grey, 1e-6),
        (color.solarize(x.clone(), chosen, 0.5), F.solarize(x, 0.5), 1e-7),
    ):
        torch.testing.assert_close(ours[:, ::2], theirs[:, ::2], rtol=0, atol=atol)
        assert torch.equal(ours[:, 1::2], x[:, 1::2])


def test_solarize_at_half_inverts_the_values_that_pil_inverts() -> None:
    levels = torch.arange(256) / 255
    assert color.solarize(levels.clone(), torch.ones(()), 0.5).mul(255).round().tolist() == [
        v if v < 128 else 255 - v for v in range(256)
    ]


def test_hue_position_counts_the_operations_before_it() -> None:
    order = torch.tensor([[3, 0, 1, 2], [0, 3, 1, 2], [2, 1, 3, 0], [0, 1, 2, 3], [3, 2, 1, 0]])
    params = {"order": order, "jitter": torch.tensor([True, True, True, True, False])}
    assert color.hue_position(params).tolist() == [0, 1, 2, 3, 4]


def test_blends_fall_on_one_side_of_the_hue() -> None:
    params = color.draw_jitter(200, (0.4, 0.4, 0.2, 0.1), 0.5, torch.Generator().manual_seed(0))
    before, after = color.blend_coefficients(params)
    position, identity = color.hue_position(params), torch.tensor(color.IDENTITY)
    for i in range(200):
        for step in range(3):
            used = before[i, step] if step < position[i] else after[i, step]
            other = after[i, step] if step < position[i] else before[i, step]
            assert torch.equal(other, identity)
            assert torch.equal(used, identity) == (not params["jitter"][i])


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.2, 0.1), (1.5, 0.8, 0.0, 0.5)])
def test_jitter_is_distributed_as_torchvisions(jitter: tuple[float, float, float, float]) -> None:
    n = 4000
    ours = color.draw_jitter(n, jitter, 0.8, torch.Generator().manual_seed(0))
    transform = T.ColorJitter(*jitter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = [transform.make_params([]) for _ in range(n)]
    columns = [*ours["factors"].unbind(1), ours["hue"]]
    for column, name, width in zip(columns, ["brightness", "contrast", "saturation", "hue"], jitter, strict=True):
        if width == 0:  # torchvision leaves the operation out; a factor of 1 does the same
            assert (column == 1).all()
            continue
        values = [draw[f"{name}_factor"] for draw in theirs]
        assert ks_2samp(column.numpy(), values).pvalue > 1e-3
    known = {order: i for i, order in enumerate(permutations(range(4)))}
    counts = torch.bincount(torch.tensor([known[tuple(order)] for order in ours["order"].tolist()]), minlength=24)
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert abs(ours["jitter"].float().mean() - 0.8) < 4 * (0.16 / n) ** 0.5
