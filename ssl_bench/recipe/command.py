"""Runs a track's command: ``--help``, errors in one line, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ssl_bench.recipe.schema import Recipe

USAGE_ERROR = 2


def run_command(track: str, run: Callable[[Recipe], int], argv: Sequence[str]) -> int:
    """Composes the recipe that a command line means, and runs it.

    Args:
        track: "pretrain" or "classify".
        run: recipe -> exit code.
        argv: overrides, ``--help`` (for the recipe that they give) and ``--debug`` (tracebacks).

    Returns:
        0; 2 after a user's error; `interrupt.REQUEUE_EXIT_CODE` when a signal stopped the run.
    """
    overrides = [argument for argument in argv if argument not in ("--debug", "--help", "-h")]

    def command() -> int:
        from ssl_bench.recipe.compose import compose

        recipe = compose(track, overrides)
        if "--help" in argv or "-h" in argv:
            from ssl_bench.recipe.help import print_help

            print_help(recipe)
            return 0
        return run(recipe)

    return guarded(command, debug="--debug" in argv)


def leave(code: int) -> NoReturn:
    """Exits the process.

    After using gloo, a process sometimes aborts in the interpreter's clean-up ("terminate called without an active
    exception", torch 2.14), and a finished run would count as failed; such a process skips the clean-up.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def guarded(command: Callable[[], int], *, debug: bool = False) -> int:
    """Calls a command and prints a user's error as one line on standard error.

    A ValueError or OSError is a user's error: wrong settings or files. Any other exception is a bug and keeps its
    traceback.
    """
    try:
        return command()
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        # Every process sees the same error; one reports it.
        elif int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
