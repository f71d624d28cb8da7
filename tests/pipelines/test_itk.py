"""ITK files and DICOM series against NIfTI of the same content and DICOM's own formula; series that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import assert_same_content, in_orientation, noise, oblique_affine, save_nifti

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


def write_dicom(
    folder: Path,
    array: np.ndarray,
    *,
    step: tuple[float, float, float] = (0.6, -0.8, 2.0),
    uid: str = "1.2.826.0.1.3680043.8.498.1",
    skip: tuple[int, ...] = (),
    **tags: object,
) -> np.ndarray:
    """A series of (rows, columns, slices); returns its affine for (column, row, slice), RAS, by DICOM's own formula."""
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(exist_ok=True)
    template = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
    # Direction of the columns' index, then of the rows'; spacing is (between rows, between columns).
    along_row, along_column = np.array([0.8, 0.6, 0.0]), np.array([-0.6, 0.8, 0.0])
    row_spacing, column_spacing, first = 1.5, 0.75, np.array([-40.0, 25.0, 60.0])
    for k in range(array.shape[2]):
        if k in skip:
            continue
        template.Rows, template.Columns = array.shape[:2]
        template.PixelData = np.ascontiguousarray(array[:, :, k], dtype="<i2").tobytes()
        template.PixelSpacing = [row_spacing, column_spacing]
        template.ImageOrientationPatient = [*along_row.tolist(), *along_column.tolist()]
        template.ImagePositionPatient = np.round(first + k * np.array(step), 6).tolist()
        template.SeriesInstanceUID = uid
        template.SeriesDescription = f"series {uid[-1]}"
        template.SOPInstanceUID = template.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        template.InstanceNumber = 100 - k
        template.SliceThickness = 99.0  # not the distance of the slices
        for name, value in tags.items():
            setattr(template, name, value)
        # File names run against the order of the slices.
        template.save_as(folder / f"{uid[-1]}_{(k * 7) % 11:02d}.dcm")
    lps = np.eye(4)
    lps[:3, :3] = np.column_stack([along_row * column_spacing, along_column * row_spacing, step])
    lps[:3, 3] = first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def test_dicom_series_equals_nifti_of_the_same_content(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    array = noise((8, 9, 6)).astype(np.int16)
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


def test_dicom_with_a_tilted_gantry_keeps_its_positions(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    array = noise((8, 9, 6)).astype(np.int16)
    affine = write_dicom(tmp_path / "dicom", array)
    volume = read_volume(tmp_path / "dicom")
    assert_same_content(volume.array, volume.affine, array.transpose(1, 0, 2), affine)
    back = nib.load(write_labels(tmp_path / "labels.nii.gz", volume.array.astype(np.uint8), volume))
    assert_same_content(np.asarray(back.dataobj), back.affine, array.transpose(1, 0, 2), affine)


def test_single_dicom_file_without_suffix(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    pydicom = pytest.importorskip("pydicom")
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


def test_dicom_series_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    array = noise((8, 9, 6)).astype(np.int16)

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
