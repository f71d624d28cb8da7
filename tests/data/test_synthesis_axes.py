"""The engine's operations along axes against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline

from hf_binaryformer.data.synthesis import axes as ax


def test_matrices_act_on_their_axes() -> None:
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((5, 6, 7)).astype(np.float32)
    first, last = rng.standard_normal((9, 5)), rng.standard_normal((3, 7))
    expected = np.einsum("ai,ijk,ck->ajc", first, volume, last)
    np.testing.assert_allclose(ax.along_axes(torch.from_numpy(volume), [first, None, last]), expected, atol=1e-5)


def test_a_slice_averages_what_lies_in_it() -> None:
    fine = np.arange(24) * 0.5 + 0.25
    matrix = ax.average_matrix(np.arange(6) * 2 + 1.0, 2.0, fine, 0.0)
    np.testing.assert_allclose(matrix, np.kron(np.eye(6), np.full((1, 4), 0.25)), atol=1e-12)
    # A part of a cell counts by its part.
    np.testing.assert_allclose(ax.average_matrix(np.array([3.0]), 1.5, fine, 0.0)[0, 4:8] * 3, [0.5, 1, 1, 0.5])


@pytest.mark.parametrize("blur", [0.3, 1.0])
def test_blur_of_a_slice_profile(blur: float) -> None:
    fine = np.arange(-40, 40, 0.1) + 0.05
    profile = ax.average_matrix(np.array([0.0]), 3.0, fine, blur)[0]
    box = (np.abs(fine) < 1.5).astype(float)
    expected = ndimage.gaussian_filter1d(box / box.sum(), blur / 0.1, truncate=8)
    np.testing.assert_allclose(profile, expected, atol=2e-4)
    assert profile @ fine**2 == pytest.approx(3.0**2 / 12 + blur**2, rel=0.01)


def test_linear_interpolation_equals_numpy() -> None:
    rng = np.random.default_rng(1)
    given, wanted, values = np.arange(7) * 2.5 - 3, rng.uniform(-6, 16, 30), rng.standard_normal(7)
    np.testing.assert_allclose(ax.linear_matrix(wanted, given) @ values, np.interp(wanted, given, values), atol=1e-12)


def test_splines_equal_scipy() -> None:
    wanted = np.linspace(0, 20, 41)
    basis = BSpline.basis_element(np.array([-2, -1, 0, 1, 2.0]), extrapolate=False)
    expected = np.nan_to_num(basis((wanted[:, None] - 1.0) / 3 - np.arange(8)))
    np.testing.assert_allclose(ax.spline_matrix(wanted, 1.0, 3.0, 8), expected, atol=1e-12)


def test_ringing_keeps_low_frequencies_alone() -> None:
    wave = np.cos(2 * np.pi * np.arange(32) / 32 * np.array([2, 12])[:, None])
    kept = ax.ringing_matrix(32, 0.5) @ wave.T
    np.testing.assert_allclose(kept[:, 0], wave[0], atol=1e-12)
    np.testing.assert_allclose(kept[:, 1], 0, atol=1e-12)
    step = ax.ringing_matrix(64, 0.6) @ (np.arange(64) > 31).astype(float)
    assert step.max() > 1.05, "an edge overshoots"


def test_motion_is_a_mean_of_shifted_copies() -> None:
    values = np.arange(20.0) ** 2
    found = ax.motion_matrix(20, [1.0, -2.0], [0.25, 0.75]) @ values
    np.testing.assert_allclose(found[2:-1], 0.25 * values[3:] + 0.75 * values[:-3])


def test_a_smooth_field_is_one_function_of_position() -> None:
    rng = np.random.default_rng(2)
    fields = [ax.SmoothField(np.zeros(3), np.full(3, 60.0), 7.0, rng) for _ in range(8)]
    whole = [np.arange(60.0)] * 3
    values = torch.stack([field.at(whole) for field in fields])
    assert float(values.std()) == pytest.approx(1, abs=0.1)
    part = fields[0].at([np.arange(10.0, 20, 2), np.array([5.0]), np.arange(60.0)])
    torch.testing.assert_close(part, values[0, 10:20:2, 5:6], rtol=1e-4, atol=1e-4)
    assert float(values.diff(dim=1).abs().max()) < 1.0
