"""Geometry, each sample with its own parameters: random resized crops, rotations and Gaussian blur.

Crop, resize and flip are linear and separable, so they are two matrix products per sample, ``Wy @ X @ Wx.T``, with a
flip folded into Wx. So is the blur. Dense products are the fastest way to do this on CPUs and on GPUs alike: batched
matrix products run near the peak where gathers do not. (On a GPU they follow torch's setting of TF32, which costs up to
0.1 of a grey level.)
"""

from collections.abc import Mapping

import numpy as np
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


def crop_boxes(params: Mapping[str, Tensor], height: int, width: int, ratio: tuple[float, float]) -> Tensor:
    """The crops in pixels, distributed as torchvision's ``RandomResizedCrop.get_params``.

    A sample takes the first of its tries that fits into the image; where none does, the largest central crop whose
    aspect ratio is within ``ratio``.

    Returns:
        (n, 4) float32 whole numbers: top, left, height, width.
    """
    # NumPy: the same float32 arithmetic at half the cost of a call, of which a GPU's host pays many at every step.
    area, aspect = params["crop_area"].numpy() * np.float32(height * width), params["crop_ratio"].numpy()
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (n, TRIES)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    rows, first = np.arange(len(fits)), fits.argmax(1)
    size = np.stack([heights[rows, first], widths[rows, first]], 1)  # (n, 2)
    room = np.array([height, width], np.float32) - size + 1
    corner = np.floor(params["crop_position"].numpy() * room)

    # the fallback, as torchvision computes it
    central = (height, width)
    if width / height < ratio[0]:
        central = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        central = (height, round(height * ratio[1]))
    fallback = np.array([(height - central[0]) // 2, (width - central[1]) // 2, *central], np.float32)
    found = np.concatenate([corner, size], 1)
    found[~fits[rows, first]] = fallback
    return torch.from_numpy(found)


def _axis(start: Tensor, length: Tensor, flip: Tensor | None, source: int, size: int) -> tuple[Tensor, Tensor]:
    """Where an axis' input and output pixels lie, in units of the resampling filter's width: (n, source), (n, size).

    Pixels outside the crop are put beyond the filter's reach, so that the crop's edges are treated as an image's.
    """
    start, length = start[:, None], length[:, None]
    scale = length / size
    shrink = 1 / scale.clamp(min=1)  # the filter widens where the crop shrinks (antialias)
    pixel = torch.arange(source, device=start.device) + 0.5 - start  # relative to the crop
    inputs = (pixel * shrink).masked_fill_((pixel < 0) | (pixel > length), _OUTSIDE)
    output = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        output = output + flip[:, None] * (size - 2 * output)
    return inputs, output * (scale * shrink)


def _weights(inputs: Tensor, outputs: Tensor, kind: str) -> Tensor:
    """(n, source), (n, size) -> (n, size, source) resampling matrices, rows summing to 1.

    The bicubic filter (a = -0.5, PIL's and that of antialias) is written in truncated powers of u = (2 - d)+ and
    v = (1 - d)+: f = u^2 (u - 1) / 2 + v^2 (1 - 2 v) needs no branch. The division by 2 is left to the normalisation.
    """
    distance = (inputs[:, None, :] - outputs[:, :, None]).abs_()
    if kind == "bilinear":
        weights = distance.neg_().add_(1).clamp_(min=0)
    else:
        u = distance.neg_().add_(2).clamp_(min=0)
        u_1 = u - 1
        v = u_1.clamp(min=0)
        inner = torch.rsub(v, 2, alpha=4)
        weights = u.mul_(u).mul_(u_1).addcmul_(inner, v.mul_(v))
    return weights.div_(weights.sum(2, keepdim=True))


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int, kind: str) -> Tensor:
    """Crops, resizes and flips: torchvision's ``resized_crop(antialias=True)``, then ``horizontal_flip``.

    Args:
        images: (n, 3, H, W) uint8.
        boxes: (n, 4) top, left, height, width of each crop, as from `crop_boxes`, on the images' device.
        flip: (n,) float, 1 or 0.
        size: pixels of the output's sides.
        kind: "bicubic" or "bilinear".

    Returns:
        (3, n, size, size) float32 in [0, 1]: a bicubic's overshoot is clamped, as torchvision does for uint8 images.
    """
    n, _, height, width = images.shape
    top, left, crop_height, crop_width = boxes.unbind(1)
    wy = _weights(*_axis(top, crop_height, None, height, size), kind).div_(255)  # uint8 -> [0, 1] costs little here
    wx = _weights(*_axis(left, crop_width, flip, width, size), kind).transpose(1, 2)
    planes = torch.empty((3, n, height, width), device=images.device).copy_(images.transpose(0, 1))
    output = torch.empty((3, n, size, size), device=images.device)
    for plane, result in zip(planes, output, strict=True):
        torch.bmm(torch.bmm(wy, plane), wx, out=result)
    return output.clamp_(0, 1)


def tap_matrices(size: int, kernel: int) -> Tensor:
    """How often a tap at each distance from the centre falls on each pixel, with reflected borders.

    Args:
        size: pixels of the axis.
        kernel: taps, odd, < 2 size.

    Returns:
        (kernel // 2 + 1, size * size) float32: for each distance a (target, source) matrix.
    """
    radius = kernel // 2
    taps = torch.arange(-radius, radius + 1)
    source = (torch.arange(size)[:, None] + taps).abs()  # (size, kernel)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    target = torch.arange(size)[:, None].expand_as(source)
    counts = torch.zeros(radius + 1, size, size)
    counts.index_put_((taps.abs().expand_as(source), target, source), torch.ones(source.shape), accumulate=True)
    return counts.view(radius + 1, size * size)


def gaussian_blur(planes: Tensor, sigma: Tensor, taps: Tensor) -> Tensor:
    """Blurs each sample with its own sigma, in place: torchvision's ``gaussian_blur``.

    Args:
        planes: (3, n, S, S) float32, contiguous.
        sigma: (n, 1) standard deviation in pixels, > 0.
        taps: the matrices of `tap_matrices` for S and the kernel's size, on the planes' device.
    """
    _, n, size, _ = planes.shape
    distance = torch.arange(len(taps), device=planes.device)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)  # (n, radius + 1)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    matrix = (weights @ taps).view(n, size, size)
    for plane in planes:
        torch.bmm(torch.bmm(matrix, plane), matrix.transpose(1, 2), out=plane)
    return planes


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
