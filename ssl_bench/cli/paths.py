"""Paths on a command line: a shell expands ``~/runs`` but not ``--runs=~/runs``."""

import os


def expanded(path: str | None) -> str | None:
    """The path with ``~`` expanded, as the callback of an option or argument."""
    return None if path is None else os.path.expanduser(path)
