"""Synthesise MRI-like head volumes from label maps (no intensities needed); used by `binaryformer prepare synth-brain`.

After SynthSeg (Billot et al., Medical Image Analysis 2023): deform the label map, draw one Gaussian per label, then
blur, bias field, noise and gamma. Differs from it by a T1-like table of means as the default contrast, and by skull
stripping. All arrays are (I, J, K) in RAS order, 1 mm voxels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from hf_binaryformer.data.boxes import bounding_box, shifted
from hf_binaryformer.pipelines.label_values import label_numbers

# Class index -> (name, FreeSurfer values left and right, T1-weighted mean as a fraction of the brightest brain tissue).
CLASSES: dict[int, tuple[str, tuple[int, ...], float]] = {
    1: ("cerebral white matter", (2, 41), 0.87),
    2: ("cerebral cortex", (3, 42), 0.63),
    3: ("lateral ventricle", (4, 5, 43, 44), 0.15),
    4: ("cerebellum white matter", (7, 46), 0.85),
    5: ("cerebellum cortex", (8, 47), 0.62),
    6: ("thalamus", (10, 49), 0.74),
    7: ("caudate", (11, 50), 0.64),
    8: ("putamen", (12, 51), 0.68),
    9: ("pallidum", (13, 52), 0.80),
    10: ("third and fourth ventricle", (14, 15), 0.15),
    11: ("brain stem", (16,), 0.80),
    12: ("hippocampus", (17, 53), 0.63),
    13: ("amygdala", (18, 54), 0.62),
    14: ("ventral DC", (28, 60), 0.76),
    15: ("accumbens", (26, 58), 0.63),
    16: ("CSF", (24,), 0.18),
}
LABEL_NAMES = {0: "background"} | {index: name for index, (name, _, _) in CLASSES.items()}
FLUID_CLASSES = (3, 10, 16)
CSF_VALUE = 24
LAST_BRAIN_VALUE = 499  # above: skull, skin and the other tissues of the head
# Brain structures without a class of their own, left and right together; None: no known T1 mean.
OTHER_TISSUES: tuple[tuple[tuple[int, ...], float | None], ...] = (
    ((30, 62, 31, 63), 0.40),  # vessels, choroid plexus
    ((136, 163), 0.40),  # choroid plexus of the lateral ventricle, judged by its position
    ((137, 164), 0.40),  # the same in the temporal horn
    ((72,), 0.15),  # fifth ventricle
    ((85,), 0.78),  # optic chiasm
    ((25, 57), None),  # white-matter lesions around the ventricles
)


@dataclass(frozen=True)
class SynthSettings:
    """Ranges of the generator.

    (low, high) pairs are uniform draws. Lengths are in mm (= voxels), intensities are fractions of full scale (white
    matter 0.87).
    """

    rotation_degrees: float = 10.0
    scale_range: float = 0.10
    shear_range: float = 0.03
    elastic_spacing: tuple[float, float] = (25.0, 40.0)
    elastic_std: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    mild_factor: float = 0.3  # all deformation of validation and test volumes is multiplied by this; no flip there
    gray_white_contrast: tuple[float, float] = (0.7, 1.3)
    fluid_shift: tuple[float, float] = (-0.1, 0.1)
    mean_jitter: float = 0.04
    label_std: tuple[float, float] = (0.02, 0.05)
    extracerebral_mean: tuple[float, float] = (0.05, 1.2)
    unlisted_mean: tuple[float, float] = (0.2, 0.9)
    texture_amplitude: tuple[float, float] = (0.0, 0.04)
    texture_spacing: tuple[float, float] = (6.0, 20.0)
    blur_sigma: tuple[float, float] = (0.4, 1.3)
    strong_blur_probability: float = 0.3
    strong_blur_sigma: tuple[float, float] = (1.2, 1.8)
    thick_slice_probability: float = 0.2
    thick_slice_mm: tuple[float, float] = (1.5, 4.0)
    bias_log_amplitude: tuple[float, float] = (0.0, 0.30)
    bias_spacing: tuple[float, float] = (50.0, 120.0)
    noise_std: tuple[float, float] = (0.0, 0.04)
    log_gamma: float = 0.2
    random_contrast_fraction: float = 0.2  # of the training volumes, with contrast "mixed"
    strip_kinds: tuple[float, float, float] = (0.35, 0.45, 0.20)  # probabilities of csf, rim, tissue in `strip_mask`
    strip_margin: tuple[float, float] = (1.0, 6.0)
    strip_csf_reach: float = 15.0  # CSF farther than this from brain tissue is in the spinal canal
    box_margin: tuple[int, int] = (0, 12)
    neck_crop_probability: float = 0.5
    neck_below_brain: tuple[float, float] = (0.0, 60.0)


class Anatomy(NamedTuple):
    """A label map in RAS order: FreeSurfer values int16 (I, J, K) and its (4, 4) affine, voxel -> mm."""

    values: np.ndarray
    affine: np.ndarray


class SynthVolume(NamedTuple):
    """image uint8 (I, J, K), 0-255; labels uint8 (I, J, K), keys of LABEL_NAMES; affine (4, 4); what was drawn."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    drawn: dict[str, object]


@lru_cache(maxsize=1)
def read_anatomy(path: Path) -> Anatomy:
    """Label map at `path` as RAS, cropped to the head plus 12 voxels.

    Raises:
        ValueError: the voxels are not 1 mm, or the map has no brain label, or values that are no labels.
    """
    source = nib.as_closest_canonical(nib.load(path))
    numbers, notes = label_numbers(path, np.asanyarray(source.dataobj))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    values = numbers.astype(np.int16)
    spacing = np.array(nib.affines.voxel_sizes(source.affine))
    if not np.allclose(spacing, 1.0, atol=0.01):
        raise ValueError(f"{path}: expected voxels of 1 mm, found {spacing.round(3).tolist()}; resample it first")
    if not ((values > 0) & (values <= LAST_BRAIN_VALUE)).any():
        raise ValueError(f"{path}: no brain label (1-{LAST_BRAIN_VALUE}); expected FreeSurfer label values")
    # Some maps have specks outside the head: keep the largest piece.
    pieces, _ = ndimage.label(values > 0)
    values[pieces != np.bincount(pieces.ravel())[1:].argmax() + 1] = 0
    box = bounding_box(values > 0)
    pad = 12
    values = np.pad(values[box], pad)
    start = np.array([side.start for side in box]) - pad
    return Anatomy(values, shifted(source.affine, start))


def smooth_noise(shape: tuple[int, ...], spacing: float, rng: np.random.Generator, channels: int = 1) -> torch.Tensor:
    """Smooth noise (channels, *shape): standard normal at control points `spacing` voxels apart, cubic between them."""
    knots = tuple(int(np.ceil(size / spacing)) + 2 for size in shape)
    coarse = rng.standard_normal((channels, *knots)).astype(np.float32)
    # Cubic up to about 4 voxels, linear from there: smooth enough, and 20 times faster than cubic all the way.
    middle = [max(2, size // 4) for size in shape]
    cubic = ndimage.zoom(coarse, (1, *(m / k for m, k in zip(middle, knots, strict=False))), order=3, mode="nearest")
    return F.interpolate(torch.from_numpy(cubic)[None], size=shape, mode="trilinear", align_corners=True)[0]


def deform(values: np.ndarray, settings: SynthSettings, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Random affine and elastic deformation of a label map (I, J, K), nearest neighbour; `strength` 1 is full."""
    angles = np.deg2rad(settings.rotation_degrees) * strength * rng.uniform(-1, 1, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(3) + np.triu(settings.shear_range * strength * rng.uniform(-1, 1, (3, 3)), 1)
    matrix = matrix @ shear @ np.diag(1 + settings.scale_range * strength * rng.uniform(-1, 1, 3))

    shape = values.shape
    displacement = (
        rng.uniform(*settings.elastic_std)
        * strength
        * smooth_noise(shape, rng.uniform(*settings.elastic_spacing), rng, channels=3)
    )
    axes = [torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in shape]
    # grid_sample wants (x, y, z) = (K, J, I), each scaled to [-1, 1].
    grid = torch.empty((1, *shape, 3))
    for row in range(3):
        weights = torch.tensor(matrix[row], dtype=torch.float32)
        source = displacement[row]
        source += weights[0] * axes[0][:, None, None] + weights[1] * axes[1][:, None] + weights[2] * axes[2]
        grid[0, ..., 2 - row] = source * (2 / (shape[row] - 1))
    moved = (
        F.grid_sample(
            torch.from_numpy(values.astype(np.float32))[None, None], grid, mode="nearest", align_corners=True
        )[0, 0]
        .numpy()
        .astype(np.int16)
    )
    flip = strength == 1 and rng.random() < settings.flip_probability
    return np.ascontiguousarray(moved[::-1]) if flip else moved


def draw_means(contrast: str, settings: SynthSettings, rng: np.random.Generator, size: int) -> np.ndarray:
    """Mean intensity of every FreeSurfer value, float32 (size,); left and right share one draw; background is 0."""
    if contrast == "random":
        means = rng.uniform(0, 1, size)
    else:
        means = rng.uniform(*settings.unlisted_mean, size)
        means[LAST_BRAIN_VALUE + 1 :] = rng.uniform(*settings.extracerebral_mean, size - LAST_BRAIN_VALUE - 1)
    white = CLASSES[1][2]
    gray_white, fluid_shift = rng.uniform(*settings.gray_white_contrast), rng.uniform(*settings.fluid_shift)
    tissues: list[tuple[tuple[int, ...], float | None, bool]] = [
        (values, mean, index in FLUID_CLASSES) for index, (_, values, mean) in CLASSES.items()
    ]
    tissues += [(values, mean, mean == 0.15) for values, mean in OTHER_TISSUES]
    for values, mean, is_fluid in tissues:
        if contrast == "random" or mean is None:
            drawn = means[values[0]]
        else:
            drawn = mean + fluid_shift if is_fluid else white + (mean - white) * gray_white
            drawn = max(0.02, drawn + settings.mean_jitter * rng.standard_normal())
        means[list(values)] = drawn
    means[0] = 0.0
    return means.astype(np.float32)


def strip_mask(values: np.ndarray, settings: SynthSettings, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Brain mask as real skull-stripping tools leave it: with all CSF, with a rim of 1-6 mm, or brain tissue alone."""
    brain = (values > 0) & (values <= LAST_BRAIN_VALUE)
    tissue = brain & (values != CSF_VALUE)
    kind = rng.choice(["csf", "rim", "tissue"], p=settings.strip_kinds)
    if kind == "tissue":
        mask = ndimage.binary_fill_holes(ndimage.binary_closing(tissue, iterations=2))
    else:
        distance = ndimage.distance_transform_edt(~tissue)
        if kind == "csf":
            mask = brain & (distance < settings.strip_csf_reach)
        else:
            wobble = smooth_noise(values.shape, 20.0, rng)[0].numpy()
            mask = distance <= np.maximum(rng.uniform(*settings.strip_margin) + wobble, 0.5)
    return gaussian(torch.from_numpy(mask.astype(np.float32)), (1.0, 1.0, 1.0)).numpy() > 0.5, str(kind)


def gaussian(volume: torch.Tensor, sigmas: tuple[float, ...]) -> torch.Tensor:
    """Separable Gaussian blur of a float (I, J, K) volume, one sigma (voxels) per axis; 0 leaves an axis alone."""
    for axis, sigma in enumerate(sigmas):
        if sigma <= 0:
            continue
        radius = int(np.ceil(3 * sigma))
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        shape, padding = [1] * 3, [0] * 3
        shape[axis], padding[axis] = 2 * radius + 1, radius
        volume = F.conv3d(volume[None, None], (taps / taps.sum()).view(1, 1, *shape), padding=padding)[0, 0]
    return volume


def paint(values: np.ndarray, contrast: str, settings: SynthSettings, rng: np.random.Generator) -> torch.Tensor:
    """Tissue intensities of a label map before the scanner's noise: Gaussian per label, texture, partial volume."""
    size = max(int(values.max()), LAST_BRAIN_VALUE + 100) + 1
    index = torch.from_numpy(values.astype(np.int64))
    stds = rng.uniform(*settings.label_std, size).astype(np.float32)
    stds[0] = 0.0
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    image = torch.from_numpy(stds)[index] * torch.randn(values.shape, generator=generator)
    image += torch.from_numpy(draw_means(contrast, settings, rng, size))[index]
    texture = smooth_noise(values.shape, rng.uniform(*settings.texture_spacing), rng)[0]
    image *= 1 + rng.uniform(*settings.texture_amplitude) * texture

    strong = rng.random() < settings.strong_blur_probability
    sigma = rng.uniform(*(settings.strong_blur_sigma if strong else settings.blur_sigma))
    image = gaussian(image, (sigma, sigma, sigma))
    if rng.random() < settings.thick_slice_probability:
        axis, thickness = int(rng.integers(3)), rng.uniform(*settings.thick_slice_mm)
        # A slice averages over its thickness: blur with a matching width, then sample the slices.
        blurred = gaussian(image, tuple(thickness / 2.355 if other == axis else 0.0 for other in range(3)))
        slices = list(values.shape)
        slices[axis] = max(2, round(slices[axis] / thickness))
        thick = F.interpolate(blurred[None, None], size=slices, mode="trilinear", align_corners=True)
        image = F.interpolate(thick, size=values.shape, mode="trilinear", align_corners=True)[0, 0]
    return image


def scan(image: torch.Tensor, settings: SynthSettings, rng: np.random.Generator) -> torch.Tensor:
    """Bias field, Rician noise and gamma, as a scanner and its reconstruction add them."""
    bias = smooth_noise(tuple(image.shape), rng.uniform(*settings.bias_spacing), rng)[0]
    image = image * torch.exp(rng.uniform(*settings.bias_log_amplitude) * bias.clamp(-1, 1))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    std = rng.uniform(*settings.noise_std)
    real, imaginary = (std * torch.randn(image.shape, generator=generator) for _ in range(2))
    image = torch.hypot(image + real, imaginary)
    return image ** float(np.exp(rng.uniform(-settings.log_gamma, settings.log_gamma)))


def output_box(
    values: np.ndarray, mask: np.ndarray, skull: bool, settings: SynthSettings, rng: np.random.Generator
) -> tuple[slice, ...]:
    """Field of view: the mask's box with a random margin; with skull, sometimes without most of the neck."""
    box = bounding_box(mask)
    margins = rng.integers(*settings.box_margin, size=(3, 2))
    sides = [
        slice(max(0, side.start - int(low)), min(size, side.stop + int(high)))
        for side, (low, high), size in zip(box, margins, mask.shape, strict=False)
    ]
    below, crop = rng.uniform(*settings.neck_below_brain), rng.random() < settings.neck_crop_probability
    if skull and crop:
        tissue = (values > 0) & (values <= LAST_BRAIN_VALUE) & (values != CSF_VALUE)
        lowest = bounding_box(tissue)[2].start
        sides[2] = slice(max(sides[2].start, int(lowest - below)), sides[2].stop)
    return tuple(sides)


def synthesize(
    anatomy: Anatomy, seed: tuple[int, ...], *, contrast: str, skull: bool, mild: bool, settings: SynthSettings
) -> SynthVolume:
    """One image and its labels from an anatomy.

    Args:
        anatomy: from `read_anatomy`.
        seed: e.g. (seed, anatomy, variant), non-negative; the volume depends on it alone, not on earlier volumes.
        contrast: "t1", "random", or "mixed" (random with probability `settings.random_contrast_fraction`).
        skull: keep the tissues outside the brain.
        mild: deform by `settings.mild_factor` only, so that the volume still shows the held-out anatomy.

    Raises:
        ValueError: unknown contrast.
    """
    if contrast not in ("t1", "random", "mixed"):
        raise ValueError(f"contrast must be t1, random or mixed, not {contrast!r}")
    rng = np.random.default_rng(seed)
    if contrast == "mixed":
        contrast = "random" if rng.random() < settings.random_contrast_fraction else "t1"
    values, affine = anatomy
    if not skull:  # work on the brain alone, which has half the voxels
        brain = (values > 0) & (values <= LAST_BRAIN_VALUE) & (values != CSF_VALUE)
        box = tuple(
            slice(max(0, side.start - 20), min(size, side.stop + 20))
            for side, size in zip(bounding_box(brain), values.shape, strict=False)
        )
        values, affine = values[box], shifted(affine, np.array([side.start for side in box]))
    values = deform(values, settings, rng, settings.mild_factor if mild else 1.0)

    mask, strip = (values > 0, "none") if skull else strip_mask(values, settings, rng)
    box = output_box(values, mask, skull, settings, rng)
    values, mask = values[box], mask[box]
    image = scan(paint(values, contrast, settings, rng), settings, rng)
    classes = np.zeros(int(values.max()) + 1, dtype=np.uint8)
    for index, (_, sources, _) in CLASSES.items():
        classes[[value for value in sources if value < classes.size]] = index
    labels = classes[values]
    if not skull:
        image[torch.from_numpy(~mask)] = 0
        labels[~mask] = 0
    full_scale = np.quantile(image.numpy()[mask][::11], 0.999)
    image_bytes = (image * (255 / max(float(full_scale), 1e-6))).round().clamp(0, 255).to(torch.uint8).numpy()
    start = np.array([side.start for side in box])
    return SynthVolume(image_bytes, labels, shifted(affine, start), {"contrast": contrast, "strip": strip})
