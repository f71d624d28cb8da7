"""Classic DICOM series: one file for each slice. Places and values by DICOM's formulas; series that are no volume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import UPWARDS, position_of, ras_affine, write_dicom
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


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path: Path) -> None:
    array = slices()
    rescale = [(1.0, 0.0), (0.0005, 0.0), (0.0005, 0.25), (0.0005, 0.0), (3.0, -1000.0), (0.0005, 0.0)]
    each = {k: {"RescaleSlope": slope, "RescaleIntercept": intercept} for k, (slope, intercept) in enumerate(rescale)}
    affine = write_dicom(tmp_path / "pet", array, each=each)
    real = np.stack([array[:, :, k] * slope + intercept for k, (slope, intercept) in enumerate(rescale)], axis=2)
    volume = read_volume(tmp_path / "pet")
    assert_same_content(volume.array, volume.affine, real.transpose(1, 0, 2).astype(np.float32), affine)


def test_slices_may_differ_in_how_they_store_numbers(tmp_path: Path) -> None:
    array = slices() - 100
    unsigned = {"PixelRepresentation": 0, "PixelData": (array[:, :, 3] + 2000).astype("<u2").tobytes()}
    each = {3: {**unsigned, "RescaleSlope": 1, "RescaleIntercept": -2000}}
    affine = write_dicom(tmp_path / "mixed", array, each=each)
    volume = read_volume(tmp_path / "mixed")
    assert_same_content(volume.array, volume.affine, array.transpose(1, 0, 2), affine)


def test_bits_that_hold_no_pixel_are_ignored(tmp_path: Path) -> None:
    array = slices() - 100
    # A graphic in the upper four bits of every second pixel, as older scanners store it.
    stored = (array.view(np.uint16) & 0x0FFF) | (0xA000 * (noise(array.shape) % 2).astype(np.uint16))
    affine = write_dicom(tmp_path / "ct", stored.view(np.int16), BitsStored=12, HighBit=11)
    volume = read_volume(tmp_path / "ct")
    assert_same_content(volume.array, volume.affine, array.transpose(1, 0, 2), affine)


@pytest.mark.parametrize(
    ("padding", "tags", "filled"),
    [
        # Below and above what was measured, in a range, and signed pixels whose padding is written as an unsigned number.
        (-2000, {"PixelPaddingValue": ("SS", -2000), "RescaleIntercept": -1024}, 10 - 1024),
        (32000, {"PixelPaddingValue": ("SS", 32000), "RescaleIntercept": -1024}, 10 - 1024),
        (-2000, {"PixelPaddingValue": ("US", 65536 - 2000), "RescaleIntercept": -1024}, 10 - 1024),
        (
            -2000,
            {"PixelPaddingValue": ("SS", -3000), "PixelPaddingRangeLimit": ("SS", -1000), "RescaleIntercept": -1024},
            10 - 1024,
        ),
        # A background of 0 that was cut out stays at 0.
        (0, {"PixelPaddingValue": ("SS", 0), "RescaleIntercept": 0}, 0),
    ],
)
def test_padding_is_background(padding: int, tags: dict, filled: int, tmp_path: Path) -> None:
    array = slices() + 10
    array[0, 0, 0] = 10
    outside = noise((8, 9, 6), seed=1) < 50
    outside[0, 0, 0] = False
    stored = np.where(outside, padding, array)
    affine = write_dicom(tmp_path / "ct", stored, RescaleSlope=1, **tags)
    volume = read_volume(tmp_path / "ct")
    real = np.where(outside, filled, array + tags["RescaleIntercept"])
    assert_same_content(volume.array, volume.affine, real.transpose(1, 0, 2), affine)


def test_label_numbers_that_float32_rounds_are_kept(tmp_path: Path) -> None:
    labels = slices().astype(np.int32) + 2**24 + 1
    bits = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}
    each = {k: {**bits, "PixelData": ("OW", labels[:, :, k].astype("<i4").tobytes())} for k in range(6)}
    affine = write_dicom(tmp_path / "labels", slices(), each=each)
    volume = read_volume(tmp_path / "labels", labels=True)
    assert_same_content(volume.array, volume.affine, labels.transpose(1, 0, 2), affine)


def test_one_slice_takes_its_depth_from_the_slice_thickness(tmp_path: Path) -> None:
    write_dicom(tmp_path / "one", slices(1), SliceThickness=4.0, SpacingBetweenSlices=6.0)
    volume = read_volume(tmp_path / "one")
    assert_same_content(volume.array, volume.affine, slices(1).transpose(1, 0, 2), ras_affine((0.0, 0.0, 4.0)))
    write_dicom(tmp_path / "one", slices(1), SliceThickness=None)
    with pytest.raises(VolumeError, match="one slice.*SliceThickness"):
        read_volume(tmp_path / "one")


def test_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    affine = write_dicom(tmp_path / "old", slices(), step=UPWARDS)
    for path in (tmp_path / "old").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta, dataset.preamble = pydicom.dataset.FileMetaDataset(), None
        pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True, enforce_file_format=False)
    volume = read_volume(tmp_path / "old")
    assert_same_content(volume.array, volume.affine, slices().transpose(1, 0, 2), affine)


@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit", "padded"])
def test_every_encoding_holds_the_same_values(name: str, tmp_path: Path) -> None:
    plain = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm")).pixel_array
    path = tmp_path / "IM0001"
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file(f"MR_small_{name}.dcm"))
    dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -3
    dataset.save_as(path)
    assert read_volume(path).array[63, 63, 0] == plain[0, 0] * 0.5 - 3
    np.testing.assert_array_equal(np.sort(read_volume(path).array, None), np.sort(plain * 0.5 - 3, None))


def test_files_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    for name in ("rtplan.dcm", "test-SR.dcm", "rtstruct.dcm"):
        (tmp_path / name).write_bytes(Path(pydicom.data.get_testdata_file(name)).read_bytes())
    with pytest.raises(VolumeError, match="no DICOM series"):
        read_volume(tmp_path)
    with pytest.raises(VolumeError, match=r"rtplan\.dcm.*RT Plan Storage.*no image"):
        read_volume(tmp_path / "rtplan.dcm")
    (tmp_path / "notes.txt").write_text("\x08\x00 no DICOM either")
    (tmp_path / "empty.dcm").write_bytes(b"")
    affine = write_dicom(tmp_path, slices())
    volume = read_volume(tmp_path)
    assert_same_content(volume.array, volume.affine, slices().transpose(1, 0, 2), affine)


MOSAIC = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
ONE_SLICE_TURNED = {3: {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}}
BAD_SERIES = {
    "mosaic": ({"ImageType": MOSAIC}, r"Siemens mosaic.*8 x 9.*dcm2niix"),
    "turned": ({"each": ONE_SLICE_TURNED}, r"2 orientations \(5 axial, 1 axial\).*one stack"),
    "no direction": ({"ImageOrientationPatient": [0] * 6}, r"ImageOrientationPatient.*right angles"),
    "no position": ({"each": {2: {"ImagePositionPatient": None}}}, r"1_03\.dcm.*ImagePositionPatient"),
    "no orientation": ({"ImageOrientationPatient": None}, r"ImageOrientationPatient"),
    "no spacing": ({"PixelSpacing": None}, r"PixelSpacing"),
    "no size": ({"PixelSpacing": [0, 1]}, r"PixelSpacing.*0.*more than 0"),
    "pixel spacing": ({"each": {1: {"PixelSpacing": [1.0, 1.0]}}}, r"2 pixel spacings \(1 x 1, 1\.5 x 0\.75 mm\)"),
    "size": (
        {"each": {1: {"Rows": 4, "Columns": 4, "PixelData": b"\1\0" * 16}}},
        r"2 sizes \(4 x 4, 8 x 9 pixels\)",
    ),
    "uneven": (
        {"each": {5: {"ImagePositionPatient": position_of(7).tolist()}}},
        r"6 slices 2 mm apart.*gap of 6 mm.*1_06\.dcm and 1_02\.dcm",
    ),
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, r"MONOCHROME1.*expected MONOCHROME2"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, r"PALETTE COLOR.*one real number.*grey"),
    "colours": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, r"RGB.*one real number.*grey"),
    "no pixels": ({"PixelData": None}, r"no pixel data"),
    "slope too large": ({"RescaleSlope": "1e300", "RescaleIntercept": 0}, r"\d+ infinite voxels.*expected finite"),
    "slope 0": ({"RescaleSlope": 0, "RescaleIntercept": 1}, r"rescale slope of 0"),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_series_that_are_no_volume_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    tags, message = BAD_SERIES[name]
    write_dicom(tmp_path / "series", slices(), step=UPWARDS, **tags)
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(tmp_path / "series")
    assert str(tmp_path / "series") in str(caught.value) and "\n" not in str(caught.value)
    assert "expected" in str(caught.value) and ": " in str(caught.value)


@pytest.mark.parametrize(
    ("tag", "values", "message"),
    [
        ("EchoTime", (10, 80), r"2 echo times \(10, 80 ms\) at each of 6 positions"),
        ("DiffusionBValue", (0.0, 700.0), r"2 b-values \(0, 700 s/mm²\) at each of 6 positions"),
        ("TriggerTime", (0, 400), r"2 trigger times \(0, 400 ms\) at each of 6 positions"),
        ("ImageType", (["DERIVED", "SECONDARY", "M"], ["DERIVED", "SECONDARY", "P"]), r"2 image types"),
        ("AcquisitionNumber", (1, 2), r"2 acquisition numbers \(1, 2\)"),
        ("InstanceNumber", (1, 2), r"2 images at each of 6 positions, which their headers do not tell apart"),
    ],
)
def test_several_images_at_a_position_are_named(tag: str, values: tuple, message: str, tmp_path: Path) -> None:
    for prefix, value in zip("ab", values, strict=True):
        write_dicom(tmp_path / "both", slices(), prefix=prefix, **{tag: value})
    with pytest.raises(VolumeError, match=message + ".*expected one.*dcm2niix"):
        read_volume(tmp_path / "both")


def test_a_truncated_slice_is_noticed(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", slices())
    path = tmp_path / "series" / "1_03.dcm"
    path.write_bytes(path.read_bytes()[:-180])
    with pytest.raises(VolumeError, match=r"1_03\.dcm is truncated, damaged"):
        read_volume(tmp_path / "series")


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", slices(), step=UPWARDS, ImageType=MOSAIC)
    mosaic = tmp_path / "series" / "1_00.dcm"
    # A fault in form, of which pydicom would warn on a line of its own.
    mosaic.write_bytes(mosaic.read_bytes().replace(b"1.2.826.0.1.3680043.8.498.1\0", b"1.2.826.0.1.36800x3.8.498.1\0"))
    truncated = tmp_path / "truncated.dcm"
    truncated.write_bytes(Path(pydicom.data.get_testdata_file("MR_small_RLE.dcm")).read_bytes()[:-500])
    for path, message in ((mosaic, "Siemens mosaic"), (truncated, "truncated.dcm is truncated, damaged")):
        command = [sys.executable, "-m", "hf_binaryformer", "segment", str(path), "-o", str(tmp_path / "out.nii.gz")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "2000"})
        (line,) = (line for line in done.stderr.splitlines() if line.strip())
        assert done.returncode == 1 and line.startswith("error: ") and message in line
