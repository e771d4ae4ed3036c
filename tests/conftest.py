"""What several test files share."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerate keeps its precision for the life of a process; each test may choose its own."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def shared_data() -> Path:
    """The folder with the real data sets beside the checkout; the test is skipped where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA
