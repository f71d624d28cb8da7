"""ITK files and DICOM series against NIfTI of the same content and DICOM's own formula; series that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import in_orientation, noise, oblique_affine, save_nifti

from hf_binaryformer.pipelines.volumes import VolumeError, check_same_grid, read_volume, write_image, write_labels


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_itk_files_equal_nifti_of_the_same_content(suffix: str, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(noise((7, 6, 5)).astype(np.int16))
    image.SetSpacing((0.5, 1.25, 3.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    image.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 1.7).GetMatrix())
    sitk.WriteImage(image, str(tmp_path / f"in{suffix}"))
    # ITK's own NIfTI writer does the change from LPS to RAS independently of this package.
    sitk.WriteImage(image, str(tmp_path / "in.nii.gz"))

    ours, theirs = read_volume(tmp_path / f"in{suffix}"), read_volume(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    check_same_grid(ours, theirs)

    back = nib.load(write_labels(tmp_path / "labels.nii.gz", ours.array.astype(np.uint8), ours))
    np.testing.assert_array_equal(np.asarray(back.dataobj), noise((7, 6, 5)).T)
    np.testing.assert_allclose(back.affine, nib.load(tmp_path / "in.nii.gz").affine, atol=1e-4)
    assert int(back.header["sform_code"]) == int(back.header["qform_code"]) == 1


def test_mha_output_holds_the_same_grid(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    array, affine = in_orientation(noise(), oblique_affine(), "SRP")
    volume = read_volume(save_nifti(tmp_path / "in.nii", array, affine))
    path = write_labels(tmp_path / "out.mha", volume.array.astype(np.uint8), volume)
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array.T)
    for index in ((0, 0, 0), (4, 2, 1)):
        position = image.TransformIndexToPhysicalPoint(index) * np.array([-1, -1, 1])
        np.testing.assert_allclose(position, (affine @ (*index, 1))[:3], atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii", "out.mha"]
    with pytest.raises(VolumeError, match=r"write \.nii\.gz"):
        write_image(tmp_path / "channels.mha", np.zeros((2, *volume.array.shape)), volume)

    sheared = affine.copy()
    sheared[:3, 0] += 0.3 * sheared[:3, 1]
    volume = read_volume(save_nifti(tmp_path / "sheared.nii", array, sheared, sform=1, qform=0))
    with pytest.raises(VolumeError, match="right angles"):
        write_labels(tmp_path / "sheared.mha", volume.array.astype(np.uint8), volume)


def test_missing_simpleitk_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mha").write_text("ObjectType = Image")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"SimpleITK.*pip install hf-binaryformer\[dicom\]"):
        read_volume(tmp_path / "x.mha")
    # NIfTI needs nothing of it.
    assert read_volume(save_nifti(tmp_path / "x.nii", noise())).array.shape == (5, 6, 7)


def test_damaged_mha_is_noticed(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "in.mha"
    sitk.WriteImage(sitk.GetImageFromArray(noise((12, 13, 14))), str(path))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VolumeError, match="truncated, damaged"):
        read_volume(path)
    sitk.WriteImage(sitk.GetImageFromArray(noise((12, 13, 14, 3)), isVector=True), str(path))
    with pytest.raises(VolumeError, match="vector.*one real number"):
        read_volume(path)
    sitk.WriteImage(sitk.GetImageFromArray(noise((3, 12, 13, 14)), isVector=False), str(path))
    with pytest.raises(VolumeError, match="series of 3 volumes"):
        read_volume(path)
    sitk.WriteImage(sitk.GetImageFromArray(noise((12, 13))), str(path))
    with pytest.raises(VolumeError, match="expected three axes"):
        read_volume(path)
