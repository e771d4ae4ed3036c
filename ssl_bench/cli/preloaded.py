"""What a cell's process has in memory when it starts (see `ssl_bench.study.warm`); importing this loads it.

Nothing here may touch a GPU: a process that is forked after that cannot use it.
"""

import ssl_bench.classify
import ssl_bench.pretrain
import ssl_bench.recipe.compose
import ssl_bench.recipe.content
import ssl_bench.training.build  # noqa: F401
from ssl_bench.records.provenance import code_version

code_version()  # of the code that is in memory from here on; a commit may come while the cells run
