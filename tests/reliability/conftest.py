"""The scripts that disturb the package find each other as files of one folder, as they do when one of them is run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "reliability"))
# And the DICOM files of another folder's tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
# And what its own tests share.
sys.path.insert(0, str(Path(__file__).parent))

from planting import Markers


@pytest.fixture
def markers(tmp_path: Path) -> Iterator[Markers]:
    """What planted code leaves, which must be nothing."""
    markers = Markers(tmp_path / "markers")
    yield markers
    assert not markers.left
