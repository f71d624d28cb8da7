"""Boxes of voxels: the smallest one around a mask, and where a part of a volume lies."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds all true voxels of `mask` (at least one must be true)."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def shifted(affine: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Affine of the sub-volume whose first voxel is `start`."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ start
    return moved
