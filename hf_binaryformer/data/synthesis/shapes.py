"""Where things lie: deformation of an anatomy, the field of view, and the outline that stripping leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_binaryformer.data.boxes import bounding_box
from hf_binaryformer.data.synthesis.anatomy import REACH, Anatomy
from hf_binaryformer.data.synthesis.axes import SmoothField
from hf_binaryformer.data.synthesis.description import Ranges

# Voxels that are sampled at once; larger parts leave the processor's caches.
PART = 2**20
# The field of view is found on a grid of this spacing, mm.
COARSE = 4.0
# It may reach so far beyond the anatomy's own box, mm.
PAD_MM = 24.0
# Share of the organ's extent.
LARGEST_CUT = 0.8


class Deformation:
    """Random affine and elastic map from positions in the new volume to positions in an anatomy, both in mm.

    Args:
        shape: of the anatomy, voxels.
        ranges: what is drawn.
        rng: random numbers.
        mm: spacing of the anatomy.
        beyond: what lies outside of the anatomy, as grid_sample calls it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        ranges: Ranges,
        rng: np.random.Generator,
        mm: float = 1.0,
        beyond: str = "zeros",
    ) -> None:
        self.mm, self.beyond = mm, beyond
        self.centre = (np.array(shape) - 1) / 2 * mm
        self.matrix = affine_matrix(ranges, rng)
        low, high = np.full(3, -REACH), np.array(shape) * mm + REACH
        self.fields = []
        for nearest, farthest, std in ranges.elastic:
            spacing, size = rng.uniform(nearest, farthest), rng.uniform(0, std)
            self.fields.append((size, [SmoothField(low, high, spacing, rng) for _ in range(3)]))
        self.mirrored = bool(rng.random() < ranges.mirror_probability)

    def places(self, axes: Sequence[np.ndarray]) -> torch.Tensor:
        """Positions in the anatomy (3, I, J, K) of the grid of three coordinate vectors."""
        offsets = [torch.from_numpy((a - c).astype(np.float32)) for a, c in zip(axes, self.centre, strict=True)]
        rows = []
        for row in range(3):
            weights = self.matrix[row].tolist()
            place = weights[0] * offsets[0][:, None, None] + weights[1] * offsets[1][:, None] + weights[2] * offsets[2]
            for size, fields in self.fields:
                place += size * fields[row].at(axes)
            rows.append((-place if row == 0 and self.mirrored else place) + self.centre[row])
        return torch.stack(rows)

    def sample(
        self,
        volumes: torch.Tensor,
        axes: Sequence[np.ndarray],
        mode: str,
        first: Sequence[int] = (0, 0, 0),
        padding: str | None = None,
    ) -> torch.Tensor:
        """Volumes (C, I', J', K') float, whose first voxel is ``first`` of the anatomy, on a grid: (C, I, J, K)."""
        rows = max(1, PART // (len(axes[1]) * len(axes[2])))
        scale = 2 / (torch.tensor(volumes.shape[1:]) - 1) / self.mm
        parts = []
        for start in range(0, len(axes[0]), rows):
            places = self.places([axes[0][start : start + rows], axes[1], axes[2]])
            # grid_sample wants (x, y, z) = (K, J, I), each scaled to [-1, 1].
            grid = torch.stack([(places[a] - int(first[a]) * self.mm) * scale[a] - 1 for a in (2, 1, 0)], dim=-1)
            parts.append(
                F.grid_sample(
                    volumes[None], grid[None], mode=mode, padding_mode=padding or self.beyond, align_corners=True
                )[0]
            )
        return torch.cat(parts, dim=1)


def affine_matrix(ranges: Ranges, rng: np.random.Generator) -> np.ndarray:
    """Rotation, shear and scale (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(ranges.rotation_degrees) * rng.uniform(-1, 1, 3)):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(3) + np.triu(ranges.shear * rng.uniform(-1, 1, (3, 3)), 1)
    return matrix @ shear @ np.diag(1 + ranges.scale * rng.uniform(-1, 1, 3))


def choose(options: dict[str, dict[str, Any]], rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """One of the options, by their ``probability``."""
    shares = np.array([option["probability"] for option in options.values()])
    name = list(options)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return name, options[name]


def field_of_view(
    anatomy: Anatomy, deformation: Deformation, whole: bool, ranges: Ranges, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """Corners of the volume in whole mm, lower and upper (3,), and the name of what is cut off."""
    axes = [np.arange(-PAD_MM, size * anatomy.mm + PAD_MM, COARSE) for size in anatomy.values.shape]
    masks = torch.from_numpy(np.stack([anatomy.core, anatomy.values > 0]).astype(np.float32))
    core, body = (deformation.sample(masks, axes, "nearest", padding="zeros") > 0).numpy()

    def corners(mask: np.ndarray) -> np.ndarray:
        box = bounding_box(mask)
        return np.array([[a[side.start], a[side.stop - 1]] for a, side in zip(axes, box, strict=True)]).T

    organ = corners(core)
    low, high = corners(body) if whole else organ.copy()
    margins = rng.uniform(*ranges.margin, (2, 3))
    low, high = low - margins[0], high + margins[1]
    low[2] = max(low[2], organ[0, 2] - rng.uniform(*ranges.below))
    name, cut = choose(ranges.cuts, rng)
    if "axis" in cut:
        axis, mm = cut["axis"], rng.uniform(*cut["mm"])
        mm = min(mm, LARGEST_CUT * (organ[1, axis] - organ[0, axis]))
        if cut["side"] == "low":
            low[axis] = organ[0, axis] + mm
        elif cut["side"] == "high":
            high[axis] = organ[1, axis] - mm
        else:
            room = max(0.0, organ[1, axis] - organ[0, axis] - mm)
            low[axis] = organ[0, axis] + rng.uniform(0, 1) * room
            high[axis] = low[axis] + mm
    return np.floor(low), np.ceil(high), name


def stripped(
    anatomy: Anatomy, deformation: Deformation, axes: Sequence[np.ndarray], ranges: Ranges, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """What a skull-stripping tool keeps, bool on a grid, and its kind: an outline at a random, uneven distance."""
    name, kind = choose(ranges.strips, rng)
    distances, first = anatomy.distance
    distance = deformation.sample(torch.from_numpy(distances)[None], axes, "bilinear", first.tolist(), "border")[0]
    low, high = (np.array([a[end] for a in axes]) for end in (0, -1))
    uneven = SmoothField(low, high, rng.uniform(*kind["spacing"]), rng).at(axes)
    kept = distance <= rng.uniform(*kind["margin"]) + rng.uniform(*kind["wobble"]) * uneven
    return kept.numpy(), name
