"""Every layer-wise optimizer in the settings that differ, and every path of its arithmetic."""

import pytest

from ssl_bench.optim import LAMB, LAMBC, LARS, TVLARS

ALL = {
    "lars": lambda p, **k: LARS(p, lr=0.1, weight_decay=0.05, **k),
    "lars_sum_of_norms": lambda p, **k: LARS(p, lr=0.1, denominator="sum_of_norms", zero_norm="skip", eps=1e-8, **k),
    "lars_inside_nesterov": lambda p, **k: LARS(p, lr=0.1, lr_in_buffer=True, nesterov=True, clip=True, **k),
    "lamb": lambda p, **k: LAMB(p, lr=0.1, weight_decay=0.05, **k),
    "lambc": lambda p, **k: LAMBC(p, lr=0.1, bias_correction=False, **k),
    "tvlars": lambda p, **k: TVLARS(p, lr=0.1, eta=0.02, decay=0.3, delay_steps=6, **k),
    "tvlars_released": lambda p, **k: TVLARS(p, lr=0.1, eta=0.02, decay=0.3, variant="released", **k),
    "tvlars_2023_08": lambda p, **k: TVLARS(p, lr=0.1, eta=0.02, decay=0.3, variant="2023-08", delay_steps=6, **k),
}
EVERY = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
PATHS = pytest.mark.parametrize(
    "path", [{}, {"fused": False}, {"fused": False, "foreach": False}], ids=["fused", "foreach", "loop"]
)


def values(params):
    """The parameters' values now."""
    return {name: p.detach().clone() for name, p in params.items()}
