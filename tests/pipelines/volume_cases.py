"""Small volumes in every position, and how to compare two of them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform


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


def assert_same_content(array_a: np.ndarray, affine_a: np.ndarray, array_b: np.ndarray, affine_b: np.ndarray) -> None:
    """Both hold the same value at the same place in mm, whatever their axis orders."""
    assert array_a.size == array_b.size
    index = np.argwhere(np.ones(array_a.shape, dtype=bool))
    points = index @ affine_a[:3, :3].T + affine_a[:3, 3]
    other = np.linalg.solve(affine_b[:3, :3], (points - affine_b[:3, 3]).T).T
    np.testing.assert_allclose(other, np.round(other), atol=1e-3)
    np.testing.assert_array_equal(array_b[tuple(np.round(other).astype(int).T)], array_a.ravel())
