"""What is inside organs: parts with a look of their own that keep the organ's label."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from hf_binaryformer.data.boxes import bounding_box
from hf_binaryformer.data.synthesis.canvas import Canvas
from hf_binaryformer.data.synthesis.tubes import paint_line


def paint_organs(canvas: Canvas) -> None:
    """Medulla and pelvis of the kidneys, vessels of the liver, contents of stomach and gall bladder, cysts."""
    for side in ("right kidney", "left kidney"):
        if canvas.has(side):
            _kidney(canvas, side)
    if canvas.has("liver"):
        _liver(canvas)
    if canvas.has("stomach"):
        _stomach(canvas)
    if canvas.has("gallbladder"):
        _gall_bladder(canvas)
    if canvas.has("pancreas") and canvas.rng.random() < canvas.ranges.lobulation:
        box, depth = _depth(canvas, "pancreas")
        fat = canvas.field(5.0, box) > canvas.rng.uniform(0.5, 1.4)
        canvas.paint_inside(fat & (depth > 0), "pancreatic fat", "pancreas", box)
    _cysts(canvas)


def _depth(canvas: Canvas, organ: str) -> tuple[tuple[slice, ...], np.ndarray]:
    """The organ's box with a margin of one voxel, and the distance in mm of its voxels to its surface."""
    mask = canvas.organs == canvas.labels[organ]
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in bounding_box(mask))
    return box, (ndimage.distance_transform_edt(mask[box]) * canvas.mm).astype(np.float32)


def _kidney(canvas: Canvas, organ: str) -> None:
    """Pyramids below the cortex, columns of cortex between them, and in some draws fat and urine in the middle."""
    rng = canvas.rng
    box, depth = _depth(canvas, organ)
    cortex = canvas.draw("cortex")
    columns = canvas.field(9.0, box)
    canvas.paint_inside((depth > cortex + 1.2 * columns) & (columns < 0.9), "medulla", organ, box)
    deepest = float(depth.max())
    if rng.random() < 0.6:
        pelvis = max(rng.uniform(0.55, 0.85) * deepest, cortex + 3)
        canvas.paint_inside(depth > pelvis + columns, "renal sinus", organ, box)
        canvas.paint_inside(depth > pelvis + 2.5 + 2 * columns, "renal pelvis", organ, box)


def _liver(canvas: Canvas) -> None:
    """Veins that gather at the back of the dome, a portal tree from below, and small branches everywhere."""
    rng = canvas.rng
    places = canvas.places("liver")
    box = canvas.around(places, 0)
    bends = np.hypot(canvas.field(24.0, box), canvas.field(24.0, box))
    canvas.paint_inside(bends < rng.uniform(0.06, 0.16), "liver vessel", "liver", box)
    low, high = places.min(0), places.max(0)
    upper = places[places[:, 2] > high[2] - 0.3 * (high[2] - low[2])]
    # The veins meet at the back, near the middle of the body.
    meeting = upper[np.argmin(upper[:, 1] + 0.5 * np.abs(upper[:, 0] - np.percentile(upper[:, 0], 35)))]
    gate = np.array([np.percentile(places[:, 0], 38), places[:, 1].mean(), np.percentile(places[:, 2], 35)])
    door = places[np.argmin(np.linalg.norm(places - gate, axis=1))]
    # Three veins and two portal branches with twigs; their ends lie deep inside.
    inner = places[rng.integers(len(places), size=400)]
    for start, count, size in ((meeting, 3, rng.uniform(3.5, 5.5)), (door, 4, rng.uniform(3.5, 5.5))):
        for number in range(count):
            wanted = inner[(inner[:, 0] < np.percentile(places[:, 0], 100 * (number + 1) / count))]
            wanted = wanted[wanted[:, 0] >= np.percentile(places[:, 0], 100 * number / count)]
            if len(wanted) == 0:
                continue
            end = wanted[rng.integers(len(wanted))].astype(float)
            middle = 0.5 * (start + end) + rng.normal(0, 6, 3)
            paint_line(canvas, np.array([start, middle, end]), (size, 1.2), "liver vessel", (), "liver")
            for _ in range(2):
                twig = middle + 0.45 * (end - start) + rng.normal(0, 16, 3)
                paint_line(canvas, np.array([middle, twig]), (0.6 * size, 1.0), "liver vessel", (), "liver")


def _stomach(canvas: Canvas) -> None:
    """A wall with folds around gas in front, fluid behind it, and food."""
    rng = canvas.rng
    box, depth = _depth(canvas, "stomach")
    wall = canvas.draw("stomach_wall") * (1 + 0.35 * canvas.field(10.0, box))
    lumen = depth > np.maximum(wall, 1.5)
    if rng.random() < 0.12:
        return
    canvas.paint_inside(lumen, "stomach fluid", "stomach", box)
    if rng.random() < 0.5:
        coarse = canvas.field(rng.uniform(5, 14), box)
        canvas.paint_inside(lumen & (coarse > rng.uniform(-0.8, 1.2)), "stomach food", "stomach", box)
    if rng.random() < 0.75:
        forward = np.broadcast_to(canvas.y[:, box[1]], depth.shape)[lumen]
        if forward.size:
            level = np.quantile(forward, rng.uniform(0.3, 1.0))
            canvas.paint_inside(lumen & (canvas.y[:, box[1]] > level), "stomach gas", "stomach", box)


def _gall_bladder(canvas: Canvas) -> None:
    """A thin wall; in some draws sludge or stones at the back."""
    rng = canvas.rng
    box, depth = _depth(canvas, "gallbladder")
    canvas.paint_inside((depth > 0) & (depth <= canvas.mm), "gallbladder wall", "gallbladder", box)
    if rng.random() < canvas.ranges.stones:
        back = np.broadcast_to(canvas.y[:, box[1]], depth.shape)
        inner = depth > canvas.mm
        if inner.any():
            level = np.quantile(back[inner], rng.uniform(0.1, 0.4))
            name = "gallstone" if rng.random() < 0.5 else "sludge"
            lumps = canvas.field(6.0, box) > 0 if name == "gallstone" else np.True_
            canvas.paint_inside(inner & (back < level) & lumps, name, "gallbladder", box)


def _cysts(canvas: Canvas) -> None:
    """Balls of fluid in organs that have them in many people."""
    rng = canvas.rng
    for _ in range(int(rng.integers(canvas.ranges.cysts + 1))):
        organ = str(rng.choice(canvas.ranges.cysts_in))
        if not canvas.has(organ):
            continue
        places = canvas.places(organ)
        radius = canvas.draw("cyst_radius") ** rng.uniform(0.5, 1)
        centre = places[rng.integers(len(places))]
        box = canvas.around(centre[None], 1.3 * radius)
        squares = [(a[s] - c) ** 2 for a, s, c in zip(canvas.axes, box, centre, strict=True)]
        distance = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
        canvas.paint_inside(distance < radius, "cyst", organ, box)
