"""FreeSurfer's .mgh and .mgz: nibabel writes them, and what is read is what a NIfTI of the same volume holds."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import assert_same_content, in_orientation, noise, oblique_affine

from hf_binaryformer.pipelines.volumes import VolumeError, read_volume, write_labels


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.MGHImage(array, affine.astype(np.float32)), path)
    return path


# FreeSurfer's own volumes are LIA.
@pytest.mark.parametrize("codes", ["RAS", "LIA", "PSR", "SLA"])
@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".MGZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_a_volume_is_read_where_it_lies(codes, suffix, dtype, tmp_path):
    array, affine = in_orientation(noise(), oblique_affine(), codes)
    array = (100 * array).astype(dtype)
    lower = save(tmp_path / f"a{suffix.lower()}", array, affine)
    path = lower.rename(tmp_path / f"in{suffix}")
    volume = read_volume(path)
    assert volume.array.dtype == np.float32 and volume.array.dtype.isnative and volume.notes == ()
    assert_same_content(volume.array, volume.affine, array.astype(np.float32), affine)
    if dtype == np.int32:
        labels = read_volume(path, labels=True)
        out = nib.load(write_labels(tmp_path / "out.nii.gz", labels.array, labels))
        np.testing.assert_array_equal(np.asarray(out.dataobj), array)
        np.testing.assert_allclose(out.affine, affine, atol=1e-4)


def test_a_file_without_a_position_is_told(tmp_path):
    path = save(tmp_path / "in.mgh", noise((5, 6, 7)), np.eye(4))
    content = bytearray(path.read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    path.write_bytes(content)
    volume = read_volume(path)
    assert "states no position" in volume.notes[0]
    # Columns run to the left, rows down, slices to the front, 1 mm each; the middle of the volume is 0.
    np.testing.assert_allclose(volume.affine[:3, :3], np.eye(3), atol=1e-6)
    assert volume.array.shape == (5, 7, 6)


def test_damaged_files_are_noticed(tmp_path):
    whole = save(tmp_path / "in.mgh", noise((12, 13, 14)), np.eye(4)).read_bytes()
    packed = gzip.compress(whole)
    flipped = bytearray(packed)
    flipped[len(flipped) // 2] ^= 0xFF
    huge = bytearray(whole)
    huge[4:8] = (2**31 - 1).to_bytes(4, "big")
    unknown = bytearray(whole)
    unknown[20:24] = (77).to_bytes(4, "big")
    files = {
        "short.mgh": whole[:-3000],
        "header.mgh": whole[:100],
        "empty.mgz": b"",
        "short.mgz": packed[:-9],
        "flipped.mgz": bytes(flipped),
        "type.mgh": bytes(unknown),
        "text.mgh": b"this is no volume" * 100,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=f"{name} is truncated or damaged"):
            read_volume(tmp_path / name)
    huge[4:8] = (1000).to_bytes(4, "big")
    (tmp_path / "claims.mgh").write_bytes(huge)
    with pytest.raises(VolumeError, match="the file has at most"):
        read_volume(tmp_path / "claims.mgh")
    huge[4:8] = (2**31 - 1).to_bytes(4, "big")
    (tmp_path / "huge.mgh").write_bytes(huge)
    with pytest.raises(VolumeError, match="at most"):
        read_volume(tmp_path / "huge.mgh")


def test_several_frames_are_refused(tmp_path):
    path = save(tmp_path / "in.mgz", np.zeros((5, 6, 7, 3), np.float32), np.eye(4))
    with pytest.raises(VolumeError, match=r"\(5, 6, 7, 3\)"):
        read_volume(path)
