"""Scores against MONAI and plain arithmetic; fills against loops that say what they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric, SSIMMetric
from vq_cases import SHAPE, inpainting, seeded

from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.inpainting_scores import (
    foreground,
    hole_psnr,
    make_hole,
    mean_fill,
    mirror_fill,
    score_fill,
    ssim_map,
    token_fills,
    zero_fill,
)

UNIT = IntensityScale(0, 1, 1.5)


def volume(shape: tuple[int, int, int] = (30, 26, 28), seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).uniform(0.2, 1, shape).astype(np.float32)
    array[:3] = 0
    return array


def as_batch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)[None, None]


def test_scores_of_a_hole_as_large_as_the_volume_are_monais():
    a, b = volume(seed=1), volume(seed=2)
    score = score_fill(a, b, np.ones(a.shape, dtype=bool), UNIT)
    assert score.psnr_hole == pytest.approx(float(PSNRMetric(max_val=1.0)(as_batch(a), as_batch(b))), abs=1e-4)
    assert score.psnr_object == pytest.approx(score.psnr_hole, abs=1e-4)
    assert score.mae_hole == score.mae_object == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    # MONAI leaves out the windows that reach beyond the edge.
    inner = ssim_map(a, b)[5:-5, 5:-5, 5:-5].mean()
    assert inner == pytest.approx(float(SSIMMetric(spatial_dims=3)(as_batch(a), as_batch(b))), abs=1e-5)


def test_scores_of_a_small_hole_equal_those_of_the_whole_volume():
    """Only the surroundings of the hole are looked at; the rest is known to be equal."""
    truth, hole = volume((40, 36, 38)), np.zeros((40, 36, 38), dtype=bool)
    hole[18:22, 16:20, 17:23] = True
    filled = np.where(hole, np.float32(0.4), truth)
    score = score_fill(filled, truth, hole, UNIT)
    thing, error = hole | (truth > 0.1), filled.astype(np.float64) - truth
    similarity = ssim_map(filled, truth)
    assert score.psnr_hole == pytest.approx(-10 * np.log10((error[hole] ** 2).mean()))
    assert score.psnr_object == pytest.approx(-10 * np.log10((error[thing] ** 2).mean()))
    assert score.ssim_hole == pytest.approx(similarity[hole].mean(), abs=1e-6)
    assert score.ssim_object == pytest.approx(similarity[thing].mean(), abs=1e-5)
    assert score.mae_object == pytest.approx(np.abs(error[thing]).mean())
    assert hole_psnr(filled, truth, hole, UNIT) == score.psnr_hole
    perfect = score_fill(truth, truth, hole, UNIT)
    assert perfect.ssim_hole == perfect.ssim_object == pytest.approx(1) and perfect.psnr_hole > 100


def test_scores_do_not_depend_on_the_unit_of_intensity():
    truth, hole = volume(), np.zeros((30, 26, 28), dtype=bool)
    hole[10:15, 10:15, 10:15] = True
    filled = np.where(hole, np.float32(0.5), truth)
    ours = score_fill(filled, truth, hole, UNIT).as_dict()
    theirs = score_fill(700 * filled + 40, 700 * truth + 40, hole, IntensityScale(40, 740, 1.5)).as_dict()
    assert theirs == pytest.approx(ours, rel=1e-3)


def test_bad_comparisons_are_named():
    a, hole = volume(), np.zeros((30, 26, 28), dtype=bool)
    with pytest.raises(ValueError, match="0 voxels, expected one shape and at least one voxel"):
        score_fill(a, a, hole, UNIT)
    hole[5, 5, 5] = True
    with pytest.raises(ValueError, match="differ outside the hole"):
        score_fill(a + 1, a, hole, UNIT)


def test_zero_and_mean_fill():
    image, hole = volume() * 100 + 50, np.zeros((30, 26, 28), dtype=bool)
    hole[10:14, 3:9, 5:20] = True
    scale = IntensityScale(50, 150, 1.5)
    for fill, value in ((zero_fill, 50), (mean_fill, image[~hole & (image > 60)].mean())):
        filled = fill(image, hole, scale)
        np.testing.assert_allclose(filled[hole], value, rtol=1e-5)
        np.testing.assert_array_equal(filled[~hole], image[~hole])


@pytest.mark.parametrize("where", [slice(5, 9), slice(11, 21), slice(2, 30), slice(0, 30)])
def test_mirror_fill(where):
    image, hole = volume(), np.zeros((30, 26, 28), dtype=bool)
    hole[where, 8:12, 9:13] = True
    hole[25:27, 9:11, 10] = True
    filled = mirror_fill(image, hole, UNIT)
    known = foreground(image, hole, UNIT)
    inside = np.flatnonzero(known.any((1, 2)))
    low, high = inside[0], inside[-1]
    for i, j, k in np.argwhere(hole):
        line = hole[:, j, k]
        below, above = i, i
        while below >= 0 and line[below]:
            below -= 1
        while above < len(line) and line[above]:
            above += 1
        behind_faces = [2 * below + 1 - i, 2 * above - 1 - i]
        if i - below > above - i:
            behind_faces.reverse()
        partners = [p for p in (low + high - i, *behind_faces) if 0 <= p < len(line) and not line[p]]
        expected = image[partners[0], j, k] if partners else image[known].mean()
        assert filled[i, j, k] == pytest.approx(expected, rel=1e-5), (i, j, k)
    np.testing.assert_array_equal(filled[~hole], image[~hole])


def test_holes_have_the_size_asked_for():
    ball = make_hole((60, 50, 40), (0.5, 1.0, 2.0), 20.0, centre=(30, 20, 20))
    assert ball.sum() * 1.0 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.05)
    assert np.argwhere(ball).mean(0) == pytest.approx([30, 20, 20])
    box = make_hole((60, 50, 40), (0.5, 1.0, 2.0), 20.0, centre=(30, 20, 20), kind="box")
    assert box.sum() == 41 * 21 * 11 and (ball & ~box).sum() == 0
    assert make_hole((3, 3, 3), (1, 1, 1), 0.5)[1, 1, 1]
    with pytest.raises(ValueError, match="kind is 'cube', expected 'ball' or 'box'"):
        make_hole((3, 3, 3), (1, 1, 1), 1, kind="cube")


def test_token_fills_are_what_the_autoencoder_makes_of_true_and_of_random_tokens():
    pipeline = inpainting()
    image = np.random.default_rng(0).uniform(0.2, 1, SHAPE).astype(np.float32)
    hole = make_hole(SHAPE, (1, 1, 1), 6.0)
    case = pipeline.prepare(image, hole, np.diag([2, 2, 2, 1.0]))
    fills = token_fills(pipeline, case, seeded())
    with torch.no_grad():
        tokens = pipeline.vqmodel.encode(torch.from_numpy(case.scale.apply(image))[None, None]).tokens
        decoded = pipeline.vqmodel.decode(tokens).sample[0, 0].clamp(0, 1.5).numpy()
    far = hole & (decoded > 0.03)  # below that it is background
    np.testing.assert_allclose(fills["oracle tokens"][far], case.scale.undo(decoded)[far], rtol=1e-4)
    again, other = (token_fills(pipeline, case, seeded(s))["random tokens"] for s in (0, 1))
    np.testing.assert_array_equal(fills["random tokens"], again)
    assert not np.array_equal(again, other)
    for fill in fills.values():
        np.testing.assert_array_equal(fill[~hole], image[~hole])
