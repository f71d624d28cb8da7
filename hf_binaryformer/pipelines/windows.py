"""Slices larger than a network's input: overlapping windows, whose results are blended.

MONAI's ``sliding_window_inference`` does the same and is what the tests compare with; importing it takes more than a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Standard deviation of a window's weights as a share of its side, and their least value: 1 in the middle.
WEIGHT_DEVIATION, LEAST_WEIGHT = 0.125, 1e-3


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: evenly spaced, as few as reach both ends and overlap enough.

    Args:
        size: length of the axis.
        window: length of a window, at most ``size``.
        overlap: share of a window that the next one covers at least, 0 <= overlap < 1.
    """
    step = max(1, int(window * (1 - overlap)))
    gaps = math.ceil((size - window) / step)
    return [round(number * (size - window) / max(1, gaps)) for number in range(gaps + 1)]


def in_windows(network: Callable[[Tensor], Tensor], pixels: Tensor, window: Sequence[int], overlap: float) -> Tensor:
    """What a network says of images, window by window; where windows overlap, the mean with Gaussian weights.

    Args:
        network: gets (B, C, h, w), returns (B, C', h, w) float32.
        pixels: (B, C, H, W), at least as large as the window.
        window: h and w.
        overlap: share of a window that the next one covers at least, 0 <= overlap < 1.

    Returns:
        (B, C', H, W) float32.
    """
    height, width = (_weights(side, pixels.device) for side in window)
    weights = (height[:, None] * width).clamp(min=LEAST_WEIGHT)
    covered = pixels.new_zeros(pixels.shape[2:], dtype=torch.float32)
    total: Tensor | None = None
    rows, columns = (window_starts(*sizes, overlap) for sizes in zip(pixels.shape[2:], window, strict=True))
    for row, column in itertools.product(rows, columns):
        place = (..., slice(row, row + window[0]), slice(column, column + window[1]))
        found = network(pixels[place].contiguous())
        if total is None:
            total = found.new_zeros(*found.shape[:2], *pixels.shape[2:])
        total[place] += found * weights
        covered[place] += weights
    assert total is not None, "there is at least one window"
    return total / covered


def _weights(side: int, device: torch.device) -> Tensor:
    """A Gaussian along one side of a window, 1 in the middle."""
    offset = torch.arange(side, device=device) - (side - 1) / 2
    return torch.exp(-0.5 * (offset / (WEIGHT_DEVIATION * side)) ** 2)
