"""Voxel grids: where a volume lies in space, how it is resampled, and whether two volumes lie on the same grid.

All arrays are (I, J, K) and all affines map the *centres* of voxels to mm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# Corners of two grids may lie this many voxels apart and the grids still count as the same: qform and sform of one file
# differ by rounding, which grows with the distance from the origin.
SAME_GRID_TOLERANCE = 0.05
# Spacings that differ by less than this share count as equal.
SAME_SPACING_TOLERANCE = 0.01
FOREGROUND_THRESHOLD = 0.1
FOREGROUND_MARGIN_MM = 10.0
# Share of a voxel that the rounding of a header may be worth.
ROUNDING = 1e-3
# Connected pieces of the foreground smaller than this share of the largest are specks: bright voxels in air.
SPECK_SHARE = 0.01


# Beyond these, the units are wrong: metres or micrometres taken for mm, or the reverse.
MIN_EXTENT_MM, MAX_EXTENT_MM = 1.0, 3000.0
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.01, 100.0
MAX_VOXELS = 2**31
# Deflate does not compress by more than this.
MAX_COMPRESSION = 1032
# The voxels of a box, a slice for each axis.
Box = tuple[slice, slice, slice]


class VolumeError(ValueError):
    """A volume cannot be used; the message says what was expected, what was found, and the remedy."""


def check_shape(name: object, shape: Sequence[int]) -> None:
    """Refuse anything but one 3D volume; further axes of length 1 are allowed.

    Raises:
        VolumeError: fewer than three axes, an empty one, or a series of volumes.
    """
    if len(shape) < 3 or 0 in shape:
        raise VolumeError(
            f"{name} has shape {tuple(shape)}, expected three axes and at least one voxel: export it as a volume"
        )
    if any(n != 1 for n in shape[3:]):
        raise VolumeError(
            f"{name} is a series of {int(np.prod(shape[3:]))} volumes, shape {tuple(shape)}, expected one 3D volume: "
            f"take one out of it, with nibabel.four_to_three for example"
        )


def check_claim(name: object, shape: Sequence[int], bytes_of_voxel: float, available: float) -> None:
    """Refuse, before any memory is taken, a header that asks for more voxels than its file can hold.

    Args:
        name: of the file, for the message.
        shape: of all axes.
        bytes_of_voxel: memory of one voxel.
        available: the most bytes that the file can hold, unpacked.

    Raises:
        VolumeError: it asks for more than ``available`` bytes or 2³¹ voxels, or an axis has a negative length.
    """
    voxels = math.prod(int(n) for n in shape)
    if min(shape, default=0) < 0 or voxels > MAX_VOXELS:
        raise VolumeError(f"{name} has shape {tuple(shape)}, expected at most {MAX_VOXELS} voxels: export it again")
    if voxels * bytes_of_voxel > available:
        raise VolumeError(
            f"{name} is truncated, damaged or not of this kind: its header asks for {voxels * bytes_of_voxel:.0f} bytes of "
            f"voxels, the file has at most {available:.0f}, expected a complete file: fetch or export it again"
        )


def check_extent(name: object, shape: Sequence[int], affine: np.ndarray) -> None:
    """Refuse a volume whose units must be wrong.

    Raises:
        VolumeError: it spans less than 1 mm or more than 3 m, or its voxels have less than 0.01 or more than 100 mm.
    """
    spacing = affine_spacing(affine)
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    longest = int(np.argmax(extent))
    wrong = [axis for axis, mm in enumerate(spacing) if not MIN_VOXEL_MM <= mm <= MAX_VOXEL_MM]
    if not MIN_EXTENT_MM <= extent[longest] <= MAX_EXTENT_MM:
        wrong.insert(0, longest)
    if wrong:
        raise VolumeError(
            f"{name} spans {_mm(extent[wrong[0]])} along {'ijk'[wrong[0]]}, in voxels of {_mm(spacing[wrong[0]])}: are its "
            f"units wrong? Expected {MIN_EXTENT_MM:g} to {MAX_EXTENT_MM:g} mm, in voxels of {MIN_VOXEL_MM:g} to "
            f"{MAX_VOXEL_MM:g} mm: repair the header (in NIfTI, pixdim, sform and xyzt_units)"
        )


def _mm(length: float) -> str:
    return f"{length:.3g} mm" if length < 1000 else f"{length:,.0f} mm"


def affine_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along I, J, K of a (4, 4) affine."""
    i, j, k = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    return float(i), float(j), float(k)


def same_spacing(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two voxel sizes differ by no more than 1 % along any axis."""
    return all(abs(x / y - 1) <= SAME_SPACING_TOLERANCE for x, y in zip(a, b, strict=True))


def grid_distance(affine_a: np.ndarray, affine_b: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance, in voxels of the first, between the corners of two grids of one shape."""
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in shape), [1], indexing="ij")).reshape(4, -1)
    offset = ((np.asarray(affine_b) - np.asarray(affine_a)) @ corners)[:3]
    return float(np.sqrt((offset**2).sum(axis=0)).max() / min(affine_spacing(affine_a)))


def foreground_box(
    scaled: np.ndarray,
    spacing: Sequence[float],
    *,
    threshold: float = FOREGROUND_THRESHOLD,
    margin_mm: float = FOREGROUND_MARGIN_MM,
) -> Box:
    """The box of the foreground (:func:`foreground_mask`), with a margin; the whole volume if there is none.

    Args:
        scaled: intensities scaled to about [0, 1], (I, J, K).
        spacing: voxel size along I, J, K in mm.
        threshold: in units of the scaled intensities.
        margin_mm: added on every side, as far as the volume reaches.
    """
    return add_margin(occupied_box(foreground_mask(scaled, threshold)), scaled.shape, spacing, margin_mm)


def add_margin(
    box: Box, shape: Sequence[int], spacing: Sequence[float], margin_mm: float = FOREGROUND_MARGIN_MM
) -> Box:
    """The box with a margin on every side, as far as a volume of this shape reaches."""
    parts = []
    for part, size, mm in zip(box, shape, spacing, strict=True):
        # An oblique header's voxel of 1 mm may be 0.99999999 mm, which must not add a voxel.
        margin = int(np.ceil(margin_mm / mm - ROUNDING))
        parts.append(slice(max(0, part.start - margin), min(size, part.stop + margin)))
    return parts[0], parts[1], parts[2]


def narrow_margin(box: Box, foreground: Box, voxels: Sequence[int | None]) -> Box:
    """The box with narrower margins along the axes where it then has no more than these voxels.

    Args:
        box: the foreground with its margin.
        foreground: lies in the box.
        voxels: most voxels along I, J, K; None, or fewer than the foreground has, leave an axis as it is.
    """
    parts = []
    for part, inner, most in zip(box, foreground, voxels, strict=True):
        left = -1 if most is None else most - (inner.stop - inner.start)
        if left >= 0 and part.stop - part.start > left + inner.stop - inner.start:
            # Half on each side, or less where the volume ends.
            before = min(inner.start - part.start, max(left // 2, left - (part.stop - inner.stop)))
            part = slice(inner.start - before, inner.stop + left - before)
        parts.append(part)
    return parts[0], parts[1], parts[2]


def extent_mm(box: Box, spacing: Sequence[float]) -> tuple[float, float, float]:
    """Edge lengths of a box in mm."""
    i, j, k = ((part.stop - part.start) * mm for part, mm in zip(box, spacing, strict=True))
    return float(i), float(j), float(k)


def foreground_mask(scaled: np.ndarray, threshold: float = FOREGROUND_THRESHOLD) -> np.ndarray:
    """Everything brighter than a threshold, without specks; bool, (I, J, K).

    Args:
        scaled: intensities scaled to about [0, 1], (I, J, K).
        threshold: in units of the scaled intensities.
    """
    from scipy.ndimage import label

    mask = scaled > threshold
    pieces, count = label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return (sizes >= SPECK_SHARE * sizes.max())[pieces]


def occupied_box(mask: np.ndarray) -> Box:
    """The smallest box that holds all of a mask (I, J, K); all of the volume where the mask is empty."""
    parts = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        parts.append(slice(int(hits[0]), int(hits[-1]) + 1) if hits.size else slice(0, size))
    return parts[0], parts[1], parts[2]


def crop_affine(affine: np.ndarray, box: Sequence[slice]) -> np.ndarray:
    """Affine of ``array[box]``."""
    cropped = np.array(affine, dtype=np.float64)
    cropped[:3, 3] += cropped[:3, :3] @ [s.start for s in box]
    return cropped


def resample(
    array: np.ndarray, affine: np.ndarray, spacing: Sequence[float], *, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change the voxel size along the array's own axes; the volume keeps its centre.

    Args:
        array: (I, J, K).
        affine: (4, 4), voxel to mm.
        spacing: new voxel size along I, J, K in mm, reached exactly; the length is rounded to whole voxels.
        order: 0 for labels (nearest voxel, dtype kept), 1 for intensities (linear, float32; if the new voxel is larger,
            the average over it, to avoid aliasing).

    Returns:
        The resampled array (I', J', K') and its affine.

    Raises:
        VolumeError: a spacing is not positive, or ``order`` is neither 0 nor 1.
    """
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise VolumeError(f"spacing is {tuple(spacing)}, expected three positive numbers in mm")
    ratio = np.divide(spacing, affine_spacing(affine))
    shape = [max(1, round(n / r)) for n, r in zip(array.shape, ratio, strict=True)]
    start = [(n - 1 - (m - 1) * r) / 2 for n, m, r in zip(array.shape, shape, ratio, strict=True)]
    target = np.array(affine, dtype=np.float64)
    target[:3, 3] += target[:3, :3] @ start
    target[:3, :3] *= ratio
    return resample_to(array, affine, shape, target, order=order), target


def resample_to(
    array: np.ndarray, affine: np.ndarray, shape: Sequence[int], target_affine: np.ndarray, *, order: int
) -> np.ndarray:
    """Resample a volume to another grid whose axes are parallel to its own.

    Voxels of the target whose centre lies outside the source volume become 0.

    Args:
        array: (I, J, K).
        affine: its (4, 4) affine, voxel to mm.
        shape: shape of the target grid.
        target_affine: (4, 4) affine of the target grid.
        order: 0 nearest or 1 linear, as in :func:`resample`.

    Returns:
        Array of ``shape``; float32 for order 1, the array's own dtype for order 0.

    Raises:
        VolumeError: the grids are rotated against each other, or ``order`` is neither 0 nor 1.
    """
    to_source = np.linalg.inv(affine) @ np.asarray(target_affine, dtype=np.float64)
    step, start = np.diag(to_source)[:3], to_source[:3, 3]
    drift = np.abs(to_source[:3, :3] - np.diag(step)) @ (np.asarray(shape) - 1)
    if drift.max() > 2 * SAME_GRID_TOLERANCE:
        raise VolumeError(
            f"the grids are turned against each other (off by {drift.max():.3g} voxels at the far end), expected axes "
            f"that run along each other: bring both to one orientation and frame first"
        )
    axes = list(zip(array.shape, shape, step, start, strict=True))
    if order == 0:
        picked = [_nearest(*axis) for axis in axes]
        nearest = array[np.ix_(*(index for index, _ in picked))]
        outside = ~np.logical_and.outer(np.logical_and.outer(picked[0][1], picked[1][1]), picked[2][1])
        nearest[outside] = 0
        return nearest
    if order != 1:
        raise VolumeError(f"order is {order}, expected 0 (nearest) or 1 (linear)")

    result = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    # The axes are independent; starting with the one that shrinks most keeps the work small.
    for axis in sorted(range(3), key=lambda a: axes[a][1] / axes[a][0]):
        weights = _linear_weights(*axes[axis])
        if axis == 0:
            result = (weights @ result.flatten(1)).unflatten(1, result.shape[1:])
        else:
            result = weights @ result if axis == 1 else result @ weights.T
    return result.numpy()


def _nearest(size: int, target_size: int, step: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, for every target voxel: index of the nearest source voxel, and whether it lies in the volume."""
    centre = start + step * np.arange(target_size)
    return np.clip(np.floor(centre + 0.5), 0, size - 1).astype(np.intp), _inside(centre, size)


def _inside(centre: np.ndarray, size: int) -> np.ndarray:
    return (centre >= -0.5 - 1e-4) & (centre <= size - 0.5 + 1e-4)


def _linear_weights(size: int, target_size: int, step: float, start: float) -> torch.Tensor:
    """Along one axis: (target_size, size) weights of linear interpolation.

    Where the step is larger than one source voxel, the interpolated function is averaged over a box of width
    sqrt(step^2 - 1), which keeps the blur of a large voxel. A linear field stays exact, and step 1 changes nothing.
    """
    centre = start + step * np.arange(target_size)
    distance = np.clip(centre, 0, size - 1)[:, None] - np.arange(size)
    width = np.sqrt(max(step**2 - 1, 0.0))
    if width < 0.05:
        weights = np.clip(1 - np.abs(distance), 0, None)
    else:
        weights = _hat_integral(distance + width / 2) - _hat_integral(distance - width / 2)
        weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy((weights * _inside(centre, size)[:, None]).astype(np.float32))


def _hat_integral(x: np.ndarray) -> np.ndarray:
    """Integral of max(0, 1 - abs(t)) from minus infinity to x."""
    x = np.clip(x, -1, 1)
    return 0.5 + x - np.sign(x) * x**2 / 2
