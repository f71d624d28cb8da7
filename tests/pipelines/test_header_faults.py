"""Headers as people's files have them: the right place, or one line that says what is wrong; never a silent guess."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import noise, oblique_affine, save_nifti

from hf_binaryformer.pipelines.volumes import VolumeError, check_output_path, read_volume

SHAPE = (20, 24, 18)


def edited(path: Path, **fields) -> Path:
    """A NIfTI-1 file with other values in its header, whatever nibabel thinks of them."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("unit", "factor", "span"),
    [("micron", 1.0, "0.024 mm"), ("meter", 1.0, "24,000 mm"), ("mm", 0.001, "0.024 mm"), ("mm", 1000.0, "24,000 mm")],
    ids=str,
)
def test_wrong_units_are_refused_by_what_they_would_mean(unit, factor, span, tmp_path):
    image = nib.Nifti1Image(noise(SHAPE), np.diag([factor] * 3 + [1]))
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "in.nii")
    with pytest.raises(VolumeError, match=rf"spans {span} along j, .*: are its units wrong\?"):
        read_volume(tmp_path / "in.nii")


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001), ("unknown", 1.0)])
def test_right_units_are_read_as_mm(unit, factor, tmp_path):
    image = nib.Nifti1Image(noise(SHAPE), np.diag([factor] * 3 + [1]))
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "in.nii")
    assert read_volume(tmp_path / "in.nii").spacing == pytest.approx((1, 1, 1))


def test_one_axis_in_other_units_is_named(tmp_path):
    path = save_nifti(tmp_path / "in.nii", noise(SHAPE), np.diag([1.0, 1.0, 3000.0, 1.0]))
    with pytest.raises(VolumeError, match="along k, in voxels of 3,000 mm"):
        read_volume(path)


def forms(path: Path, qform: np.ndarray | None, sform: np.ndarray | None) -> Path:
    image = nib.Nifti1Image(noise(SHAPE), np.eye(4))
    image.set_qform(qform, 1 if qform is not None else 0)
    image.set_sform(sform, 2 if sform is not None else 0)
    image.to_filename(path)
    return path


def test_sform_and_qform_that_disagree_are_told(tmp_path):
    qform, sform = np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([1.0, 1.0, 2.0, 1.0])
    sform[0, 3] = 12
    volume = read_volume(forms(tmp_path / "in.nii", qform, sform))
    assert volume.notes == (f"{volume.name}: sform and qform lie up to 12 mm apart; the sform is used",)
    np.testing.assert_allclose(volume.affine, sform)


def test_an_identity_sform_gives_way_to_the_qform(tmp_path):
    qform = np.diag([1.0, 1.0, 2.5, 1.0])
    qform[:3, 3] = -10, -12, -20
    volume = read_volume(forms(tmp_path / "in.nii", qform, np.eye(4)))
    np.testing.assert_allclose(volume.affine, qform, atol=1e-5)
    (note,) = volume.notes
    # The far corner of the last axis: 17 x 1.5 mm along k, less the origin; the others lie at most that far apart.
    far = max(np.linalg.norm([-10, -12, -20 + 1.5 * k]) for k in (0, 17))
    told = f"sform and qform lie up to {far:.3g} mm apart; the qform is used, as the sform is only the identity matrix"
    assert note == f"{volume.name}: {told}"


@pytest.mark.parametrize("only", ["qform", "sform"])
def test_one_form_alone_needs_no_words(only, tmp_path):
    affine = oblique_affine()
    path = forms(tmp_path / "in.nii", affine if only == "qform" else None, affine if only == "sform" else None)
    assert read_volume(path).notes == ()


def test_rounding_between_the_forms_needs_no_words(tmp_path):
    affine = oblique_affine()
    assert read_volume(forms(tmp_path / "in.nii", affine, affine)).notes == ()


def test_no_form_at_all_is_told(tmp_path):
    path = edited(save_nifti(tmp_path / "in.nii", noise(SHAPE)), sform_code=0, qform_code=0)
    (note,) = read_volume(path).notes
    assert "neither sform nor qform has a code, so that left and right are not known" in note


def test_voxels_of_size_zero_are_refused(tmp_path):
    path = save_nifti(tmp_path / "in.nii", noise(SHAPE))
    edited(path, pixdim=[1, 1, 0, 1, 0, 0, 0, 0], sform_code=0, qform_code=1)
    with pytest.raises(VolumeError, match="has voxels of 1 x 0 x 1 mm, expected sizes above 0: repair pixdim"):
        read_volume(path)


def test_a_quaternion_that_rounds_beyond_one_is_read(tmp_path):
    path = forms(tmp_path / "in.nii", np.diag([2.0, -1.0, -1.0, 1.0]), None)
    # A half turn about i, whose sine is stored as 1 + 5e-7.
    edited(path, quatern_b=np.float32(1 + 5e-7), quatern_c=0, quatern_d=0)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(path).affine  # noqa: B018 (what a reader without care does)
    own = np.array(nib.load(forms(tmp_path / "exact.nii", np.diag([2.0, -1.0, -1.0, 1.0]), None)).affine)
    np.testing.assert_allclose(read_volume(path).source.affine, own, atol=1e-4)


def test_a_quaternion_far_from_one_is_refused(tmp_path):
    path = edited(forms(tmp_path / "in.nii", np.eye(4), None), quatern_b=0.9, quatern_c=0.9)
    with pytest.raises(VolumeError, match="truncated or damaged"):
        read_volume(path)


def test_what_a_file_holds_decides_whether_it_is_unpacked(tmp_path):
    plain = save_nifti(tmp_path / "in.nii", noise(SHAPE))
    for name, content in (("in.nii.gz", plain.read_bytes()), ("packed.nii", gzip.compress(plain.read_bytes()))):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, read_volume(plain).array)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("sides", [(32767,) * 3, (30000, 30000, 2), (2000, 1000, 1000)], ids=str)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(sides, suffix, tmp_path):
    path = save_nifti(tmp_path / "in.nii", noise(SHAPE))
    edited(path, dim=[3, *sides, 1, 1, 1, 1])
    if suffix == ".nii.gz":
        (tmp_path / "in.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(VolumeError, match=r"expected at most 2147483648 voxels|its header asks for \d+ bytes"):
        read_volume(tmp_path / f"in{suffix}")


def test_a_sheared_grid_is_refused_before_the_work_if_the_format_cannot_hold_it(tmp_path):
    pytest.importorskip("SimpleITK")
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    volume = read_volume(save_nifti(tmp_path / "in.nii", noise(SHAPE), sheared))
    with pytest.raises(VolumeError, match=r"not at right angles, which .mha cannot store: write .nii.gz"):
        check_output_path(tmp_path / "out.mha", volume)
    assert check_output_path(tmp_path / "out.nii.gz", volume)


def test_a_link_to_nothing_as_output_is_refused(tmp_path):
    (tmp_path / "out.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    with pytest.raises(VolumeError, match="is a link to .*gone.nii.gz, which does not exist: remove it"):
        check_output_path(tmp_path / "out.nii.gz")
