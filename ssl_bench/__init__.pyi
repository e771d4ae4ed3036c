# What type checkers see of ssl_bench/__init__.py, whose names are looked up when they are used.
from ssl_bench.cli.api import Result as Result
from ssl_bench.cli.api import StudyResult as StudyResult
from ssl_bench.cli.api import classify as classify
from ssl_bench.cli.api import evaluate as evaluate
from ssl_bench.cli.api import load as load
from ssl_bench.cli.api import pretrain as pretrain
from ssl_bench.cli.api import report as report
from ssl_bench.cli.api import study as study

__version__: str
