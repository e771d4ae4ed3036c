"""What all tests of the data share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSL_BENCH_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # pytest keeps its folders, and all of Tiny ImageNet is 1.3 GB
