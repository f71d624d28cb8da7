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
from volume_cases import assert_same_content, in_orientation, noise, oblique_affine, save_nifti

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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        "flipped.nii.gz": bytes(compressed),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=f"{name} is truncated or damaged"):
            read_volume(tmp_path / name)


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
