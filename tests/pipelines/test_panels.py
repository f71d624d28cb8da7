"""The picture of several volumes: a column each, the hole hidden where asked, one grey scale, true proportions."""

from __future__ import annotations

import numpy as np
import pytest

from hf_binaryformer.pipelines.panels import HOLE_COLOUR, volume_panels


def head() -> tuple[np.ndarray, np.ndarray]:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 50, 30)), indexing="ij"))
    radius = (grid**2).sum(0)
    return np.where(radius < 0.8, 500.0, 0.0), radius < 0.1


def columns_with(picture, colour, tolerance=12, least=20) -> np.ndarray:
    """Numbers of the pixel columns in which a colour fills at least so many pixels."""
    near = (np.abs(np.asarray(picture).astype(float) - colour) < tolerance).all(-1)
    return np.flatnonzero(near.sum(0) >= least)


def test_the_hole_is_painted_in_its_column_only():
    image, hole = head()
    picture = volume_panels({"hole": image, "result": image}, (1, 1, 1), hole=hole, hide_hole_in=["hole"])
    painted = columns_with(picture, HOLE_COLOUR)
    assert len(painted) and painted.max() < picture.width / 2
    assert not len(columns_with(volume_panels({"a": image}, (1, 1, 1), hole=hole), HOLE_COLOUR))


def test_columns_share_one_grey_scale_and_maps_have_their_own():
    image, hole = head()
    spread = np.where(hole, 3.0, 0.0)
    picture = volume_panels({"hole": image, "dark": image / 2}, (1, 1, 1), hole=hole, maps={"std": spread})
    third = picture.width / 3
    assert columns_with(picture, (255, 255, 255)).max() > 2 * third
    grey = columns_with(picture, (127, 127, 127), least=200)
    assert len(grey) and (grey > third * 0.9).all() and (grey < 2 * third * 1.1).all()


def test_proportions_follow_the_spacing():
    image, hole = head()
    flat, tall = (
        volume_panels({n: image for n in "abcdef"}, (1, 1, mm), hole=hole, max_height=9000) for mm in (1.0, 3.0)
    )
    assert tall.height > 1.5 * flat.height and tall.width == flat.width


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 200, 5), (64, 3, 9)])
def test_any_shape_fits(shape):
    picture = volume_panels({str(n): np.ones(shape) for n in range(4)}, (1, 0.5, 2), title="title " * 9)
    assert picture.width <= 1600


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected at least one, all of the same"):
        volume_panels({"a": np.ones((3, 3, 3)), "b": np.ones((3, 3, 4))}, (1, 1, 1))
    with pytest.raises(ValueError, match="expected at least one"):
        volume_panels({}, (1, 1, 1))
    with pytest.raises(ValueError, match="three positive numbers"):
        volume_panels({"a": np.ones((3, 3, 3))}, (1, 1, 0))
