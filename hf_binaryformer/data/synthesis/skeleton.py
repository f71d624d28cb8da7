"""Bones, the muscles beside them, and the chest: spine with discs and canal, ribs, lungs, heart, diaphragm."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from hf_binaryformer.data.synthesis.canvas import Canvas
from hf_binaryformer.data.synthesis.outline import BACK, Shell, at_angles

DIAPHRAGM_MM = 4.0
UPPER_ORGANS = ("liver", "spleen", "stomach", "right kidney", "left kidney")


def paint_skeleton(canvas: Canvas, shell: Shell) -> None:
    """Ribs in the wall, then the spine with the muscles beside it."""
    _ribs(canvas, shell)
    _spine(canvas, shell)


def _ribs(canvas: Canvas, shell: Shell) -> None:
    """Oblique ribs above the kidneys; their cartilage rises in front."""
    rng = canvas.rng
    angle, radius = shell.polar(canvas)
    outside = radius - at_angles(shell.cavity, angle)
    turn = np.abs(angle - BACK)
    turn = np.minimum(turn, 360 - turn)  # degrees from the back
    kidneys = np.concatenate([canvas.places(f"{side} kidney")[:, 2] for side in ("left", "right")])
    lowest = float(np.median(kidneys)) if kidneys.size else float(canvas.z.mean())
    distance, slope = rng.uniform(27, 34), rng.uniform(0.8, 1.2)
    drop = slope * np.minimum(turn, 110) - slope * np.maximum(turn - 110, 0)
    phase = (canvas.z + drop - lowest - rng.uniform(0, 25)) / distance
    number = np.floor(phase)
    across = (phase - number - 0.5) * distance / rng.uniform(5.5, 7.0)
    edge = across**2 + ((outside - 5.0) / 3.6) ** 2
    # The lowest ribs end at the side; none meets its neighbour in the middle.
    reach = np.minimum(58 + 32 * number, 158)
    rib = (edge < 1) & (number >= 0) & (turn < reach) & (turn > 16)
    canvas.paint(rib & (turn < 112), "bone")
    canvas.paint(rib & (turn < 112) & (edge < 0.3), "marrow")
    canvas.paint(rib & (turn >= 112), "cartilage")


def _spine(canvas: Canvas, shell: Shell) -> None:
    """Vertebral bodies, discs, canal with cord, arches and processes, and psoas muscles; no bone inside an organ."""
    rng = canvas.rng
    wide, deep = (float(a) for a in shell.half_axes)
    line = np.stack([shell.spine[0], shell.spine[1]], 1)
    low = np.array([line[:, 0].min() - 75, line[:, 1].min() - 70, 0])
    high = np.array([line[:, 0].max() + 75, line[:, 1].max() + 35, canvas.axes[2][-1]])
    box = canvas.around(np.stack([low, high]), 0)
    x, y, z = (
        c[tuple(s if c.shape[a] > 1 else slice(None) for a, s in enumerate(box))]
        for c in (canvas.x, canvas.y, canvas.z)
    )
    # Its own wobble keeps every section from being the same ellipse.
    right, front = x - shell.spine[0], y - shell.spine[1]
    height = canvas.draw("vertebra_height")
    phase = ((z - rng.uniform(0, height)) / height) % 1.0
    disc = phase < rng.uniform(0.2, 0.28)
    waist = 1 - 0.07 * np.sin(np.pi * np.clip((phase - 0.24) / 0.76, 0, 1))
    flat = np.where(front < 0, 0.85, 1.0)
    edge = np.sqrt((right / (wide * waist)) ** 2 + (front / (deep * waist * flat)) ** 2)

    def paint(where: np.ndarray, name: str, over: tuple[str, ...] = ()) -> None:
        canvas.paint(where, name, box, over)

    heights = canvas.axes[2]
    kidneys = np.concatenate([canvas.places(f"{side} kidney")[:, 2] for side in ("left", "right")])
    start = float(np.median(kidneys)) + 15 if kidneys.size else float(heights.mean())
    size = np.clip((start - heights) / 90, 0, 1) ** 0.7 * rng.uniform(17, 26)
    psoas = np.hypot(
        (np.abs(right) - wide - 0.75 * size) / np.maximum(size, 0.1), (front + 3) / np.maximum(1.15 * size, 0.1)
    )
    paint((psoas < 1) & (size > 2), "muscle", ("visceral fat",))
    # The square muscle of the loin, flat, between psoas and the wall.
    loin = ((np.abs(right) - wide - 34) / 22) ** 2 + ((front + 20) / 8) ** 2
    paint((loin < 1) & (z < start), "muscle", ("visceral fat",))

    canal = np.sqrt((right / 11.5) ** 2 + ((front + deep + 8) / 8.0) ** 2)
    arch = (canal < 1.65) & (front < -deep + 3)
    bony = (phase > 0.3) & (phase < 0.9)
    paint(arch & bony, "bone")
    paint(arch & ~bony, "ligament")
    facet = np.hypot(np.abs(right) - 18, front + deep + 14) < 8
    paint(facet, "bone")
    paint(facet & (np.hypot(np.abs(right) - 18, front + deep + 14) < 4), "marrow")
    spine_end = -(deep + rng.uniform(38, 50))
    process = (np.abs(right) < 4.2) & (front < -deep - 15) & (front > spine_end)
    paint(process & (phase > 0.35) & (phase < 0.95), "bone")
    paint(process & (np.abs(right) < 2.2) & (phase > 0.4) & (phase < 0.9), "marrow")
    across = (np.abs(front + deep + 4) < 4) & (np.abs(right) > 10) & (np.abs(right) < wide + 18)
    paint(across & (phase > 0.5) & (phase < 0.72), "bone")
    paint(edge < 1, "bone")
    paint(edge < 1 - 2.2 / deep, "marrow")
    paint((edge < 1.03) & disc, "disc")
    paint((edge < 0.55) & disc, "disc core")
    paint(canal < 1, "fluid")
    conus = start + rng.uniform(-20, 30)
    paint((np.hypot(right, front + deep + 8) < 5) & (z > conus), "cord")
    paint((np.hypot(right / 1.6, front + deep + 11) < 4) & (z <= conus), "cord")


def paint_chest(canvas: Canvas, shell: Shell) -> None:
    """Lungs above a diaphragm that spans the domes of liver, spleen and stomach; heart and mediastinum between them."""
    rng, mm = canvas.rng, canvas.mm
    upper = np.isin(canvas.organs, [canvas.labels[name] for name in UPPER_ORGANS])
    columns = upper.any(2)
    top = mm * (canvas.organs.shape[2] - 1 - np.argmax(upper[:, :, ::-1], axis=2)).astype(np.float32)
    dome = float(top[columns].max())
    sigma = 12 / mm
    weight = ndimage.gaussian_filter(columns.astype(np.float32), sigma)
    spread = ndimage.gaussian_filter(np.where(columns, top, 0), sigma) / np.maximum(weight, 1e-3)
    distance, (i, j) = ndimage.distance_transform_edt(~columns, return_indices=True)
    surface = spread[i, j] - rng.uniform(0.5, 0.9) * mm * distance
    surface = np.where(columns, np.maximum(surface, top + 2), surface)
    # Lungs reach down behind the liver, less far at the sides, and hardly in front.
    angle, radius = shell.polar(canvas)
    turn = np.abs(angle - BACK)
    turn = np.minimum(turn, 360 - turn)[..., 0]
    deepest = rng.uniform(60, 100) * (1 - turn / 180) + rng.uniform(12, 30)
    surface = np.maximum(surface, dome - deepest)
    surface = ndimage.gaussian_filter(np.maximum(surface, np.where(columns, top + 2, -np.inf)), 4 / mm)
    surface = np.maximum(surface, np.where(columns, top + 1, -np.inf))[..., None]

    inside = at_angles(shell.cavity, angle) - radius
    chest = (canvas.z > surface + DIAPHRAGM_MM) & (inside > 1.5)
    canvas.paint((canvas.z > surface) & (inside > 0) & ~chest, "muscle", over=("visceral fat",))
    trunk, spine = shell.trunk, shell.spine
    middle = np.array(
        [spine[0].mean() - rng.uniform(14, 28), shell.centre[1] + rng.uniform(24, 40), dome + rng.uniform(16, 30)]
    )
    # From the spine to the heart.
    length = 0.5 * (middle[1] - spine[1])
    between = np.hypot((canvas.x - 0.5 * (trunk[0] + spine[0])) / 28, (canvas.y - spine[1] - length) / (length + 8)) < 1
    canvas.paint(chest & ~between, "lung", over=("visceral fat",))
    vessels = np.hypot(canvas.field(22.0), canvas.field(22.0)) < rng.uniform(0.12, 0.3)
    canvas.paint(chest & vessels, "vein", over=("lung",))

    axes = np.array([rng.uniform(52, 64), rng.uniform(38, 46), rng.uniform(34, 46)])
    heart = sum(((c - m) / a) ** 2 for c, m, a in zip((canvas.x, canvas.y, canvas.z), middle, axes, strict=True))
    canvas.paint((heart < 1.12) & chest, "visceral fat", over=("lung", "vein"))
    canvas.paint((heart < 1) & chest, "heart", over=("visceral fat",))
    canvas.paint((heart < rng.uniform(0.5, 0.7)) & chest & (canvas.field(40.0) > -0.4), "blood", over=("heart",))
    for side in (-1, 1):
        # The crura of the diaphragm, on both sides of the great vessel.
        crus = np.hypot((canvas.x - trunk[0] - side * (trunk[2] + 4)) / 5, (canvas.y - trunk[1] + 4) / 11)
        near = (canvas.z > dome - 110) & (canvas.z < dome + 5)
        canvas.paint((crus < 1) & near, "muscle", over=("visceral fat",))
