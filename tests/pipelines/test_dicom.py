"""Classic DICOM series: one file for each slice. Places and values by DICOM's formulas; series that are no volume."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import write_dicom
from volume_cases import assert_same_content, noise, save_nifti

from hf_binaryformer.pipelines.volumes import VolumeError, read_volume, write_labels

pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")


def slices(count: int = 6) -> np.ndarray:
    """Pixels of (rows, columns, slices)."""
    return noise((8, 9, count)).astype(np.int16)


def test_series_equals_nifti_of_the_same_content(tmp_path: Path) -> None:
    array = slices()
    affine = write_dicom(tmp_path / "dicom", array, step=(0.0, 0.0, 2.0))
    save_nifti(tmp_path / "same.nii", array.transpose(1, 0, 2), affine)
    ours, theirs = read_volume(tmp_path / "dicom"), read_volume(tmp_path / "same.nii")
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    assert ours.source.kind == "dicom"

    one_file = read_volume(next((tmp_path / "dicom").iterdir()))
    np.testing.assert_array_equal(one_file.array, ours.array)
    np.testing.assert_array_equal(one_file.affine, ours.affine)

    back = nib.load(write_labels(tmp_path / "labels.nii.gz", ours.array.astype(np.uint8), ours))
    assert_same_content(np.asarray(back.dataobj), back.affine, array.transpose(1, 0, 2), affine)


def test_a_tilted_gantry_keeps_its_positions(tmp_path: Path) -> None:
    array = slices()
    affine = write_dicom(tmp_path / "dicom", array)
    volume = read_volume(tmp_path / "dicom")
    assert_same_content(volume.array, volume.affine, array.transpose(1, 0, 2), affine)
    back = nib.load(write_labels(tmp_path / "labels.nii.gz", volume.array.astype(np.uint8), volume))
    assert_same_content(np.asarray(back.dataobj), back.affine, array.transpose(1, 0, 2), affine)


def test_single_dicom_file_without_suffix(tmp_path: Path) -> None:
    source = Path(pydicom.data.get_testdata_file("MR_small.dcm"))
    path = tmp_path / "IM0001"
    path.write_bytes(source.read_bytes())
    volume = read_volume(path)
    dataset = pydicom.dcmread(source)
    assert sorted(volume.array.shape) == [1, 64, 64]
    np.testing.assert_array_equal(np.sort(volume.array, axis=None), np.sort(dataset.pixel_array, axis=None))
    # The first pixel lies at (x, y, z) LPS, which is (-x, -y, z) RAS: the largest x and y of the volume.
    corner = volume.affine @ (63, 63, 0, 1)
    np.testing.assert_allclose(corner[:2], -np.array(dataset.ImagePositionPatient[:2], dtype=float), atol=1e-3)
    assert volume.array[63, 63, 0] == dataset.pixel_array[0, 0]


def test_series_that_cannot_be_used(tmp_path: Path) -> None:
    array = slices()

    write_dicom(tmp_path / "two", array, uid="1.2.3.1")
    write_dicom(tmp_path / "two", array + 1, uid="1.2.3.2")
    with pytest.raises(VolumeError, match=r"2 DICOM series.*one.*1\.2\.3\.1.*series 1.*1\.2\.3\.2.*series 2"):
        read_volume(tmp_path / "two")
    chosen = read_volume(next((tmp_path / "two").glob("2_*.dcm")))
    assert chosen.array.min() == array.min() + 1

    write_dicom(tmp_path / "gap", array, skip=(2,))
    with pytest.raises(VolumeError, match="slices are missing"):
        read_volume(tmp_path / "gap")

    write_dicom(tmp_path / "doubled", array, step=(0.0, 0.0, 0.0))
    with pytest.raises(VolumeError, match="doubled"):
        read_volume(tmp_path / "doubled")

    (tmp_path / "none").mkdir()
    save_nifti(tmp_path / "none" / "x.nii", array)
    with pytest.raises(VolumeError, match="no DICOM series"):
        read_volume(tmp_path / "none")

    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM and then nothing")
    with pytest.raises(VolumeError, match=r"broken\.dcm is truncated, damaged"):
        read_volume(tmp_path / "broken.dcm")
