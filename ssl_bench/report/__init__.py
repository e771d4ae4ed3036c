"""Tables, figures, statistics, checked claims and one self-contained web page from the records of runs."""

from ssl_bench.runtime.callable_module import make_callable

make_callable(__name__, "ssl_bench.cli.api:report")
