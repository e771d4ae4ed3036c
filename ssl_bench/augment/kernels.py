# mypy: disable-error-code="no-untyped-def"
"""`SSLView` and `PadCropFlipRotate` as one kernel each, for GPUs: from an image's bytes to the normalised view.

The plain program of an SSLView makes some 190 passes over a batch, each a kernel of its own that reads and writes all
of it; here an image stays in registers in between. Triton compiles a kernel in some seconds, once for each shape.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_bench.augment import color, resample

MOST = 32  # pixels of an image's sides, before and after: three planes of more do not fit a block's registers
_OUTSIDE, _TINY = tl.constexpr(resample._OUTSIDE), tl.constexpr(color._TINY)
_LUMA_R, _LUMA_G, _LUMA_B = map(tl.constexpr, color.LUMA)


_PIXELS = 1024  # of an image that a block of threads rotates at a time


def fits(size: int, height: int, width: int) -> bool:
    """Whether images of height x width pixels and views of size x size are small enough."""
    return max(size, height, width) <= MOST


def ssl_view(images: Tensor, table: Tensor, *, size: int, view: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What `SSLView` makes of images: crop, resize, flip, colour, blur, solarization, normalisation.

    Args:
        images: (n, 3, H, W) uint8, contiguous, and `fits`.
        table: (n, 27) float32 from `SSLView.table`, on the images' device.
        size: pixels of the view's sides.
        view: the kernel's arguments ``mean_r`` ... and ``scale_r`` ... (1 / std), ``threshold`` (of solarization),
            ``blurs`` (whether any image is blurred), ``radius`` (of the blur's kernel) and ``least`` (the standard
            deviation up to which an image is left as it is).
        dtype: of the result.

    Returns:
        (n, size * size, 3), normalised.
    """
    n, _, height, width = images.shape
    out = torch.empty((n, size * size, 3), dtype=dtype, device=images.device)
    source = max(16, triton.next_power_of_2(max(height, width)))
    target = max(16, triton.next_power_of_2(size))
    _ssl_view[(n,)](images, table, out, height, width, size, source, target, **view, num_warps=8)
    return out


def pad_crop_flip_rotate(images: Tensor, table: Tensor, *, stats: dict[str, float], dtype: torch.dtype) -> Tensor:
    """What `PadCropFlipRotate` makes of images: shift, flip, rotation (each pixel from its nearest), normalisation.

    Args:
        images: (n, 3, H, W) uint8, contiguous.
        table: (n, 4) float32 from `PadCropFlipRotate.table`, on the images' device.
        stats: ``mean_r`` ... and ``scale_r`` ... (1 / std).
        dtype: of the result.

    Returns:
        (n, H * W, 3), normalised.
    """
    n, _, height, width = images.shape
    out = torch.empty((n, height * width, 3), dtype=dtype, device=images.device)
    blocks = triton.cdiv(height * width, _PIXELS)
    _shifted_rotation[(n, blocks)](images, table, out, height, width, **stats, pixels=_PIXELS, num_warps=4)
    return out


@triton.jit
def _nearest(x):
    """The whole number next to x; of two, the even one, as torch rounds."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2 * tl.floor(low * 0.5)
    return low + tl.where(rest == 0.5, odd, (rest > 0.5).to(tl.float32))


@triton.jit
def _shifted_rotation(
    images, table, out, height, width,
    mean_r: tl.constexpr, mean_g: tl.constexpr, mean_b: tl.constexpr,
    scale_r: tl.constexpr, scale_g: tl.constexpr, scale_b: tl.constexpr, pixels: tl.constexpr,
):  # fmt: skip
    """`ssl_bench.augment.resample.shifted_rotation`, normalised."""
    n = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * pixels + tl.arange(0, pixels)
    here = place < height * width
    down, right, flip = tl.load(table + 4 * n), tl.load(table + 4 * n + 1), tl.load(table + 4 * n + 2)
    radians = tl.load(table + 4 * n + 3) * 0.017453292519943295
    cos, sin = tl.cos(radians), tl.sin(radians)
    across, along = width.to(tl.float32), height.to(tl.float32)
    x = (place % width).to(tl.float32) + (0.5 - across / 2)
    y = (place // width).to(tl.float32) + (0.5 - along / 2)
    column = _nearest(cos * x - sin * y + (across / 2 - 0.5))
    row = _nearest(sin * x + cos * y + (along / 2 - 0.5))
    inside = here & (column >= 0) & (column < across) & (row >= 0) & (row < along)
    column += flip * (across - 1 - 2 * column) + right
    row += down
    inside &= (column >= 0) & (column < across) & (row >= 0) & (row < along)
    source = images + 3 * n * height * width + row.to(tl.int32) * width + column.to(tl.int32)
    out += 3 * (n * height * width + place)
    red = tl.load(source, mask=inside, other=0).to(tl.float32) / 255
    green = tl.load(source + height * width, mask=inside, other=0).to(tl.float32) / 255
    blue = tl.load(source + 2 * height * width, mask=inside, other=0).to(tl.float32) / 255
    _store(out, 0, here, red, mean_r, scale_r)
    _store(out, 1, here, green, mean_g, scale_g)
    _store(out, 2, here, blue, mean_b, scale_b)


@triton.jit
def _resampling(start, length, flip, source_size, size: tl.constexpr, source: tl.constexpr, target: tl.constexpr):
    """(target, source) bicubic antialiased weights: `ssl_bench.augment.resample._axis` and `_weights`."""
    scale = length / size
    shrink = 1 / tl.maximum(scale, 1.0)
    place = tl.arange(0, source)
    pixel = place.to(tl.float32) + 0.5 - start
    outside = (pixel < 0) | (pixel > length) | (place >= source_size)
    inputs = tl.where(outside, _OUTSIDE, pixel * shrink)
    output = tl.arange(0, target).to(tl.float32) + 0.5
    output = (output + flip * (size - 2 * output)) * (scale * shrink)
    u = tl.maximum(2 - tl.abs(inputs[None, :] - output[:, None]), 0.0)
    v = tl.maximum(u - 1, 0.0)
    weights = u * u * (u - 1) + (2 - 4 * v) * (v * v)
    total = tl.sum(weights, 1)
    return weights / tl.where(total == 0, 1.0, total)[:, None]  # 0 in rows that only fill the block


@triton.jit
def _plane(images, place, inside, rows, columns):
    """One channel, resampled."""
    pixels = tl.load(images + place, mask=inside, other=0).to(tl.float32)
    square = tl.dot(tl.dot(rows, pixels, input_precision="ieee"), columns, input_precision="ieee")
    return tl.minimum(tl.maximum(square / 255, 0.0), 1.0)


@triton.jit
def _luma(red, green, blue):
    return _LUMA_R * red + _LUMA_G * green + _LUMA_B * blue


@triton.jit
def _blended(x, ratio, offset):
    return tl.minimum(tl.maximum(ratio * x + offset, 0.0), 1.0)


@triton.jit
def _share(hue, centre):
    return tl.minimum(tl.maximum(2 - tl.abs(hue - centre), 0.0), 1.0)


@triton.jit
def _blends(red, green, blue, row, inside, size: tl.constexpr):
    """Three of `ssl_bench.augment.color.blend`."""
    for step in tl.static_range(3):
        ratio, on_grey, on_mean = tl.load(row + 3 * step), tl.load(row + 3 * step + 1), tl.load(row + 3 * step + 2)
        grey = _luma(red, green, blue)
        mean = tl.sum(tl.sum(tl.where(inside, grey, 0.0), 1), 0) / (size * size)
        offset = on_grey * grey + on_mean * mean
        red, green, blue = _blended(red, ratio, offset), _blended(green, ratio, offset), _blended(blue, ratio, offset)
    return red, green, blue


@triton.jit
def _taps(sigma, radius: tl.constexpr, size: tl.constexpr, target: tl.constexpr):
    """(target, target) Gaussian blur of an axis with reflected borders: a pixel, and what is reflected onto it."""
    distance = tl.arange(0, target)
    tap = tl.exp(-0.5 * (distance / sigma) * (distance / sigma))
    total = 2 * tl.sum(tl.where(distance <= radius, tap, 0.0), 0) - 1
    i, j = tl.arange(0, target)[:, None], tl.arange(0, target)[None, :]
    matrix = _tap(tl.abs(i - j), sigma, radius)
    matrix += tl.where(j > 0, _tap(i + j, sigma, radius), 0.0)
    matrix += tl.where(j < size - 1, _tap(2 * (size - 1) - i - j, sigma, radius), 0.0)
    return tl.where((i < size) & (j < size), matrix, 0.0) / total


@triton.jit
def _tap(distance, sigma, radius: tl.constexpr):
    near = (distance >= 0) & (distance <= radius)
    return tl.where(near, tl.exp(-0.5 * (distance / sigma) * (distance / sigma)), 0.0)


@triton.jit
def _blurred(x, taps):
    return tl.dot(tl.dot(taps, x, input_precision="ieee"), tl.trans(taps), input_precision="ieee")


@triton.jit
def _store(out, place, inside, x, mean, scale):
    tl.store(out + place, ((x - mean) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _ssl_view(
    images, table, out, height, width,
    size: tl.constexpr, source: tl.constexpr, target: tl.constexpr,
    mean_r: tl.constexpr, mean_g: tl.constexpr, mean_b: tl.constexpr,
    scale_r: tl.constexpr, scale_g: tl.constexpr, scale_b: tl.constexpr,
    threshold: tl.constexpr, blurs: tl.constexpr, radius: tl.constexpr, least: tl.constexpr,
):  # fmt: skip
    """The operations and their order are `SSLView._pixels`'s."""
    n = tl.program_id(0).to(tl.int64)
    row = table + 27 * n
    rows = _resampling(tl.load(row), tl.load(row + 2), 0.0, height, size, source, target)
    columns = _resampling(tl.load(row + 1), tl.load(row + 3), tl.load(row + 4), width, size, source, target)
    columns = tl.trans(columns)
    y, x = tl.arange(0, source)[:, None], tl.arange(0, source)[None, :]
    inside, place = (y < height) & (x < width), y * width + x
    images += 3 * n * height * width
    red = _plane(images, place, inside, rows, columns)
    green = _plane(images + height * width, place, inside, rows, columns)
    blue = _plane(images + 2 * height * width, place, inside, rows, columns)

    y, x = tl.arange(0, target)[:, None], tl.arange(0, target)[None, :]
    inside, place = (y < size) & (x < size), 3 * (y * size + x)
    red, green, blue = _blends(red, green, blue, row + 5, inside, size)
    shift = tl.load(row + 14)
    if shift != 0:
        low, high = tl.minimum(tl.minimum(red, green), blue), tl.maximum(tl.maximum(red, green), blue)
        chroma = high - low
        hue = (green + blue - red - low) / tl.maximum(chroma, _TINY) + 1
        hue = tl.where(green < blue, -hue, hue) + shift * 6
        hue -= 6 * tl.floor(hue * (1 / 6))
        green, blue = low + chroma * _share(hue, 2.0), low + chroma * _share(hue, 4.0)
        red = low + chroma * tl.minimum(tl.maximum(tl.abs(hue - 3) - 1, 0.0), 1.0)
    red, green, blue = _blends(red, green, blue, row + 15, inside, size)
    if tl.load(row + 24) != 0:
        grey = _luma(red, green, blue)
        red, green, blue = grey, grey, grey
    if blurs:
        sigma = tl.load(row + 25)
        if sigma > least:
            taps = _taps(sigma, radius, size, target)
            red, green, blue = _blurred(red, taps), _blurred(green, taps), _blurred(blue, taps)
    if tl.load(row + 26) != 0:
        red = tl.where(red >= threshold, 1 - red, red)
        green = tl.where(green >= threshold, 1 - green, green)
        blue = tl.where(blue >= threshold, 1 - blue, blue)
    out += 3 * n * size * size
    _store(out, place, inside, red, mean_r, scale_r)
    _store(out, place + 1, inside, green, mean_g, scale_g)
    _store(out, place + 2, inside, blue, mean_b, scale_b)
