"""A schedule that is never ready, so that a run that asks for it goes on until it is ended."""

import os
import time
from pathlib import Path
from typing import Never

import tiny_net  # noqa: F401 (registers the tiny networks)


def endless_schedule(marker: str) -> Never:
    """Leaves the process's id in a file, and sleeps.

    Args:
        marker: the file.
    """
    Path(f"{marker}.new").write_text(str(os.getpid()))
    os.replace(f"{marker}.new", marker)
    time.sleep(600)
    raise AssertionError("nobody ended this process")
