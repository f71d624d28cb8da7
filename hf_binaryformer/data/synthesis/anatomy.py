"""Label maps as the engine uses them: in RAS order, cropped, with distances to the organ that stripping keeps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from hf_binaryformer.data.boxes import bounding_box, shifted
from hf_binaryformer.data.synthesis.description import Description, load_description
from hf_binaryformer.pipelines.label_values import label_numbers

PAD = 12
# Distances are known up to here, mm; the closing that removes sulci from the organ's outline has this radius.
REACH, CLOSING = 30, 3


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A label map (I, J, K) int16 in RAS order, 1 mm, its affine, and how a description reads it."""

    values: np.ndarray
    affine: np.ndarray
    description: Description

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
        closed = F.max_pool3d(torch.from_numpy(self.core[box])[None].float(), 2 * CLOSING + 1, 1, CLOSING)
        closed = 1 - F.max_pool3d(1 - closed, 2 * CLOSING + 1, 1, CLOSING)
        inside = ndimage.binary_fill_holes(closed[0].numpy() > 0.5)
        signed = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
        return signed.astype(np.float32), np.array([side.start for side in box])

    @cached_property
    def membrane(self) -> np.ndarray:
        """Voxels of ``agents.membrane``, bool (I, J, K)."""
        rule = self.description.agents["membrane"]
        beside = torch.from_numpy(np.isin(self.values, rule["beside"]).astype(np.float32))[None]
        reach = int(np.ceil(rule["mm"]))
        near = F.max_pool3d(beside, 2 * reach + 1, 1, reach)[0].numpy() > 0
        return near & np.isin(self.values, rule["of"])


def trim(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest connected piece of a label map with a border of 12 voxels; specks outside of the body are removed."""
    pieces, _ = ndimage.label(values > 0)
    values = np.where(pieces == np.bincount(pieces.ravel())[1:].argmax() + 1, values, 0)
    box = bounding_box(values > 0)
    return np.pad(values[box], PAD), shifted(affine, np.array([side.start for side in box]) - PAD)


@lru_cache(maxsize=1)
def read_anatomy(path: Path, description: Path) -> Anatomy:
    """Label map at ``path`` for the description at another path.

    Raises:
        ValueError: the voxels are not 1 mm, or the map has values that the description lacks, or no organ.
    """
    told = load_description(description)
    source = nib.as_closest_canonical(nib.load(path))
    numbers, notes = label_numbers(path, np.asanyarray(source.dataobj))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    spacing = np.array(nib.affines.voxel_sizes(source.affine))
    if not np.allclose(spacing, 1.0, atol=0.01):
        raise ValueError(f"{path}: expected voxels of 1 mm, found {spacing.round(3).tolist()}; resample it first")
    known = {0, *(value for region in told.regions for value in region.values)}
    if unknown := sorted(set(np.unique(numbers).tolist()) - known):
        raise ValueError(f"{path} has the values {unknown[:8]}, which {description.name} lacks: add them to a region")
    if not np.isin(numbers, list(told.label_names)[1:]).any():
        raise ValueError(f"{path} has none of the labels of {description.name}; expected {list(told.label_names)[1:]}")
    return Anatomy(*trim(numbers.astype(np.int16), source.affine), told)
