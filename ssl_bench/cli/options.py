"""What the commands share: an option, paths as options, and how a command ends."""

import os
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def expanded(path: str | None) -> str | None:
    """The path with ``~`` expanded, as an option's callback: a shell does it for ``~/runs``, not ``--runs=~/runs``."""
    return None if path is None else os.path.expanduser(path)


def finish(command: Callable[[], int], debug: bool) -> NoReturn:
    """Runs a command, and ends with its exit code; a user's error is one line (see `ssl_bench.recipe.command`)."""
    from ssl_bench.recipe.command import guarded

    raise typer.Exit(guarded(command, debug=debug))
