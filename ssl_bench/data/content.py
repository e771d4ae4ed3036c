"""Which data it is, wherever it lies: the part of a run's identity that takes the place of the path."""

import json
import os
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from ssl_bench.data.raw import Files

SAMPLES, SAMPLE_BYTES = 64, 4096


def content_digest(files: Files, labels: Sequence[np.ndarray]) -> str:
    """16 hex digits that are equal for copies of one data set.

    They depend on the files' names below their common folder, their sizes, 64 samples of their bytes, and how many
    images each class has; on neither the place nor the times of the files. Reading the samples takes milliseconds.

    Args:
        files: all files of the data set.
        labels: of each split.
    """
    # Of a million files abspath takes seconds, and so does commonpath, for which the first and the last suffice.
    paths = [path if path.startswith(os.sep) else os.path.abspath(path) for path, _, _ in files]
    ends = min(paths), max(paths)
    start = len(os.path.commonpath(ends) if len(paths) > 1 else os.path.dirname(paths[0]))
    named = sorted((path[start:].lstrip(os.sep), path, size) for path, (_, size, _) in zip(paths, files, strict=True))
    counts = [[part.tolist() for part in np.unique(each, return_counts=True)] for each in labels]
    listing = "\n".join(f"{json.dumps(name)} {size}" for name, _, size in named)
    digest = sha256(f"{json.dumps(counts)}\n{listing}".encode())
    chosen = [named[i * len(named) // SAMPLES] for i in range(SAMPLES)] if len(named) > SAMPLES else named
    each = max(1, SAMPLES // len(chosen))
    for _, path, size in chosen:
        with open(path, "rb") as file:
            for place in range(each):
                file.seek(max(0, (2 * place + 1) * size // (2 * each) - SAMPLE_BYTES // 2))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
