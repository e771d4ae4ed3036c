"""torch's optimizers through this package's names."""

import subprocess
import sys

import pytest
import torch
from optim_cases import difference, run

from ssl_bench.optim import OPTIMIZERS, adamw, sgd


def test_sgd_is_torchs():
    for nesterov in (False, True):
        theirs = run(lambda p, n=nesterov: torch.optim.SGD(p.values(), 1.0, 0.9, weight_decay=0.1, nesterov=n))
        ours = run(lambda p, n=nesterov: sgd(p.values(), 1.0, 0.9, 0.1, nesterov=n))
        assert difference(ours, theirs) < 1e-12


def test_adamw_is_torchs():
    theirs = run(lambda p: torch.optim.AdamW(p.values(), 1.0, (0.8, 0.9), eps=1e-3, weight_decay=0.1))
    assert difference(run(lambda p: adamw(p.values(), 1.0, (0.8, 0.9), 1e-3, 0.1)), theirs) < 1e-12


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [
        ("sgd", "momentum", 1.0),
        ("sgd", "weight_decay", -1.0),
        ("adamw", "eps", -1.0),
        ("adamw", "lr", -1.0),
        ("adamw", "betas", (0.9,)),
    ],
)
def test_bad_torch_keywords(name, keyword, value):
    with pytest.raises(ValueError, match=f"^{name}: {keyword} must .* got "):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(2, 2))], **({"lr": 1.0} | {keyword: value}))


def test_sgd_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="sgd: momentum must be > 0 with nesterov=True, got 0"):
        sgd([torch.nn.Parameter(torch.ones(2, 2))], 1.0, momentum=0.0, nesterov=True)


def test_the_package_imports_torch_only():
    heavy = ("timm", "torchvision", "accelerate", "pydantic")
    code = f"import sys, ssl_bench.optim; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
