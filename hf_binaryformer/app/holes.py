"""Holes that a visitor draws: a box or an ellipsoid around the crosshair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.volumes import Volume

FORMS = ("ellipsoid", "box")


def hole_mask(volume: Volume, centre: Sequence[float], size: Sequence[float], form: str) -> np.ndarray:
    """A box or an ellipsoid along the volume's own axes.

    A voxel belongs to it if its centre does: abs(x) ≤ s/2 along each axis for a box, and Σ (2x/s)² ≤ 1 for an ellipsoid.

    Args:
        volume: the scan.
        centre: (R, A, S) in mm, the scanner's coordinates.
        size: whole extent along I, J, K in mm, each above 0.
        form: "ellipsoid" or "box".

    Returns:
        (I, J, K) uint8, 1 inside.

    Raises:
        VolumeError: the hole misses the volume, or is smaller than a voxel.
        ValueError: no such form, or a size that is not positive.
    """
    if form not in FORMS:
        raise ValueError(f"form is '{form}', expected one of {', '.join(FORMS)}")
    if len(size) != 3 or not min(size) > 0:
        raise ValueError(f"size is {tuple(size)}, expected three numbers of mm above 0")
    middle = (np.linalg.inv(volume.affine) @ (*centre, 1.0))[:3]
    places = np.ogrid[tuple(slice(n) for n in volume.array.shape)]
    # Distance from the centre in halves of the size, (I, 1, 1), (1, J, 1) and (1, 1, K).
    far = [
        np.abs(place - at) * mm * 2 / extent
        for place, at, mm, extent in zip(places, middle, volume.spacing, size, strict=True)
    ]
    inside = (
        np.maximum(np.maximum(far[0], far[1]), far[2]) if form == "box" else far[0] ** 2 + far[1] ** 2 + far[2] ** 2
    )
    mask = (inside <= 1).astype(np.uint8)
    if not mask.any():
        at = ", ".join(f"{x:.0f}" for x in centre)
        raise VolumeError(
            f"the hole at ({at}) mm holds no voxel of the scan: move the crosshair into it, or make it larger"
        )
    return mask
