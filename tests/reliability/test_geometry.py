"""One volume in every orientation gets the same labels at the same places."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import geometry

RECORD = Path(__file__).parents[2] / "model_cards" / "evidence" / "reliability" / "geometry.json"
AFFINE = np.array([[0.7, 0, 0, -31.5], [0, 1.1, 0, 12.25], [0, 0, 4.5, 407.0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing", [None, geometry.NETWORK_SPACING])
@pytest.mark.parametrize("size", geometry.SIZES)
def test_labels_agree_in_space(size, spacing):
    ways = list(itertools.product(geometry.ORIENTATIONS[::7], geometry.ANGLES))
    found = geometry.measure(geometry.pipeline_of(spacing), geometry.phantom(size), AFFINE, ways)
    if size == (1, 1, 1):
        assert found == []  # One voxel has no contrast, and is refused.
    else:
        assert len(found) == len(ways) and min(found) >= 0.999


@pytest.mark.slow
def test_labels_agree_in_all_orientations():
    ways = list(itertools.product(geometry.ORIENTATIONS, geometry.ANGLES))
    for spacing in geometry.SPACINGS:
        affine = np.diag([*spacing, 1.0])
        found = geometry.measure(
            geometry.pipeline_of(geometry.NETWORK_SPACING), geometry.phantom((40, 31, 22)), affine, ways
        )
        assert len(found) == 144 and min(found) >= 0.999


def test_a_mirrored_file_is_noticed(tmp_path):
    """A measure that finds agreement everywhere must be able to find none."""
    labels = np.digitize(geometry.phantom((9, 8, 7)), geometry.LEVELS).astype(np.uint8)
    image = geometry.stored(labels, AFFINE, "PIR", 12.0)
    nib.save(image, tmp_path / "labels.nii")
    assert geometry.agreement(tmp_path / "labels.nii", image, 12.0, labels, AFFINE) == 1
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), tmp_path / "labels.nii")
    assert geometry.agreement(tmp_path / "labels.nii", image, 12.0, labels, AFFINE) < 0.9
    moved = image.affine.copy()
    moved[0, 3] += 1
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / "labels.nii")
    assert geometry.agreement(tmp_path / "labels.nii", image, 12.0, labels, AFFINE) == 0


@pytest.mark.skipif(not RECORD.is_file(), reason="there is no record here")
def test_the_record_has_all_orientations_and_agreement():
    rows = json.loads(RECORD.read_text())["agreement"]
    assert any(name.startswith("512x512x200") for name in rows) and any("MNI152" in name for name in rows)
    assert sum(figures["tried"] == 144 for figures in rows.values()) == 20
    for name, figures in rows.items():
        assert figures["worst"] is None if name.startswith("1x1x1") else figures["worst"] >= 0.999
