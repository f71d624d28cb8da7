"""Synthesise a scan and its labels from a label map; used by `binaryformer prepare synth-…`.

After SynthSeg (Billot et al., Medical Image Analysis 2023): deform, draw a contrast, scan. An anatomy is drawn on a fine
grid and averaged to the scan's voxels, so that voxels at the border of two tissues have a part of both. All arrays are
(I, J, K) in RAS order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hf_binaryformer.data.synthesis.anatomy import Anatomy
from hf_binaryformer.data.synthesis.axes import SmoothField, along_axes, linear_matrix
from hf_binaryformer.data.synthesis.body import embodied
from hf_binaryformer.data.synthesis.description import Description, Ranges
from hf_binaryformer.data.synthesis.paint import painted
from hf_binaryformer.data.synthesis.scanner import Axes, ScanPlan, plan_scan, scan
from hf_binaryformer.data.synthesis.shapes import Deformation, field_of_view, stripped
from hf_binaryformer.pipelines.sides import mirrored_labels

# Quantile of the foreground that becomes 255.
FULL_SCALE = 0.999


class SynthVolume(NamedTuple):
    """image uint8 (I, J, K), 0-255; labels uint8 (I, J, K), the description's; affine (4, 4); what was drawn."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    drawn: dict[str, object]


def synthesize(anatomy: Anatomy, ranges: Ranges, seed: tuple[int, ...]) -> SynthVolume:
    """One scan and its labels.

    Args:
        anatomy: from :func:`~hf_binaryformer.data.synthesis.anatomy.read_anatomy`.
        ranges: what is drawn.
        seed: for example (seed, anatomy, variant), non-negative; the volume depends on it alone, not on earlier ones.
    """
    rng = np.random.default_rng(seed)
    names, shares = list(ranges.contrasts), np.array(list(ranges.contrasts.values()))
    contrast = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    whole = bool(rng.random() < ranges.whole_probability)
    ranges = anatomy.description.contrast_ranges(ranges, contrast)
    anatomy = embodied(anatomy, rng)
    deformation = Deformation(anatomy.values.shape, ranges, rng, anatomy.mm, anatomy.beyond)
    low, high, cut = field_of_view(anatomy, deformation, whole, ranges, rng)
    plan = plan_scan(low, high, ranges, rng)

    appearance, found = painted(anatomy, contrast, ranges, rng)
    drawn = _draw(appearance, deformation, plan, ranges, rng)
    image = scan(drawn if contrast in anatomy.description.signed else drawn.clamp_(min=0), plan, ranges, rng)
    kind = "none"
    kept = torch.ones(image.shape, dtype=torch.bool)
    if not whole:
        mask, kind = stripped(anatomy, deformation, plan.axes, ranges, rng)
        kept = torch.from_numpy(mask)
        image[~kept] = 0

    axes = plan.axes if ranges.keep_grid else _grid(plan, low, high, anatomy.description.grid_mm)
    if not ranges.keep_grid:
        to_grid = [linear_matrix(wanted, given) for wanted, given in zip(axes, plan.axes, strict=True)]
        image = along_axes(image, to_grid)
        kept = along_axes(kept.float(), to_grid) >= 0.5 if not whole else torch.ones(image.shape, dtype=torch.bool)
    labels = label_table(anatomy.description, deformation.mirrored)[
        deformation.sample(torch.from_numpy(anatomy.values).float()[None], axes, "nearest")[0].int().numpy()
    ]
    labels[~kept.numpy()] = 0
    inside = image[image > 0].numpy()[::11]
    full_scale = max(float(np.quantile(inside, FULL_SCALE)), 1e-6) if inside.size else 1.0
    spacing = np.array([axis[1] - axis[0] for axis in axes])
    affine = anatomy.affine.copy()
    affine[:3, :3] = anatomy.affine[:3, :3] * spacing
    affine[:3, 3] += anatomy.affine[:3, :3] @ np.array([axis[0] for axis in axes])
    told = {
        "contrast": contrast,
        "whole": whole,
        "strip": kind,
        "cut": cut,
        "resolution": plan.kind,
        "scanned_mm": plan.spacing.round(2).tolist(),
        **found,
    }
    bytes_ = (image * (255 / full_scale)).round().clamp(0, 255).to(torch.uint8).numpy()
    return SynthVolume(bytes_, labels, affine, told)


def label_table(description: Description, mirrored: bool) -> np.ndarray:
    """Value of a label map -> label, uint8; ``mirrored`` exchanges the sides."""
    other = mirrored_labels(description.label_names)
    table = np.zeros(max(v for region in description.regions for v in region.values) + 1, np.uint8)
    for region in description.regions:
        table[list(region.values)] = [other[label] if mirrored else label for label in region.labels]
    return table


def _draw(
    appearance: torch.Tensor, deformation: Deformation, plan: ScanPlan, ranges: Ranges, rng: np.random.Generator
) -> torch.Tensor:
    """The deformed anatomy on the fine grid: mean, and a spread that is partly smooth, partly noise."""
    mean, spread = deformation.sample(appearance, plan.fine, "bilinear")
    share, low, high = rng.uniform(*ranges.texture_share), *(np.array([a[i] for a in plan.fine]) for i in (0, -1))
    texture = SmoothField(low, high, rng.uniform(*ranges.texture_mm), rng).at(plan.fine)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    texture *= share**0.5
    texture += (1 - share) ** 0.5 * torch.randn(mean.shape, generator=generator)
    return mean.addcmul_(spread, texture)


def _grid(plan: ScanPlan, low: np.ndarray, high: np.ndarray, wanted: Sequence[float | None]) -> Axes:
    """Coordinates of the volume that a scan is interpolated to, from corner to corner; None keeps the scan's own."""
    return [
        given if mm is None else np.arange(a, b + mm, mm)
        for given, a, b, mm in zip(plan.axes, low, high, wanted, strict=True)
    ]
