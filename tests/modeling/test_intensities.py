"""Intensity scaling: what people's files do to the background, and what the network must see nevertheless."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hf_binaryformer.modeling.intensities import IntensityScale, find_background

PERCENTILES, CEILING = (0.5, 99.5), 1.5


def head(size: int = 40) -> np.ndarray:
    """A ball of smooth tissue, 300 to 1 000, in air that is 0."""
    rng = np.random.default_rng(0)
    tissue = gaussian_filter(rng.normal(size=(size,) * 3), 3)
    tissue = 300 + 700 * (tissue - tissue.min()) / (tissue.max() - tissue.min())
    distance = np.sqrt(((np.indices((size,) * 3) - (size - 1) / 2) ** 2).sum(0))
    return np.where(distance < 0.4 * size, tissue, 0).astype(np.float32)


HEAD = head()
INSIDE = HEAD > 0


def scaled(array: np.ndarray, **options) -> np.ndarray:
    return IntensityScale.of(array, PERCENTILES, CEILING, **options).apply(array)


CLEAN = np.clip(HEAD / np.percentile(HEAD[INSIDE], 99.5), 0, CEILING)


def test_the_background_of_a_clean_image_is_zero_and_the_upper_percentile_one():
    np.testing.assert_allclose(scaled(HEAD), CLEAN, rtol=1e-5)


@pytest.mark.parametrize(("factor", "offset"), [(1e-6, 0.0), (1.0, -1000.0), (0.01, 50.0), (3e4, 1e6)])
def test_scaling_does_not_depend_on_units_or_on_what_air_is_called(factor, offset):
    np.testing.assert_allclose(scaled(factor * HEAD + offset), CLEAN, atol=2e-5)


def test_zscored_over_the_whole_volume():
    np.testing.assert_allclose(scaled((HEAD - HEAD.mean()) / HEAD.std()), CLEAN, atol=1e-5)


@pytest.mark.parametrize("values", [(-500, -400), (-1e6, -1e5), (5e3, 9e9), (-500, 5e3)])
def test_stray_voxels_change_nothing_but_themselves(values):
    array = HEAD.copy()
    array[2, 3, 4], array[20, 20, 21] = values
    result, others = scaled(array), np.ones_like(INSIDE)
    others[2, 3, 4] = others[20, 20, 21] = False
    np.testing.assert_allclose(result[others], CLEAN[others], atol=2e-3)


@pytest.mark.parametrize("sigma", [5, 20, 50])
def test_noise_in_the_background_does_not_shift_the_scale(sigma):
    array = HEAD + np.random.default_rng(1).normal(0, sigma, HEAD.shape).astype(np.float32)
    scale = IntensityScale.of(array, PERCENTILES, CEILING)
    assert abs(scale.low) < 0.2 * sigma
    # Noise in the tissue raises its upper percentile, by less than twice its standard deviation.
    true = np.percentile(HEAD[INSIDE], 99.5)
    assert true - 0.2 * sigma < scale.high < true + 2 * sigma


def test_rician_noise_lifts_air_and_air_stays_zero():
    rng = np.random.default_rng(1)
    array = np.hypot(HEAD + rng.normal(0, 30, HEAD.shape), rng.normal(0, 30, HEAD.shape))
    # The mode of a Rayleigh distribution is its sigma, the mean 1.25 sigma.
    assert 0.8 * 30 < IntensityScale.of(array, PERCENTILES, CEILING).low < 1.25 * 30
    assert scaled(array)[~INSIDE].mean() < 0.02


def test_ringing_below_zero_does_not_shift_the_scale():
    spectrum = np.fft.fftn(HEAD)
    kept = np.abs(np.fft.fftfreq(40)) < 0.25
    spectrum[~(kept[:, None, None] & kept[:, None] & kept)] = 0
    array = np.fft.ifftn(spectrum).real.astype(np.float32)
    assert array.min() < -30
    # Around half of what rings in air is above 0.
    assert abs(scaled(array) - CLEAN)[~INSIDE].mean() < 0.02
    assert abs(IntensityScale.of(array, PERCENTILES, CEILING).low) < 10


def test_air_that_was_left_at_zero_by_zscoring_the_inside_is_background():
    array = np.where(INSIDE, (HEAD - HEAD[INSIDE].mean()) / HEAD[INSIDE].std(), 0).astype(np.float32)
    scale = IntensityScale.of(array, PERCENTILES, CEILING)
    result = scale.apply(array)
    assert scale.as_dict()["background"] == 0 and not result[~INSIDE].any()
    # How bright the darkest tissue was is lost; its place is 0.15, the order of all others is kept.
    low, high = np.percentile(HEAD[INSIDE], PERCENTILES)
    expected = 0.15 + 0.85 * (HEAD[INSIDE] - low) / (high - low)
    np.testing.assert_allclose(result[INSIDE], np.clip(expected, 0, CEILING), atol=1e-4)
    undone = scale.undo(result)
    assert not undone[~INSIDE].any()
    np.testing.assert_allclose(undone[INSIDE][expected > 0.05], array[INSIDE][expected > 0.05], atol=1e-4)


def test_a_bright_background_is_background():
    array = np.where(INSIDE, HEAD, 4095).astype(np.float32)
    result = scaled(array)
    assert not result[~INSIDE].any() and 0.9 < np.percentile(result[INSIDE], 99.5) <= 1.001


def test_a_crop_without_background_has_none_and_strays_do_not_matter():
    crop = HEAD[12:28, 12:28, 12:28].copy()
    assert find_background(crop) is None
    scale = IntensityScale.of(crop, PERCENTILES, CEILING)
    assert scale.background is None and crop.min() <= scale.low < np.percentile(crop, 0.2)
    before = scaled(crop)
    crop[0, 0, 0], crop[5, 5, 5] = -5000, -4000
    np.testing.assert_allclose(
        np.delete(scaled(crop), [0, 5 * 256 + 5 * 16 + 5]), np.delete(before, [0, 1365]), atol=0.02
    )


def test_many_saturated_voxels_inside_are_not_background():
    crop = HEAD[12:28, 12:28, 12:28].copy()
    crop[4:12, 4:12, 4:12] = crop.max()
    assert find_background(crop) is None


def test_unknown_voxels_have_no_influence():
    known, array = np.ones_like(INSIDE), HEAD.copy()
    known[10:25, 10:25, :] = False
    expected = IntensityScale.of(array, PERCENTILES, CEILING, known=known)
    array[~known] = np.random.default_rng(0).normal(0, 1e6, (~known).sum())
    assert IntensityScale.of(array, PERCENTILES, CEILING, known=known) == expected
    assert expected.low == 0 and abs(expected.high - np.percentile(HEAD[known & INSIDE], 99.5)) < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_a_background_at_either_end_of_an_axis_is_found(axis, end):
    """Tissue without a mode fills all but one end of one axis, whose layers are half of a flat block's border."""
    shape = [40, 40, 40]
    shape[axis] = 4
    array = np.random.default_rng(0).uniform(100, 200, shape)
    assert find_background(array) is None
    np.moveaxis(array, axis, 0)[end] = 7.0
    assert find_background(array) == 7.0


def test_unknown_voxels_of_the_border_are_no_background():
    array, known = HEAD.copy(), np.ones_like(INSIDE)
    known[:, :26] = False
    array[~known] = 555.0
    assert find_background(array) == 555.0 and find_background(array, known) == 0.0
    assert find_background(array, np.zeros_like(known)) is None


@pytest.mark.parametrize(
    "array",
    [
        np.eye(2)[0],
        np.array([[0, 0, 0], [0, 5, 0], [0, 0, 0]]),
        np.array([[5, 5, 5], [5, 0, 5], [5, 5, 5]]),
        np.r_[np.zeros(5), np.full(95, 0.95), np.ones(40)],
        np.r_[np.full(9999, 7.0), 8.0],
    ],
    ids=str,
)
def test_two_or_three_values(array):
    result = scaled(np.asarray(array, dtype=np.float32))
    assert np.isfinite(result).all() and result.max() > result.min()


def test_percentiles_of_everything_if_asked():
    # Three quarters are air, so the lower percentile is one of tissue.
    low, high = np.percentile(HEAD, [80, 98])
    assert low > 300
    expected = np.clip((HEAD - low) / (high - low), 0, CEILING)
    result = IntensityScale.of(HEAD, (80, 98), CEILING, foreground_only=False).apply(HEAD)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
