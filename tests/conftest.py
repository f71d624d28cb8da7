"""What all tests share."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any import of huggingface_hub: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
# Cases that tests of several folders share are imported from here, under `--import-mode=importlib`.
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def no_settings_of_another_test() -> Iterator[None]:
    """Accelerate keeps the first precision of a process for all that follow."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real data, which no checkout holds: HF_BINARYFORMER_DATA, or a folder beside the checkout."""
    folder = Path(os.environ.get("HF_BINARYFORMER_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HF_BINARYFORMER_DATA to its folder")
    return folder
