"""The ``ssl-bench`` commands."""

from ssl_bench.cli.app import app, main

__all__ = ["app", "main"]
