"""Makes what the tests of the scripts share importable under `--import-mode=importlib`, and lets each have its own precision."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_settings_of_another_test() -> Iterator[None]:
    """Accelerate keeps the first precision of a process for all that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
