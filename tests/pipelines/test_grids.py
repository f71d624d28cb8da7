"""Resampling against analytic fields and hand-made averages, boxes, and grids in space."""

from __future__ import annotations

import numpy as np
import pytest

from hf_binaryformer.pipelines.grids import (
    VolumeError,
    add_margin,
    affine_spacing,
    crop_affine,
    foreground_box,
    foreground_mask,
    narrow_margin,
    resample,
    resample_to,
    same_spacing,
)

# Axes of a grid that are turned in space and differently long, as scanners make them.
TURNED = np.array(
    [[0.6, -0.8, 0.0, 10.0], [0.8, 0.6, 0.0, -20.0], [0.0, 0.0, 1.0, 30.0], [0.0, 0.0, 0.0, 1.0]]
) @ np.diag([0.9, 1.3, 3.0, 1.0])


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Voxel centres in mm, (I, J, K, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def linear_field(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A function of the place in mm that linear interpolation must reproduce."""
    return (positions(shape, affine) @ np.array([0.7, -0.4, 0.25]) + 3).astype(np.float32)


def interior(array: np.ndarray, voxels: int) -> np.ndarray:
    return array[(slice(voxels, -voxels),) * 3]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 1.3, 3.0), (0.45, 2.0, 1.7), (2.5, 2.1, 6.1)])
def test_a_linear_field_stays_where_it_is(spacing: tuple[float, float, float]) -> None:
    shape = (41, 37, 23)
    result, affine = resample(linear_field(shape, TURNED), TURNED, spacing, order=1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(affine_spacing(affine), spacing)
    np.testing.assert_allclose(interior(result, 3), interior(linear_field(result.shape, affine), 3), atol=2e-5)
    # The same length to half a voxel, and the same centre.
    for old, new, before, after in zip(shape, result.shape, affine_spacing(TURNED), spacing, strict=True):
        assert abs(old * before - new * after) <= after / 2 + 1e-9
    centres = [a @ [*((n - 1) / 2 for n in s), 1] for a, s in ((TURNED, shape), (affine, result.shape))]
    np.testing.assert_allclose(*centres)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.7, 1.1)])
def test_there_and_back_keeps_a_smooth_field(spacing: tuple[float, float, float]) -> None:
    shape = (30, 28, 16)

    def smooth(s: tuple[int, ...], a: np.ndarray) -> np.ndarray:
        return np.sin(positions(s, a) / 12).sum(-1).astype(np.float32)

    original = smooth(shape, TURNED)
    there, affine = resample(original, TURNED, spacing, order=1)
    back = resample_to(there, affine, shape, TURNED, order=1)
    assert back.shape == shape
    # Half a voxel's shift would make an error of about 0.05 to 0.12 along each axis.
    assert np.abs(interior(back - original, 3)).max() < 0.02


def test_equal_spacing_changes_nothing() -> None:
    array = np.random.default_rng(0).random((9, 8, 7), dtype=np.float32)
    result, affine = resample(array, TURNED, affine_spacing(TURNED), order=1)
    np.testing.assert_array_equal(result, array)
    np.testing.assert_allclose(affine, TURNED)
    labels = (array * 9).astype(np.uint16)
    result, _ = resample(labels, TURNED, affine_spacing(TURNED), order=0)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, labels)


def test_coarser_voxels_average_and_do_not_alias() -> None:
    # Stripes as fine as the grid allows: a third of the resolution must see their mean, not one of them.
    stripes = np.zeros((60, 12, 12), dtype=np.float32)
    stripes[::2] = 1
    result, _ = resample(stripes, np.eye(4), (3.0, 1.0, 1.0), order=1)
    assert result.shape == (20, 12, 12)
    # A mean of three voxels would be off by 1/6.
    np.testing.assert_allclose(result[1:-1], 0.5, atol=0.1)
    # Averages keep the total and reduce noise of single voxels as an average over 3 x 3 x 3 of them would, or nearly.
    noise = np.random.default_rng(0).standard_normal((60, 60, 60)).astype(np.float32)
    coarse, _ = resample(noise, np.eye(4), (3.0, 3.0, 3.0), order=1)
    assert coarse.std() < 1.3 * noise.std() / np.sqrt(27)


def test_nearest_takes_the_voxel_whose_centre_is_closest() -> None:
    labels = np.random.default_rng(1).integers(0, 900, (11, 9, 6)).astype(np.int32)
    result, affine = resample(labels, TURNED, (0.55, 1.0, 1.25), order=0)
    assert result.dtype == np.int32
    index = (positions(result.shape, affine) - TURNED[:3, 3]) @ np.linalg.inv(TURNED[:3, :3]).T
    distance = np.abs(index - np.floor(index) - 0.5)
    clear = (distance > 1e-6).all(-1)
    nearest = np.clip(np.round(index), 0, np.array(labels.shape) - 1).astype(int)
    np.testing.assert_array_equal(result[clear], labels[tuple(nearest[clear].T)])


@pytest.mark.parametrize("order", [0, 1])
def test_crop_goes_back_into_its_volume(order: int) -> None:
    array = np.random.default_rng(2).random((12, 11, 10), dtype=np.float32) + 1
    box = (slice(2, 9), slice(0, 5), slice(6, 10))
    whole = resample_to(array[box], crop_affine(TURNED, box), array.shape, TURNED, order=order)
    np.testing.assert_allclose(whole[box], array[box], rtol=1e-6)
    outside = np.ones(array.shape, dtype=bool)
    outside[box] = False
    assert not whole[outside].any()


def test_one_slice_can_be_resampled() -> None:
    array = np.random.default_rng(3).random((6, 5, 1), dtype=np.float32)
    result, _ = resample(array, np.diag([1.0, 1.0, 5.0, 1.0]), (1.0, 1.0, 1.0), order=1)
    assert result.shape == (6, 5, 5)
    np.testing.assert_allclose(result, np.repeat(array, 5, axis=2), rtol=1e-6)


def test_flipped_target_axes() -> None:
    array = np.random.default_rng(4).random((6, 5, 4), dtype=np.float32)
    flipped = TURNED @ np.array([[-1.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])
    for order in (0, 1):
        np.testing.assert_allclose(
            resample_to(array, TURNED, array.shape, flipped, order=order), array[::-1, :, ::-1], rtol=1e-6
        )


def test_wrong_requests_are_named() -> None:
    array = np.zeros((6, 5, 4), dtype=np.float32)
    with pytest.raises(VolumeError, match="turned against each other"):
        resample_to(array, np.eye(4), (6, 5, 4), TURNED, order=1)
    with pytest.raises(VolumeError, match=r"order is 3, expected 0 \(nearest\) or 1"):
        resample(array, TURNED, (1, 1, 1), order=3)
    for spacing in ((1, 1), (1, 0, 1), (1, float("nan"), 1)):
        with pytest.raises(VolumeError, match="three positive numbers in mm"):
            resample(array, TURNED, spacing, order=1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("row", "column"), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)])
def test_axes_may_drift_by_a_tenth_of_a_voxel_over_the_grid(row: int, column: int, sign: int) -> None:
    """A target of 3 x 5 x 11 voxels reaches 2, 4 and 10 steps: that far an axis may run 0.1 voxels astray, in all."""
    array, shape = np.zeros((3, 5, 11), dtype=np.float32), (3, 5, 11)
    steps = shape[column] - 1
    for off, refused in ((0.097, False), (0.103, True)):
        target = np.eye(4)
        target[row, column] = sign * off / steps
        if refused:
            with pytest.raises(VolumeError, match="turned against each other"):
                resample_to(array, np.eye(4), shape, target, order=0)
        else:
            resample_to(array, np.eye(4), shape, target, order=0)
    # Two axes that drift along the same one add up, even in opposite directions.
    target, other = np.eye(4), 3 - row - column
    target[row, column], target[row, other] = sign * 0.06 / steps, -sign * 0.06 / (shape[other] - 1)
    with pytest.raises(VolumeError, match=r"off by 0\.12 voxels"):
        resample_to(array, np.eye(4), shape, target, order=0)


def test_foreground_is_brighter_than_a_tenth_and_specks_are_under_a_hundredth() -> None:
    scaled = np.zeros((30, 20, 20), dtype=np.float32)
    scaled[2:12, 2:12, 2:12] = 0.2
    scaled[5, 5, 5] = 0.1  # not brighter
    # Of 999 voxels, a hundredth is 9.99.
    scaled[20:30, 0, 0] = 1.0
    scaled[20:29, 10, 10] = 1.0
    # Corners do not connect.
    scaled[12, 12, 12] = 1.0
    mask = foreground_mask(scaled)
    assert mask.sum() == 999 + 10 and mask[20:30, 0, 0].all() and not mask[5, 5, 5] and not mask[12, 12, 12]
    assert foreground_mask(scaled, 0.5).sum() == 10 + 9 + 1, "of ten voxels, one is no speck"
    single = np.zeros((4, 4, 4), dtype=np.float32)
    single[1, 1, 1] = 1
    assert foreground_mask(single).sum() == 1 and not foreground_mask(single * 0).any()


def test_spacings_count_as_equal_within_one_per_cent() -> None:
    assert same_spacing((1.0, 0.5, 3.0), (1.009, 0.5, 2.971))
    assert not same_spacing((1.0, 0.5, 3.0), (1.0, 0.5, 3.05))


def test_foreground_box_has_a_margin_in_mm() -> None:
    scaled = np.full((40, 30, 20), 0.05, dtype=np.float32)
    scaled[12, 10:21, 1] = 0.5
    scaled[15, 15, 9] = 0.11
    box = foreground_box(scaled, (1.0, 2.0, 3.0), margin_mm=4.0)
    assert box == (slice(8, 20), slice(8, 23), slice(0, 12))
    assert foreground_box(scaled * 0, (1.0, 1.0, 1.0)) == (slice(0, 40), slice(0, 30), slice(0, 20))
    np.testing.assert_allclose(crop_affine(TURNED, box) @ [0, 0, 0, 1], TURNED @ [8, 8, 0, 1])


def test_rounding_of_a_header_does_not_widen_the_margin() -> None:
    """An oblique volume of 1 mm voxels has voxels of 0.99999999 mm, once its header is read."""
    box = slice(20, 30), slice(20, 30), slice(20, 30)
    for spacing in ((1.0, 1.0, 1.0), (0.99999999, 1.00000002, 0.9999999)):
        assert add_margin(box, (60, 60, 60), spacing, 5.0) == (slice(15, 35),) * 3
    assert add_margin(box, (60, 60, 60), (0.9, 1.1, 5.0), 5.0) == (slice(14, 36), slice(15, 35), slice(19, 31))


@pytest.mark.parametrize(
    ("voxels", "expected"),
    [
        (30, slice(10, 40)),  # fits
        (26, slice(12, 38)),
        (25, slice(13, 38)),
        (20, slice(15, 35)),  # the foreground
        (19, slice(10, 40)),  # the foreground does not fit either
        (None, slice(10, 40)),
    ],
)
def test_a_margin_is_narrowed_evenly_and_the_foreground_kept(voxels, expected) -> None:
    box, foreground = (slice(10, 40),) * 3, (slice(15, 35),) * 3
    assert narrow_margin(box, foreground, (voxels, None, voxels)) == (expected, slice(10, 40), expected)


def test_a_margin_that_the_volume_cuts_is_narrowed_on_its_other_side() -> None:
    at_start, at_end = (slice(0, 30), slice(2, 20)), (slice(70, 100), slice(80, 98))
    for (box, foreground), expected in ((at_start, slice(1, 22)), (at_end, slice(79, 100))):
        assert narrow_margin((box,) * 3, (foreground,) * 3, (21, 21, 21)) == (expected,) * 3


def test_specks_in_air_do_not_move_the_box() -> None:
    scaled = np.zeros((40, 30, 20), dtype=np.float32)
    scaled[10:25, 8:20, 6:15] = 0.5
    # Two parts of one object both count.
    scaled[30:34, 8:12, 6:10] = 0.5
    clean = foreground_box(scaled, (1.0, 1.0, 1.0), margin_mm=0)
    assert clean == (slice(10, 34), slice(8, 20), slice(6, 15))
    scaled[0, 0, 0] = scaled[39, 29, 18:20] = scaled[2:4, 27, 1] = 1.0
    assert foreground_box(scaled, (1.0, 1.0, 1.0), margin_mm=0) == clean
    assert foreground_mask(scaled).sum() == 15 * 12 * 9 + 4**3
