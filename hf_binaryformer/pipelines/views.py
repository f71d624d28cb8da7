"""How a slice of a volume is shown: its orientation, the letters at its edges, and the colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (13, 17, 23)
TEXT = (230, 237, 243)
DIM_TEXT = (139, 148, 158)
GAP, MARGIN = 8, 16
# How far beyond the labels the picture reaches, in mm: enough to see the skull around a brain.
SURROUNDINGS = 25


@dataclass(frozen=True)
class View:
    """A slice as it is shown: the axis it is cut along, and the letters at its left, right, top and bottom edges."""

    axis: int
    letters: str


CORONAL, SAGITTAL, AXIAL = View(1, "LRSI"), View(0, "PASI"), View(2, "LRAP")


def view_centre(labels: np.ndarray) -> tuple[int, int, int]:
    """Voxel (i, j, k) nearest to the centre of mass of all labels; the middle of the volume where there are none."""
    mask = labels > 0
    if not mask.any():
        return tuple(n // 2 for n in labels.shape)  # type: ignore[return-value]
    counts = [mask.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return tuple(round(float(np.average(np.arange(c.size), weights=c))) for c in counts)  # type: ignore[return-value]


def content_box(grey: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float]) -> list[slice]:
    """The box of everything brighter than a tenth of the range, cut to the surroundings of the labels if there are any."""
    box = []
    for axis, mm in enumerate(spacing):
        others = tuple(a for a in range(3) if a != axis)
        start, stop = 0, labels.shape[axis]
        for content, margin in ((grey > 0.1, 4), (labels > 0, SURROUNDINGS)):
            hits = np.flatnonzero(content.any(axis=others))
            if hits.size:
                reach = int(np.ceil(margin / mm))
                start, stop = max(start, hits[0] - reach), min(stop, hits[-1] + 1 + reach)
        box.append(slice(int(start), int(stop)))
    return box


def display_slice(volume: np.ndarray, view: View, index: int, box: list[slice]) -> np.ndarray:
    """The 2D slice as rows from the top (superior or anterior) and columns from the left (left or posterior)."""
    window: list[slice | int] = list(box)
    window[view.axis] = index
    return volume[tuple(window)].T[::-1]


def enlarge(values: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """Resize a 2D array to size (width, height), as float32."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).resize(size, method))


def times(numbers: Sequence[float]) -> str:
    """2 x 3 x 4; Pillow's own font has no multiplication sign."""
    return " x ".join(f"{n:.4g}" for n in numbers)


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def draw_letters(panel: Image.Image, view: View) -> None:
    """Write the four directions at the panel's edges, each on a dark disc so that it is readable on any image."""
    draw, font, radius = ImageDraw.Draw(panel), font_of(15), 11
    (width, height), inset = panel.size, radius + 4
    places = ((inset, height / 2), (width - inset, height / 2), (width / 2, inset), (width / 2, height - inset))
    for letter, (x, y) in zip(view.letters, places, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=BACKGROUND)
        draw.text((x, y), letter, fill=TEXT, font=font, anchor="mm")
