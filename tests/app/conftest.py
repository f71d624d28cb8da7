"""What tests of the page share: a scan, tiny networks, and handlers that work in a folder of the test."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_cases import checkpoint, save
from vq_cases import save_checkpoint

from hf_binaryformer.app.handlers import Handlers
from hf_binaryformer.app.limits import Limits
from hf_binaryformer.app.runs import Networks
from hf_binaryformer.app.workspace import Workspaces


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> Networks:
    folder = tmp_path_factory.mktemp("networks")
    model, inpaint = checkpoint(folder / "tiny-random"), save_checkpoint(folder / "tiny-vq")
    return Networks(model=str(model), inpaint_model=str(inpaint))


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def handlers(root, networks) -> Handlers:
    return Handlers(Workspaces(root), networks, Limits())


@pytest.fixture
def scan(tmp_path) -> Path:
    """Where an upload lies: a folder of its own."""
    return save(tmp_path / "uploads" / "abc" / "head one.nii.gz")
