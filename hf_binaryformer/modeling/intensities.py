"""How image intensities are scaled for the networks: one rule for training and for every pipeline.

Background becomes 0, and an upper percentile of the foreground becomes 1. The background is looked for at the border of
the image, because people's files have it in many forms: constant (skull-stripped or padded images), noise around a
level, with a few stray values or ringing below it, or a constant among the intensities of tissue (images that were
z-scored inside the brain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The most frequent value of the border is a constant background if it has this share of the border.
CONSTANT_SHARE = 0.25
# Otherwise, the border is noise around a level if this share of it lies within LEVEL_WIDTH of its mode.
NOISE_SHARE = 0.5
# A share of the range of intensities.
LEVEL_WIDTH = 0.1
# A background is the dark end if at most this share of the foreground is darker by more than LEVEL_WIDTH.
DARKER_SHARE = 0.05
# Fewer values than this share that lie below all others are stray. More below a dark background are its noise, which has
# the same width above it.
STRAY_SHARE = 0.001
# Where z-scoring has lost how bright the darkest tissue is, its scaled intensity is this: the median over skull-stripped
# images of the data set synth-brain (0.04 to 0.26), for the percentiles 0.5 and 99.5.
DARKEST_TISSUE = 0.15
# Scaled intensities up to here become background where the map is undone.
AIR = 0.05


@dataclass(frozen=True)
class IntensityScale:
    """The linear map between a volume's intensities and a network's, 0 (background) to about 1.

    Args:
        low, high: intensities that become 0 and 1.
        ceiling: scaled intensities are clipped to [0, ceiling].
        background: intensity of a background that lies among the intensities of tissue or above them; it becomes 0
            too. None if the background is the dark end, or if there is none.
    """

    low: float
    high: float
    ceiling: float
    background: float | None = None

    @classmethod
    def of(
        cls,
        array: np.ndarray,
        percentiles: Sequence[float],
        ceiling: float,
        *,
        known: np.ndarray | None = None,
        foreground_only: bool = True,
    ) -> IntensityScale:
        """The scale of an image.

        A dark background (:func:`find_background`) becomes 0; if there is none, the darkest value does, without the
        ``STRAY_SHARE`` of values below it. A background among the intensities of tissue becomes 0 too, and the lower
        percentile of the foreground ``DARKEST_TISSUE``. The upper percentile of the foreground becomes 1.

        Args:
            array: intensities of any shape.
            percentiles: lower and upper, 0 to 100.
            ceiling: in scaled intensities.
            known: bool, of the same shape: the voxels that count. None: all.
            foreground_only: False does not look for a background and takes both percentiles over all values.

        Raises:
            ValueError: all intensities are equal.
        """
        array = np.asarray(array, dtype=np.float32)
        values = array.ravel() if known is None else array[known]
        if values.size == 0 or values.min() == values.max():
            raise ValueError(
                "all intensities are equal, expected an image with contrast: check the image and, for inpainting, that "
                "the mask leaves some of it"
            )
        level = find_background(array, known) if foreground_only else None
        if level is not None:
            inside = values[values != level]
            below = values[values < level]
            noise = level - np.percentile(below, 1) if below.size > STRAY_SHARE * values.size else 0.0
            brighter = values[values > level + noise]
            if brighter.size and _is_dark(level, inside):
                return cls(level, float(np.percentile(brighter, percentiles[1])), ceiling, level)
            darkest, high = np.percentile(inside, percentiles)
            if darkest < high:
                low = darkest - DARKEST_TISSUE / (1 - DARKEST_TISSUE) * (high - darkest)
                return cls(float(low), float(high), ceiling, level)
        low, high = np.percentile(values, [100 * STRAY_SHARE if foreground_only else percentiles[0], percentiles[1]])
        if low == high:
            low, high = values.min(), values.max()
        return cls(float(low), float(high), ceiling)

    def as_dict(self) -> dict[str, float | None]:
        """What became 0 and 1, and what was taken as background, in the image's intensities."""
        return {"low": self.low, "high": self.high, "background": self.background}

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Scaled intensities, float32, 0 to the ceiling."""
        array = np.asarray(array, dtype=np.float32)
        scaled = np.clip((array - self.low) / (self.high - self.low), 0, self.ceiling).astype(np.float32)
        if self.background is not None:
            scaled[array == np.float32(self.background)] = 0
        return scaled

    def undo(self, scaled: np.ndarray) -> np.ndarray:
        """Map scaled intensities back to the volume's intensities, float32."""
        scaled = np.asarray(scaled, dtype=np.float32)
        array = self.low + scaled * (self.high - self.low)
        if self.background is not None and self.background > self.low:
            array = np.where(scaled <= AIR, self.background, array)
        return array.astype(np.float32)


def find_background(array: np.ndarray, known: np.ndarray | None = None) -> float | None:
    """The intensity of the background: what most of an image's border has; None if the border shows no background.

    Args:
        array: intensities of any shape; the border is the first and last layer along each axis.
        known: bool, of the same shape: the voxels that count. None: all.
    """
    border = np.zeros(array.shape, dtype=bool)
    for axis in range(array.ndim):
        np.moveaxis(border, axis, 0)[[0, -1]] = True
    values, counts = np.unique(array[border if known is None else border & known], return_counts=True)
    if values.size == 0:
        return None
    if counts.max() >= CONSTANT_SHARE * counts.sum():
        return float(values[counts.argmax()])
    border_values = np.repeat(values, counts)
    level = _mode(border_values)
    width = LEVEL_WIDTH * (np.percentile(array if known is None else array[known], 99.5) - level)
    is_noise = (np.abs(border_values - level) <= width).mean() >= NOISE_SHARE
    return level if is_noise and _is_dark(level, array.ravel() if known is None else array[known]) else None


def _is_dark(level: float, foreground: np.ndarray) -> bool:
    """Whether hardly anything of the foreground is darker than a background."""
    low, high = np.percentile(foreground, [0.5, 99.5])
    darker = foreground < level - LEVEL_WIDTH * (high - low)
    return bool(darker.mean() <= DARKER_SHARE)


def _mode(values: np.ndarray) -> float:
    """The half-sample mode of sorted values: the densest half, the densest half of that, and so on (Bickel 2002)."""
    while values.size > 2:
        half = (values.size + 1) // 2
        start = int(np.argmin(values[half - 1 :] - values[: values.size - half + 1]))
        values = values[start : start + half]
    return float(values.mean())
