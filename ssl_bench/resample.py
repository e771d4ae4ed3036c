"""Geometry, each sample with its own parameters: random resized crops, rotations and Gaussian blur.

Crop, resize and flip are linear and separable, so they are two matrix products per sample, ``Wy @ X @ Wx.T``, with a
flip folded into Wx. So is the blur. Dense products are the fastest way to do this on CPUs and on GPUs alike: batched
matrix products run near the peak where gathers do not.
"""

from functools import lru_cache

import torch
from torch import Tensor

Params = dict[str, Tensor]

TRIES = 10  # torchvision's RandomResizedCrop tries this often before it takes a central crop
_OUTSIDE = 1e6  # a distance beyond every filter's support


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Float32 samples of U[low, high)."""
    return torch.rand(shape, generator=generator).mul_(high - low).add_(low)


def draw_crops(
    n: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float, generator: torch.Generator
) -> Params:
    """Draws random resized crops and flips; `crop_boxes` makes pixels of them once the images' size is known.

    Args:
        n: the number of samples.
        scale: the crop's share of the image's area, drawn uniformly.
        ratio: width / height of the crop, drawn log-uniformly.
        flip: the probability of a horizontal flip.
        generator: the CPU generator to draw from.
    """
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    return {
        "crop_area": uniform((n, TRIES), *scale, generator),
        "crop_ratio": uniform((n, TRIES), low, high, generator).exp_(),
        "crop_position": torch.rand((n, 2), generator=generator),
        "flip": torch.rand(n, generator=generator) < flip,
    }


def crop_boxes(params: Params, height: int, width: int, ratio: tuple[float, float]) -> Tensor:
    """The crops in pixels, distributed as torchvision's ``RandomResizedCrop.get_params``.

    A sample takes the first of its tries that fits into the image; where none does, the largest central crop whose
    aspect ratio is within ``ratio``.

    Returns:
        (n, 4) float32 whole numbers: top, left, height, width.
    """
    area, aspect = params["crop_area"] * (height * width), params["crop_ratio"]
    widths, heights = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()  # (n, TRIES)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    size = torch.cat([heights.gather(1, first), widths.gather(1, first)], 1)  # (n, 2)
    room = torch.tensor([height, width]) - size + 1
    corner = (params["crop_position"] * room).floor_()

    # the fallback, as torchvision computes it
    central = (height, width)
    if width / height < ratio[0]:
        central = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        central = (height, round(height * ratio[1]))
    fallback = torch.tensor([(height - central[0]) // 2, (width - central[1]) // 2, *central], dtype=torch.float32)
    return torch.where(fits.any(1, keepdim=True), torch.cat([corner, size], 1), fallback)


def _filter(distance: Tensor, interpolation: str) -> Tensor:
    """The resampling filter at distances >= 0 (in place): bilinear, or bicubic with a = -0.5 (PIL, antialias).

    The cubic is written in truncated powers of u = (2 - d)+ and v = (1 - d)+, f = u^2 (u - 1) / 2 + v^2 (1 - 2 v),
    which needs no branch. The factor of 2 that is left out goes with the normalisation of the weights.
    """
    if interpolation == "bilinear":
        return distance.neg_().add_(1).clamp_(min=0)
    u = distance.neg_().add_(2).clamp_(min=0)
    u_1 = u - 1
    v = u_1.clamp(min=0)
    inner = torch.rsub(v, 2, alpha=4).mul_(v).mul_(v)
    return u.mul_(u).mul_(u_1).add_(inner)


def resize_weights(start: Tensor, length: Tensor, flip: Tensor | None, source: int, size: int, kind: str) -> Tensor:
    """The matrices that resize one axis of a crop, antialiased as torchvision's and PIL's.

    Args:
        start: (n,) first pixel of the crop.
        length: (n,) pixels of the crop, >= 1. Pixels outside the crop have no weight: its edges count as an image's.
        flip: (n,) float, 1 to reverse the output and 0 not to; None for no flip at all.
        source: pixels of the whole axis.
        size: pixels of the output.
        kind: "bicubic" or "bilinear".

    Returns:
        (n, size, source), rows summing to 1.
    """
    start, length = start[:, None], length[:, None]
    scale = length / size
    shrink = 1 / scale.clamp(min=1)  # the filter widens where the crop shrinks
    pixel = torch.arange(source, device=start.device) + 0.5 - start  # (n, source), relative to the crop
    position = pixel * shrink
    position.masked_fill_((pixel < 0) | (pixel > length), _OUTSIDE)
    output = torch.arange(size, device=start.device) + 0.5  # (size,)
    if flip is not None:
        output = output + flip[:, None] * (size - 2 * output)
    centre = output * (scale * shrink)  # (n, size)
    weights = _filter((position[:, None, :] - centre[:, :, None]).abs_(), kind)
    return weights.div_(weights.sum(2, keepdim=True))


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int, kind: str) -> Tensor:
    """Crops, resizes and flips: torchvision's ``resized_crop(antialias=True)``, then ``horizontal_flip``.

    Args:
        images: (n, 3, H, W) uint8.
        boxes: (n, 4) float, top, left, height, width.
        flip: (n,) float, 1 or 0.
        size: pixels of the output's sides.
        kind: "bicubic" or "bilinear".

    Returns:
        (n, 3, size, size) float32 in [0, 1], contiguous: a bicubic's overshoot is clamped, as uint8 images' is.
    """
    n, _, height, width = images.shape
    top, left, crop_height, crop_width = boxes.unbind(1)
    wy = resize_weights(top, crop_height, None, height, size, kind).div_(255)  # uint8 -> [0, 1] costs nothing here
    wx = resize_weights(left, crop_width, flip, width, size, kind)
    # Rows of all three channels side by side make both products batched ones without a further copy.
    rows = torch.empty((n, height, 3, width), device=images.device)
    rows.copy_(images.permute(0, 2, 1, 3))
    rows = torch.bmm(wy, rows.view(n, height, 3 * width))  # (n, size, 3 * W)
    rows = torch.bmm(rows.view(n, size * 3, width), wx.transpose(1, 2))  # (n, size * 3, size)
    output = torch.empty((n, 3, size, size), device=images.device)
    return torch.clamp(rows.view(n, size, 3, size).permute(0, 2, 1, 3), 0, 1, out=output)


@lru_cache(maxsize=8)
def _tap_matrices(size: int, radius: int, device: torch.device) -> Tensor:
    """(radius + 1, size * size): how often a tap at each distance falls on each pixel, with reflected borders."""
    taps = torch.arange(-radius, radius + 1)
    source = (torch.arange(size)[:, None] + taps).abs()  # (size, 2 * radius + 1)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    counts = torch.zeros(radius + 1, size, size)
    target = torch.arange(size)[:, None].expand_as(source)
    counts.index_put_((taps.abs().expand_as(source), target, source), torch.ones(source.shape), accumulate=True)
    return counts.view(radius + 1, size * size).to(device)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blurs each sample with its own sigma: torchvision's ``gaussian_blur``.

    Args:
        images: (n, 3, S, S) float.
        sigma: (n,) standard deviation in pixels, > 0.
        kernel: taps, odd, < 2 S.

    Returns:
        (n, 3, S, S) float32, a view with rows of all channels side by side in memory.
    """
    n, _, size, _ = images.shape
    radius = kernel // 2
    distance = torch.arange(radius + 1, device=images.device)
    taps = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (n, radius + 1)
    taps = taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])
    matrix = (taps @ _tap_matrices(size, radius, images.device)).view(n, size, size)
    rows = torch.bmm(images.reshape(n, 3 * size, size), matrix.transpose(1, 2))  # along x
    rows = rows.view(n, 3, size, size).permute(0, 2, 1, 3).reshape(n, size, 3 * size)
    return torch.bmm(matrix, rows).view(n, size, 3, size).permute(0, 2, 1, 3)  # along y


def shifted_rotation(images: Tensor, shift: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
    """Shifts, flips, then rotates, each pixel from its nearest one: torchvision's crop of a zero-padded image,
    ``horizontal_flip`` and ``rotate(NEAREST)``, in one gather.

    Args:
        images: (n, 3, H, W) uint8.
        shift: (n, 2) float whole numbers, how many pixels (down, right) the crop lies from the image.
        flip: (n,) float, 1 or 0.
        angle: (n,) degrees, counter-clockwise.

    Returns:
        (n, 3, H, W) uint8; pixels from outside the image are 0.
    """
    n, _, height, width = images.shape
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    y = torch.arange(height, device=images.device)[:, None] + (0.5 - height / 2)
    radians = torch.deg2rad(angle)[:, None, None]
    cos, sin = radians.cos(), radians.sin()
    column = (cos * x - sin * y).add_(width / 2 - 0.5).round_()  # (n, H, W), of the crop
    row = (sin * x + cos * y).add_(height / 2 - 0.5).round_()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column += flip[:, None, None] * (width - 1 - 2 * column)
    column += shift[:, 1, None, None]
    row += shift[:, 0, None, None]
    inside &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row * width + column).mul_(inside).long().view(n, 1, height * width)
    pixels = images.reshape(n, 3, -1).gather(2, index.expand(-1, 3, -1)).view(images.shape)
    return pixels.mul_(inside[:, None])
