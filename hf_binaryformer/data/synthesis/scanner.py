"""From a finely drawn anatomy to a scan: resolution, slice profile, shading, ringing, motion, noise, gamma."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_binaryformer.data.synthesis.axes import (
    SmoothField,
    along_axes,
    average_matrix,
    motion_matrix,
    ringing_matrix,
)
from hf_binaryformer.data.synthesis.description import Ranges
from hf_binaryformer.data.synthesis.shapes import choose

Axes = list[np.ndarray]


@dataclass(frozen=True)
class ScanPlan:
    """Grids of a scan: centres in mm of its voxels and of the finer ones that they average.

    ``width`` is that of the slice profile along each axis, mm, and ``spacing`` the distance of voxels.
    """

    axes: Axes
    fine: Axes
    spacing: np.ndarray
    width: np.ndarray
    kind: str


def plan_scan(low: np.ndarray, high: np.ndarray, ranges: Ranges, rng: np.random.Generator) -> ScanPlan:
    """Draw a resolution, and lay its grid over the box from ``low`` to ``high`` (3,) mm."""
    kind, rule = choose(ranges.resolutions, rng)
    spacing = np.full(3, rng.uniform(*rule["plane"]))
    profile = np.ones(3)
    if rule["slice"] is not None:
        axis = int(rng.integers(3)) if rule["axis"] is None else rule["axis"]
        spacing[axis], profile[axis] = rng.uniform(*rule["slice"]), rng.uniform(*ranges.slice_profile)
    axes, fine = [], []
    for mm, start, stop in zip(spacing, low, high, strict=True):
        # The corners are centres of voxels of 1 mm. Half of what a grid reaches too far lies on each side.
        count = max(2, int(np.ceil((stop - start) / mm - 1e-6)) + 1)
        axes.append((start + stop) / 2 + mm * (np.arange(count) - (count - 1) / 2))
        step = float(np.clip(mm / ranges.oversampling, *ranges.fine))
        reach = (count + 1) * mm
        cells = int(np.ceil(reach / step))
        fine.append((start + stop) / 2 + step * (np.arange(cells) - (cells - 1) / 2))
    return ScanPlan(axes, fine, spacing, spacing * profile, kind)


def scan(drawn: torch.Tensor, plan: ScanPlan, ranges: Ranges, rng: np.random.Generator) -> torch.Tensor:
    """Average a finely drawn volume to the scan's voxels and add what a scanner adds; float32, at least 0."""
    blur = rng.uniform(*ranges.blur)
    matrices = [
        average_matrix(axis, width, fine, blur * mm)
        for axis, width, fine, mm in zip(plan.axes, plan.width, plan.fine, plan.spacing, strict=True)
    ]
    if rng.random() < ranges.motion_probability:
        axis = int(rng.integers(3))
        shifts = rng.uniform(*ranges.motion_voxels) * rng.standard_normal(ranges.motion_copies)
        shares = rng.dirichlet(np.ones(ranges.motion_copies))
        matrices[axis] = motion_matrix(len(plan.axes[axis]), shifts, shares) @ matrices[axis]
    if rng.random() < ranges.ringing_probability:
        axis = int(rng.integers(3))
        matrices[axis] = ringing_matrix(len(plan.axes[axis]), rng.uniform(*ranges.ringing_kept)) @ matrices[axis]
    image = along_axes(drawn, matrices)

    low, high = (np.array([a[end] for a in plan.axes]) for end in (0, -1))
    shading = SmoothField(low, high, rng.uniform(*ranges.bias_mm), rng).at(plan.axes)
    image *= torch.exp(rng.uniform(*ranges.bias_log) * shading.clamp(-2, 2))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    std = rng.uniform(*ranges.noise)
    real, imaginary = (std * torch.randn(image.shape, generator=generator) for _ in range(2))
    image = torch.hypot(image + real, imaginary)
    image **= float(np.exp(rng.uniform(-ranges.log_gamma, ranges.log_gamma)))
    if ranges.window is not None and rng.random() < ranges.window_probability:
        bottom, top = (float(rng.uniform(*end)) for end in ranges.window)
        image = (image.clamp(bottom, top) - bottom) / (top - bottom)
    return image
