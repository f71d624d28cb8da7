"""What an anatomy looks like before the scanner: mean and spread of every voxel, vessels, membranes and lesions."""

from __future__ import annotations

import numpy as np
import torch

from hf_binaryformer.data.synthesis.anatomy import Anatomy
from hf_binaryformer.data.synthesis.axes import SmoothField
from hf_binaryformer.data.synthesis.description import CONTRAST_RANDOM, Description, Ranges

DARKEST = 0.01


def draw_means(
    description: Description, contrast: str, ranges: Ranges, rng: np.random.Generator, agent: float | None = None
) -> dict[str, float]:
    """Mean intensity of every region, left and right alike; ``agent`` is that of tissues with a contrast agent."""
    signed = contrast in description.signed
    by_tissue = contrast != CONTRAST_RANDOM or rng.random() < ranges.random_by_tissue
    tissues = {
        name: rng.uniform(*means.get(CONTRAST_RANDOM, (0, 1)))
        if contrast == CONTRAST_RANDOM
        else rng.uniform(*means[contrast])
        for name, means in description.tissues.items()
    }
    if agent is not None:
        tissues |= dict.fromkeys(description.agents["tissues"], agent)
    means = {}
    for region in description.regions:
        mean = sum(share * tissues[tissue] for tissue, share in region.tissue.items())
        mean += ranges.mean_jitter * rng.standard_normal()
        own = rng.uniform(0, 1)
        # What is dark in every contrast, such as air, has its own means in random ones.
        told = by_tissue or any(CONTRAST_RANDOM in description.tissues[tissue] for tissue in region.tissue)
        means[region.name] = (mean if told else own) if signed else max(DARKEST, mean if told else own)
    return means


def painted(anatomy: Anatomy, contrast: str, ranges: Ranges, rng: np.random.Generator) -> tuple[torch.Tensor, dict]:
    """Mean and spread (2, I, J, K) float32 of an anatomy's voxels, background 0, and what was drawn."""
    description = anatomy.description
    agent = rng.uniform(*ranges.agent_mean) if rng.random() < ranges.agent_probability else None
    means = draw_means(description, contrast, ranges, rng, agent)
    table = np.zeros((2, max(v for region in description.regions for v in region.values) + 1), np.float32)
    for region in description.regions:
        table[:, list(region.values)] = [[means[region.name]], [rng.uniform(*ranges.tissue_std)]]
    volume = torch.from_numpy(table)[:, torch.from_numpy(anatomy.values.astype(np.int32))]
    if agent is not None:
        volume[0][torch.from_numpy(anatomy.membrane)] = agent
        volume[0][vessels(anatomy, ranges, rng)] = agent
    lesions = 0
    if rng.random() < ranges.lesion_probability:
        lesions = int(rng.integers(*ranges.lesion_count, endpoint=True))
        mean = rng.uniform(*ranges.lesion_mean)
        for place in lesion_places(anatomy, lesions, rng):
            add_lesion(volume[0], anatomy, place, rng.uniform(*ranges.lesion_radius) / anatomy.mm, mean, rng)
    return volume, {"agent": agent is not None, "lesions": lesions}


def vessels(anatomy: Anatomy, ranges: Ranges, rng: np.random.Generator) -> torch.Tensor:
    """Random curves, bool (I, J, K): where two smooth fields are both near 0."""
    shape = anatomy.values.shape
    axes = [np.arange(size) for size in shape]
    spacing = rng.uniform(*ranges.vessel_spacing)
    # A field of standard deviation 1 changes by about 1.5 over the distance of its control points.
    radius = 1.5 * rng.uniform(*ranges.vessel_radius) / spacing
    first, second = (SmoothField(np.zeros(3), np.array(shape), spacing, rng).at(axes) for _ in range(2))
    allowed = np.isin(anatomy.values, anatomy.description.agents["vessels_in"])
    return (torch.hypot(first, second) < radius) & torch.from_numpy(allowed)


def lesion_places(anatomy: Anatomy, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Voxels in which lesions start."""
    values = [v for r in anatomy.description.regions if r.name in anatomy.description.lesions_in for v in r.values]
    places: list[np.ndarray] = []
    allowed = np.zeros(int(anatomy.values.max()) + 1, bool)
    allowed[[value for value in values if value < len(allowed)]] = True
    while len(places) < count:
        tries = rng.integers(0, anatomy.values.shape, (4096, 3))
        places += list(tries[allowed[anatomy.values[tuple(tries.T)]]][: count - len(places)])
    return places


def add_lesion(
    mean: torch.Tensor, anatomy: Anatomy, place: np.ndarray, radius: float, level: float, rng: np.random.Generator
) -> None:
    """Paint one uneven ellipsoid into ``mean``, inside the organ only."""
    reach = int(np.ceil(1.6 * radius))
    low = np.maximum(place - reach, 0)
    high = np.minimum(place + reach + 1, anatomy.values.shape)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    stretch = rng.uniform(0.7, 1.3, 3)
    offsets = [(axis - p) / (radius * s) for axis, p, s in zip(axes, place, stretch, strict=True)]
    distance = np.sqrt(offsets[0][:, None, None] ** 2 + offsets[1][:, None] ** 2 + offsets[2] ** 2)
    uneven = SmoothField(low, high, max(radius, 2.0), rng).at(axes).numpy()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = (distance + 0.2 * uneven < 1) & anatomy.core[box]
    mean[box][torch.from_numpy(inside)] = level
