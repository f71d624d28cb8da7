"""Scores against set formulas written by hand and against distances between all pairs of surface voxels."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from hf_binaryformer.pipelines.metrics import mask_dice, mean_score, sample_deviation, score_labels, summarize

SPACING = (0.7, 1.3, 2.5)


def surface_points(mask: np.ndarray) -> np.ndarray:
    """Positions in mm of the voxels of a mask that have one of their six neighbours outside the mask."""
    points = []
    inside = {tuple(v) for v in np.argwhere(mask)}
    for i, j, k in inside:
        neighbours = [(i - 1, j, k), (i + 1, j, k), (i, j - 1, k), (i, j + 1, k), (i, j, k - 1), (i, j, k + 1)]
        if any(n not in inside for n in neighbours):
            points.append((i * SPACING[0], j * SPACING[1], k * SPACING[2]))
    return np.array(points)


def brute_force(pred: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[float, float]:
    """(NSD, HD95) from the full matrix of distances."""
    a, b = surface_points(pred), surface_points(truth)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    to_truth, to_pred = distance.min(axis=1), distance.min(axis=0)
    within = (to_truth <= tolerance).sum() + (to_pred <= tolerance).sum()
    return within / (len(a) + len(b)), max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))


@pytest.fixture
def volumes() -> tuple[np.ndarray, np.ndarray]:
    """Labels 1 (a ball), 2 (a slab that touches the border) and 5 (crumbs), and the same shifted and eroded."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 17, 14)), indexing="ij"))
    truth = np.zeros(grid.shape[1:], dtype=np.int32)
    truth[((grid - np.array([8, 8, 6]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 20] = 1
    truth[16:, :9, :] = 2
    truth[(rng.random(truth.shape) < 0.02) & (truth == 0)] = 5
    pred = np.roll(truth, (1, -1, 1), axis=(0, 1, 2))
    pred[17:, :, :3] = 2
    return pred, truth


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
def test_scores_agree_with_brute_force(volumes, tolerance):
    pred, truth = volumes
    scores = score_labels(pred, truth, SPACING, tolerance=tolerance)
    assert [s.label for s in scores] == [1, 2, 5]
    for score in scores:
        p, t = pred == score.label, truth == score.label
        nsd, hd95 = brute_force(p, t, tolerance)
        assert score.dice == pytest.approx(2 * np.sum(p & t) / (p.sum() + t.sum()), abs=1e-6)
        assert score.nsd == pytest.approx(nsd, abs=1e-6)
        assert score.hd95 == pytest.approx(hd95, rel=1e-5)
    assert 0 < scores[0].dice < 1 and scores[0].nsd > 0 and scores[0].hd95 > 0


def test_perfect_prediction(volumes):
    for score in score_labels(volumes[1], volumes[1], SPACING):
        assert (score.dice, score.nsd, score.hd95) == (1.0, 1.0, 0.0)


def test_spacing_is_in_millimetres_along_the_right_axis():
    truth = np.zeros((9, 9, 9), dtype=np.uint8)
    truth[2:4, 2:4, 2:4] = 1
    for axis, mm in enumerate(SPACING):
        pred = np.roll(truth, 2, axis=axis)
        (score,) = score_labels(pred, truth, SPACING)
        assert score.hd95 == pytest.approx(2 * mm, rel=1e-5)


def test_a_label_in_one_volume_counts_0_and_in_neither_nothing():
    truth, pred = np.zeros((6, 6, 6), dtype=np.uint8), np.zeros((6, 6, 6), dtype=np.uint8)
    truth[:2, :2, :2] = pred[:2, :2, :2] = 1
    truth[4:, 4:, 4:] = 2  # missed
    pred[4:, :2, :2] = 3  # invented
    names = {0: "background", 1: "right", 2: "missed", 3: "invented", 4: "neither"}
    rows = {s.name: s for s in score_labels(pred, truth, (1, 1, 1), label_names=names)}
    assert set(rows) == set(names.values()) - {"background"}
    for name in ("missed", "invented"):
        assert (rows[name].dice, rows[name].nsd) == (0.0, 0.0) and math.isnan(rows[name].hd95)
        assert rows[name].nan == {"dice": 0, "nsd": 0, "hd95": 1}
    assert rows["neither"].nan == {"dice": 1, "nsd": 1, "hd95": 1}
    assert all(math.isnan(v) for v in (rows["neither"].dice, rows["neither"].nsd, rows["neither"].hd95))
    mean = mean_score(rows.values())
    assert (mean.dice, mean.nsd, mean.hd95) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0)
    assert mean.nan == {"dice": 1, "nsd": 1, "hd95": 3}
    assert json.loads(json.dumps(rows["neither"].as_json(), allow_nan=False))["hd95"] is None


def test_summary_over_cases(volumes):
    pred, truth = volumes
    only_ball = np.where(truth == 1, 1, 0)
    first, second = score_labels(pred, truth, SPACING), score_labels(only_ball, only_ball, SPACING)
    *rows, mean = summarize([first, second])
    assert [(r.label, r.name) for r in rows] == [(1, "label 1"), (2, "label 2"), (5, "label 5")]
    assert rows[0].dice == pytest.approx((first[0].dice + 1) / 2)
    assert rows[1].dice == first[1].dice
    assert mean.dice == pytest.approx(np.mean([r.dice for r in rows]))


def test_summary_of_nothing_is_nan():
    (mean,) = summarize([])
    assert math.isnan(mean.dice) and mean.nan["dice"] == 0


@pytest.mark.parametrize("values", [[0.2, 0.9], [1.0, 2.0, 4.0, 8.0], [3.0, 3.0, 3.0]])
def test_deviation_is_that_of_a_sample(values):
    assert sample_deviation(values) == pytest.approx(statistics.stdev(values))
    assert sample_deviation([*values, math.nan]) == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan], [math.nan, math.nan]])
def test_fewer_than_two_values_have_no_deviation(values):
    assert math.isnan(sample_deviation(values))


def test_mask_dice():
    a = np.array([True, True, True, False]).reshape(1, 2, 2)
    b = np.array([True, False, False, True]).reshape(1, 2, 2)
    assert mask_dice(a, b) == pytest.approx(2 * 1 / (3 + 2))
    empty = np.zeros_like(a)
    assert mask_dice(a, empty) == mask_dice(empty, a) == 0 and math.isnan(mask_dice(empty, empty))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(truth=np.zeros((3, 3, 4), int)), r"\(3, 3, 3\).*\(3, 3, 4\)"),
        (dict(tolerance=-1.0), "tolerance is -1.0"),
        (dict(tolerance=math.nan), "tolerance is nan"),
        (dict(label_names={1: "a"}), r"label ids \[7\].*named are \[1\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(pred=np.full((3, 3, 3), 7), truth=np.zeros((3, 3, 3), int), spacing=(1, 1, 1)) | change
    with pytest.raises(ValueError, match=message):
        score_labels(**arguments)
