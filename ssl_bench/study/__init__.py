"""Many runs: a grid or a search of recipes, expanded into cells and run on this machine or on a cluster."""

from ssl_bench.runtime.callable_module import make_callable

make_callable(__name__, "ssl_bench.cli.api:study")
