"""Geometry: every operation equals torchvision's with the same parameters, and the crops its distribution."""

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from ssl_bench.augment.resample import (
    crop_boxes,
    draw_crops,
    gaussian_blur,
    shifted_rotation,
    tap_matrices,
)
from ssl_bench.augment.resample import crop_resize as resize_planes

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.manual_seed(seed))


def crop_resize(x: Tensor, box: Tensor, flip: Tensor, size: int, kind: str) -> Tensor:
    return resize_planes(x, box, flip, size, kind).transpose(0, 1)


def boxes(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    params = draw_crops(n, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, torch.Generator().manual_seed(1))
    return crop_boxes(params, height, width, (3 / 4, 4 / 3)), params["flip"]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 28, 16), (24, 24, 56), (9, 7, 2)])
def test_crop_resize_equals_torchvision(height: int, width: int, size: int, kind: str) -> None:
    x = images(24, height, width)
    box, flip = boxes(24, height, width)
    box[0] = torch.tensor([0, 0, height, width])
    box[1] = torch.tensor([height - 1, width - 2, 1, 2])  # a crop of a single row, in the corner
    ours = crop_resize(x, box, flip, size, kind)
    for i in range(len(x)):
        top, left, h, w = box[i].int().tolist()
        theirs = F.resized_crop(x[i].float(), top, left, h, w, [size, size], MODES[kind], antialias=True)
        theirs = F.horizontal_flip(theirs) if flip[i] else theirs
        torch.testing.assert_close(ours[i], theirs.clamp(0, 255) / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_crop_resize_is_within_rounding_of_torchvision_on_uint8(kind: str) -> None:
    # Mid-grey images: on uint8, torchvision also clamps an overshoot between the two axes.
    x = images(24, 32, 32) // 3 + 85
    box, _ = boxes(24, 32, 32)
    ours = crop_resize(x, box, torch.zeros(24, dtype=torch.bool), 32, kind) * 255
    for i in range(len(x)):
        theirs = F.resized_crop(x[i], *box[i].int().tolist(), [32, 32], MODES[kind], antialias=True)
        torch.testing.assert_close(ours[i], theirs.float(), rtol=0, atol=1.5)


def test_identity_crop_returns_the_image() -> None:
    x = images(2, 16, 16)
    ours = crop_resize(x, torch.tensor([[0.0, 0, 16, 16]] * 2), torch.tensor([False, True]), 16, "bicubic")
    torch.testing.assert_close(ours[0], x[0] / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], x[1].flip(2) / 255, rtol=0, atol=1e-6)


def test_crops_never_see_beyond_their_edges() -> None:
    x = images(2, 20, 20)
    x[1, :, 5:11, 3:15] = x[0, :, 5:11, 3:15]  # two images that agree within the crop alone
    box = torch.tensor([[5.0, 3.0, 6.0, 12.0]] * 2)
    ours = crop_resize(x, box, torch.tensor([False, False]), 8, "bicubic")
    assert torch.equal(ours[0], ours[1])


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 64, (0.6, 1.0), (3 / 4, 4 / 3)),  # no try can fit: the central crop
        (24, 36, (0.5, 1.0), (3 / 4, 4 / 3)),  # some samples fall back
        (64, 20, (0.5, 1.0), (0.5, 2.0)),
    ],
)
def test_crops_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    n = 4000
    ours = crop_boxes(draw_crops(n, scale, ratio, 0.5, torch.Generator().manual_seed(3)), height, width, ratio)
    theirs_transform = T.RandomResizedCrop(32, scale, ratio)
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        draws = [theirs_transform.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in draws])
    for column in range(4):
        assert ks_2samp(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > 1e-3
    products = [(0, 2), (1, 3), (2, 3)]  # joint moments: position with size, height with width
    for i, j in products:
        p, q = ours[:, i] * ours[:, j], (theirs[:, i] * theirs[:, j]).float()
        assert abs(p.mean() - q.mean()) <= 4 * (p.var() / n + q.var() / n).sqrt() + 1e-3
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (32, 13), (12, 23), (33, 9)])
def test_blur_equals_torchvision(size: int, kernel: int) -> None:
    x = torch.rand(6, 3, size, size, generator=torch.manual_seed(0))
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
    ours = gaussian_blur(x.transpose(0, 1).contiguous(), sigma[:, None], tap_matrices(size, kernel)).transpose(0, 1)
    for i in range(len(x)):
        theirs = F.gaussian_blur(x[i], [kernel, kernel], [sigma[i].item()])
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 27)])
def test_shifted_rotation_equals_torchvision(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(5)
    n, pad = 40, 4
    x = images(n, height, width)
    shift = torch.randint(-pad, pad + 1, (n, 2), generator=generator).float()
    flip = (torch.rand(n, generator=generator) < 0.5).float()
    angle = torch.rand(n, generator=generator) * 30 - 15
    angle[:10] = 0
    angle[10], angle[11] = 180, 100
    ours = shifted_rotation(x, shift, flip, angle)
    different = 0
    for i in range(n):
        top, left = (shift[i].int() + pad).tolist()
        theirs = F.crop(F.pad(x[i], [pad]), top, left, height, width)
        theirs = F.horizontal_flip(theirs) if flip[i] else theirs
        theirs = F.rotate(theirs, angle[i].item(), InterpolationMode.NEAREST)
        differs = (ours[i] != theirs).any(0).sum().item()
        assert differs == 0 or angle[i] != 0
        different += differs
    assert different <= 1e-3 * n * height * width  # a point halfway between two pixels may round either way
