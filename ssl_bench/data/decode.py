"""From encoded images to blocks of uint8 pixels: one decoder (Pillow) for every kind of file.

Pillow rather than `torchvision.io`, whose decoders are deprecated since torchvision 0.29. One thread decodes small
images: Pillow holds the GIL for most of a 32x32 JPEG, and two threads were measured slower than one.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image

from ssl_bench.data.raw import RawImage, RawSplit

Shape = tuple[int, int, int]  # (3, H, W)

_BLOCK_BYTES = 16 * 2**20
_THREADS_FROM_PIXELS = 128 * 128


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns when such a palette goes straight to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(raw: RawImage, size: int | None) -> np.ndarray:
    """Decodes one image to RGB.

    Args:
        raw: the image; grey, palette and CMYK ones are converted, transparency is dropped.
        size: pixels; the shorter side is resized to it (antialiased bilinear) and the centre square kept. None leaves
            the image as it is.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError, ValueError, SyntaxError: what Pillow raises on a damaged image.
    """
    if isinstance(raw, np.ndarray):
        image = Image.fromarray(raw)
    else:
        image = Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw)
    with image:
        image = _to_rgb(image)
        if size is not None and image.size != (size, size):
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)


def _decode_named(split: RawSplit, index: int, raw: RawImage, size: int | None) -> np.ndarray:
    try:
        return decode(raw, size)
    except FileNotFoundError:
        raise FileNotFoundError(f"{split.describe(index)}: no such image file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{split.describe(index)}: the image cannot be decoded ({reason})") from error


def image_shape(split: RawSplit, size: int | None) -> Shape:
    """The shape (3, H, W) of the split's first image after decoding."""
    height, width, _ = _decode_named(split, 0, next(split.images()), size).shape
    return (3, height, width)


def decode_blocks(split: RawSplit, size: int | None, shape: Shape) -> Iterator[np.ndarray]:
    """Decodes a split in order, some megabytes at a time.

    Args:
        split: the images.
        size: see `decode`.
        shape: (3, H, W), which every image must have.

    Yields:
        (n, 3, H, W) uint8.

    Raises:
        ValueError: names the first image that cannot be decoded or that has another shape.
        FileNotFoundError: names the image file that is gone.
    """
    _, height, width = shape
    block_images = max(1, _BLOCK_BYTES // (3 * height * width))
    images = split.images()
    threads = (os.cpu_count() or 1) if height * width >= _THREADS_FROM_PIXELS or size is not None else 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(split), block_images):
            raws = list(islice(images, block_images))
            block = np.empty((len(raws), *shape), dtype=np.uint8)

            def fill(offset: int, raws: list = raws, block: np.ndarray = block, start: int = start) -> None:
                pixels = _decode_named(split, start + offset, raws[offset], size)
                if pixels.shape[:2] != (height, width):
                    got = f"{pixels.shape[1]}x{pixels.shape[0]}"
                    raise ValueError(
                        f"{split.describe(start + offset)}: the image is {got} but the first one is {width}x{height}; "
                        "give a size (data.size=N) to resize all images to N x N"
                    )
                block[offset] = pixels.transpose(2, 0, 1)

            for _ in map(fill, range(len(raws))) if threads == 1 else pool.map(fill, range(len(raws))):
                pass
            yield block
