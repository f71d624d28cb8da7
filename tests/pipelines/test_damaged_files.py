"""Headers that ask for more than a file holds, or that the libraries below us do not survive: refused, and at once.

Each case is one that `scripts/reliability/fuzz.py` found.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import placed, write_dicom, write_multiframe
from volume_cases import noise, save_nifti

from hf_binaryformer.pipelines.itk_header import check_header
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume

META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    "Offset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 5 6 7\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
)
NRRD = (
    "NRRD0004\ntype: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 6 7\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nencoding: raw\nspace origin: (0,0,0)\n\n"
)
VOXELS = noise().tobytes("F")


def written(path: Path, header: str) -> Path:
    path.write_bytes(header.encode() + VOXELS)
    return path


def with_field(path: Path, name: str, value: object) -> Path:
    """A NIfTI file with one field of its header set as it is."""
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    header[name] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    return path


@pytest.mark.parametrize(("name", "header"), [("a.mha", META), ("a.nrrd", NRRD)])
def test_the_headers_of_these_tests_are_valid(tmp_path, name, header):
    pytest.importorskip("SimpleITK")
    np.testing.assert_array_equal(read_volume(written(tmp_path / name, header)).array[::-1, ::-1], noise())


@pytest.mark.parametrize(
    "number", ["0", "-1", "11", "127", "2147483647", "1099511627776", "x", "", "3 4", "3\nNDims = 2"]
)
def test_a_wrong_number_of_axes_never_reaches_itk(tmp_path, number):
    path = written(tmp_path / "a.mha", META.replace("NDims = 3", f"NDims = {number}"))
    # Not read_volume: ITK would end the tests too.
    with pytest.raises(VolumeError, match=r"NDims.*expected"):
        check_header(path)


def test_two_numbers_of_axes_never_reach_itk(tmp_path):
    path = written(tmp_path / "a.mha", META.replace("Offset", "NDims = 127\nOffset"))
    with pytest.raises(VolumeError, match="several lines NDims"):
        check_header(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("DimSize = 5 6 7", "DimSize = 5 6 1099511627776"),
        ("DimSize = 5 6 7", "DimSize = 2000 2000 500"),
        ("DimSize = 5 6 7", "DimSize = 5 6 -7"),
        ("DimSize = 5 6 7", "DimSize = 5 6"),
        ("DimSize = 5 6 7\n", ""),
        ("MET_UCHAR", "MET_SHORT_ARRAY"),
        ("MET_UCHAR", "MET_UCHAR\nElementNumberOfChannels = 2147483647"),
        ("CompressedData = False", "CompressedData = True\nCompressedDataSize = 2147483647"),
        ("0 1\nOffset", "0 1e308\nOffset"),
        ("ElementDataFile = LOCAL", "ElementDataFile = missing.raw"),
        ("ElementDataFile = LOCAL", "ElementDataFile = " + 400 * "9"),
        ("ElementDataFile = LOCAL", ""),
    ],
)
def test_meta_headers(tmp_path, old, new):
    with pytest.raises(VolumeError, match="expected|put it beside"):
        read_volume(written(tmp_path / "a.mha", META.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sizes: 5 6 7", "sizes: 5 6 1099511627776"),
        ("sizes: 5 6 7", "sizes: 5 6 700000000"),
        ("sizes: 5 6 7", "sizes: 5 6 -7"),
        ("sizes: 5 6 7\n", ""),
        ("(0,0,1)", "(0,0,1e308)"),
        ("unsigned char", "double"),
        ("encoding: raw", "encoding: raw\ndata file: missing.raw"),
    ],
)
def test_nrrd_headers(tmp_path, old, new):
    with pytest.raises(VolumeError, match="expected|put it beside"):
        read_volume(written(tmp_path / "a.nrrd", NRRD.replace(old, new, 1)))


def test_detached_voxels_are_measured_in_their_own_file(tmp_path):
    pytest.importorskip("SimpleITK")
    (tmp_path / "a.raw").write_bytes(VOXELS)
    (tmp_path / "a.mhd").write_text(META.replace("LOCAL", "a.raw"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mhd").array[::-1, ::-1], noise())
    (tmp_path / "a.raw").write_bytes(VOXELS[:-1])
    with pytest.raises(VolumeError, match="asks for 210 bytes of voxels, the file has at most 209"):
        read_volume(tmp_path / "a.mhd")


@pytest.mark.parametrize(
    ("name", "value"),
    [("datatype", 32767), ("quatern_b", np.inf), ("quatern_c", 1e30), ("vox_offset", np.inf), ("xyzt_units", 7)],
)
def test_nifti_fields(tmp_path, name, value):
    path = save_nifti(tmp_path / "a.nii", noise(), sform=1, qform=1)
    with pytest.raises(VolumeError, match="expected"):
        read_volume(with_field(path, name, value))


def longest(data: bytes, tag: bytes) -> bytes:
    """The file with the largest length of an element that its 32-bit length can state."""
    at = data.index(tag)
    return data[: at + 8] + struct.pack("<I", 2**32 - 2) + data[at + 12 :]


@pytest.mark.parametrize("tag", [b"\x02\x00\x01\x00OB", b"\xe0\x7f\x10\x00OW"])
def test_a_length_of_a_dicom_element_takes_no_memory(tmp_path, tag):
    pytest.importorskip("pydicom")
    path = write_multiframe(tmp_path / "a.dcm", noise().astype("<u2"), [placed(k) for k in range(5)])
    path.write_bytes(longest(path.read_bytes(), tag))
    tracemalloc.start()
    try:
        read_volume(path)
    except VolumeError as error:
        assert "expected" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("at", [4, 12, 40])
def test_a_length_of_compressed_pixels_never_reaches_gdcm(tmp_path, at):
    pydicom = pytest.importorskip("pydicom")
    path = write_multiframe(tmp_path / "a.dcm", noise().astype("<u2"), [placed(k) for k in range(5)])
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    pixels = bytearray(dataset.PixelData)
    start = pixels.index(b"\xfe\xff\x00\xe0", at if at > 4 else 0)
    pixels[start + 4 : start + 8] = struct.pack("<I", 2**31 - 1)
    dataset.PixelData = bytes(pixels)
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    with pytest.raises(VolumeError, match="a fragment of its compressed pixels is damaged|damaged"):
        read_volume(path)


def test_dicom_headers_that_ask_for_more_pixels_than_there_are(tmp_path):
    pytest.importorskip("pydicom")
    folder = tmp_path / "series"
    write_dicom(folder, noise().astype("<i2"), Rows=65535, Columns=32000)
    tracemalloc.start()
    with pytest.raises(VolumeError, match="asks for 4194240000 bytes"):
        read_volume(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
