"""The ``ssl-bench`` commands."""

import signal
import threading

# While the commands are imported a Ctrl-C ends the process as a signal does, without a traceback.
_main = threading.current_thread() is threading.main_thread()
_before = signal.signal(signal.SIGINT, signal.SIG_DFL) if _main else None

from ssl_bench.cli.app import app, main  # noqa: E402

if _before is not None:
    signal.signal(signal.SIGINT, _before)

__all__ = ["app", "main"]
