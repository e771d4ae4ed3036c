"""From encoded images to blocks of uint8 pixels: one decoder (Pillow) for every kind of file.

Pillow rather than `torchvision.io`, whose decoders are deprecated since torchvision 0.29, or PyTurboJPEG, which is no
faster (`benchmarks/loading.py`). One thread decodes small images: Pillow holds the GIL for most of a 32x32 JPEG, and
two threads were measured slower than one. For large ones there is a thread more than cores, because one often waits for
the GIL, and a block is decoded while the caller digests and writes the one before: 1.4 times as fast on two cores.
"""

import io
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image

from ssl_bench.data.raw import RawImage, RawSplit
from ssl_bench.runtime.interrupt import stop_if_requested
from ssl_bench.runtime.launcher import usable_cores

Shape = tuple[int, int, int]  # (3, H, W)

_BLOCK_BYTES = 16 * 2**20
_THREADS_FROM_PIXELS = 128 * 128


# What Pillow turns into RGB value by value. Its other modes of 16 and 32 bits it would clip at 255, which makes a
# 12-bit microscope's image white.
_EIGHT_BITS = ("1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel.

    Raises:
        ValueError: a mode whose values have no defined range.
    """
    if image.mode == "RGB":
        return image
    # Grey of 16 bits: the high byte, as Pillow itself reads RGB of 16 bits. PNG and PGM hold no wider numbers, though
    # Pillow may open them as "I", of 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode not in _EIGHT_BITS:
        raise ValueError(f"mode {image.mode} has no defined range of values; convert it to 8 or 16 bits a channel")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns when such a palette goes straight to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(raw: RawImage, size: int | None) -> np.ndarray:
    """Decodes one image to RGB.

    Args:
        raw: the image; grey, palette and CMYK ones are converted, 16 bits become the high 8, transparency is dropped,
            and of several frames the first counts. An orientation tag (EXIF) is not applied: the pixels are taken as
            they are stored, as by torchvision's `ImageFolder` and timm.
        size: pixels; the shorter side is resized to it (antialiased bilinear) and the centre square kept. None leaves
            the image as it is.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError, ValueError, SyntaxError, TypeError: what Pillow raises on a damaged image, or pixels of a wrong type.
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
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{split.describe(index)}: the image cannot be decoded ({reason})") from error


def image_shape(split: RawSplit, size: int | None) -> Shape:
    """The shape (3, H, W) of the split's first image after decoding."""
    height, width, _ = _decode_named(split, 0, next(split.images()), size).shape
    return (3, height, width)


def block_images(shape: Shape) -> int:
    """How many images make a block."""
    return max(1, _BLOCK_BYTES // math.prod(shape))


def decode_blocks(split: RawSplit, size: int | None, shape: Shape, first: int = 0) -> Iterator[np.ndarray]:
    """Decodes a split in order, some megabytes at a time.

    Args:
        split: the images.
        size: see `decode`.
        shape: (3, H, W), which every image must have.
        first: the block to start with.

    Yields:
        (n, 3, H, W) uint8.

    Raises:
        ValueError: names the first image that cannot be decoded or that has another shape.
        FileNotFoundError: names the image file that is gone.
        Stopped: a signal asked this process to stop.
    """
    _, height, width = shape
    length = block_images(shape)
    images = islice(split.images(), first * length, None)
    threads = usable_cores() + 1 if height * width >= _THREADS_FROM_PIXELS or size is not None else 1
    ahead: deque[tuple[np.ndarray, Iterator[None]]] = deque()  # blocks that are being decoded
    pool = ThreadPoolExecutor(threads)

    def whole() -> np.ndarray:
        block, filled = ahead.popleft()
        deque(filled, maxlen=0)
        return block

    try:
        for start in range(first * length, len(split), length):
            raws = list(islice(images, min(length, len(split) - start)))
            if len(raws) < min(length, len(split) - start):
                raise ValueError(f"{split.describe(start + len(raws))}: has a label but no image")
            block = np.empty((len(raws), *shape), dtype=np.uint8)

            def fill(offset: int, raws: list = raws, block: np.ndarray = block, start: int = start) -> None:
                stop_if_requested("decoding")
                pixels = _decode_named(split, start + offset, raws[offset], size)
                if pixels.shape[:2] != (height, width):
                    got = f"{pixels.shape[1]}x{pixels.shape[0]}"
                    raise ValueError(
                        f"{split.describe(start + offset)}: the image is {got} but the first one is {width}x{height}; "
                        "give a size (data.size=N) to resize all images to N x N"
                    )
                block[offset] = pixels.transpose(2, 0, 1)

            ahead.append((block, map(fill, range(len(raws))) if threads == 1 else pool.map(fill, range(len(raws)))))
            if threads == 1 or len(ahead) > 1:
                yield whole()
        while ahead:
            yield whole()
    finally:
        pool.shutdown(cancel_futures=True)
    if next(images, None) is not None:
        raise ValueError(f"{split.describe(len(split) - 1)}: the last one with a label, but more images follow")
