"""Volume files: orientation, geometry, formats against independent readers, bad input, and no partial output."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from hf_binaryformer.pipelines import nifti
from hf_binaryformer.pipelines.volumes import (
    Volume,
    VolumeError,
    check_output_path,
    check_same_grid,
    read_volume,
    volume_from_image,
    write_image,
    write_labels,
)

ALL_CODES = [
    "".join(letters[flip] for letters, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]


def oblique_affine(spacing: tuple[float, float, float] = (0.8, 1.1, 2.3), degrees: float = 17.0) -> np.ndarray:
    """A RAS affine turned about all three axes, far from the origin."""
    a, b, c = np.deg2rad([degrees, -degrees / 2, degrees / 3])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_y @ about_z * spacing
    affine[:3, 3] = (-31.5, 12.25, 407.0)
    return affine


def in_orientation(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume stored with other axis codes."""
    ornt = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return nib.orientations.apply_orientation(array, ornt), affine @ inv_ornt_aff(ornt, array.shape)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **codes: int) -> Path:
    image = nib.Nifti1Image(array, np.diag([1.0, 1.5, 2.0, 1.0]) if affine is None else affine)
    if codes:
        image.set_sform(image.affine, codes["sform"])
        image.set_qform(image.affine, codes["qform"])
    nib.save(image, path)
    return path


def noise(shape: tuple[int, ...] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same_content(array_a: np.ndarray, affine_a: np.ndarray, array_b: np.ndarray, affine_b: np.ndarray) -> None:
    """Both hold the same value at the same place in mm, whatever their axis orders."""
    assert array_a.size == array_b.size
    index = np.argwhere(np.ones(array_a.shape, dtype=bool))
    points = index @ affine_a[:3, :3].T + affine_a[:3, 3]
    other = np.linalg.solve(affine_b[:3, :3], (points - affine_b[:3, 3]).T).T
    np.testing.assert_allclose(other, np.round(other), atol=1e-3)
    np.testing.assert_array_equal(array_b[tuple(np.round(other).astype(int).T)], array_a.ravel())


def test_there_are_48_axis_codes() -> None:
    assert len(set(ALL_CODES)) == 48


@pytest.mark.parametrize("codes", ALL_CODES)
def test_labels_come_back_on_the_very_grid(codes: str, tmp_path: Path) -> None:
    array, affine = in_orientation(noise(), oblique_affine(), codes)
    path = save_nifti(tmp_path / "in.nii.gz", array, affine, sform=2, qform=1)
    volume = read_volume(path)

    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert_same_content(volume.array, volume.affine, array, affine)
    np.testing.assert_allclose(volume.spacing, (0.8, 1.1, 2.3), rtol=1e-5)

    before, after = (
        nib.load(path),
        nib.load(write_labels(tmp_path / "out.nii.gz", volume.array.astype(np.int32), volume)),
    )
    np.testing.assert_array_equal(np.asarray(after.dataobj), array)
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "qoffset_x", "xyzt_units"):
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (0, 1), (4, 0), (1, 3)])
def test_codes_and_both_transforms_survive(sform: int, qform: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), None)
    image.header["pixdim"][1:4] = (1, 2, 3)
    image.set_sform(oblique_affine((1, 2, 3)), sform)
    image.set_qform(oblique_affine((1, 2, 3), degrees=-5), qform)
    nib.save(image, tmp_path / "in.nii")
    before = nib.load(tmp_path / "in.nii")

    volume = read_volume(tmp_path / "in.nii")
    after = nib.load(write_labels(tmp_path / "out.nii", volume.array.astype(np.uint8), volume))
    assert int(after.header["sform_code"]) == sform
    assert int(after.header["qform_code"]) == qform
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(after.header.get_qform(), before.header.get_qform())
    np.testing.assert_array_equal(after.header.get_sform(), before.header.get_sform())
    np.testing.assert_array_equal(np.asarray(after.dataobj), noise())


def test_scaled_integers_big_endian_nifti2_and_trailing_axis(tmp_path: Path) -> None:
    header = nib.Nifti2Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti2Image(noise()[..., None].astype(np.int16), oblique_affine(), header)
    image.header.set_slope_inter(0.125, -3)  # nibabel stores the numbers as they are and applies these on reading
    nib.save(image, tmp_path / "in.nii.gz")

    volume = read_volume(tmp_path / "in.nii.gz")
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, noise() / 8 - 3)
    after = nib.load(write_labels(tmp_path / "out.nii.gz", ((volume.array + 3) * 8).astype(np.int32), volume))
    assert isinstance(after, nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(after.dataobj), noise())


def test_nothing_of_the_input_but_its_grid_reaches_the_output(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise().astype(np.int16), oblique_affine())
    image.header.set_slope_inter(0.125, -3)
    image.header["descrip"], image.header["aux_file"], image.header["cal_max"] = b"NAME OF PATIENT", b"patient.txt", 7
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"NAME OF PATIENT"))
    nib.save(image, tmp_path / "in.nii")
    for volume in (volume_from_image(image), read_volume(tmp_path / "in.nii")):
        path = write_labels(tmp_path / "out.nii", noise().astype(np.int32), volume)
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), noise())
        content = path.read_bytes()
        assert b"PATIENT" not in content
        assert b"patient" not in content
        assert float(nib.load(path).header["cal_max"]) == 0


def test_units_other_than_mm_are_read_as_mm_and_written_back(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), np.diag([500.0, 500.0, 800.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    np.testing.assert_allclose(volume.spacing, (0.5, 0.5, 0.8))
    after = nib.load(write_labels(tmp_path / "out.nii", volume.array.astype(np.uint8), volume))
    np.testing.assert_array_equal(after.affine, image.affine)
    assert after.header.get_xyzt_units()[0] == "micron"


@pytest.mark.parametrize(("highest", "dtype"), [(1, np.uint8), (255, np.uint8), (256, np.uint16), (70000, np.uint32)])
def test_labels_are_stored_in_the_smallest_type(highest: int, dtype: type, tmp_path: Path) -> None:
    volume = volume_from_image(nib.Nifti1Image(noise(), np.eye(4)))
    labels = np.zeros(volume.array.shape, dtype=np.int64)
    labels[2, 3, 4] = highest
    names = {0: "background", 1: "Rückenmark"}
    path = write_labels(tmp_path / "out.nii.gz", labels, volume, label_names=names, description="x" * 200)
    image = nib.load(path)
    assert image.get_data_dtype() == dtype
    assert int(image.dataobj[2, 3, 4]) == highest
    assert json.loads(image.header.extensions[0].get_content()) == {"0": "background", "1": "Rückenmark"}
    assert image.header["descrip"].item() == b"x" * 79
    assert image.header.get_intent()[0] == "label"


def test_image_output_is_float32_on_the_grid_also_with_channels(tmp_path: Path) -> None:
    array, affine = in_orientation(noise(), oblique_affine(), "PIL")
    volume = read_volume(save_nifti(tmp_path / "in.nii", array, affine))
    after = nib.load(write_image(tmp_path / "out.nii", volume.array / 7, volume))
    assert after.get_data_dtype() == np.float32
    np.testing.assert_array_equal(after.get_fdata(dtype=np.float32), array.astype(np.float32) / 7)
    np.testing.assert_array_equal(after.affine, nib.load(tmp_path / "in.nii").affine)

    channels = np.stack([volume.array / 256, 1 - volume.array / 256]).astype(np.float16)
    after = nib.load(write_image(tmp_path / "channels.nii.gz", channels, volume))
    assert after.shape == (*array.shape, 2)
    assert after.get_data_dtype() == np.float32
    np.testing.assert_array_equal(after.get_fdata()[..., 0], array / 256)


# Other formats


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


def test_import_is_light() -> None:
    code = (
        "import sys, hf_binaryformer.pipelines.segmentation; "
        "print([m for m in ('nibabel', 'monai', 'SimpleITK', 'transformers', 'timm', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Bad input


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[1, 2, 3] = array[2, 2, 2] = np.nan
    array[0, 0, 0] = -np.inf
    return array


FLAT = np.diag([1.0, 1.0, 0.0, 1.0])
BAD_IMAGES = {
    "nan": (with_nan(noise()), None, r"2 NaN and 1 infinite voxels of 210, expected finite"),
    "overflow": (noise().astype(np.float64) * 1e300, None, r"0 NaN and \d+ infinite"),
    "constant": (np.full((4, 5, 6), 7, dtype=np.int16), None, r"all 120 voxels are 7, expected an image with contrast"),
    "zeros": (np.zeros((4, 5, 6), dtype=np.uint8), None, r"is empty: all 120 voxels are 0"),
    "series": (noise((4, 5, 6, 3)), None, r"series of 3 volumes, shape \(4, 5, 6, 3\), expected one 3D volume"),
    "vectors": (noise((4, 5, 6, 1, 3)), None, r"series of 3 volumes"),
    "flat image": (noise((4, 5)), None, r"shape \(4, 5\), expected three axes"),
    "no voxels": (noise((4, 0, 6)), None, r"shape \(4, 0, 6\), expected three axes and at least one voxel"),
    "complex": (noise().astype(np.complex64), None, r"complex numbers \(complex64\), expected one real number"),
    "colours": (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), None, r"colours.*grey"),
    "flat affine": (noise(), FLAT, r"affine .*, expected one that spans a volume"),
    "nan affine": (noise(), np.full((4, 4), np.nan), r"affine .*, expected one that spans a volume"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(name: str, tmp_path: Path) -> None:
    array, affine, message = BAD_IMAGES[name]
    image = nib.Nifti1Image(array, np.eye(4))
    if affine is not None:
        for row, values in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
            image.header[row] = values
        image.header["sform_code"] = 1
        image = nib.Nifti1Image(array, None, image.header)
    path = tmp_path / "bad.nii.gz"
    nib.save(image, path)
    before = sha256(path)
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)
    assert sha256(path) == before


@pytest.mark.parametrize("missing", [1, 4, 8, 60, 400])
def test_truncated_gzip_is_noticed_while_reading(missing: int, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "in.nii.gz", noise((12, 13, 14)))
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(VolumeError, match="truncated or damaged"):
        read_volume(path)


def test_damaged_files_are_noticed(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "in.nii", noise((12, 13, 14)))
    data = plain.read_bytes()
    compressed = bytearray(gzip.compress(data))
    compressed[len(compressed) // 2] ^= 0xFF
    files = {
        "short.nii": data[:-100],
        "header.nii": data[:200],
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "text.nii": b"this is no image" * 100,
        "plain.nii.gz": data,
        "flipped.nii.gz": bytes(compressed),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=f"{name} is truncated or damaged"):
            read_volume(tmp_path / name)


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


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"gone\.nii\.gz does not exist"):
        read_volume(tmp_path / "gone.nii.gz")
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(VolumeError, match=r"ends in '\.png', expected \.nii, \.nii\.gz.*DICOM folder"):
        read_volume(tmp_path / "x.png")


def test_label_maps_may_be_uniform_but_must_be_whole(tmp_path: Path) -> None:
    empty = read_volume(save_nifti(tmp_path / "zeros.nii", np.zeros((4, 5, 6), dtype=np.uint8)), labels=True)
    assert empty.array.dtype == np.int32
    assert not empty.array.any()
    whole = read_volume(save_nifti(tmp_path / "whole.nii", noise().astype(np.float64)), labels=True)
    np.testing.assert_array_equal(whole.array, noise())
    for name, array in {
        "half": noise() / 2,
        "negative": noise().astype(np.int16) - 100,
        "nan": with_nan(noise()),
        "huge": noise().astype(np.float64) * 1e9,
    }.items():
        with pytest.raises(VolumeError, match="expected label numbers"):
            read_volume(save_nifti(tmp_path / f"{name}.nii", array), labels=True)


# Output


def in_memory(shape: tuple[int, int, int] = (5, 6, 7), affine: np.ndarray | None = None) -> Volume:
    return volume_from_image(nib.Nifti1Image(noise(shape), np.eye(4) if affine is None else affine))


def test_unusable_output_is_refused(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "in.nii.gz", noise())
    before = sha256(path)
    volume = read_volume(path)
    labels = volume.array.astype(np.int32)
    link = tmp_path / "link.nii.gz"
    link.symlink_to(path)
    for target in (path, link, tmp_path / "." / "in.nii.gz"):
        with pytest.raises(VolumeError, match="is the input itself"):
            write_labels(target, labels, volume)
    with pytest.raises(VolumeError, match=r"ends in '\.mgz', expected \.nii"):
        write_labels(tmp_path / "out.mgz", labels, volume)
    with pytest.raises(VolumeError, match="does not exist.*create it"):
        check_output_path(tmp_path / "no" / "out.nii.gz")
    with pytest.raises(VolumeError, match=r"shape \(7, 6, 5\), expected \(5, 6, 7\)"):
        write_labels(tmp_path / "out.nii.gz", labels.T, volume)
    with pytest.raises(VolumeError, match=r"shape \(5, 6\), expected \(5, 6, 7\)"):
        write_image(tmp_path / "out.nii.gz", labels[..., 0], volume)
    with pytest.raises(VolumeError, match="float32, expected whole numbers"):
        write_labels(tmp_path / "out.nii.gz", volume.array, volume)
    with pytest.raises(VolumeError, match="labels range from -1"):
        write_labels(tmp_path / "out.nii.gz", labels - 1 - labels.min(), volume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii.gz", "link.nii.gz"]
    assert sha256(path) == before


def test_nothing_partial_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = in_memory()
    path = write_labels(tmp_path / "out.nii.gz", np.ones((5, 6, 7), dtype=np.uint8), volume)
    before = sha256(path)

    def write_half(target: Path, *args: object, **options: object) -> None:
        target.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(nifti, "write_file", write_half)
    with pytest.raises(OSError, match="no space"):
        write_labels(path, np.zeros((5, 6, 7), dtype=np.uint8), volume)
    with pytest.raises(OSError, match="no space"):
        write_image(tmp_path / "new.nii.gz", volume.array, volume)
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"]
    assert sha256(path) == before


def test_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    volume = in_memory()
    one, two = (write_labels(tmp_path / f"{n}.nii.gz", noise().astype(int), volume) for n in "ab")
    assert sha256(one) == sha256(two)


def test_grids_are_compared_in_space(tmp_path: Path) -> None:
    affine = oblique_affine()
    first = in_memory(affine=affine)
    array, turned = in_orientation(noise(), affine, "SLP")
    check_same_grid(first, volume_from_image(nib.Nifti1Image(array, turned)))
    with pytest.raises(VolumeError, match=r"\(5, 6, 7\).*\(5, 6, 8\)"):
        check_same_grid(first, in_memory((5, 6, 8), affine))
    shifted = affine.copy()
    shifted[2, 3] += 0.5
    with pytest.raises(VolumeError, match=r"0\.625 voxels apart"):
        check_same_grid(first, in_memory(affine=shifted))
    tilted = affine.copy()
    tilted[:3, 2] += 0.05
    with pytest.raises(VolumeError, match="voxels apart"):
        check_same_grid(first, in_memory(affine=tilted))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("hippocampus/imagesTr/hippocampus_001.nii.gz", False),
        ("hippocampus/labelsTr/hippocampus_001.nii.gz", True),
        ("brain_label_maps/training_seg_19.nii.gz", True),
    ],
)
def test_real_files_come_back_as_they_are(name: str, labels: bool, data_root: Path, tmp_path: Path) -> None:
    path = data_root / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    before, volume = nib.load(path), read_volume(path, labels=labels)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    canonical = nib.as_closest_canonical(before)
    np.testing.assert_array_equal(volume.array, np.asarray(canonical.dataobj, dtype=volume.array.dtype))
    np.testing.assert_allclose(volume.affine, canonical.affine)
    after = nib.load((write_labels if labels else write_image)(tmp_path / "out.nii.gz", volume.array, volume))
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    np.testing.assert_array_equal(after.affine, before.affine)
