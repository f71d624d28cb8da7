"""Other contrasts of training windows, on pictures of few tissues whose intensities are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_binaryformer.data.contrasts import RandomCurve, redrawn

# A left and a right structure, 1 and 2, one without a side, 3, and what has no class.
MIRRORED = torch.arange(256)
MIRRORED[1], MIRRORED[2] = 2, 1
CLASSES = torch.zeros(3, 48, 64, dtype=torch.int64)
CLASSES[:, 4:20, 4:20], CLASSES[:, 4:20, 44:60], CLASSES[1:, 26:44, 20:44] = 1, 2, 3


def inner(label: int) -> torch.Tensor:
    """Pixels that have only this class around them."""
    same = (label == CLASSES).float()[:, None]
    return torch.nn.functional.avg_pool2d(same, 3, stride=1, padding=1, count_include_pad=False)[:, 0] > 0.999


def test_structures_get_new_means_and_keep_their_texture() -> None:
    texture = 0.02 * torch.randn(CLASSES.shape, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([0.5, 0.3, 0.4, 0.8])[CLASSES] + texture
    found = []
    for seed in range(200):
        changed = redrawn(given, CLASSES, MIRRORED, np.random.default_rng(seed)) - given
        steps = [changed[inner(label)] for label in range(4)]
        for step in steps:
            torch.testing.assert_close(step, step[:1].expand_as(step), atol=1e-6, rtol=0)
        first, left, right, middle = (float(step[0]) for step in steps)
        assert first == 0 and left == pytest.approx(right, abs=1e-6)
        found.append((0.35 + left, 0.8 + middle))
    means = np.array(found)
    new = np.abs(means - (0.35, 0.8)) > 5e-3
    # A structure changes in 65 of 100 windows, which structures is drawn each by itself, and new means are anywhere.
    assert (np.abs(new.mean(0) - 0.65) < 0.12).all() and 0.1 < (new[:, 0] != new[:, 1]).mean() < 0.6
    for column in range(2):
        drawn = np.sort(means[new[:, column], column])
        assert drawn[0] > 0.02 and drawn[-1] < 1.01 and np.abs(drawn - np.linspace(0.03, 1, len(drawn))).max() < 0.15


def test_edges_are_as_soft_as_partial_volume() -> None:
    given = torch.tensor([0.5, 0.3, 0.3, 0.5])[CLASSES]
    shares = []
    for seed in range(40):
        change = redrawn(given, CLASSES, MIRRORED, np.random.default_rng(seed)) - given
        if change[0, 12, 12].abs() > 0.02:
            outside, border = (change[0, 12, [20, 19]] / change[0, 12, 12]).tolist()
            assert border == pytest.approx(1 - outside, abs=1e-4) and change[0, 12, 22:42].abs().max() == 0
            shares.append(outside)
    assert 0.1 <= min(shares) < 0.16 and 0.27 < max(shares) <= 0.331


def test_a_curve_gives_equal_tissues_equal_intensities_and_leaves_the_background() -> None:
    """Four tissues of a quarter, a half, three quarters and full intensity, and one between the first two."""
    given = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.3, 0.375]).expand(3, 2, 7).clone()
    curve, found = RandomCurve("image", 0.7), []
    for seed in range(60):
        curve.set_random_state(seed=seed)
        sample = curve({"image": given.clone(), "label": torch.ones(2, 7)})
        image = sample["image"]
        assert image.dtype == torch.float32 and torch.equal(sample["label"], torch.ones(2, 7))
        assert torch.equal(image, image[:1, :1].expand_as(image)), "slices differ"
        if torch.equal(image, given):
            continue
        tissues = image[0, 0]
        assert tissues[0] == 0 and tissues[5] == tissues[4] and tissues[1:].min() >= 0.05 and tissues.max() <= 1
        assert tissues[6] == pytest.approx((tissues[1] + tissues[2]) / 2)
        found.append(tissues[1:5].argsort().tolist())
    assert 34 <= len(found) <= 50 and len({*map(tuple, found)}) > 12, "of 24 orders of four tissues"
