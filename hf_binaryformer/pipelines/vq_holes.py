"""Brings a volume with a hole to the autoencoder's intensities and grid, and brings the fill back into the hole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.grids import (
    FOREGROUND_THRESHOLD,
    Box,
    VolumeError,
    affine_spacing,
    foreground_mask,
    occupied_box,
    resample,
    resample_to,
    same_spacing,
)
from hf_binaryformer.pipelines.vq_sampling import Placement, place_on_grid


@dataclass(frozen=True, eq=False)
class HoleCase:
    """One volume on its own grid, with the mapping to the model's grid and back.

    Made by :meth:`of`. The volume's values inside the hole affect only ``image``.

    Args:
        image: (I, J, K) float32, any intensities.
        hole: the same shape, bool.
        affine: (4, 4), voxel to mm.
        scale: from the intensities of the known voxels.
        spacing: voxel size of the model's grid in mm.
        network_affine: affine of the volume resampled to that voxel size.
        placement: position of the resampled volume on the model's grid.
        network_hole: bool, on the model's grid; every voxel that the hole overlaps.
        cut_off: whether known foreground lies beyond the grid.
    """

    image: np.ndarray
    hole: np.ndarray
    affine: np.ndarray
    scale: IntensityScale
    spacing: tuple[float, float, float]
    network_affine: np.ndarray
    placement: Placement
    network_hole: np.ndarray
    cut_off: bool

    @classmethod
    def of(
        cls,
        image: np.ndarray,
        hole: np.ndarray,
        affine: np.ndarray,
        *,
        grid: Sequence[int],
        spacing: tuple[float, float, float],
        percentiles: Sequence[float],
        ceiling: float,
    ) -> HoleCase:
        """Scale and place a volume by its known voxels only.

        Args:
            image, hole, affine: as above.
            grid: voxels of the model's grid.
            spacing: their size in mm.
            percentiles, ceiling: see ``IntensityScale.of``.

        Raises:
            VolumeError: the hole does not fit on the grid.
            ValueError: the known intensities are all equal.
        """
        all_unknown = bool(hole.all())
        darkest = np.float32(0) if all_unknown else image[~hole].min()
        known, network_affine, touched = np.where(hole, darkest, image), affine, hole
        if not same_spacing(affine_spacing(affine), spacing):
            known, network_affine = resample(known, affine, spacing, order=1)
            touched = resample(hole.astype(np.float32), affine, spacing, order=1)[0] > 0
        # If nothing is known, the scale is that of the autoencoder's own intensities, as in synthesis.
        scale = IntensityScale(0, 1, ceiling)
        if not all_unknown:
            array, seen = (image, ~hole) if touched.all() else (known, ~touched)
            scale = IntensityScale.of(array, percentiles, ceiling, known=seen)
        scaled = np.where(touched, np.float32(0), scale.apply(known))
        placed, placement = place_on_grid(scaled, grid, box=object_box(scaled, touched, grid, spacing))
        seen, there = ((a > FOREGROUND_THRESHOLD).sum() for a in (placed, scaled))
        # If nothing is known, it is not known either whether there is only air around the volume.
        network_hole = placement.apply(touched, grid) | all_unknown
        return cls(image, hole, affine, scale, spacing, network_affine, placement, network_hole, bool(seen < there))

    def to_network(self, image: np.ndarray) -> np.ndarray:
        """Scale an image on this volume's grid (I, J, K) and bring it to the model's grid; 0 outside the volume."""
        if self.network_affine is not self.affine:
            image, _ = resample(image, self.affine, self.spacing, order=1)
        return self.placement.apply(self.scale.apply(image), self.network_hole.shape)

    def network_image(self) -> np.ndarray:
        """This image, scaled and on the model's grid, with 0 in the hole."""
        image = np.where(self.hole, np.float32(self.scale.low), self.image)
        return np.where(self.network_hole, np.float32(0), self.to_network(image))

    def to_input(self, decoded: np.ndarray) -> np.ndarray:
        """A decoded volume on the model's grid, brought to this image's grid and intensities; (I, J, K) float32."""
        scaled = self.placement.undo(decoded)
        if self.network_affine is not self.affine:
            scaled = resample_to(scaled, self.network_affine, self.image.shape, self.affine, order=1)
        return self.scale.undo(scaled)

    def composite(self, fill: np.ndarray, feather: int = 0) -> np.ndarray:
        """This image with its hole taken from ``fill`` (I, J, K).

        Args:
            fill: intensities as the image's.
            feather: number of voxels, inwards from the hole's edge, over which the fill is blended. The difference
                between the nearest known voxel and that voxel's value in ``fill`` is added with decreasing weight.
        """
        # With a margin of one voxel around the hole, the box holds the nearest known voxel of every voxel of the hole.
        box = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in occupied_box(self.hole))
        hole, image, inner = self.hole[box], self.image[box], fill[box]
        if feather and hole.any() and not hole.all():
            from scipy.ndimage import distance_transform_edt

            distance, nearest = distance_transform_edt(hole, return_indices=True)
            weight = np.clip(1 - distance / (feather + 1), 0, 1).astype(np.float32)
            inner = inner + weight * (image - inner)[tuple(nearest)]
        filled = self.image.copy()
        filled[box] = np.where(hole, inner, image)
        return filled


def object_box(scaled: np.ndarray, hole: np.ndarray, grid: Sequence[int], spacing: Sequence[float]) -> Box:
    """The box to centre on the grid: the known foreground, and as much of the hole as there is room for.

    The object continues inside the hole, but its extent there is unknown.

    Args:
        scaled: (I, J, K) at the grid's voxel size, 0 for background.
        hole: the same, bool.
        grid: voxels along I, J, K.
        spacing: their size in mm, for the message.

    Raises:
        VolumeError: the foreground is larger than the grid, and the hole lies in a part of it that would be cut off.
    """
    foreground = foreground_mask(scaled) & ~hole
    known, unknown = occupied_box(foreground), occupied_box(hole)
    if not hole.any() or not foreground.any():
        return known
    parts = []
    for axis, (own, other, size) in enumerate(zip(known, unknown, grid, strict=True)):
        length = own.stop - own.start
        start = (own.start + own.stop - size) // 2
        if length > size and (other.start < start or other.stop > start + size):
            raise VolumeError(
                f"along axis {'IJK'[axis]} the image spans {length * spacing[axis]:.0f} mm and the hole lies at its end, "
                f"beyond the {size * spacing[axis]:.0f} mm of the checkpoint's grid; expected a hole inside that grid: "
                f"crop the image around the hole (for a brain model, strip the skull) or take another checkpoint"
            )
        before, after = max(own.start - other.start, 0), max(other.stop - own.stop, 0)
        share = min(1.0, max(size - length, 0) / max(before + after, 1))
        parts.append(slice(own.start - round(before * share), own.stop + round(after * share)))
    return parts[0], parts[1], parts[2]
