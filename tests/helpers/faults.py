"""Plug-ins that fail, or are signalled, on one process of several or in one phase of a run."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import tiny_net
from torch import Tensor, nn

from ssl_bench.data.raw import Located, RawDataset, RawSplit
from ssl_bench.eval import Probe

RANK = int(os.environ.get("RANK", "0"))


class FailsAtStart(tiny_net.TinyTwins):
    """Barlow Twins that only the second process cannot make."""

    def __init__(self, *arguments: object, **options: object) -> None:
        if RANK == 1:
            raise ValueError("only this process has this trouble")
        super().__init__(*arguments, **options)  # type: ignore[arg-type]


class FailsLater(tiny_net.TinyTwins):
    """Barlow Twins whose loss fails at the third step, in the second process; the first then waits in a collective."""

    calls = 0

    def embed(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D)."""
        FailsLater.calls += 1
        if RANK == 1 and FailsLater.calls > 4:
            raise ValueError("only this process has this trouble")
        return super().embed(x)


class Unused(tiny_net.TinyTwins):
    """Barlow Twins with a layer that no loss reaches."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.left_over = nn.Linear(3, 3)


class SlowSteps(tiny_net.TinyTwins):
    """Barlow Twins with steps of half a second."""

    def embed(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D)."""
        time.sleep(0.25)
        return super().embed(x)


def signal_once(marker: Path) -> None:
    """The first time, a SIGTERM to this process, which then works on for a minute."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(600):
            time.sleep(0.1)


class SignalledProbe:
    """An evaluator during which the run is asked to stop."""

    name = "signalled-v1"

    def __call__(self, probe: Probe) -> dict[str, float]:
        """No accuracy."""
        signal_once(Path("evaluated"))
        return {"classes": float(probe.classes)}


def signalled_data(path: Path | None) -> Located:
    """A data set while whose images are read the run is asked to stop."""
    signal_once(Path("located"))
    return other_images(path)


def other_images(path: Path | None) -> Located:
    """Random images, in the second process others than in the first."""
    assert path is None
    images = np.random.default_rng(RANK).integers(0, 256, (192, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(192) % 2

    def split(part: slice) -> RawSplit:
        return RawSplit(labels[part], lambda: iter(images[part]), lambda index: f"made image {index}")

    # Another cache for each process: the digest of the sources is part of the cache's name.
    return Located((), lambda: RawDataset(split(slice(0, 128)), split(slice(128, 192)), (f"a{RANK}", "b")))
