"""Tubes along bent lines: vessels, and bowel with its wall, gas, fluid and stool."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from hf_binaryformer.data.synthesis.canvas import Canvas
from hf_binaryformer.data.synthesis.outline import Shell, at_angles

STEP_MM = 3.0
# Tries for the next step of a bent line.
TRIES = 8
FAR = 9.0


def smooth_line(points: np.ndarray) -> np.ndarray:
    """Points (n, 3) about 3 mm apart on a smooth curve near the given ones (m, 3)."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    count = max(2, int(lengths[-1] / STEP_MM) + 1)
    wanted = np.linspace(0, lengths[-1], count)
    line = np.stack([np.interp(wanted, lengths, column) for column in points.T], 1)
    bend = 0.12 * lengths[-1] / max(len(points) - 1, 1) / STEP_MM
    smooth = ndimage.gaussian_filter1d(line, max(bend, 1e-3), axis=0, mode="nearest")
    smooth[[0, -1]] = line[[0, -1]]
    return smooth


class Tube:
    """Distances to lines with a radius at every point.

    Attributes:
        distance: (I, J, K) to the nearest point's centre as a share of its radius; 9 far away.
        owner: (I, J, K) that point's number.
        points, radius: (n, 3) mm and (n,) mm of all points so far.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.distance = np.full(canvas.organs.shape, FAR, np.float32)
        self.owner = np.zeros(canvas.organs.shape, np.int32)
        self.points: list[np.ndarray] = []
        self.radius: list[float] = []

    def add(self, point: np.ndarray, radius: float) -> None:
        """Add one point of a line; its neighbours must be nearer than the radius."""
        box = self.canvas.around(point[None], 1.7 * radius)
        if any(side.start >= side.stop for side in box):
            return
        squares = [((axis[side] - p) / radius) ** 2 for axis, side, p in zip(self.canvas.axes, box, point, strict=True)]
        found: np.ndarray = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2]).astype(np.float32)
        nearer = found < self.distance[box]
        self.distance[box][nearer] = found[nearer]
        self.owner[box][nearer] = len(self.points)
        self.points.append(point)
        self.radius.append(radius)

    def at(self, point: np.ndarray) -> float:
        """Distance at a place, 0 outside of the volume."""
        place = np.rint(point / self.canvas.mm).astype(int)
        inside = bool(((place >= 0) & (place < self.distance.shape)).all())
        return float(self.distance[tuple(place)]) if inside else 0.0


def paint_line(
    canvas: Canvas,
    points: np.ndarray,
    radius: tuple[float, float],
    name: str,
    over: tuple[str, ...],
    organ: str | None = None,
) -> None:
    """Draw a vessel along points (n, 3) mm; its radius goes from the first to the second. ``organ``: inside of that one."""
    line = smooth_line(np.asarray(points, dtype=float))
    for point, size in zip(line, np.linspace(*radius, len(line)), strict=True):
        box = canvas.around(point[None], size)
        squares = [(axis[side] - p) ** 2 for axis, side, p in zip(canvas.axes, box, point, strict=True)]
        if min(map(len, squares)) == 0:
            continue
        near = squares[0][:, None, None] + squares[1][:, None] + squares[2] < max(size, 0.7 * canvas.mm) ** 2
        if organ is None:
            canvas.paint(near, name, box, over)
        else:
            canvas.paint_inside(near, name, organ, box)


def _bent(start: np.ndarray, end: np.ndarray, by: float, rng: np.random.Generator, count: int = 3) -> np.ndarray:
    """Points from start to end, those between moved at random."""
    share = np.linspace(0, 1, count + 2)[:, None]
    points = start + share * (end - start)
    points[1:-1] += by * rng.standard_normal((count, 3))
    return points


def paint_vessels(canvas: Canvas, shell: Shell) -> None:
    """Veins and arteries between the organs, the oesophagus, adrenal glands and duodenum; none has a label here."""
    rng, mm = canvas.rng, canvas.mm
    fat = ("visceral fat", "muscle")
    middles = {name: canvas.places(name).mean(0) for name in canvas.labels if name != "background" and canvas.has(name)}
    trunk = shell.trunk
    heights = canvas.axes[2]

    def trunk_at(z: float) -> np.ndarray:
        index = int(np.clip(round(z / mm), 0, len(heights) - 1))
        return np.array([*trunk[:2, index], z])

    ends = heights[np.flatnonzero((canvas.organs == canvas.labels["aorta"]).any((0, 1)))]
    cava = _paint_cava(canvas, shell, float(ends[0]))

    def cava_at(z: float) -> np.ndarray:
        index = int(np.clip(round(z / mm), 0, len(heights) - 1))
        return np.array([*cava[:2, index], z])

    for side in (-1, 1):
        pelvis = np.array([canvas.draw("vertebra_width") + 22, 5.0, -95]) * [side, 1, 1]
        start = trunk_at(float(ends[0]))
        paint_line(canvas, _bent(start, start + pelvis, 4, rng), (trunk[2].mean() * 0.65, 4.5), "blood", (*fat, "vein"))
        start = cava_at(float(ends[0]) - 12)
        paint_line(canvas, _bent(start, start + pelvis - np.array([0, 6, 0]), 4, rng), (7.5, 5.5), "vein", fat)
    for name, inward in (("right kidney", -1), ("left kidney", 1)):
        if (place := middles.get(name)) is None:
            continue
        hilum = place + np.array([inward * 14, 6, rng.normal(0, 4)])
        vein = cava_at(hilum[2] + 6)
        front = trunk_at(hilum[2] + 6) + np.array([0, trunk[2].mean() + 5, 0])
        course = [vein, front, hilum] if inward > 0 else [vein, hilum]
        paint_line(canvas, np.array(course), (4.5, 4.0), "vein", fat)
        paint_line(canvas, _bent(trunk_at(hilum[2] + 8), hilum - np.array([0, 4, 0]), 3, rng), (3.0, 2.5), "blood", fat)
        paint_line(canvas, _bent(hilum, hilum + np.array([0, 2, -60]), 4, rng), (3.0, 2.0), "urine", ("visceral fat",))
    _paint_upper(canvas, shell, middles, trunk_at)
    # Small vessels of the mesentery.
    small = np.hypot(canvas.field(16.0), canvas.field(16.0)) < rng.uniform(0.10, 0.22)
    canvas.paint(small, "vein", over=("visceral fat",))


def _paint_cava(canvas: Canvas, shell: Shell, lowest: float) -> np.ndarray:
    """Draw the lower vena cava: right of the trunk, and in the gap that the liver leaves for it. Its R, A (2, K) mm."""
    rng, mm = canvas.rng, canvas.mm
    trunk = shell.trunk
    line = np.stack([shell.spine[0] + rng.uniform(13, 19), trunk[1] + rng.uniform(-2, 3)])
    beside = np.isin(canvas.organs, [canvas.labels[n] for n in ("liver", "aorta", "right kidney", "pancreas")])
    found = line.copy()
    for k in range(line.shape[1]):
        i, j = np.rint(line[:, k] / mm).astype(int)
        reach = int(16 / mm)
        box = (slice(max(i - reach, 0), i + reach + 1), slice(max(j - reach, 0), j + reach + 1), k)
        room = ndimage.distance_transform_edt(~beside[box])
        p, q = np.ogrid[: room.shape[0], : room.shape[1]]
        score = np.minimum(room, 11 / mm) - 0.25 * np.hypot(p - (i - box[0].start), q - (j - box[1].start))
        best = np.unravel_index(int(score.argmax()), score.shape)
        found[:, k] = mm * np.array([best[0] + box[0].start, best[1] + box[1].start])
    found = ndimage.gaussian_filter1d(found, 8 / mm, axis=1, mode="nearest")
    size = rng.uniform(8.5, 12.0) * np.exp(0.12 * rng.standard_normal())
    flat = rng.uniform(0.65, 1.0)
    round_ = np.hypot((canvas.x - found[0]) / size, (canvas.y - found[1]) / (flat * size)) < 1
    liver = np.flatnonzero((canvas.organs == canvas.labels["liver"]).any((0, 1)))
    highest = mm * liver[-1] + 8 if liver.size else canvas.axes[2][-1]
    canvas.paint(round_ & (canvas.z > lowest - 15) & (canvas.z < highest), "vein")
    return found


def _paint_upper(
    canvas: Canvas, shell: Shell, middles: dict[str, np.ndarray], trunk_at: Callable[[float], np.ndarray]
) -> None:
    """Portal and splenic vein, mesenteric vessels, oesophagus, adrenal glands and duodenum."""
    rng = canvas.rng
    fat = ("visceral fat",)
    pancreas = canvas.places("pancreas")
    if len(pancreas) and "spleen" in middles and "liver" in middles:
        # Its head is on the right.
        head = pancreas[pancreas[:, 0] > np.percentile(pancreas[:, 0], 85)].mean(0)
        tail = pancreas[pancreas[:, 0] < np.percentile(pancreas[:, 0], 15)].mean(0)
        body = pancreas.mean(0)
        joint = 0.5 * (head + body) - np.array([0, 6, 0])
        spleen = canvas.places("spleen")
        gate = spleen[np.argmin(np.linalg.norm(spleen - tail, axis=1))]
        paint_line(
            canvas,
            np.array([gate, tail - np.array([0, 5, 0]), body - np.array([0, 9, 0]), joint]),
            (3.5, 5.0),
            "vein",
            fat,
        )
        liver = canvas.places("liver")
        door = liver[np.argmin(np.linalg.norm(liver - (joint + np.array([25, 0, 30])), axis=1))]
        paint_line(canvas, _bent(joint, door, 3, rng), (6.0, 6.5), "vein", fat)
        paint_line(canvas, _bent(joint, joint + np.array([-4, 8, -110]), 5, rng), (5.0, 3.5), "vein", fat)
        start = trunk_at(float(body[2]))
        paint_line(canvas, _bent(start, start + np.array([0, 24, -120]), 3, rng), (4.0, 2.5), "blood", fat)
        paint_line(
            canvas, _bent(start + np.array([0, 0, 14]), tail + np.array([0, -8, 10]), 6, rng), (3.0, 2.0), "blood", fat
        )
        # The duodenum turns about the head, in front of the vena cava.
        turn = [[8, 14, 26], [26, 6, 14], [30, -2, -12], [18, -10, -34], [-14, -6, -40], [-44, 0, -26]]
        size = rng.uniform(9, 13)
        tube = Tube(canvas)
        for point in smooth_line(head + np.array(turn) + rng.normal(0, 3, (6, 3))):
            tube.add(point, size)
        fill_bowel(
            canvas, tube, canvas.draw("bowel_wall"), {"bowel gas": 0.15, "bowel fluid": 0.55, "collapsed": 0.3}, fat
        )
    stomach = canvas.places("stomach")
    if len(stomach):
        high = stomach[stomach[:, 2] > np.percentile(stomach[:, 2], 60)]
        entry = high[np.argmin(np.linalg.norm(high[:, :2] - trunk_at(float(high[:, 2].mean()))[:2], axis=1))]
        top = trunk_at(float(canvas.axes[2][-1])) + np.array([rng.uniform(2, 12), shell.trunk[2].mean() + 8, 0])
        paint_line(canvas, _bent(entry, top, 2, rng), (7.5, 7.0), "bowel wall", ("visceral fat", "muscle", "lung"))
    for side, inward in (("right", -1), ("left", 1)):
        if f"{side} kidney" not in middles:
            continue
        kidney = canvas.places(f"{side} kidney")
        start = kidney[kidney[:, 2] > kidney[:, 2].max() - 6].mean(0) + np.array([inward * rng.uniform(6, 16), 6, 4])
        for end in ([inward * 8, -10, 16], [inward * -4, -16, 14]):
            paint_line(canvas, np.array([start + np.array([0, 8, -2]), start, start + end]), (2.6, 1.8), "adrenal", fat)


def paint_bowel(canvas: Canvas, shell: Shell) -> None:
    """Large bowel along its frame, then small bowel as a random line that keeps clear of itself."""
    fat = ("visceral fat", "vein")
    large = Tube(canvas)
    for point, radius in _colon(canvas, shell):
        large.add(point, radius)
    contents = {"stool": 0.45, "bowel gas": 0.35, "bowel fluid": 0.1, "collapsed": 0.1}
    fill_bowel(canvas, large, canvas.draw("bowel_wall"), contents, fat)
    small = _small_bowel(canvas, shell)
    shares = {"bowel gas": 0.12, "bowel fluid": canvas.rng.uniform(0.2, 0.6), "collapsed": canvas.rng.uniform(0.2, 0.6)}
    fill_bowel(canvas, small, canvas.draw("bowel_wall"), shares, fat)


def _colon(canvas: Canvas, shell: Shell) -> list[tuple[np.ndarray, float]]:
    """Points and radii of the large bowel: up the right flank, across in front, down the left flank."""
    rng, mm = canvas.rng, canvas.mm
    size = canvas.draw("colon_radius")

    def wall(angle: float, z: float, inner: float) -> np.ndarray:
        k = int(np.clip(round(z / mm), 0, shell.cavity.shape[1] - 1))
        reach = max(shell.cavity[int(angle) % 360, k] - inner, 5)
        return np.array([*(shell.centre + reach * np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])), z])

    def edge(organ: str, share: float) -> float:
        places = canvas.places(organ)
        return float(np.percentile(places[:, 2], share)) if len(places) else float(canvas.axes[2].mean())

    right, left = edge("liver", 12) + rng.normal(0, 12), edge("spleen", 15) + rng.normal(0, 12)
    deep = min(right, left) - rng.uniform(0, 70)
    bottom = -1.5 * size
    points = [wall(a, z, size + 2) for a, z in ((340, bottom), (345, 0.5 * right), (352, right - 25), (5, right - 8))]
    points += [wall(a, z, size + 4) for a, z in ((40, deep + 15), (75, deep), (110, deep), (145, 0.5 * (deep + left)))]
    points += [wall(a, z, size + 2) for a, z in ((172, left - 4), (192, left - 25), (197, 0.5 * left), (200, bottom))]
    line = smooth_line(np.array(points) + rng.normal(0, 5, (len(points), 3)))
    pouches = 1 + 0.16 * np.sin(np.arange(len(line)) * STEP_MM * 2 * np.pi / rng.uniform(24, 34))
    wide = np.exp(0.2 * ndimage.gaussian_filter1d(rng.standard_normal(len(line)), 8, mode="nearest") * 4)
    # The descending part is the narrowest.
    narrow = np.linspace(1.1, 0.65, len(line))
    return list(zip(line, np.clip(size * pouches * wide * narrow, 6, 32), strict=True))


def _small_bowel(canvas: Canvas, shell: Shell) -> Tube:
    """Random loops in the free fat below the stomach and in front of the spine."""
    rng, mm = canvas.rng, canvas.mm
    angle, radius = shell.polar(canvas)
    height = [np.percentile(canvas.places(n)[:, 2], 30) for n in ("stomach", "pancreas") if canvas.has(n)]
    ceiling = float(np.mean(height)) if height else float(canvas.axes[2].mean())
    room = canvas.is_in("visceral fat", "vein") & (at_angles(shell.cavity, angle) - radius > 4)
    room &= (canvas.z < ceiling) & (canvas.y > shell.spine[1] + shell.half_axes[1] + 6)
    room = ndimage.binary_erosion(room, iterations=2)
    places = np.argwhere(room)
    tube = Tube(canvas)
    if len(places) == 0:
        return tube
    wanted = canvas.draw("bowel_share") * len(places) * mm**3
    filled, size = 0.0, canvas.draw("bowel_radius")
    limit = int(wanted / (np.pi * size**2 * STEP_MM)) * 2 + 1
    point = mm * places[rng.integers(len(places))].astype(float)
    heading = rng.standard_normal(3)
    for _ in range(limit):
        if filled >= wanted:
            break
        best, good = None, -np.inf
        for _ in range(TRIES):
            turned = heading / np.linalg.norm(heading) + 0.55 * rng.standard_normal(3)
            step = point + STEP_MM * turned / np.linalg.norm(turned)
            ahead = step + 1.3 * size * turned / np.linalg.norm(turned)
            place = np.rint(ahead / mm).astype(int)
            inside = bool((place >= 0).all() and (place < room.shape).all()) and bool(room[tuple(place)])
            score = min(tube.at(ahead), 1.6) + (1.0 if inside else 0.0) + 0.1 * rng.random()
            if score > good:
                best, good, turn = step, score, turned
        if good < 1.6 or best is None:
            # No way on: another loop starts elsewhere.
            free = places[rng.integers(len(places), size=20)]
            point = mm * free[int(np.argmax(tube.distance[tuple(free.T)]))].astype(float)
            heading = rng.standard_normal(3)
        else:
            point, heading = best, turn
        radius_here = size * float(np.exp(0.12 * np.sin(len(tube.points) / 9) + 0.05 * rng.standard_normal()))
        tube.add(point, radius_here)
        filled += np.pi * radius_here**2 * STEP_MM
    return tube


def fill_bowel(canvas: Canvas, tube: Tube, wall: float, shares: dict[str, float], over: tuple[str, ...]) -> None:
    """Draw a tube's wall and its contents, which change along it; gas lies in front, as in a person on the back.

    Args:
        tube: distances to the line.
        wall: thickness, mm.
        shares: how much of the line is filled with what; "collapsed" is wall throughout.
        over: regions that it may cover.
    """
    if not tube.points:
        return
    rng = canvas.rng
    inside = (tube.distance < 1) & canvas.is_in(*over) & canvas.free
    owner = tube.owner[inside]
    radius, points = np.array(tube.radius), np.array(tube.points)
    canvas.values[inside] = canvas.value("bowel wall")
    names = list(shares)
    chances = np.array(list(shares.values())) / sum(shares.values())
    # Pieces of 25 to 120 mm have one content each.
    kinds: list[int] = []
    while len(kinds) < len(points):
        kinds += [int(rng.choice(len(names), p=chances))] * int(rng.uniform(25, 120) / STEP_MM)
    kind = np.array(kinds[: len(points)])[owner]
    lumen = (1 - tube.distance[inside]) * radius[owner] > wall
    forward = (np.argwhere(inside)[:, 1] * canvas.mm - points[owner][:, 1]) / radius[owner]
    level = ndimage.gaussian_filter1d(rng.uniform(-0.7, 0.7, len(points)), 25, mode="nearest")[owner] * 3
    found = canvas.values[inside]
    coarse = canvas.field(7.0)[inside] if "stool" in shares else None
    for index, name in enumerate(names):
        here = lumen & (kind == index)
        if name == "collapsed":
            continue
        found[here] = canvas.value(name)
        if name == "bowel gas":
            found[here & (forward < level)] = canvas.value("bowel fluid")
        elif name == "stool" and coarse is not None:
            found[here & (coarse > 1.2)] = canvas.value("bowel gas")
            found[here & (forward > 0.75)] = canvas.value("bowel gas")
    canvas.values[inside] = found
