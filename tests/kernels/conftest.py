"""Makes the oracle importable under `--import-mode=importlib` and poisons scratch memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def poisoned_scratch_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN or the largest integer, so that a read before the first write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20_24)
