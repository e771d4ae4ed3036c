"""Runs a track's command: help, errors in one line, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ssl_bench.recipe.schema import Recipe

USAGE_ERROR = 2


def run_command(track: str, run: Callable[[Recipe], int], argv: Sequence[str]) -> int:
    """Composes the recipe from the words of a command line and runs it.

    Args:
        track: "pretrain" or "classify".
        run: recipe -> exit code.
        argv: ``key=value`` words, ``--help`` (with choices, their keys too) and ``--debug`` (tracebacks).

    Returns:
        0; 2 after an error of the user's; `interrupt.REQUEUE_EXIT_CODE` when a signal stopped the run.
    """
    words = [word for word in argv if word not in ("--debug", "--help", "-h")]
    debug = "--debug" in argv

    def command() -> int:
        from ssl_bench.recipe.compose import compose

        if len(words) + debug < len(argv):
            from ssl_bench.recipe.help import print_help

            print_help(track, words)
            return 0
        return run(compose(track, words))

    return guarded(command, debug=debug)


def leave(code: int) -> NoReturn:
    """Ends a script's process with an exit code.

    A process that had a gloo group sometimes aborts in the interpreter's clean-up ("terminate called without an active
    exception", torch 2.14), which would turn a finished run into a failed one; so such a process skips the clean-up.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def guarded(command: Callable[[], int], *, debug: bool = False) -> int:
    """Calls a command and turns the errors that a user can mend into one line on standard error.

    ValueError and OSError are such errors: everything of ours that a user can cause is one of them. Any other
    exception is a bug, and keeps its traceback.
    """
    try:
        return command()
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        # Every process meets a wrong recipe; one of them says so.
        elif int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
