"""Where the cache is, and names that others chose (of plug-ins, studies, data sets) as parts of paths."""

import os
import re
from hashlib import blake2b
from pathlib import Path

_LONGEST = 60  # characters; a file system takes 255 bytes, and a run's name is made of several


def file_name(text: str) -> str:
    """A name as one component of a path: letters, digits, ``_.-``, no dot in front, not empty, not too long.

    A name that is so already stays as it is. Where much of one is lost, eight hex digits keep two names apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip(".-").rstrip("-.")
    if safe and len(safe) <= _LONGEST and len(safe) * 2 > len(text):
        return safe
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{safe[: _LONGEST - 9]}-{digest}".lstrip("-")


def cache_folder(given: str | Path | None = None) -> Path:
    """The given folder of the cache; without one $SSL_BENCH_CACHE, or ~/.cache/ssl_bench."""
    return Path(given if given is not None else os.environ.get("SSL_BENCH_CACHE") or "~/.cache/ssl_bench").expanduser()
