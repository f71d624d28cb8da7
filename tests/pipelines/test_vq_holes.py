"""Intensities, grids and holes: there and back again, and what is taken from where."""

from __future__ import annotations

import numpy as np
import pytest

from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.grids import VolumeError, occupied_box
from hf_binaryformer.pipelines.vq_holes import HoleCase, object_box
from hf_binaryformer.pipelines.vq_sampling import place_on_grid


def blob(shape: tuple[int, int, int], centre: tuple[float, float, float], width: float = 6.0) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    return np.exp(-((grid - np.array(centre)[:, None, None, None]) ** 2).sum(0) / width**2).astype(np.float32)


def case_of(image: np.ndarray, hole: np.ndarray, spacing: tuple = (1.0, 1.0, 1.0), **changes) -> HoleCase:
    """A volume of this spacing and a model of 2 mm."""
    options = {"grid": (24, 32, 16), "spacing": (2.0, 2.0, 2.0), "percentiles": (0.5, 99.5), "ceiling": 1.5}
    return HoleCase.of(image.astype(np.float32), hole, np.diag([*spacing, 1.0]), **{**options, **changes})


def test_scale_maps_background_to_zero_and_the_upper_percentile_to_one():
    tissue = np.linspace(100, 1100, 1001)
    for zeros in (50, 100_000):
        scale = IntensityScale.of(np.concatenate([np.zeros(zeros), tissue]), (0.5, 99.5), 1.5)
        assert scale.low == 0 and scale.high == pytest.approx(1095)
    assert scale.apply(np.array([-5.0, 0, 1095 / 2, 1095, 1e6])).tolist() == pytest.approx([0, 0, 0.5, 1, 1.5])
    np.testing.assert_allclose(scale.undo(scale.apply(tissue)), tissue, rtol=1e-6)
    assert scale.undo(np.zeros(1))[0] == 0


@pytest.mark.parametrize("values", [np.full(9, 7.0), np.zeros(0)])
def test_scale_without_contrast(values):
    with pytest.raises(ValueError, match="intensities are equal, expected an image with contrast"):
        IntensityScale.of(values, (0.5, 99.5), 1.5)


@pytest.mark.parametrize("shape", [(9, 30, 12), (40, 5, 7), (16, 16, 16)])
@pytest.mark.parametrize("grid", [(16, 16, 16), (8, 24, 4)])
def test_placed_foreground_lies_in_the_middle_and_goes_back(shape, grid):
    array = np.zeros(shape, dtype=np.float32)
    box = tuple(slice(n // 3, n // 3 + max(2, n // 4)) for n in shape)
    array[box] = np.random.default_rng(0).uniform(0.2, 1, array[box].shape)
    placed, placement = place_on_grid(array, grid)
    assert placed.shape == grid and placement.apply(array, grid).tobytes() == placed.tobytes()
    for axis, part in enumerate(box):
        if part.stop - part.start <= grid[axis]:
            others = tuple(a for a in range(3) if a != axis)
            hits = np.flatnonzero(placed.any(axis=others))
            assert abs(hits[0] - (grid[axis] - 1 - hits[-1])) <= 1
    back = placement.undo(placed)
    assert back.shape == shape
    if all(part.stop - part.start <= n for part, n in zip(box, grid, strict=True)):
        np.testing.assert_array_equal(back, array)


def test_volume_far_from_the_box_leaves_an_empty_grid():
    placed, placement = place_on_grid(np.ones((4, 4, 4)), (4, 4, 4), box=[slice(50, 54)] * 3)
    assert not placed.any() and not placement.undo(placed).any()


def test_box_of_a_mask():
    mask = np.zeros((5, 6, 7), dtype=bool)
    assert occupied_box(mask) == (slice(0, 5), slice(0, 6), slice(0, 7))
    mask[1, 2:4, 5] = True
    assert occupied_box(mask) == (slice(1, 2), slice(2, 4), slice(5, 6))


def test_smooth_volume_survives_the_way_to_the_model_and_back():
    image = 800 * blob((40, 50, 28), (21, 24, 13), width=9)
    hole = np.zeros(image.shape, dtype=bool)
    hole[18:24, 20:28, 10:16] = True
    case = case_of(image, hole, ceiling=9.0)
    np.testing.assert_allclose(case.to_input(case.to_network(image))[hole], image[hole], atol=0.05 * 800)
    # Without a change of voxel size it is exact.
    same = case_of(image, hole, spacing=(2.0, 2.0, 2.0), grid=(48, 56, 32), ceiling=9.0)
    np.testing.assert_allclose(same.to_input(same.to_network(image)), image, atol=1e-2)


def test_network_hole_holds_every_voxel_that_the_hole_has_part_in():
    image = blob((40, 50, 28), (21, 24, 13), width=9)
    hole = np.zeros(image.shape, dtype=bool)
    hole[20, 24, 13] = True
    case = case_of(image, hole)
    changed = image.copy()
    changed[hole] = 1.4 * image.max()
    # What the hole's one voxel changes on the model's grid lies inside the hole there.
    differs = case.to_network(changed) != case.to_network(image)
    assert differs.any() and not (differs & ~case.network_hole).any()
    assert (case.network_image()[case.network_hole] == 0).all()


def test_hole_at_the_side_is_part_of_the_object():
    image = np.zeros((60, 40, 20))
    image[10:50, 5:35, 4:16] = 1
    hole = np.zeros(image.shape, dtype=bool)
    hole[40:50, 5:35, 4:16] = True
    assert object_box(image, hole, (48, 48, 24), (1, 1, 1)) == (slice(10, 50), slice(5, 35), slice(4, 16))
    # A hole that goes on into the air is followed as far as there is room on the grid.
    hole[40:, :, :] = True
    assert object_box(image, hole, (48, 48, 24), (1, 1, 1)) == (slice(10, 58), slice(0, 40), slice(0, 20))
    assert object_box(image, np.ones_like(hole), (48, 48, 24), (1, 1, 1)) == tuple(slice(0, n) for n in image.shape)


def test_hole_in_what_the_grid_cuts_off():
    image, hole = np.ones((60, 20, 20)), np.zeros((60, 20, 20), dtype=bool)
    hole[50:55, 5:10, 5:10] = True
    with pytest.raises(VolumeError, match="along axis I the image spans 120 mm.*beyond the 80 mm"):
        object_box(image, hole, (40, 24, 24), (2, 2, 2))


def test_composite_hard_and_feathered():
    image, hole = np.full((9, 9, 9), 5.0, dtype=np.float32), np.zeros((9, 9, 9), dtype=bool)
    image[0] = 0
    hole[2:7, 2:7, 2:7] = True
    case = case_of(image, hole)
    fill = np.full(image.shape, 3.0, dtype=np.float32)
    assert np.unique(case.composite(fill)[hole]).tolist() == [3]
    feathered = case.composite(fill, feather=1)
    # Half of the difference of 2 in the outermost layer of the hole, nothing behind it.
    assert feathered[2, 4, 4] == 4 and feathered[3, 4, 4] == 3 and feathered[4, 4, 4] == 3
    for result in (case.composite(fill), feathered):
        np.testing.assert_array_equal(result[~hole], image[~hole])
        assert result.dtype == np.float32
