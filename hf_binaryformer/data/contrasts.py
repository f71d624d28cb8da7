"""Other contrasts of training windows, so that a network learns shapes and places and not what was bright in its data."""

from __future__ import annotations

import monai.transforms as mt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Mean intensities that are drawn, as shares of the brightest tissue's.
MEANS = (0.03, 1.0)
# Share of the structures that get a new mean, from ... to ...
CHANGED = (0.3, 1.0)
# Partial volume: the share of a voxel's change that each of its two neighbours along an axis gives, from ... to ...
NEIGHBOUR = (0.1, 0.33)


def redrawn(pixels: Tensor, classes: Tensor, mirrored: Tensor, rng: np.random.Generator) -> Tensor:
    """Give structures new mean intensities, drawn at random as SynthSeg does (Billot et al., 2023), and keep their texture.

    What has no class (0), such as skull and skin, stays as it is.

    Args:
        pixels: slices (N, H, W), scaled: 0 is background, about 1 the brightest tissue.
        classes: (N, H, W) int64 of these slices.
        mirrored: (256,) class of each class in a mirror; left and right get the same mean.
        rng: is drawn from.
    """
    both = torch.minimum(mirrored, torch.arange(len(mirrored)))
    classes = both[classes]
    counts = torch.bincount(classes.flatten(), minlength=len(both))
    sums = torch.bincount(classes.flatten(), pixels.flatten().double(), minlength=len(both))
    means = torch.from_numpy(rng.uniform(*MEANS, len(both)))
    changed = torch.from_numpy(rng.random(len(both)) < rng.uniform(*CHANGED))
    changed[0] = False
    change = torch.where(changed, means - sums / counts.clamp(min=1), 0.0)[classes].to(pixels)[:, None]
    beside = rng.uniform(*NEIGHBOUR)
    for shape in ((1, 1, 3, 1), (1, 1, 1, 3)):
        kernel = change.new_tensor([beside, 1 - 2 * beside, beside]).view(shape)
        padding = [side // 2 for side in (shape[3], shape[3], shape[2], shape[2])]
        change = F.conv2d(F.pad(change, padding, mode="replicate"), kernel)
    return pixels + change[:, 0]


class RandomCurve(mt.RandomizableTransform, mt.MapTransform):
    """Another contrast from the same image: intensities pass through a random curve, which need not rise.

    The curve is linear between ``KNOTS``, starts at 0, so that the background stays, and ends level. Of several slices all get
    the same curve. Tissues that it makes alike cannot be told apart by intensity any more, as in some scans.

    Args:
        keys: of the images, (C, H, W), scaled: 0 is background, about 1 the brightest tissue.
        prob: probability of a curve.
    """

    KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)
    VALUES = (0.05, 1.0)

    def __init__(self, keys: str, prob: float) -> None:
        mt.MapTransform.__init__(self, keys)
        mt.RandomizableTransform.__init__(self, prob)

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same sample, its images changed."""
        self.randomize(None)
        if not self._do_transform:
            return data
        values = [0.0, *self.R.uniform(*self.VALUES, len(self.KNOTS) - 1)]
        images = {str(key): np.interp(np.asarray(data[str(key)]), self.KNOTS, values) for key in self.keys}
        return {**data, **{key: torch.from_numpy(image.astype(np.float32)) for key, image in images.items()}}
