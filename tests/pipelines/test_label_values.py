"""Label files whose values are nearly whole, interpolated, or NaN: rounded and told, or refused with the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import noise, save_nifti

from hf_binaryformer.data.prepared_folder import Case, read_labels
from hf_binaryformer.pipelines.label_values import label_numbers
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume


@pytest.mark.parametrize("off", [-0.0001, 0.0000457, 0.009, -0.009])
def test_nearly_whole_values_are_rounded_and_told(off: float, tmp_path: Path) -> None:
    truth = noise() + 1
    volume = read_volume(save_nifti(tmp_path / "x.nii.gz", (truth + off).astype(np.float64)), labels=True)
    np.testing.assert_array_equal(volume.array, truth)
    (note,) = volume.notes
    assert str(tmp_path / "x.nii.gz") in note and f"up to {abs(off):.2g} off" in note and "rounded" in note


def test_a_scaling_factor_in_the_header_costs_nothing(tmp_path: Path) -> None:
    """A slope of 1.0000152 turns a label 3 into 3.0000457."""
    image = nib.Nifti1Image(np.full((3, 3, 3), 3, np.uint8), np.eye(4))
    image.header.set_slope_inter(1.0000152, 0)
    content = bytearray(image.to_bytes())
    # Byte 112 of a NIfTI-1 header is scl_slope; nibabel itself writes NaN there for data that it was given unscaled.
    content[112:116] = np.float32(1.0000152).tobytes()
    content[116:120] = np.float32(0).tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    assert np.asanyarray(nib.load(tmp_path / "x.nii").dataobj).max() > 3
    volume = read_volume(tmp_path / "x.nii", labels=True)
    assert (volume.array == 3).all() and len(volume.notes) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_values_need_no_note(dtype: type, tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "x.nii.gz", (noise() // 2).astype(dtype)), labels=True)
    np.testing.assert_array_equal(volume.array, noise() // 2)
    assert volume.notes == () and volume.array.dtype == np.int32


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        (0.5, ["1 voxels of 210", "such as 0.5", "up to 0.5 off", "interpolated", "nearest neighbour"]),
        (2.011, ["1 voxels of 210", "such as 2.011", "up to 0.011 off", "nearest neighbour"]),
        (np.nan, ["1 NaN or infinite voxels of 210", "numpy.nan_to_num"]),
        (-np.inf, ["1 NaN or infinite voxels of 210", "numpy.nan_to_num"]),
        (-1.0, ["values from -1 to 3", "at least 0"]),
        (3e9, ["3e+09", "give a label map"]),
    ],
)
def test_what_is_no_label_is_refused_with_the_remedy(value: float, messages: list[str]) -> None:
    array = np.full((5, 6, 7), 3.0)
    array[2, 3, 4] = value
    with pytest.raises(VolumeError, match="expected label numbers") as refusal:
        label_numbers("x.nii", array)
    assert all(message in str(refusal.value) for message in ["x.nii", *messages]), str(refusal.value)


def test_a_little_below_0_is_0() -> None:
    numbers, notes = label_numbers("x", np.array([[[-0.004, 1.0]]]))
    assert numbers.tolist() == [[[0, 1]]] and len(notes) == 1


def test_labels_of_a_training_folder_are_told_by_a_warning(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", np.full((4, 4, 4), 0.9999, np.float32))
    case = Case("x", "x", "train", path, path)
    with pytest.warns(UserWarning, match=r"x\.nii\.gz has labels up to 0.0001 off whole numbers"):
        assert (read_labels(case).array == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_nifti(path, np.ones((4, 4, 4), np.uint8))
        read_labels(case)
