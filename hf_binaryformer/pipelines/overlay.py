"""One picture of a segmented volume: three orthogonal views, each as the image beside the image with its labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_binaryformer.pipelines.views import (
    AXIAL,
    BACKGROUND,
    CORONAL,
    DIM_TEXT,
    GAP,
    MARGIN,
    SAGITTAL,
    TEXT,
    View,
    content_box,
    display_slice,
    draw_letters,
    enlarge,
    font_of,
    times,
    view_centre,
)

# Label k is drawn in colour (k - 1) % 40. The first sixteen are chosen by eye for anatomy on black; each further one is
# the colour of a coarse RGB grid that lies farthest from all before it in Oklab.
_RGB = bytes.fromhex(
    "f4d58d e5707e 4cc9f0 b8d8a8 3fa36b ff9f1c 2a6fdb 9b5de5 f15bb5 00e0c6"
    "c98b5e d7ff3e ff4d2e 8f9bff b5179e 7a8ca3 944c40 f4b8f4 28e828 407058"
    "6428f4 a0b828 705894 dc28f4 d02858 887c28 e8aca0 dc88f4 ac6494 88b8a0"
    "8828c4 88f4f4 70f494 c45828 28b828 28a0dc c494b8 288828 287ca0 b8dc28"
)
Colour = tuple[int, int, int]
PALETTE: tuple[Colour, ...] = tuple(zip(_RGB[0::3], _RGB[1::3], _RGB[2::3], strict=True))
# Organs of the abdomen (AMOS's names) have colours that the eye expects: arteries red, veins blue, bile green.
_ORGANS = {
    "spleen": "9b5de5",
    "right kidney": "ff9f1c",
    "left kidney": "f4d58d",
    "gallbladder": "3fa36b",
    "oesophagus": "b8d8a8",
    "liver": "c4694a",
    "stomach": "f4b8f4",
    "aorta": "ff2a2a",
    "inferior vena cava": "2a6fdb",
    "pancreas": "00e0c6",
    "right adrenal gland": "d7ff3e",
    "left adrenal gland": "8f9bff",
    "duodenum": "f15bb5",
    "bladder": "ffe94d",
    "prostate or uterus": "7a8ca3",
}
ORGAN_COLOURS: dict[str, Colour] = {
    name: (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for name, code in _ORGANS.items()
}
FILL_OPACITY = 0.7
# Panels are drawn this much larger and then reduced, which smooths the outlines of the labels.
SUPERSAMPLING = 2
COLUMN_WIDTH = 260


def label_colour(label: int) -> Colour:
    """RGB colour, 0-255, of a label number >= 1; the same in every picture, repeating after 40 labels."""
    return PALETTE[(label - 1) % len(PALETTE)]


def label_colours(labels: np.ndarray, label_names: Mapping[int, str]) -> dict[int, Colour]:
    """Colour of every label > 0 that occurs or is named: its organ's, or by its place among the names, or by its number."""
    places = {label: place for place, label in enumerate(sorted(n for n in label_names if n > 0), 1)}
    found = {int(label) for label in np.unique(labels[labels > 0])}
    by_place = {label: label_colour(places.get(label, label)) for label in found | set(places)}
    return {label: ORGAN_COLOURS.get(label_names.get(label, ""), colour) for label, colour in by_place.items()}


def label_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    spacing: tuple[float, float, float],
    label_names: Mapping[int, str] | None = None,
    *,
    title: str = "",
    max_width: int = 1600,
    max_height: int = 1000,
) -> Image.Image:
    """Coronal, sagittal and axial views through the labels' centre of mass, in true proportions, with a legend.

    The viewer looks at the patient from behind: L is on the left of the picture, as letters at the panels' edges show.

    Args:
        image: intensities, (I, J, K) in RAS order (i grows to the right, j to the front, k upwards), any finite range;
            shown between its 0.5 and 99.5 percentiles.
        labels: whole numbers, the same shape, 0 is background.
        spacing: voxel size along I, J, K in mm.
        label_names: name of each label for the legend; a label without one is called "label 3". If numbers are missing
            between the names, as among FreeSurfer's, the k-th name has the k-th colour.
        title: first line beside the legend, such as the file name.
        max_width: largest width of the picture in pixels, at least 700.
        max_height: largest height of all views together in pixels; only a long legend makes the picture higher.

    Returns:
        An RGB picture.

    Raises:
        ValueError: shapes differ, are not 3D, or spacing is not three positive numbers.
    """
    if image.ndim != 3 or image.shape != labels.shape:
        raise ValueError(f"image has shape {image.shape}, labels {labels.shape}; expected the same (I, J, K)")
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing is {spacing}; expected three positive numbers in mm, one for each axis")

    centre = view_centre(labels)
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    box = content_box(grey, labels, spacing)
    extent = [(b.stop - b.start) * mm for b, mm in zip(box, spacing, strict=True)]
    legend = _legend_rows(labels, spacing, label_names or {})
    colours = label_colours(labels, label_names or {})
    least_text = COLUMN_WIDTH * min(3, 1 + len(legend) // 20)
    room = max_width - 2 * MARGIN - 3 * GAP
    # Top row: coronal and sagittal pairs, 2 (I + J) wide. Bottom row: the axial pair, and text where it leaves room.
    scale = min(
        room / 2 / (extent[0] + extent[1]),
        (room - least_text) / 2 / extent[0],
        max_height / (extent[1] + extent[2]),
    )
    sizes = [max(1, round(e * scale)) for e in extent]

    text_width = max(2 * sizes[1] + GAP, least_text)
    text = _text_block(legend, colours, text_width, sizes[1], title, image.shape, spacing)
    canvas = Image.new(
        "RGB",
        (2 * MARGIN + 2 * sizes[0] + 2 * GAP + text_width, 2 * MARGIN + sizes[2] + GAP + max(sizes[1], text.height)),
        BACKGROUND,
    )
    bottom, right = MARGIN + sizes[2] + GAP, MARGIN + 2 * (sizes[0] + GAP)
    for view, x, y in ((CORONAL, MARGIN, MARGIN), (SAGITTAL, right, MARGIN), (AXIAL, MARGIN, bottom)):
        for with_labels in (False, True):
            panel = _panel(view, grey, labels, centre, box, sizes, colours if with_labels else None)
            canvas.paste(panel, (x + with_labels * (panel.width + GAP), y))
    canvas.paste(text, (right, bottom))
    return canvas


def label_strip(
    image: np.ndarray,
    labels: np.ndarray,
    spacing: tuple[float, float, float],
    label_names: Mapping[int, str] | None = None,
    *,
    height: int = 180,
) -> Image.Image:
    """A small picture: the coronal, sagittal and axial view of :func:`label_overlay` with labels, in one row.

    Args:
        image, labels, spacing, label_names: as for :func:`label_overlay`.
        height: of the highest view in pixels.
    """
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    centre, box = view_centre(labels), content_box(grey, labels, spacing)
    extent = [(b.stop - b.start) * mm for b, mm in zip(box, spacing, strict=True)]
    sizes = [max(1, round(e * height / max(extent[1], extent[2]))) for e in extent]
    colours = label_colours(labels, label_names or {})
    views = (CORONAL, SAGITTAL, AXIAL)
    panels = [_panel(view, grey, labels, centre, box, sizes, colours) for view in views]
    canvas = Image.new("RGB", (sum(p.width for p in panels) + 2 * GAP, height), BACKGROUND)
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, (height - panel.height) // 2))
        left += panel.width + GAP
    return canvas


def _panel(
    view: View,
    grey: np.ndarray,
    labels: np.ndarray,
    centre: tuple[int, int, int],
    box: list[slice],
    sizes: list[int],
    colours: Mapping[int, Colour] | None,
) -> Image.Image:
    """One view at its final size, with its letters, and with the labels if they have colours."""
    width, height = (sizes[a] for a in range(3) if a != view.axis)
    large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    picture = enlarge(display_slice(grey, view, centre[view.axis], box), large, Image.Resampling.BICUBIC)
    rgb = np.repeat(np.clip(picture, 0, 1)[..., None] * 255, 3, axis=-1)
    if colours is not None:
        rgb = _blend_labels(rgb, display_slice(labels, view, centre[view.axis], box), colours)
    panel = Image.fromarray(rgb.astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    draw_letters(panel, view)
    return panel


def _blend_labels(rgb: np.ndarray, labels: np.ndarray, colours: Mapping[int, Colour]) -> np.ndarray:
    """Colour (H, W, 3) grey values 0-255 by labels (h, w), with smooth borders and a stronger line along them."""
    size = (rgb.shape[1], rgb.shape[0])
    # Each label's mask is smoothed and enlarged separately, and the largest wins: resized label numbers would
    # show steps.
    best = enlarge(_smooth(labels == 0), size, Image.Resampling.BICUBIC)
    winner = np.zeros(best.shape, dtype=np.int64)
    for label in np.unique(labels[labels > 0]):
        share = enlarge(_smooth(labels == label), size, Image.Resampling.BICUBIC)
        winner = np.where(share > best, label, winner)
        best = np.maximum(share, best)

    edge = np.zeros(winner.shape, dtype=bool)
    for axis in (0, 1):
        for step in (-1, 1):
            edge |= np.roll(winner, step, axis) != winner
    numbers, index = np.unique(winner, return_inverse=True)
    colour = np.array([colours.get(int(n), BACKGROUND) for n in numbers], np.float32)[index.reshape(winner.shape)]
    # The image shades the colour, so that anatomy can still be checked inside a label.
    blended = FILL_OPACITY * colour * (0.45 + 0.55 * rgb / 255) + (1 - FILL_OPACITY) * rgb
    return np.where((winner > 0)[..., None], np.where(edge[..., None], colour, blended), rgb)


def _smooth(mask: np.ndarray) -> np.ndarray:
    """A 3 x 3 binomial average of a 2D mask, edges repeated."""
    p = np.pad(mask.astype(np.float32), 1, mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _legend_rows(
    labels: np.ndarray, spacing: tuple[float, float, float], names: Mapping[int, str]
) -> list[tuple[int, str, str]]:
    """(label, name, volume as text) of every label that occurs, by number."""
    found, counts = np.unique(labels[labels > 0], return_counts=True)
    ml = float(np.prod(spacing)) / 1000
    return [
        (int(label), names.get(int(label), f"label {label}"), f"{count * ml:,.1f} ml")
        for label, count in zip(found, counts, strict=True)
    ]


def _text_block(
    legend: list[tuple[int, str, str]],
    colours: Mapping[int, Colour],
    width: int,
    height: int,
    title: str,
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
) -> Image.Image:
    """Title, size and legend, at least `height` high, in the largest text with which everything fits."""
    head, foot, inset = 84, 40, 2 * GAP
    for font_size in (19, 18, 17, 16, 15, 14, 13, 12):
        line = round(font_size * 1.6)
        columns = min(max(1, width // (COLUMN_WIDTH * font_size // 15)), max(1, -(-len(legend) // 8)))
        rows = -(-len(legend) // columns)
        if head + rows * line + foot <= height:
            break
    block = Image.new("RGB", (width, max(height, head + rows * line + foot)), BACKGROUND)
    draw, column_width = ImageDraw.Draw(block), min((width - inset) // columns, 2 * COLUMN_WIDTH)
    summary = f"{times(shape)} voxels of {times(spacing)} mm, {len(legend)} label{'s' * (len(legend) != 1)}"
    warning = "research only, not for clinical use"
    for text, size, colour, y in ((title, 24, TEXT, 12), (summary, 16, DIM_TEXT, 46), (warning, 14, DIM_TEXT, -26)):
        font = font_of(size)
        draw.text((inset, y % block.height), _shorten(text, font, width - inset), fill=colour, font=font, anchor="lt")
    font, swatch = font_of(font_size), round(font_size * 0.8)
    for index, (label, name, volume) in enumerate(legend):
        x, y = inset + index // rows * column_width, head + index % rows * line
        middle, end = y + swatch / 2, x + column_width - 2 * inset
        draw.rounded_rectangle((x, y, x + swatch, y + swatch), radius=3, fill=colours[label])
        draw.text((end, middle), volume, fill=DIM_TEXT, font=font, anchor="rm")
        name_width = end - font.getlength(volume) - x - swatch - 3 * GAP
        draw.text((x + swatch + GAP, middle), _shorten(name, font, name_width), fill=TEXT, font=font, anchor="lm")
    return block


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with dots so that it is at most `width` pixels long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
