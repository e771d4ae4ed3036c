"""Names that others chose (of plug-ins, studies, data sets) as parts of paths."""

import re
from hashlib import blake2b

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
