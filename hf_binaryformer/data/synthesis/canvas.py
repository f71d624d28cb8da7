"""The voxels of a body in the making, and the ranges that it is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_binaryformer.data.synthesis.axes import SmoothField
from hf_binaryformer.data.synthesis.description import Description, Range


@dataclass(frozen=True)
class BodyRanges:
    """What is drawn for a body; (low, high) pairs are uniform draws, lengths are in mm.

    Args:
        above, below: of the body beyond the highest and lowest organ. The vessel ``trunk`` does not count.
        fat, fat_back: under the skin, in front and at the sides, and below a person who lies on the back.
        visceral: between the organs and the wall.
        wall, skin: thickness.
        back_width, back_depth: half axes of the long muscles of the back, one on each side of the spine. ``back_reach``: how
            far they reach behind the middle of a vertebra.
        vertebra_width, vertebra_depth: half axes of a vertebral body. ``vertebra_height`` with its disc.
        bowel_share: of the free space of the belly. ``bowel_radius`` of the small one, ``colon_radius`` of the large one.
        bowel_wall, stomach_wall: thickness.
        cortex: of the kidneys, thickness.
        cysts, cyst_radius: how many at most, in the organs of ``cysts_in``.
        lobulation: share of draws in which fat runs through the pancreas.
        stones: share of draws in which a gall bladder has stones or sludge.
    """

    above: Range
    below: Range
    fat: Range
    fat_back: Range
    visceral: Range
    wall: Range
    skin: Range
    back_width: Range
    back_depth: Range
    back_reach: Range
    vertebra_width: Range
    vertebra_depth: Range
    vertebra_height: Range
    bowel_share: Range
    bowel_radius: Range
    colon_radius: Range
    bowel_wall: Range
    stomach_wall: Range
    cortex: Range
    cysts: int
    cyst_radius: Range
    cysts_in: list[str]
    lobulation: float
    stones: float


class Canvas:
    """The voxels of a body in the making.

    Args:
        organs: label map (I, J, K), 0 between the organs, already of the body's shape.
        mm: spacing.
        description: gives values and names.
        ranges: of the body.
        rng: random numbers.

    Attributes:
        values: what is drawn so far; starts as the organs.
        x, y, z: coordinates in mm along R, A, S, each of a shape that broadcasts to (I, J, K).
    """

    def __init__(
        self, organs: np.ndarray, mm: float, description: Description, ranges: BodyRanges, rng: np.random.Generator
    ) -> None:
        self.organs, self.values, self.mm = organs, organs.copy(), mm
        self.description, self.ranges, self.rng = description, ranges, rng
        self.free = organs == 0
        self.axes = [mm * np.arange(n, dtype=np.float32) for n in organs.shape]
        self.x, self.y, self.z = np.ix_(*self.axes)
        self.labels = {name: label for label, name in description.label_names.items()}

    def draw(self, name: str) -> float:
        """A uniform draw from the range of this name."""
        return float(self.rng.uniform(*getattr(self.ranges, name)))

    def has(self, organ: str) -> bool:
        """Whether the map has this organ."""
        return bool((self.organs == self.labels[organ]).any())

    def places(self, organ: str) -> np.ndarray:
        """Coordinates (n, 3) in mm of the organ's voxels."""
        return (np.argwhere(self.organs == self.labels[organ]) * self.mm).astype(np.float32)

    def value(self, name: str, organ: str | None = None) -> int:
        """Value of a region outside of the organs, or of one inside ``organ``."""
        return self.description.value_of(name, self.labels[organ] if organ else 0)

    def paint(self, where: np.ndarray, name: str, box: tuple[slice, ...] = (), over: Sequence[str] = ()) -> None:
        """Give voxels of ``box`` the value of a region, but never those of an organ.

        Args:
            where: bool, of the box.
            name: of the region.
            box: part of the volume; (): all of it.
            over: regions that may be overwritten; (): all.
        """
        allowed = where & self.free[box]
        if over:
            allowed &= np.isin(self.values[box], [self.value(other) for other in over])
        self.values[box][allowed] = self.value(name)

    def paint_inside(self, where: np.ndarray, name: str, organ: str, box: tuple[slice, ...] = ()) -> None:
        """Give voxels of an organ the value of a part of it, which keeps its label."""
        self.values[box][where & (self.organs[box] == self.labels[organ])] = self.value(name, organ)

    def is_in(self, *names: str) -> np.ndarray:
        """Voxels that have one of these regions outside of the organs now."""
        return np.isin(self.values, [self.value(name) for name in names])

    def field(self, spacing: float, box: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
        """Smooth random numbers of standard deviation 1 in a box, with control points so many mm apart."""
        axes = [axis[side] for axis, side in zip(self.axes, box, strict=True)]
        low, high = (np.array([axis[end] for axis in axes]) for end in (0, -1))
        return SmoothField(low, high, spacing, self.rng).at(axes).numpy()

    def around(self, points: np.ndarray, margin: float) -> tuple[slice, ...]:
        """Box of the volume that holds points (n, 3) mm and a margin."""
        low = np.floor((points.min(0) - margin) / self.mm).astype(int)
        high = np.ceil((points.max(0) + margin) / self.mm).astype(int) + 1
        return tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True))
