"""The outline of a body: layers around its organs, each a radius for every angle and height."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from hf_binaryformer.data.synthesis.anatomy import Anatomy
from hf_binaryformer.data.synthesis.canvas import BodyRanges, Canvas

ANGLES = 360
BACK, FRONT = 270, 90  # degrees from the right
AROUND = ("wrap", "nearest")
# Half the gap between the long muscles of the back, where the spinous processes are, mm.
FURROW_MM = 4.0


def smooth_noise(
    shape: tuple[int, int], sigma: tuple[float, float], rng: np.random.Generator, modes: tuple[str, str] = AROUND
) -> np.ndarray:
    """Random numbers of standard deviation about 1 that are smooth over ``sigma`` samples."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode=modes)
    return field / max(float(field.std()), 1e-6)


@dataclass(frozen=True)
class Shell:
    """Layers of a body.

    Args:
        centre: (2,) mm, from which radii are measured in every axial plane.
        cavity, muscle, skin: outer radius (360, K) in mm of what holds the organs, of the wall around it, and of the
            body; first angle on the right, then the front.
        spine: (2, K) mm: R and A of the middle of the vertebral bodies.
        trunk: (3, K) mm: R, A and radius of the great vessel; below its end, of where it would go on.
        half_axes: (2,) mm, of a vertebral body.
    """

    centre: np.ndarray
    cavity: np.ndarray
    muscle: np.ndarray
    skin: np.ndarray
    spine: np.ndarray
    trunk: np.ndarray
    half_axes: np.ndarray

    @classmethod
    def drawn(cls, organs: np.ndarray, anatomy: Anatomy, ranges: BodyRanges, rng: np.random.Generator) -> Shell:
        """Layers that hold all organs (I, J, K) of a map."""
        mm = anatomy.mm
        labels = {name: label for label, name in anatomy.description.label_names.items()}
        half_axes = np.array([rng.uniform(*ranges.vertebra_width), rng.uniform(*ranges.vertebra_depth)])
        trunk = _trunk(organs == labels["aorta"], mm)
        spine = _spine(organs, labels, trunk, half_axes, mm, rng)
        places = np.argwhere(organs > 0)
        points = places[:, :2] * mm
        front = float(np.percentile(points[:, 1], 99.5))
        centre = np.array([spine[0].mean(), 0.5 * (front + spine[1].mean() + half_axes[1])])
        nearest = radii(points, places[:, 2], centre, organs.shape[2])
        cavity = _cavity(nearest, mm, ranges, rng)
        cavity = np.maximum(
            np.minimum(cavity, _behind(points, places[:, 2], centre, spine, half_axes, mm)), nearest + 1.5
        )
        cavity = np.maximum(ndimage.gaussian_filter(cavity, (3, 3), mode=AROUND), nearest + 1)

        angle = np.arange(ANGLES)[:, None]
        behind = np.abs(angle - BACK)
        kept = nearest.shape
        thick = rng.uniform(*ranges.wall) * np.exp(0.2 * smooth_noise(kept, (20, 12), rng))
        thick = thick * (0.75 + 0.35 * np.abs(np.sin(np.deg2rad(angle))) ** 2) + 18 * np.exp(-((behind / 28) ** 2))
        # The two straight muscles of the belly meet in a thin line.
        thick = thick * (1 - 0.6 * np.exp(-(((angle - FRONT) / 5) ** 2)))
        muscle = np.maximum(cavity + thick, _back_muscles(spine, centre, ranges, rng))
        muscle = ndimage.gaussian_filter(muscle, (4, 6 / mm), mode=AROUND)

        wide = ndimage.gaussian_filter(ndimage.maximum_filter(muscle, (25, 1), mode=AROUND), (12, 10 / mm), mode=AROUND)
        fat = rng.uniform(*ranges.fat) * np.exp(0.25 * smooth_noise(kept, (35, 40), rng))
        skin = np.maximum(wide, muscle) + fat
        # A person on the back lies on a plane.
        sine = np.sin(np.deg2rad(angle))
        lowest = ndimage.gaussian_filter1d((muscle * sine).min(0), 15 / mm, mode="nearest")
        back = lowest - rng.uniform(*ranges.fat_back)
        flat = np.where(sine < -0.1, back / np.minimum(sine, -0.1), np.inf)
        skin = np.maximum(np.minimum(skin, flat), muscle + 2.5)
        skin = ndimage.gaussian_filter(skin, (3, 3), mode=AROUND)
        tables = [table.astype(np.float32) for table in (cavity, muscle, skin, spine, trunk)]
        return cls(centre, tables[0], tables[1], tables[2], tables[3], tables[4], half_axes)

    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners (2,), (2,) mm of the body in the plane."""
        angle = np.deg2rad(np.arange(ANGLES))
        edge = self.skin.max(1) * np.stack([np.cos(angle), np.sin(angle)])
        return self.centre + edge.min(1), self.centre + edge.max(1)

    def moved(self, by: np.ndarray) -> Shell:
        """The same in a volume whose first voxel lies ``by`` (2,) mm lower."""
        spine, trunk = self.spine.copy(), self.trunk.copy()
        spine += by[:, None]
        trunk[:2] += by[:, None]
        return dataclasses.replace(self, centre=self.centre + by, spine=spine, trunk=trunk)

    def polar(self, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
        """Angle in degrees from the right and distance in mm from the centre, (I, J, 1) each."""
        across, forward = canvas.x - self.centre[0], canvas.y - self.centre[1]
        return np.rad2deg(np.arctan2(forward, across)) % 360, np.hypot(across, forward)


def at_angles(table: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Values (I, J, K) of a table (360, K) at angles (I, J, 1) in degrees."""
    first = np.minimum(angle[..., 0].astype(int), ANGLES - 1)
    share = (angle[..., 0] - first)[..., None].astype(np.float32)
    return table[first] * (1 - share) + table[(first + 1) % ANGLES] * share


def radii(points: np.ndarray, heights: np.ndarray, centre: np.ndarray, count: int) -> np.ndarray:
    """Largest distance (360, count) from the centre of points (n, 2), by angle and by height (n,), a slice's number."""
    offset = points - centre
    angle = np.rint(np.rad2deg(np.arctan2(offset[:, 1], offset[:, 0]))).astype(int) % ANGLES
    found = np.zeros((ANGLES, count))
    np.maximum.at(found, (angle, heights), np.hypot(offset[:, 0], offset[:, 1]))
    return found


def _trunk(aorta: np.ndarray, mm: float) -> np.ndarray:
    """R, A and radius (3, K) of the great vessel in mm."""
    area = aorta.sum((0, 1)).astype(float)
    found = np.flatnonzero(area > 0)
    rows = [aorta.any(1), aorta.any(0)]
    line = np.zeros((3, len(area)))
    for axis, row in enumerate(rows):
        weights = aorta.sum(1 - axis)
        line[axis] = mm * (weights * np.arange(row.shape[0])[:, None]).sum(0) / np.maximum(area, 1)
    line[2] = mm * np.sqrt(area / np.pi)
    heights = np.arange(len(area))
    line = np.stack([np.interp(heights, found, row[found]) for row in line])
    return ndimage.gaussian_filter1d(line, 6 / mm, axis=1, mode="nearest")


def _spine(
    organs: np.ndarray,
    labels: dict[str, int],
    trunk: np.ndarray,
    half_axes: np.ndarray,
    mm: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """R and A of the vertebral bodies' middle, (2, K) mm."""
    sides = [np.flatnonzero((organs == labels[f"{side} kidney"]).any((1, 2))) for side in ("left", "right")]
    middle = mm * np.mean([side.mean() for side in sides if side.size] or [organs.shape[0] / 2])
    across = 0.6 * middle + 0.4 * (trunk[0] + rng.uniform(4, 14))
    across = ndimage.gaussian_filter1d(across, 30 / mm, mode="nearest")
    gap = half_axes[1] + np.minimum(trunk[2], 16) + 2
    return np.stack([across, ndimage.gaussian_filter1d(trunk[1] - gap, 20 / mm, mode="nearest")])


def _cavity(nearest: np.ndarray, mm: float, ranges: BodyRanges, rng: np.random.Generator) -> np.ndarray:
    """Radius of what holds the organs, from the farthest organ (360, K) by angle and height."""
    heights = np.flatnonzero(nearest.any(0))
    inner = nearest[:, heights[0] : heights[-1] + 1]
    size = 2 * int(40 / mm) + 1
    wide = ndimage.gaussian_filter(ndimage.maximum_filter(inner, (21, size), mode=AROUND), (10, 25 / mm), mode=AROUND)
    wide = np.pad(wide, [(0, 0), (heights[0], nearest.shape[1] - 1 - heights[-1])], mode="edge")
    # Where there are no organs, the wall bulges like an ellipse.
    high = wide.max(1)
    angle = np.deg2rad(np.arange(ANGLES))[:, None]
    forward = np.where(np.sin(angle) > 0, high[FRONT - 30 : FRONT + 31].mean(), high[BACK - 50 : BACK + 51].max())
    sideways = 0.5 * (np.roll(high, 25)[:51].mean() + high[155:206].mean())
    power = rng.uniform(2.1, 2.6)
    cosine, sine = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    ellipse = ((cosine / sideways) ** power + (sine / forward) ** power) ** (-1 / power)
    share = rng.uniform(0.88, 1.0)
    cavity = ndimage.gaussian_filter(np.maximum(wide, share * ellipse), (8, 12 / mm), mode=AROUND)
    cavity += rng.uniform(*ranges.visceral) * np.exp(0.3 * smooth_noise(cavity.shape, (30, 25), rng))
    cavity = np.maximum(cavity, ndimage.maximum_filter(nearest, (7, 5), mode=AROUND) + 2)
    cavity = ndimage.gaussian_filter(cavity, (3, 2), mode=AROUND)
    return np.maximum(cavity, nearest + 1)


def _behind(
    points: np.ndarray, heights: np.ndarray, centre: np.ndarray, spine: np.ndarray, half_axes: np.ndarray, mm: float
) -> np.ndarray:
    """Largest radius (360, K) that the cavity has at the back: it ends behind the organs, and in front of the spine."""
    lowest = np.full(spine.shape[1], np.inf)
    np.minimum.at(lowest, heights, points[:, 1])
    known = np.flatnonzero(np.isfinite(lowest))
    lowest = np.interp(np.arange(len(lowest)), known, lowest[known])
    lowest = ndimage.gaussian_filter1d(ndimage.minimum_filter1d(lowest, int(50 / mm)), 15 / mm, mode="nearest")
    lowest = np.minimum(lowest, spine[1] - 8) - 4
    angle = np.deg2rad(np.arange(ANGLES))[:, None]
    sine, cosine = np.sin(angle), np.cos(angle)
    # Beside the spine it is deepest; at the spine it ends at the front of the vertebrae.
    limit = np.full((ANGLES, spine.shape[1]), np.inf)
    for _ in range(3):
        across = np.where(np.isfinite(limit), limit * cosine, 1e3) - (spine[0] - centre[0])
        share = np.exp(-((across / (1.6 * half_axes[0])) ** 2))
        depth = lowest + share * (spine[1] + 0.3 * half_axes[1] - lowest)
        limit = np.where(sine < -0.05, (depth - centre[1]) / np.minimum(sine, -0.05), np.inf)
    return limit


def _back_muscles(spine: np.ndarray, centre: np.ndarray, ranges: BodyRanges, rng: np.random.Generator) -> np.ndarray:
    """Radius (360, K) that the long muscles of the back and the spinous processes reach."""
    across, deep = rng.uniform(*ranges.back_width), rng.uniform(*ranges.back_depth)
    beside, behind = across + FURROW_MM, rng.uniform(*ranges.back_reach) - deep
    turn = np.deg2rad(np.arange(0, 360, 2))
    points, heights = [], []
    for side in (-1, 1):
        for height in range(spine.shape[1]):
            middle = spine[:2, height] + [side * beside, -behind]
            points.append(middle + np.stack([across * np.cos(turn), deep * np.sin(turn)], 1))
            heights.append(np.full(len(turn), height))
    found = radii(np.concatenate(points), np.concatenate(heights), centre, spine.shape[1])
    # Between the sampled angles, and across the furrow.
    return ndimage.grey_closing(ndimage.maximum_filter(found, (3, 1), mode=AROUND), (9, 1), mode="wrap")


def paint_shell(canvas: Canvas, shell: Shell) -> None:
    """Skin, fat, muscle wall and the fat of the cavity, with streaks of fat in the muscle."""
    angle, radius = shell.polar(canvas)
    skin = at_angles(shell.skin, angle) - radius
    muscle = at_angles(shell.muscle, angle)
    # No muscle is cut off sharply from its surroundings: fat runs between its layers.
    seams = canvas.field(9.0)
    canvas.paint(skin > 0, "subcutaneous fat")
    canvas.paint((skin > 0) & (skin < canvas.draw("skin")), "skin")
    canvas.paint(radius < muscle, "muscle")
    cavity = at_angles(shell.cavity, angle)
    share = (radius - cavity) / np.maximum(muscle - cavity, 1)
    streak = canvas.rng.uniform(1.5, 2.6)
    layer = np.abs(share - 0.45) * np.maximum(muscle - cavity, 1) < canvas.rng.uniform(0, 1.3)
    canvas.paint((seams > streak) | (layer & (seams > 0)), "intermuscular fat", over=("muscle",))
    canvas.paint(radius < cavity, "visceral fat")
