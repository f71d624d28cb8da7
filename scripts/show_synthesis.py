"""python scripts/show_synthesis.py LABEL_MAPS page.png --sets   (or without --sets: training volumes)

A page of synthesised volumes: coronal, axial and sagittal slices through the middle of the labels, and the labels on the
coronal one, left and right in different colours. Beneath each stands what was drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw

from hf_binaryformer.data.synthesis.anatomy import read_anatomy
from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, Description
from hf_binaryformer.data.synthesis.engine import SynthVolume, synthesize
from hf_binaryformer.pipelines.overlay import label_colours
from hf_binaryformer.pipelines.views import BACKGROUND, TEXT, font_of

PANEL, GAP, CAPTION = 170, 4, 18
VIEWS = (1, 2, 0)  # slice axes: coronal, axial, sagittal


def main(
    labels: Annotated[Path, typer.Argument(help="Folder of the label maps.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    description: Annotated[str, typer.Option(help="Name of a description.")] = "brain-sides",
    anatomies: Annotated[str, typer.Option(help="Numbers, taken in turn.")] = "1,5,9,13",
    volumes: Annotated[int, typer.Option(min=1)] = 20,
    columns: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sets: Annotated[bool, typer.Option(help="The evaluation sets in place of training volumes.")] = False,
) -> None:
    """Draw the page."""
    path = DESCRIPTIONS / f"{description}.yaml"
    numbers = [int(number) for number in anatomies.split(",")]
    cells = {}
    # All volumes of one anatomy after another, since reading one takes longer than drawing from it.
    for number in numbers:
        anatomy = read_anatomy(labels / f"training_seg_{number:02d}.nii.gz", path)
        told = anatomy.description
        jobs = [(name, told.set_ranges(name)) for name in told.evaluation["sets"]] if sets else []
        jobs = jobs or [("train", told.train_ranges)] * volumes
        for index, (name, ranges) in enumerate(jobs):
            if numbers[index % len(numbers)] == number:
                cells[index] = cell(synthesize(anatomy, ranges, (seed, number, index)), f"{number:02d} {name}", told)
    pictures = [cells[index] for index in sorted(cells)]
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + 2 * GAP), rows * (height + 2 * GAP)), BACKGROUND)
    for index, picture in enumerate(pictures):
        page.paste(picture, (index % columns * (width + 2 * GAP), index // columns * (height + 2 * GAP)))
    page.save(out, optimize=True)


def cell(volume: SynthVolume, title: str, description: Description) -> Image.Image:
    """Three slices, the labels, and a caption of one volume."""
    colours = label_colours(volume.labels, description.label_names)
    spacing = np.sqrt((volume.affine[:3, :3] ** 2).sum(0))
    middle = [n // 2 for n in volume.labels.shape]
    if volume.labels.any():
        middle = [int(np.median(places)) for places in np.nonzero(volume.labels)]
    picture = Image.new("RGB", (4 * PANEL + 3 * GAP, PANEL + CAPTION), BACKGROUND)
    for column, axis in enumerate((*VIEWS, 1)):
        grey = np.take(volume.image, middle[axis], axis).astype(np.float32)
        rgb = np.repeat(grey[..., None], 3, -1)
        if column == len(VIEWS):
            chosen = np.take(volume.labels, middle[axis], axis)
            for label in np.unique(chosen[chosen > 0]):
                rgb[chosen == label] = 0.55 * np.array(colours[int(label)]) + 0.45 * rgb[chosen == label]
        sizes = [n * mm for a, (n, mm) in enumerate(zip(volume.image.shape, spacing, strict=True)) if a != axis]
        scale = PANEL / max(*sizes, 1)
        shape = (max(1, round(sizes[0] * scale)), max(1, round(sizes[1] * scale)))
        panel = Image.fromarray(np.rot90(rgb).astype(np.uint8)).resize(shape, Image.Resampling.BICUBIC)
        picture.paste(panel, (column * (PANEL + GAP) + (PANEL - shape[0]) // 2, (PANEL - shape[1]) // 2))
    drawn: dict[str, Any] = volume.drawn
    extra = ["agent"] * bool(drawn["agent"]) + [f"{drawn['lesions']} lesions"] * bool(drawn["lesions"])
    place = "whole" if drawn["whole"] else drawn["strip"]
    words = [title, drawn["contrast"], place, f"cut {drawn['cut']}", drawn["scanned_mm"], *extra]
    text = ", ".join(str(word) for word in words)
    ImageDraw.Draw(picture).text((2, PANEL + 2), text, fill=TEXT, font=font_of(12))
    return picture


if __name__ == "__main__":
    typer.run(main)
