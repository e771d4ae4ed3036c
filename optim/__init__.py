"""Large-batch optimizers, learning-rate schedules, parameter groups and per-layer telemetry; needs torch only.

from ssl_bench.optim import TVLARS
optimizer = TVLARS(model.parameters(), lr=1.0, delay_steps=10 * steps_per_epoch)
"""

from collections.abc import Callable

from torch.optim import Optimizer

from ssl_bench.optim.averaging import WeightAverage, has_evaluation_point
from ssl_bench.optim.clars import CLARS, CLARSChunks
from ssl_bench.optim.from_timm import timm_optimizer
from ssl_bench.optim.from_torch import adamw, sgd
from ssl_bench.optim.groups import build_groups, check_cover
from ssl_bench.optim.lamb import LAMB, LAMBC
from ssl_bench.optim.lars import LARS
from ssl_bench.optim.schedules import (
    SCHEDULES,
    Schedule,
    batch_scale,
    constant,
    gradual_warmup,
    polynomial,
    released_warmup_cosine,
    warmup_cosine,
)
from ssl_bench.optim.telemetry import Telemetry
from ssl_bench.optim.tvlars import TVLARS

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "lars": LARS,
    "lamb": LAMB,
    "lambc": LAMBC,
    "tvlars": TVLARS,
    "clars": CLARS,
    "clars_chunks": CLARSChunks,
    "sgd": sgd,
    "adamw": adamw,
    "timm": timm_optimizer,
}

__all__ = [
    "CLARS",
    "LAMB",
    "LAMBC",
    "LARS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TVLARS",
    "Schedule",
    "Telemetry",
    "WeightAverage",
    "adamw",
    "batch_scale",
    "build_groups",
    "check_cover",
    "constant",
    "gradual_warmup",
    "has_evaluation_point",
    "polynomial",
    "released_warmup_cosine",
    "sgd",
    "timm_optimizer",
    "warmup_cosine",
]
