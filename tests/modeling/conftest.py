"""Makes the oracle importable under `--import-mode=importlib`, and seeds every test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(7)
