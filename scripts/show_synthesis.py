"""python scripts/show_synthesis.py LABEL_MAPS page.png --sets   (or without --sets: training volumes)

A page of synthesised volumes: coronal, axial and sagittal slices through the middle of the labels, and the labels on the
coronal one, left and right in different colours. Beneath each stands what was drawn. With ``--axial`` there are three
axial slices from below to above, as radiologists show them (right on the left), and the labels on the middle one; with
``--beside`` those of a real image come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from PIL import Image, ImageDraw

from hf_binaryformer.data.synthesis.anatomy import read_anatomy
from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, Description, load_description
from hf_binaryformer.data.synthesis.engine import SynthVolume, synthesize
from hf_binaryformer.pipelines.overlay import label_colours
from hf_binaryformer.pipelines.views import BACKGROUND, TEXT, font_of

PANEL, GAP, CAPTION = 170, 4, 18
VIEWS = (1, 2, 0)  # slice axes: coronal, axial, sagittal
LEVELS = (0.2, 0.5, 0.75)  # of the labels' height
SOFT_TISSUE = (-160.0, 240.0)  # HU from black to white, for a real CT


def main(
    labels: Annotated[Path, typer.Argument(help="Folder of the label maps.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    description: Annotated[str, typer.Option(help="Name of a description.")] = "brain-sides",
    anatomies: Annotated[str, typer.Option(help="Numbers, taken in turn.")] = "1,5,9,13",
    volumes: Annotated[int, typer.Option(min=1)] = 20,
    columns: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sets: Annotated[bool, typer.Option(help="The evaluation sets in place of training volumes.")] = False,
    axial: Annotated[bool, typer.Option(help="Axial slices alone.")] = False,
    beside: Annotated[Path | None, typer.Option(help="A real CT, shown first.")] = None,
    beside_text: Annotated[str, typer.Option(help="What it is, and its licence.")] = "",
) -> None:
    """Draw the page."""
    path = DESCRIPTIONS / f"{description}.yaml"
    numbers = [int(number) for number in anatomies.split(",")]
    cells = {}
    # All volumes of one anatomy after another, since reading one takes longer than drawing from it.
    for number in numbers:
        anatomy = read_anatomy(labels / load_description(path).files.format(number=number), path)
        told = anatomy.description
        jobs = [(name, told.set_ranges(name)) for name in told.evaluation["sets"]] if sets else []
        jobs = jobs or [("train", told.train_ranges)] * volumes
        for index, (name, ranges) in enumerate(jobs):
            if numbers[index % len(numbers)] == number:
                volume = synthesize(anatomy, ranges, (seed, number, index))
                cells[index] = cell(volume, f"{number:02d} {name}", told, axial)
    pictures = [cells[index] for index in sorted(cells)]
    if beside is not None:
        pictures.insert(0, real_cell(beside, beside_text))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + 2 * GAP), rows * (height + 2 * GAP)), BACKGROUND)
    for index, picture in enumerate(pictures):
        page.paste(picture, (index % columns * (width + 2 * GAP), index // columns * (height + 2 * GAP)))
    page.save(out, optimize=True)


def real_cell(path: Path, text: str) -> Image.Image:
    """Axial slices of a CT in the usual window, and a caption."""
    source = nib.as_closest_canonical(nib.load(path))
    low, high = SOFT_TISSUE
    grey = np.clip((np.asarray(source.dataobj, np.float32) - low) / (high - low), 0, 1) * 255
    depth = grey.shape[2]
    slices = [(np.repeat(grey[:, :, int(level * depth)][..., None], 3, -1), 2) for level in (0.62, 0.74, 0.83, 0.92)]
    return picture_of([(rgb[::-1], axis) for rgb, axis in slices], source.header.get_zooms(), text)


def cell(volume: SynthVolume, title: str, description: Description, axial: bool = False) -> Image.Image:
    """Three slices, the labels, and a caption of one volume."""
    colours = label_colours(volume.labels, description.label_names)
    spacing = np.sqrt((volume.affine[:3, :3] ** 2).sum(0))
    middle = [n // 2 for n in volume.labels.shape]
    if volume.labels.any():
        middle = [int(np.median(places)) for places in np.nonzero(volume.labels)]
    cuts = [(axis, middle[axis]) for axis in (*VIEWS, VIEWS[0])]
    if axial:
        rows = np.flatnonzero(volume.labels.any((0, 1))) if volume.labels.any() else np.arange(volume.labels.shape[2])
        cuts = [(2, int(rows[int(level * (len(rows) - 1))])) for level in (*LEVELS, LEVELS[1])]
    slices = []
    for column, (axis, place) in enumerate(cuts):
        grey = np.take(volume.image, place, axis).astype(np.float32)
        rgb = np.repeat(grey[..., None], 3, -1)
        if column == len(VIEWS):
            chosen = np.take(volume.labels, place, axis)
            for label in np.unique(chosen[chosen > 0]):
                rgb[chosen == label] = 0.55 * np.array(colours[int(label)]) + 0.45 * rgb[chosen == label]
        slices.append((rgb[::-1] if axial else rgb, axis))
    drawn: dict[str, Any] = volume.drawn
    extra = ["agent"] * bool(drawn["agent"]) + [f"{drawn['lesions']} lesions"] * bool(drawn["lesions"])
    kept = [] if axial else ["whole" if drawn["whole"] else drawn["strip"]]
    words = [title, drawn["contrast"], *kept, f"cut {drawn['cut']}", drawn["scanned_mm"], *extra]
    return picture_of(slices, spacing, ", ".join(str(word) for word in words))


def picture_of(slices: list[tuple[np.ndarray, int]], spacing: Sequence[float], text: str) -> Image.Image:
    """Slices (rows, columns, 3), each with its axis, in a row above a text."""
    picture = Image.new("RGB", (4 * PANEL + 3 * GAP, PANEL + CAPTION), BACKGROUND)
    for column, (rgb, axis) in enumerate(slices):
        plane = [mm for a, mm in enumerate(spacing) if a != axis]
        sizes = [n * mm for n, mm in zip(rgb.shape, plane, strict=False)]
        scale = PANEL / max(*sizes, 1)
        shape = (max(1, round(sizes[0] * scale)), max(1, round(sizes[1] * scale)))
        panel = Image.fromarray(np.rot90(rgb).astype(np.uint8)).resize(shape, Image.Resampling.BICUBIC)
        picture.paste(panel, (column * (PANEL + GAP) + (PANEL - shape[0]) // 2, (PANEL - shape[1]) // 2))
    ImageDraw.Draw(picture).text((2, PANEL + 2), text, fill=TEXT, font=font_of(12))
    return picture


if __name__ == "__main__":
    typer.run(main)
