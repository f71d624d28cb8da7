"""What tests of runs over many scans share."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_cases import checkpoint, run, save

from hf_binaryformer.pipelines import segmentation


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-random")


@pytest.fixture
def scans(tmp_path) -> Path:
    """Three scans, one of them in a subfolder, and a broken one in the middle."""
    for seed, name in enumerate(("a.nii.gz", "c.nii.gz", "deep/a.nii.gz")):
        save(tmp_path / "scans" / name, seed)
    (tmp_path / "scans" / "b.nii.gz").write_bytes((tmp_path / "scans" / "a.nii.gz").read_bytes()[:-300])
    return tmp_path / "scans"


@pytest.fixture
def worked(monkeypatch) -> list[str]:
    """Names of the volumes that the network has seen since."""
    seen: list[str] = []
    call = segmentation.VolumeSegmentationPipeline.__call__

    def watched(self, volume, **options):
        seen.append(volume.source.path.name)
        return call(self, volume, **options)

    monkeypatch.setattr(segmentation.VolumeSegmentationPipeline, "__call__", watched)
    return seen


@pytest.fixture
def done(tmp_path, model) -> tuple[Path, Path]:
    """Two scans and their results."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed, name in enumerate(("a", "b")):
        save(scans / f"{name}.nii.gz", seed)
    assert run(scans, "-o", out, "--model", model).exit_code == 0
    return scans, out
