"""`data=shapes`: discs, squares and rings of random place, size and colour on noise; made, not downloaded."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ssl_bench.data.raw import Located, RawDataset, RawSplit

CLASSES = ("disc", "square", "ring")
SIZE = 32


def locate(path: Path | None) -> Located:
    """No files, so the images are made anew at every start; `data.path` is refused, as it would have no effect."""
    if path is not None:
        raise ValueError(f"data shapes: data.path must be left out, got {path}")
    return Located((), read)


def read() -> RawDataset:
    """600 train and 150 test images."""
    return RawDataset(_split(600, seed=0), _split(150, seed=1), CLASSES)


def _split(count: int, seed: int) -> RawSplit:
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    return RawSplit(labels, _images(labels, seed), lambda index: f"shapes: image {index}")


def _images(labels: np.ndarray, seed: int) -> Callable[[], Iterator[np.ndarray]]:
    def images() -> Iterator[np.ndarray]:
        draw = np.random.default_rng(seed)  # each pass draws the same images
        for label in labels:
            yield _image(CLASSES[label], draw)

    return images


def _image(shape: str, draw: np.random.Generator) -> np.ndarray:
    image = draw.integers(0, 80, (SIZE, SIZE, 3))
    radius, (y, x) = draw.integers(5, 10), draw.integers(10, SIZE - 10, 2)
    dy, dx = np.abs(np.mgrid[:SIZE, :SIZE] - np.array([y, x])[:, None, None])
    distance = np.maximum(dy, dx) if shape == "square" else np.hypot(dy, dx)
    inside = (distance <= radius) & (distance > (radius - 3 if shape == "ring" else -1))
    image[inside] = draw.integers(120, 256, 3)
    return image.astype(np.uint8)
