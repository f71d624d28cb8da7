"""Label maps as the engine uses them: RAS order, cropped, resampled, with distances to the organ that stripping keeps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from hf_binaryformer.data.boxes import bounding_box, shifted
from hf_binaryformer.data.synthesis.axes import along_axes, linear_matrix
from hf_binaryformer.data.synthesis.description import Description, load_description
from hf_binaryformer.pipelines.label_values import label_numbers

PAD = 12
# Distances are known up to here, mm; the closing that removes sulci from the organ's outline has this radius.
REACH, CLOSING = 30, 3


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A label map (I, J, K) int16 in RAS order, and how a description reads it.

    Args:
        values: the map.
        affine: from mm, counted from the first voxel, to mm of the patient.
        description: its labels and tissues.
        mm: spacing of the map along each axis.
        beyond: what lies outside of it, as grid_sample calls it: "zeros", or "border" for a body that goes on.
    """

    values: np.ndarray
    affine: np.ndarray
    description: Description
    mm: float = 1.0
    beyond: str = "zeros"

    @cached_property
    def core(self) -> np.ndarray:
        """The organ that stripping keeps, bool (I, J, K)."""
        kept = [v for region in self.description.regions if region.core for v in region.values]
        table = np.zeros(int(self.values.max()) + 1, bool)
        table[[value for value in kept if value < len(table)]] = True
        return table[self.values]

    @cached_property
    def distance(self) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance in mm to the organ's closed outline, negative inside, and the first voxel of its box."""
        box = tuple(
            slice(max(0, side.start - REACH), min(size, side.stop + REACH))
            for side, size in zip(bounding_box(self.core), self.core.shape, strict=True)
        )
        closed = ~_spread(~_spread(self.core[box], CLOSING), CLOSING)
        inside = ndimage.binary_fill_holes(closed)
        signed = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
        return signed.astype(np.float32), np.array([side.start for side in box])

    @cached_property
    def membrane(self) -> np.ndarray:
        """Voxels of ``agents.membrane``, bool (I, J, K)."""
        rule = self.description.agents["membrane"]
        near = _spread(np.isin(self.values, rule["beside"]), int(np.ceil(rule["mm"])))
        return near & np.isin(self.values, rule["of"])


def _spread(mask: np.ndarray, reach: int) -> np.ndarray:
    """Voxels of a cube of ``2 * reach + 1`` around any voxel of ``mask``, bool (I, J, K)."""
    return ndimage.maximum_filter(mask, 2 * reach + 1, mode="constant")


def trim(values: np.ndarray, affine: np.ndarray, whole: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A label map, 1 mm, with a border of 12 voxels. If it is a ``whole`` body, its largest connected piece alone."""
    if whole:
        pieces, _ = ndimage.label(values > 0)
        values = np.where(pieces == np.bincount(pieces.ravel())[1:].argmax() + 1, values, 0)
    box = bounding_box(values > 0)
    return np.pad(values[box], PAD), shifted(affine, np.array([side.start for side in box]) - PAD)


@lru_cache(maxsize=1)
def read_anatomy(path: Path, description: Path) -> Anatomy:
    """Label map at ``path`` for the description at another path.

    Raises:
        ValueError: the voxels are not 1 mm and the description does not resample them, or the map has values that the
            description lacks, or no organ.
    """
    told = load_description(description)
    source = nib.as_closest_canonical(nib.load(path))
    numbers, notes = label_numbers(path, np.asanyarray(source.dataobj))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    spacing = np.array(nib.affines.voxel_sizes(source.affine))
    if told.resample_mm is None and not np.allclose(spacing, 1.0, atol=0.01):
        raise ValueError(f"{path}: expected voxels of 1 mm, found {spacing.round(3).tolist()}; resample it first")
    known = {0, *(value for region in told.regions for value in region.values)}
    if unknown := sorted(set(np.unique(numbers).tolist()) - known):
        raise ValueError(f"{path} has the values {unknown[:8]}, which {description.name} lacks: add them to a region")
    if not np.isin(numbers, list(told.label_names)[1:]).any():
        raise ValueError(f"{path} has none of the labels of {description.name}; expected {list(told.label_names)[1:]}")
    if told.resample_mm is None:
        return Anatomy(*trim(numbers.astype(np.int16), source.affine), told)
    box = bounding_box(numbers > 0)
    start = np.array([side.start for side in box])
    affine = shifted(source.affine, start)
    affine[:3, :3] /= spacing
    values = resampled(numbers[box].astype(np.int16), spacing, told.resample_mm)
    return Anatomy(values, affine, told, told.resample_mm)


def resampled(values: np.ndarray, spacing: np.ndarray, mm: float) -> np.ndarray:
    """A label map at ``mm`` along each axis, from the distances to each label's surface, so that thick slices are no steps.

    Args:
        values: (I, J, K) of integers.
        spacing: (3,) mm.
        mm: wanted spacing; the first voxels have the same centre.
    """
    size = [int(np.floor((n - 1) * s / mm)) + 1 for n, s in zip(values.shape, spacing, strict=True)]
    wanted, given = (
        [mm * np.arange(n) for n in size],
        [s * np.arange(n) for n, s in zip(values.shape, spacing, strict=True)],
    )
    found, best = np.zeros(size, np.int16), np.zeros(size, np.float32)
    # One voxel more on each side, so that every surface has an outside.
    margin = 2
    for value, box in enumerate(ndimage.find_objects(values), start=1):
        if box is None:
            continue
        outer = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box)
        one = values[outer] == value
        # Between the planes of a thin axis, the share of the label in finer voxels; along a thick one, distances.
        places = [g[side] for g, side in zip(given, outer, strict=True)]
        inner = tuple(
            slice(*np.searchsorted(w, [p[0] - mm / 2, p[-1] + mm / 2])) for w, p in zip(wanted, places, strict=True)
        )
        plane = [linear_matrix(wanted[a][inner[a]], places[a]) if a < 2 else None for a in range(3)]
        share = along_axes(torch.from_numpy(one.astype(np.float32)), plane).numpy() >= 0.5
        if not share.any():
            continue
        depth = _signed_depth(share, (mm, mm, float(spacing[2])))
        along = [None, None, linear_matrix(wanted[2][inner[2]], places[2])]
        depth = along_axes(torch.from_numpy(depth), along).numpy()
        # Half a slice beyond the first and the last slice of a label, it ends.
        ahead = depth > best[inner]
        found[inner][ahead], best[inner][ahead] = value, depth[ahead]
    return found


def _signed_depth(mask: np.ndarray, sampling: tuple[float, ...]) -> np.ndarray:
    """Distance in mm to the surface of a mask, positive inside, float32."""
    inside = ndimage.distance_transform_edt(mask, sampling)
    outside = ndimage.distance_transform_edt(~mask, sampling)
    half = min(sampling) / 2
    return np.where(mask, inside - half, half - outside).astype(np.float32)
