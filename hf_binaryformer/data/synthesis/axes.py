"""Linear operations on volumes, one matrix for each axis: averaging, interpolation, smooth fields, ringing, motion.

A scanner's slice profile, its finite resolution, ringing and resampling are all separable. Each is a small dense matrix
(samples out, samples in), so that a whole chain of them costs three matrix products. Coordinates are in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from scipy.special import ndtr


def along_axes(volume: torch.Tensor, matrices: Sequence[np.ndarray | None]) -> torch.Tensor:
    """Apply one matrix (out, in) to each axis of a float (I, J, K) volume; None leaves an axis alone."""
    # The axis that shrinks most comes first.
    order = sorted(range(3), key=lambda axis: 1.0 if (m := matrices[axis]) is None else m.shape[0] / m.shape[1])
    for axis in order:
        matrix = matrices[axis]
        if matrix is not None:
            weights = torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))
            volume = torch.tensordot(weights, volume, dims=([1], [axis])).movedim(0, axis)
    return volume.contiguous()


def average_matrix(centres: np.ndarray, width: float, fine: np.ndarray, blur: float) -> np.ndarray:
    """Mean over a slice profile: a box of ``width`` around each centre, blurred by a Gaussian.

    Args:
        centres: (out,) mm, of the samples.
        width: of the box, mm.
        fine: (in,) mm, equally spaced centres of the cells that are averaged.
        blur: standard deviation of the Gaussian, mm; 0 is a plain box.
    """
    step = fine[1] - fine[0]
    edges = np.concatenate([fine - step / 2, [fine[-1] + step / 2]])
    position = edges[None] - centres[:, None]  # (out, in + 1)
    if blur > 0:
        reached = (_ramp(position + width / 2, blur) - _ramp(position - width / 2, blur)) / width
    else:
        reached = np.clip(position / width + 0.5, 0, 1)
    weights = np.diff(reached, axis=1)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


def _ramp(x: np.ndarray, sigma: float) -> np.ndarray:
    """The integral of the Gaussian's distribution function up to x."""
    return x * ndtr(x / sigma) + sigma * np.exp(-0.5 * (x / sigma) ** 2) / np.sqrt(2 * np.pi)


def linear_matrix(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Linear interpolation at ``wanted`` (out,) mm of samples at ``given`` (in,) mm; the ends are repeated."""
    step = given[1] - given[0] if len(given) > 1 else 1.0
    place = np.clip((wanted - given[0]) / step, 0, len(given) - 1)
    low = np.minimum(place.astype(int), max(len(given) - 2, 0))
    high = np.minimum(low + 1, len(given) - 1)
    matrix = np.zeros((len(wanted), len(given)))
    rows = np.arange(len(wanted))
    np.add.at(matrix, (rows, low), 1 - (place - low))
    np.add.at(matrix, (rows, high), place - low)
    return matrix


def spline_matrix(wanted: np.ndarray, start: float, spacing: float, knots: int) -> np.ndarray:
    """Cubic B-spline at ``wanted`` (out,) mm of control points at start, start + spacing, … (``knots`` of them)."""
    distance = np.abs((np.asarray(wanted)[:, None] - start) / spacing - np.arange(knots))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - np.minimum(distance, 2)) ** 3 / 6
    return np.where(distance < 1, near, far)


def ringing_matrix(size: int, kept: float) -> np.ndarray:
    """Cuts off all but the share ``kept`` of the spatial frequencies, sharply, as a short readout does."""
    passed = np.abs(np.fft.fftfreq(size)) <= kept / 2
    return np.fft.ifft(np.fft.fft(np.eye(size), axis=0) * passed[:, None], axis=0).real


def motion_matrix(size: int, shifts: Sequence[float] | np.ndarray, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weighted mean of copies that are shifted by fractions of a sample, as a head that moves during the scan."""
    place = np.arange(size, dtype=float)
    copies = [share * linear_matrix(place + shift, place) for shift, share in zip(shifts, shares, strict=True)]
    return reduce(np.add, copies)


class SmoothField:
    """A smooth random field over a box: cubic B-splines through random control points, standard deviation about 1.

    Args:
        low, high: corners of the box where it is used, mm (3,).
        spacing: of the control points, mm.
        rng: draws them.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, spacing: float, rng: np.random.Generator) -> None:
        self.spacing = spacing
        self.start = np.asarray(low, dtype=float) - 2 * spacing
        knots = np.ceil((np.asarray(high) - self.start) / spacing).astype(int) + 3
        # A B-spline of independent normal numbers has, averaged over positions, a variance of (151/315) per axis.
        scale = (151 / 315) ** -1.5
        self.knots = torch.from_numpy((scale * rng.standard_normal(tuple(knots))).astype(np.float32))

    def at(self, axes: Sequence[np.ndarray]) -> torch.Tensor:
        """Values (I, J, K) on the grid of three coordinate vectors, mm."""
        matrices = [
            spline_matrix(axis, start, self.spacing, size)
            for axis, start, size in zip(axes, self.start, self.knots.shape, strict=True)
        ]
        return along_axes(self.knots, matrices)
