"""Scores of filled holes: PSNR, SSIM and MAE, in the hole and in the whole object. Also fills that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.grids import FOREGROUND_THRESHOLD, occupied_box

if TYPE_CHECKING:
    import torch

    from hf_binaryformer.pipelines.vq_holes import HoleCase
    from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline

# MONAI's defaults for its SSIM metric.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


@dataclass(frozen=True)
class FillScore:
    """Agreement of a filled volume with a reference; intensities in units of the scale, whose range is 1.

    Args:
        psnr_hole, psnr_object: 10 log10(1 / mean squared error) in dB, over the hole, and over hole and foreground.
        ssim_hole, ssim_object: mean of the 3D structural similarity of the windows whose centre lies there, up to 1.
        mae_hole, mae_object: mean absolute error.
    """

    psnr_hole: float
    psnr_object: float
    ssim_hole: float
    ssim_object: float
    mae_hole: float
    mae_object: float

    def as_dict(self) -> dict[str, float]:
        """The fields."""
        return asdict(self)


def score_fill(filled: np.ndarray, reference: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> FillScore:
    """Compare two volumes (I, J, K) that differ in the hole only.

    Args:
        filled: with the hole filled.
        reference: what it should be.
        hole: bool, not empty.
        scale: intensities that count as 0 and 1.

    Raises:
        ValueError: the shapes differ, the hole is empty, or the volumes differ outside it.
    """
    if not filled.shape == reference.shape == hole.shape or not hole.any():
        raise ValueError(
            f"filled, reference and hole have shapes {filled.shape}, {reference.shape}, {hole.shape} and the hole "
            f"{int(hole.sum())} voxels, expected one shape and at least one voxel"
        )
    if not np.array_equal(filled[~hole], reference[~hole]):
        raise ValueError("the volumes differ outside the hole, expected the same there: compare composited volumes")
    # Both volumes are equal in SSIM windows that do not touch the hole, so these windows score 1.
    reach = 2 * (SSIM_WINDOW // 2)
    box = tuple(
        slice(max(0, part.start - reach), min(size, part.stop + reach))
        for part, size in zip(occupied_box(hole), hole.shape, strict=True)
    )
    thing = hole | (scale.apply(reference) > FOREGROUND_THRESHOLD)
    ours, theirs = scale.apply(filled[box]), scale.apply(reference[box])
    near_hole, near_thing, count = hole[box], thing[box], int(thing.sum())
    error = (ours - theirs).astype(np.float64)
    similarity = ssim_map(ours, theirs).astype(np.float64)
    elsewhere = count - int(near_thing.sum())
    return FillScore(
        psnr_hole=hole_psnr(filled, reference, hole, scale),
        psnr_object=_psnr(float((error**2).sum()) / count),
        ssim_hole=float(similarity[near_hole].mean()),
        ssim_object=(float(similarity[near_thing].sum()) + elsewhere) / count,
        mae_hole=float(np.abs(error[near_hole]).mean()),
        mae_object=float(np.abs(error).sum()) / count,
    )


def hole_psnr(filled: np.ndarray, reference: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> float:
    """``FillScore.psnr_hole`` alone, which is quick to compute."""
    error = scale.apply(filled[hole]) - scale.apply(reference[hole])
    return _psnr(float((error.astype(np.float64) ** 2).mean()))


def _psnr(mean_squared_error: float) -> float:
    # The error of equal volumes is set to the smallest that float32 can resolve.
    return float(-10 * np.log10(max(mean_squared_error, 1e-14)))


def make_hole(
    shape: Sequence[int],
    spacing: Sequence[float],
    size: float,
    *,
    centre: Sequence[float] | None = None,
    kind: str = "ball",
) -> np.ndarray:
    """A hole (I, J, K), bool.

    Args:
        shape: shape of the volume.
        spacing: voxel size in mm.
        size: diameter or edge in mm.
        centre: voxel (i, j, k); None takes the middle of the volume.
        kind: "ball" or "box".

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in ("ball", "box"):
        raise ValueError(f"kind is '{kind}', expected 'ball' or 'box'")
    middle = [(n - 1) / 2 for n in shape] if centre is None else centre
    i, j, k = np.ix_(*(np.abs(np.arange(n) - c) * mm for n, c, mm in zip(shape, middle, spacing, strict=True)))
    if kind == "ball":
        return i**2 + j**2 + k**2 <= (size / 2) ** 2
    return np.maximum(np.maximum(i, j), k) <= size / 2


def token_fills(
    pipeline: BinaryVQInpaintPipeline, case: HoleCase, generator: torch.Generator | None = None
) -> dict[str, np.ndarray]:
    """Fills that need the autoencoder but no transformer.

    Args:
        pipeline: its autoencoder is used.
        case: from ``pipeline.prepare``; its image is also known in the hole.
        generator: random generator of the random tokens.

    Returns:
        "random tokens": each masked token drawn uniformly, the paper's baseline; "oracle tokens": the true tokens, the
        best that any transformer can reach.
    """
    import torch

    config = pipeline.transformer.config
    known, true = (
        pipeline.encode(torch.from_numpy(a)[None, None]) for a in (case.network_image(), case.to_network(case.image))
    )
    masked = pipeline.touched(case)[None, None].expand_as(known)
    random = torch.randint(config.codebook_size, known.shape, generator=generator)
    names, tokens = ("random tokens", "oracle tokens"), torch.cat([random, true])
    decoded = pipeline.decode(torch.where(masked, tokens, known))[:, 0].numpy()
    return {name: case.composite(case.to_input(one)) for name, one in zip(names, decoded, strict=True)}


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of the window around each voxel of (I, J, K), edges repeated; intensities of range 1."""
    import torch
    from monai.metrics.regression import compute_ssim_and_cs

    half = SSIM_WINDOW // 2
    x, y = (torch.from_numpy(np.pad(v, half, mode="edge"))[None, None] for v in (a, b))
    found, _ = compute_ssim_and_cs(
        x, y, spatial_dims=3, kernel_size=[SSIM_WINDOW] * 3, kernel_sigma=[SSIM_SIGMA] * 3, data_range=1.0
    )
    return found[0, 0].numpy()


def zero_fill(image: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> np.ndarray:
    """The hole becomes background."""
    return np.where(hole, np.float32(scale.low), image)


def mean_fill(image: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> np.ndarray:
    """The hole becomes the mean of the known foreground."""
    return np.where(hole, image[foreground(image, hole, scale)].mean(dtype=np.float32), image)


def mirror_fill(image: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> np.ndarray:
    """Replace each voxel of the hole by its mirror voxel along the first axis.

    The mirror plane is the middle of the known foreground. If the mirror voxel is not known either, the voxel is
    mirrored at the nearer face of the hole along that axis, or else at the other face. If none of these is known, it
    becomes the mean.

    Args:
        image, hole: (I, J, K), RAS order: the first axis runs from left to right.
        scale: tells foreground from background.
    """
    size = image.shape[0]
    body = occupied_box(foreground(image, hole, scale))[0]
    index = np.argwhere(hole)
    i, rest = index[:, 0], (index[:, 1], index[:, 2])
    # Along the first axis, the last known voxel before each voxel of the hole, and the first one behind it.
    line = np.arange(size)[:, None, None]
    before = np.maximum.accumulate(np.where(hole, -1, line))[tuple(index.T)]
    behind = np.minimum.accumulate(np.where(hole, size, line)[::-1])[::-1][tuple(index.T)]
    to_low, to_high = 2 * before - i + 1, 2 * behind - i - 1
    near_low = i - before <= behind - i
    choices = [body.start + body.stop - 1 - i, np.where(near_low, to_low, to_high), np.where(near_low, to_high, to_low)]

    values = np.full(len(index), image[foreground(image, hole, scale)].mean(dtype=np.float32), dtype=np.float32)
    for partner in reversed(choices):
        inside = (partner >= 0) & (partner < size)
        place = (np.clip(partner, 0, size - 1), *rest)
        known = inside & ~hole[place]
        values[known] = image[place][known]
    filled = image.copy()
    filled[hole] = values
    return filled


def foreground(image: np.ndarray, hole: np.ndarray, scale: IntensityScale) -> np.ndarray:
    """Known voxels that are not background, bool."""
    return ~hole & (scale.apply(image) > FOREGROUND_THRESHOLD)


SIMPLE_FILLS = {"zero": zero_fill, "mean": mean_fill, "mirror": mirror_fill}
