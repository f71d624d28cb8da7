"""The two rules that scale image intensities for the networks.

A network needs the rule that it was trained with: segmentation :meth:`IntensityScale.of_foreground`, the autoencoder
:meth:`IntensityScale.of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class IntensityScale:
    """The linear map between a volume's intensities and a network's, 0 (background) to about 1.

    Args:
        low, high: intensities that become 0 and 1.
        ceiling: scaled intensities are clipped to [0, ceiling].
    """

    low: float
    high: float
    ceiling: float

    @classmethod
    def of(cls, values: np.ndarray, percentiles: Sequence[float], ceiling: float) -> IntensityScale:
        """The scale of an image: its lower percentile becomes 0, the upper percentile of all brighter values becomes 1.

        In a volume with background, the lower percentile is the background, whatever the share of the background is.

        Args:
            values: intensities of any shape; for inpainting, those of the known voxels.
            percentiles: lower and upper, 0 to 100.
            ceiling: in scaled intensities.

        Raises:
            ValueError: all intensities are equal.
        """
        values = np.asarray(values, dtype=np.float32).ravel()
        low = np.percentile(values, percentiles[0]) if values.size else 0.0
        brighter = values[values > low]
        if brighter.size == 0:
            raise ValueError(
                f"all {values.size} intensities are equal, expected an image with contrast: check the image and, for "
                f"inpainting, that the mask leaves some of it"
            )
        return cls(float(low), float(np.percentile(brighter, percentiles[1])), ceiling)

    @classmethod
    def of_foreground(
        cls, values: np.ndarray, percentiles: Sequence[float], ceiling: float, foreground_only: bool = True
    ) -> IntensityScale:
        """The scale of an image whose background is its minimum: the smallest value above the minimum becomes 0.

        Args:
            values: intensities of any shape.
            percentiles: lower and upper, 0 to 100. With ``foreground_only`` only the upper one is used, over all values
                above the minimum.
            ceiling: in scaled intensities.
            foreground_only: False takes both percentiles over all values.

        Raises:
            ValueError: all intensities are equal.
        """
        values = np.asarray(values, dtype=np.float32)
        minimum = values.min()
        inside = values[values > minimum] if foreground_only else values
        if inside.size == 0 or values.max() == minimum:
            raise ValueError("all intensities are equal; expected an image with contrast")
        low, high = np.percentile(inside, percentiles)
        return cls(float(inside.min() if foreground_only else low), float(high), ceiling)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Scaled intensities, float32, 0 to the ceiling."""
        scale = max(self.high - self.low, float(np.finfo(np.float32).tiny))
        return np.clip((np.asarray(array, dtype=np.float32) - self.low) / scale, 0, self.ceiling).astype(np.float32)

    def undo(self, scaled: np.ndarray) -> np.ndarray:
        """Map scaled intensities back to the volume's intensities, float32."""
        return (self.low + np.asarray(scaled, dtype=np.float32) * (self.high - self.low)).astype(np.float32)
