"""Fixtures that several folders of tests share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many of these as cores; torch reads it when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

# nohup has it ignored, here and in every run that a test starts; and tests send it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TEST_DATA = "SSL_BENCH_TEST_DATA"  # environment variable, explained in CONTRIBUTING.md


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerate keeps its precision for the life of a process; each test may choose its own."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def shared_data() -> Path:
    """The folder with the real data sets (`cifar10`, `tiny-imagenet`); skips the test where none is named."""
    if not (folder := os.environ.get(TEST_DATA)):
        pytest.skip(f"{TEST_DATA} is not set: no real data sets to read")
    if not Path(folder).is_dir():
        pytest.fail(f"{TEST_DATA} must be a directory, got {folder!r}")
    return Path(folder)
