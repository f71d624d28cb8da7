"""The pelvis below the great vessel's end: hip bones, sacrum, thigh bones, the muscles around them, bladder and rectum.

Places are in mm of an adult: sideways from the middle, forwards from the middle of the lowest vertebra, and down from the
crest of the hip bone. A draw scales them, and all is cut where the body ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_binaryformer.data.synthesis.canvas import Canvas
from hf_binaryformer.data.synthesis.outline import Shell, at_angles

Place = tuple[float, float, float]

# What the muscles of the buttocks and hips leave free: depth -> half width, and how far it reaches in front. Above the
# groin these muscles end at the front of the hip bone (MUSCLE_FRONT).
HOLLOW_DEPTH = (0.0, 15.0, 30.0, 50.0, 65.0, 85.0, 110.0, 150.0, 185.0, 215.0)
HOLLOW_WIDTH = (220.0, 150.0, 118.0, 92.0, 76.0, 66.0, 59.0, 50.0, 32.0, 12.0)
HOLLOW_FRONT = (200.0, 200.0, 200.0, 200.0, 190.0, 160.0, 105.0, 48.0, 36.0, 20.0)
MUSCLE_FRONT = (10.0, 25.0, 50.0, 55.0, 60.0, 75.0, 130.0, 300.0, 300.0, 300.0)
# Middle of the sacrum: depth -> forwards, half width, half depth.
SACRUM_DEPTH = (42.0, 60.0, 90.0, 125.0, 150.0, 168.0)
SACRUM = {"forward": (-4.0, -12.0, -36.0, -46.0, -38.0, -26.0), "wide": (26.0, 54.0, 47.0, 28.0, 14.0, 6.0),
          "deep": (15.0, 20.0, 17.0, 11.0, 7.0, 4.0)}  # fmt: skip
# The wing of the hip bone in a plane: depth -> its end in front, its end at the sacrum, each sideways and forwards.
WING_DEPTH = (0.0, 12.0, 35.0, 70.0, 100.0)
WING = {"front": ((124.0, 4.0), (130.0, 22.0), (131.0, 50.0), (114.0, 46.0), (104.0, 32.0)),
        "back": ((112.0, -18.0), (88.0, -40.0), (52.0, -40.0), (52.0, -36.0), (72.0, -22.0))}  # fmt: skip
WING_BOW, WING_THICK = 9.0, 4.5
SAMPLES = 14
HIP: Place = (88.0, 14.0, 122.0)
NECK_END: Place = (122.0, -6.0, 134.0)
SOCKET, HEAD, JOINT = 32.0, 23.0, 25.5
# Rods of bone: course and radius at both ends.
RODS: tuple[tuple[tuple[Place, ...], float, float], ...] = (
    (((76.0, 34.0, 112.0), (45.0, 55.0, 128.0), (9.0, 60.0, 140.0)), 10.0, 8.0),  # pubis
    (((9.0, 60.0, 138.0), (9.0, 50.0, 162.0), (44.0, -6.0, 190.0)), 8.0, 7.0),  # its lower branch
    (((84.0, -12.0, 128.0), (62.0, -30.0, 165.0), (54.0, -30.0, 198.0)), 17.0, 15.0),  # ischium
    ((HIP, NECK_END), 14.0, 15.0),  # neck of the thigh bone
    (((128.0, -10.0, 120.0), (127.0, -6.0, 165.0), (118.0, 2.0, 290.0), (110.0, 4.0, 480.0)), 17.0, 14.0),  # its shaft
)
HIP_FLEXOR: tuple[Place, ...] = ((46.0, 8.0, 10.0), (70.0, 32.0, 80.0), (92.0, 42.0, 125.0), (96.0, 4.0, 185.0))
# From where :func:`.tubes.paint_vessels` ends.
VESSELS: tuple[Place, ...] = ((46.0, 24.0, 82.0), (66.0, 46.0, 108.0), (72.0, 62.0, 128.0), (74.0, 74.0, 220.0))
# Half axes, the front, and the lowest depth of a full bladder; half axes and depth of what lies behind it.
BLADDER, BLADDER_FRONT, BLADDER_LOW = (40.0, 30.0, 30.0), 50.0, 158.0
BEHIND, BEHIND_DEPTH, BEHIND_GAP = (27.0, 17.0, 30.0), 138.0, 8.0
# Depths between which the rectum is drawn, and to which it has content.
RECTUM, RECTUM_FULL = (65.0, 195.0), 165.0
CORTEX_MM, SKIN_MM = 2.2, 3.0
# Sideways reach of the bones, and what remains of the muscle beside them.
HALF_WIDTH, ROOM_MM, LEAST_FIT = 145.0, 4.0, 0.4


def paint_pelvis(canvas: Canvas, shell: Shell) -> None:
    """Everything below the crest of the hip bones, in the wall and in what it holds."""
    Pelvis(canvas, shell).paint()


class Pelvis:
    """A pelvis in the making.

    Attributes:
        side, ahead, depth: the tables' coordinates, of shapes that broadcast to :attr:`box`.
        box: the part of the volume at and below the crest.
        body: (I, J, K), where anything may be painted.
    """

    def __init__(self, canvas: Canvas, shell: Shell) -> None:
        self.canvas, self.shell = canvas, shell
        rng, mm = canvas.rng, canvas.mm
        end = np.flatnonzero((canvas.organs == canvas.labels["aorta"]).any((0, 1)))[0]
        self.crest = mm * end - rng.uniform(0, 25)
        self.size = rng.uniform(0.93, 1.06)
        k = int(np.clip(round(self.crest / mm), 0, shell.spine.shape[1] - 1))
        self.middle, self.front = (float(line[k]) for line in shell.spine)
        # The muscles of a narrow body hold narrow hips.
        right, left = shell.muscle[0, : k + 1], shell.muscle[180, : k + 1]
        room = float(min((shell.centre[0] + right - self.middle).min(), (self.middle - shell.centre[0] + left).min()))
        self.width = rng.uniform(0.94, 1.08)
        # They are smaller in all directions, and a little narrower still.
        fits = float(np.clip((room - ROOM_MM) / (self.size * self.width * HALF_WIDTH), LEAST_FIT, 1))
        self.size, self.width = self.size * fits**0.7, self.width * fits**0.3
        # Slices at and below the crest, in the coordinates of the tables.
        self.slices = slice(0, int(np.clip(self.crest / mm, 0, canvas.organs.shape[2] - 1)) + 1)
        self.side = (canvas.x - self.middle) / (self.size * self.width)
        self.ahead = (canvas.y - self.front) / self.size
        self.depth = (self.crest - canvas.z[..., self.slices]) / self.size
        self.box = (slice(None), slice(None), self.slices)
        angle, radius = shell.polar(canvas)
        self.body = radius < at_angles(shell.skin, angle) - SKIN_MM

    def paint(self) -> None:
        """From the outside inwards."""
        if float(self.depth.max()) < 1:
            return
        self._muscles()
        self._sacrum()
        self._wings()
        self._rods()
        self._joints()
        self._vessels()
        self._hollow_organs()

    def at(self, side: float, *places: Place) -> np.ndarray:
        """Places (n, 3) of the tables in mm of the canvas, on the side -1 or 1."""
        x, y, z = np.array(places, dtype=float).T
        right = self.middle + side * self.size * self.width * x
        return np.stack([right, self.front + self.size * y, self.crest - self.size * z], 1)

    def along(self, depths: Sequence[float], values: Sequence[float]) -> np.ndarray:
        """A table's values (1, 1, K) at every slice's depth."""
        return np.interp(self.depth, depths, values).astype(np.float32)

    def fill(self, where: np.ndarray, name: str, over: tuple[str, ...] = ()) -> None:
        """Paint voxels of :attr:`box`."""
        self.canvas.paint(where & self.body[self.box], name, self.box, over)

    def _muscles(self) -> None:
        """Muscle with seams of fat everywhere but in the hollow; it takes the place of what the wall and the loin have."""
        rng, canvas = self.canvas.rng, self.canvas
        angle, radius = self.shell.polar(canvas)
        inside = radius < at_angles(self.shell.muscle, angle)[..., self.slices]
        wobble = 1 + 0.06 * canvas.field(60.0, self.box)
        sacrum = self.along(SACRUM_DEPTH, SACRUM["forward"])
        middle = sacrum + 0.45 * (self.along(HOLLOW_DEPTH, HOLLOW_FRONT) - sacrum)
        reach = np.where(self.ahead > middle, self.along(HOLLOW_DEPTH, HOLLOW_FRONT) - middle, middle - sacrum)
        share = (
            np.abs(self.side / self.along(HOLLOW_DEPTH, HOLLOW_WIDTH)) ** 2.5
            + np.abs((self.ahead - middle) / reach) ** 2.5
        )
        hollow = share < wobble
        below = self.depth > SACRUM_DEPTH[0]
        beside = np.abs(self.side) > 0.55 * self.along(HOLLOW_DEPTH, HOLLOW_WIDTH)
        spine = ("bone", "marrow", "disc", "disc core", "ligament", "fluid", "cord")
        # Above the sacrum the spine and its muscles stay as they are.
        meat = inside & ~hollow & (below | beside)
        meat &= self.ahead < self.along(HOLLOW_DEPTH, MUSCLE_FRONT) + 12 * canvas.field(50.0, self.box)
        self.fill(meat, "muscle", ("muscle", "visceral fat", "intermuscular fat"))
        cavity = radius < at_angles(self.shell.cavity, angle)[..., self.slices]
        self.fill(cavity & below & hollow, "visceral fat", ("muscle",))
        self.fill(inside & below & hollow, "visceral fat", spine)
        self.fill(meat & below, "muscle", spine)
        self.fill(~inside & below, "subcutaneous fat", spine)
        # Between the muscles fat runs in sheets; they are where a slow field crosses zero.
        sheets = np.abs(canvas.field(38.0, self.box)) < rng.uniform(0.03, 0.09)
        self.fill(meat & sheets, "intermuscular fat", ("muscle",))
        for side in (-1, 1):
            self._bar(self.at(side, *HIP_FLEXOR), (rng.uniform(16, 22), 14), "muscle", ("visceral fat",))

    def _bar(
        self, course: np.ndarray, radius: tuple[float, float], name: str, over: tuple[str, ...] = (), core: str = ""
    ) -> None:
        """A rod along points (n, 3) mm, in which ``core`` lies below a cortex."""
        box = self.canvas.around(course, max(radius))
        if any(side.start >= side.stop for side in box):
            return
        near = _within(self.canvas, box, course, radius)
        self.canvas.paint((near < 1) & self.body[box], name, box, over)
        if core:
            self.canvas.paint((near < 1 - CORTEX_MM / max(radius)) & self.body[box], core, box)

    def _sacrum(self) -> None:
        """A wedge that bends backwards and forwards again, with the end of the canal in it."""
        forward, wide, deep = (self.along(SACRUM_DEPTH, SACRUM[name]) for name in ("forward", "wide", "deep"))
        edge = np.hypot(self.side / wide, (self.ahead - forward) / deep)
        inside = (self.depth > SACRUM_DEPTH[0]) & (self.depth < SACRUM_DEPTH[-1])
        self.fill(inside & (edge < 1), "bone")
        self.fill(inside & (edge < 1 - CORTEX_MM / deep), "marrow")
        canal = np.hypot(self.side / 10, (self.ahead - forward + 0.55 * deep) / 5) < 1
        self.fill(inside & canal & (self.depth < 110), "fluid")
        holes = np.hypot(np.abs(self.side) - 0.45 * wide, (self.ahead - forward) / 1.2) < 4.5
        self.fill(inside & holes & ((self.depth % 24) < 9) & (self.depth < 130), "intermuscular fat")

    def _wings(self) -> None:
        """Bent plates from the sacrum to the front, thicker at their rims."""
        ends = {name: [self.along(WING_DEPTH, column) for column in zip(*WING[name], strict=True)] for name in WING}
        side, distance = np.abs(self.side), np.full(self.canvas.organs[self.box].shape, np.inf, np.float32)
        along = np.zeros_like(distance)
        (x0, y0), (x1, y1) = ends["back"], ends["front"]
        bow = WING_BOW * self.canvas.rng.uniform(0.6, 1.4)
        for share in np.linspace(0, 1, SAMPLES):
            # Outwards is across the plate, away from the middle.
            length = np.hypot(x1 - x0, y1 - y0)
            out = 4 * bow * share * (1 - share)
            x = x0 + share * (x1 - x0) + out * (y1 - y0) / length
            y = y0 + share * (y1 - y0) - out * (x1 - x0) / length
            found = np.hypot(side - x, self.ahead - y)
            nearer = found < distance
            distance = np.where(nearer, found, distance)
            along = np.where(nearer, share, along)
        rim = WING_THICK * (1 + 0.8 * np.abs(2 * along - 1) ** 3) * (1 + 1.2 * np.clip((self.depth - 75) / 25, 0, 1))
        plate = (distance < rim + 2.0) & (self.depth > 0) & (self.depth < WING_DEPTH[-1])
        self.fill(plate, "bone")
        self.fill(plate & (distance < rim), "marrow")

    def _rods(self) -> None:
        """Pubis, ischium and thigh bones, with sockets and heads of the hips."""
        for side in (-1, 1):
            hip = self.at(side, HIP)
            self._bar(hip, (SOCKET * self.size, SOCKET * self.size), "bone", core="marrow")
            for course, first, last in RODS:
                self._bar(self.at(side, *course), (first * self.size, last * self.size), "bone", core="marrow")

    def _joints(self) -> None:
        """The gap between socket and head, the head, and the cartilage between the pubic bones."""
        for side in (-1, 1):
            # The cup is open to the side, where the neck leaves it.
            hip, neck = self.at(side, HIP, NECK_END)
            for radius, name, core in ((JOINT, "cartilage", ""), (HEAD, "bone", "marrow")):
                self._bar(hip[None], (radius * self.size,) * 2, name, core=core)
            self._bar(
                np.stack([hip, neck]), (12 * self.size, 14 * self.size), "marrow", ("bone", "cartilage", "marrow")
            )
        joint = (np.abs(self.side) < 2.5) & (np.abs(self.depth - 148) < 17) & (np.abs(self.ahead - 56) < 9)
        self.fill(joint, "cartilage")

    def _vessels(self) -> None:
        """The arteries and veins of the legs."""
        for side in (-1, 1):
            course = self.at(side, *VESSELS)
            self._bar(course - [side * 9, 8, 0], (6.0, 6.5), "vein", ("visceral fat", "muscle", "intermuscular fat"))
            self._bar(course, (5.0, 4.5), "blood", ("visceral fat", "muscle", "intermuscular fat", "vein"))

    def _hollow_organs(self) -> None:
        """Bladder, what lies behind it, and rectum, in the fat of the hollow."""
        rng, fat = self.canvas.rng, ("visceral fat",)
        axes = rng.uniform(0.55, 1.2) * np.array(BLADDER)
        middle = (0.0, BLADDER_FRONT - axes[1], BLADDER_LOW - axes[2])
        ball = self._ball(middle, axes)
        self.fill(ball < 1, "bowel wall", fat)
        self.fill(ball < 1 - rng.uniform(0.08, 0.16), "urine", ("bowel wall",))
        behind = self._ball((0.0, middle[1] - axes[1] - BEHIND_GAP, BEHIND_DEPTH), BEHIND)
        self.fill(behind < rng.uniform(0.55, 1.05), "bowel wall", fat)
        front = self.along(SACRUM_DEPTH, SACRUM["forward"]) + self.along(SACRUM_DEPTH, SACRUM["deep"])
        radius = rng.uniform(12, 20)
        tube = np.hypot(self.side - rng.uniform(-6, 6), self.ahead - front - radius - SKIN_MM) / radius
        long = (self.depth > RECTUM[0]) & (self.depth < RECTUM[1])
        self.fill(long & (tube < 1), "bowel wall", (*fat, "muscle"))
        content = rng.choice(["stool", "bowel gas", "bowel fluid"], p=[0.6, 0.25, 0.15])
        inner = tube < 1 - self.canvas.draw("bowel_wall") / radius
        self.fill(long & inner & (self.depth < RECTUM_FULL), str(content), ("bowel wall",))

    def _ball(self, middle: Sequence[float], axes: Sequence[float] | np.ndarray) -> np.ndarray:
        """Distance from the middle of an ellipsoid, 1 at its surface, in :attr:`box`."""
        parts = zip((self.side, self.ahead, self.depth), middle, axes, strict=True)
        return np.sqrt(sum(((c - m) / a) ** 2 for c, m, a in parts))


def _within(canvas: Canvas, box: tuple[slice, ...], course: np.ndarray, radius: tuple[float, float]) -> np.ndarray:
    """Distance of a box's voxels from a course (n, 3) mm, as a share of its radius there; n = 1: a ball."""
    axes = [axis[side] for axis, side in zip(canvas.axes, box, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    if len(course) == 1:
        return np.linalg.norm(grid - course[0], axis=-1) / radius[0]
    sizes = np.linspace(*radius, len(course))
    found = np.full(grid.shape[:3], np.inf)
    for a, b, first, last in zip(course[:-1], course[1:], sizes[:-1], sizes[1:], strict=True):
        share = np.clip(((grid - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
        distance = np.linalg.norm(grid - a - share[..., None] * (b - a), axis=-1)
        found = np.minimum(found, distance / (first + share * (last - first)))
    return found
