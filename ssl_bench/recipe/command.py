"""Runs a track's command: ``--help``, errors in one line, exit codes."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ssl_bench.runtime import peers
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Interrupt, Stopped, leave_note

if TYPE_CHECKING:  # nothing heavy here: a Ctrl-C in the first second should meet `guarded`
    from ssl_bench.recipe.schema import Recipe

USAGE_ERROR, BUG = 2, 1

# In the text of a collective call's error (gloo's, NCCL's) when the process at the other end has died.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def run_command(track: str, run: "Callable[[Recipe], int]", argv: Sequence[str]) -> int:
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
        _forget_script_folder()
        from ssl_bench.recipe.compose import compose

        recipe = compose(track, overrides)
        if "--help" in argv or "-h" in argv:
            from ssl_bench.recipe.help import print_help

            print_help(recipe)
            return 0
        return run_recipe(recipe, run)[1]

    return guarded(command, debug="--debug" in argv)


def run_recipe(recipe: "Recipe", run: "Callable[[Recipe], int]") -> "tuple[Recipe, int]":
    """Runs a recipe in this process, of a command or of a notebook.

    Returns:
        the recipe with what it is about filled in (`ssl_bench.recipe.content`), by which its folder is named; and the
        exit code.

    Raises:
        ValueError, OSError: a user's error, in one line.
        Stopped: a signal came where there is nothing to save.
    """
    # Until the run's session has handlers of its own (and the file to lock), while torch is imported.
    with Interrupt(at_once=True):
        try:
            peers.follow_parent()
            peers.adopt()
            from ssl_bench.recipe.content import with_content

            recipe = with_content(recipe)
            return recipe, run(recipe)
        except Stopped:
            if peers.rank() == 0:
                leave_note(Path(recipe.folder()))
            raise


def _forget_script_folder() -> None:
    """Takes ssl_bench/ itself off the import path, where ``accelerate launch ssl_bench/pretrain.py`` puts it.

    A user's plug-in file views.py or data.py would otherwise be hidden by the suite's folder of that name.
    """
    package = Path(__file__).resolve().parents[1]
    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == package:
        del sys.path[0]


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
    traceback. Of several processes each prints its line with its rank, equal lines are printed once, and a process that
    fails ends the others (see `ssl_bench.runtime.peers`).
    """
    try:
        return command()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and peers.world_size() == 1:
            # The reader of the output has seen enough (ssl-bench list | head); Python would complain of it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        code, text = USAGE_ERROR, " ".join(str(error).split()) or type(error).__name__
        if debug:
            traceback.print_exc()
        else:
            _say_once(text)
    except Stopped as stopped:
        if str(stopped) and peers.rank() == 0:
            print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        code = REQUEUE_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except peers.PeerError as error:
        return error.code
    except Exception as error:
        if peers.world_size() == 1:
            raise
        # Where another process has failed, the collective call that it did not join fails here.
        if (earlier := peers.told()) is not None:
            return earlier
        code = BUG
        if any(words in str(error) for words in _LOST) and not debug:
            _say_once("the connection to another process is lost; was it killed?")
        elif peers.first_to_say(repr(error)):
            traceback.print_exc()
    if peers.world_size() > 1:
        peers.tell(code)
    return code


def _say_once(text: str) -> None:
    """Prints an error's line; of several processes' equal lines only one, with the rank."""
    if peers.world_size() == 1:
        print(f"error: {text}", file=sys.stderr)
    elif peers.first_to_say(text):
        print(f"error: rank {peers.rank()}: {text}", file=sys.stderr)
