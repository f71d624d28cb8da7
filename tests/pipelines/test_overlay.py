"""The picture: true proportions, the right colour in the right place, letters, legend."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops

from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, load_description
from hf_binaryformer.pipelines.overlay import ORGAN_COLOURS, PALETTE, label_colour, label_colours, label_overlay
from hf_binaryformer.pipelines.views import AXIAL, CORONAL, SAGITTAL, draw_letters, view_centre


def colour_mask(picture: Image.Image, label: int) -> np.ndarray:
    """Where the picture has a label's colour mixed with any grey, which keeps its direction from the grey axis."""
    rgb, colour = np.asarray(picture).astype(float), np.array(label_colour(label), float)
    rgb, colour = rgb - rgb.mean(-1, keepdims=True), colour - colour.mean()
    length = np.linalg.norm(rgb, axis=-1)
    return (length > 15) & (rgb @ colour > 0.985 * length * np.linalg.norm(colour))


def extents(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@pytest.fixture
def box() -> tuple[np.ndarray, np.ndarray]:
    """A white volume in which label 1 fills 20 x 30 x 10 voxels in the middle."""
    image, labels = np.zeros((60, 60, 60), np.float32), np.zeros((60, 60, 60), np.int32)
    image[5:55, 5:55, 5:55] = 1
    labels[20:40, 15:45, 25:35] = 1
    return image, labels


def panels_with_label(picture: Image.Image, label: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of each connected patch of the label's colour of more than 100 pixels."""
    from scipy.ndimage import find_objects
    from scipy.ndimage import label as connect

    mask = colour_mask(picture, label)
    patches, _ = connect(mask)
    found = [(s[0].start, s[1].start, s[0].stop - s[0].start, s[1].stop - s[1].start) for s in find_objects(patches)]
    return [p for p in found if p[2] * p[3] > 600]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (3.0, 1.0, 0.5)])
def test_views_have_physical_proportions(box, spacing):
    picture = label_overlay(*box, spacing)
    mm = np.array([20, 30, 10]) * np.array(spacing)
    patches = sorted(panels_with_label(picture, 1))
    coronal, sagittal = sorted(patches[:2], key=lambda p: p[1])
    (axial,) = patches[2:]
    for (_, _, height, width), (across, up) in zip(
        (coronal, sagittal, axial), ((mm[0], mm[2]), (mm[1], mm[2]), (mm[0], mm[1])), strict=True
    ):
        assert height / width == pytest.approx(up / across, rel=0.08)
    assert coronal[3] / sagittal[3] == pytest.approx(mm[0] / mm[1], rel=0.08)


def test_sides_are_not_swapped():
    """A marker on the patient's right, front and top appears right, right (sagittal) and up, next to R, A and S."""
    image, labels = np.full((50, 50, 50), 0.5, np.float32), np.zeros((50, 50, 50), np.int32)
    labels[15:36, 15:36, 15:36] = 1
    # Three bars, so that each of the three slices cuts one at the high end of its two axes.
    labels[20:28, 30:36, 30:36] = labels[30:36, 20:28, 30:36] = labels[30:36, 30:36, 20:28] = 2
    picture = label_overlay(image, labels, (1, 1, 1), max_width=900)
    rows_columns = [(t + h / 2, left + w / 2) for t, left, h, w in sorted(panels_with_label(picture, 2))]
    middle = [(t + h / 2, left + w / 2, h) for t, left, h, w in sorted(panels_with_label(picture, 1))]
    assert len(rows_columns) == len(middle) == 3
    for marker, (row, column, _) in zip(sorted(rows_columns), sorted(middle), strict=True):
        assert marker[0] < row and marker[1] > column


def test_letters_stand_at_their_sides(monkeypatch):
    """Arrays grow to R, A and S; those letters belong right and on top, where the test above finds the high ends."""
    written = {}
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.text", lambda self, place, text, **style: written.__setitem__(text, place)
    )
    opposite = {"R": "L", "A": "P", "S": "I"}
    for view, (right, top) in ((CORONAL, "RS"), (SAGITTAL, "AS"), (AXIAL, "RA")):
        written.clear()
        draw_letters(Image.new("RGB", (100, 200)), view)
        assert set(written) == {right, top, opposite[right], opposite[top]}
        assert written[opposite[right]][0] < 25 and written[right][0] > 75
        assert written[top][1] < 25 and written[opposite[top]][1] > 175


def test_plain_image_beside_every_overlay(box):
    picture = np.asarray(label_overlay(*box, (1, 1, 1)).convert("RGB")).astype(int)
    plain = label_overlay(box[0], np.zeros_like(box[1]), (1, 1, 1))
    assert picture.shape[1] <= 1600
    top = picture[16 : picture.shape[0] // 2 - 20]
    grey = np.abs(np.diff(top, axis=-1)).max(-1) == 0
    quarter = top.shape[1] // 4
    shares = [grey[:, n * quarter + 20 : (n + 1) * quarter - 20].mean() for n in range(4)]
    assert shares[0] > 0.95 and shares[2] > 0.95 and shares[1] < 0.95 and shares[3] < 0.95
    assert not colour_mask(plain, 1).any()


def test_letters_and_legend_change_the_picture(box):
    named = label_overlay(*box, (1, 1, 1), {1: "hippocampus"}, title="case")
    unnamed = label_overlay(*box, (1, 1, 1), {}, title="case")
    difference = ImageChops.difference(named, unnamed).getbbox()
    assert difference is not None
    # Only the legend's line differs: it is in the lower right quarter.
    assert difference[0] > named.width / 2 and difference[1] > named.height / 2
    assert difference[3] - difference[1] < 40


@pytest.mark.parametrize("shape", [(40, 300, 30), (300, 40, 40), (20, 20, 200), (3, 3, 3), (64, 64, 1)])
def test_any_shape_fits(shape):
    labels = (np.arange(np.prod(shape)).reshape(shape) % 41).astype(np.uint8)
    picture = label_overlay(labels.astype(np.float32), labels, (1.0, 0.5, 4.0), {7: "a very long name " * 5})
    assert picture.width <= 1600 and picture.height <= 1700


def test_no_labels_and_constant_image():
    picture = label_overlay(np.ones((20, 20, 20)), np.zeros((20, 20, 20), np.uint8), (1, 1, 1))
    assert picture.mode == "RGB"


def test_view_centre_is_the_centre_of_mass():
    labels = np.zeros((10, 12, 14), np.uint8)
    assert view_centre(labels) == (5, 6, 7)
    labels[1, 2, 3], labels[5, 6, 9] = 4, 9
    assert view_centre(labels) == (3, 4, 6)


def test_numbers_forty_apart_have_colours_of_their_own():
    """FreeSurfer's left and right white matter are 2 and 41, its right cortex 42; in a picture of all three they differ."""
    labels = np.zeros((40, 30, 30), np.uint8)
    labels[5:15, 5:25, 5:25], labels[15:25, 5:25, 5:25], labels[25:35, 5:25, 5:25] = 2, 41, 42
    names = {0: "background", 2: "left white", 41: "right white", 42: "right cortex"}
    picture = label_overlay(np.full(labels.shape, 0.5), labels, (1, 1, 1), names)
    for place in (1, 2, 3):
        assert colour_mask(picture, place).sum() > 500, place
    # Names without gaps keep the colours of their numbers.
    assert label_colours(labels, {0: "background", 1: "a", 2: "b"})[2] == label_colour(2)


def test_forty_distinct_colours():
    assert len(set(PALETTE)) == 40
    distances = [max(abs(x - y) for x, y in zip(a, b, strict=True)) for a in PALETTE for b in PALETTE if a != b]
    assert min(distances) >= 30
    assert label_colour(41) == label_colour(1) != label_colour(2)


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [((3, 3), (1, 1, 1), "same"), ((3, 3, 4), (1, 1, 1), "same"), ((3, 3, 3), (1, 0, 1), "spacing")],
)
def test_bad_input_is_named(shape, spacing, message):
    with pytest.raises(ValueError, match=message):
        label_overlay(np.ones((3, 3, 3)), np.ones(shape, int), spacing)


def test_organs_have_colours_of_their_own():
    """Every organ of AMOS, in the spelling of its data set; arteries are red, veins blue, and no two are alike."""
    names = dict(load_description(DESCRIPTIONS / "abdomen.yaml").label_names)
    colours = label_colours(np.zeros(1, np.int32), names)
    assert {name for name in names.values() if name != "background"} == set(ORGAN_COLOURS)
    assert len(set(colours.values())) == 15
    for name, channel in (("aorta", 0), ("inferior vena cava", 2)):
        (colour,) = (colours[label] for label in names if names[label] == name)
        assert colour[channel] == max(colour) > 2 * min(colour)
