"""Labels after the network, against shapes whose pieces and volumes are known."""

from __future__ import annotations

import numpy as np
import pytest

from hf_binaryformer.pipelines.postprocessing import head_mask, intracranial_ml, largest_pieces
from hf_binaryformer.pipelines.structure_names import is_brain, side_of, structure_groups, without_side

SIDED = {0: "background", 1: "left hippocampus", 2: "right hippocampus", 3: "brain stem", 24: "CSF"}


def test_the_largest_piece_of_each_structure_is_kept():
    labels = np.zeros((20, 20, 20), np.int32)
    labels[2:6, 2:6, 2:6] = 1
    labels[12:14, 2:6, 2:6] = 1  # half as large, which a name with a side does not excuse
    labels[2:6, 12:16, 2:6] = 2
    labels[18, 18, 18] = 2
    labels[6, 16, 6] = 2  # touches by a corner
    labels[10:12, 10:12, 10:12] = 3
    expected = labels.copy()
    expected[12:14, 2:6, 2:6] = 0
    expected[18, 18, 18] = 0
    before = labels.copy()
    np.testing.assert_array_equal(largest_pieces(labels, SIDED), expected)
    np.testing.assert_array_equal(labels, before)


def test_both_sides_of_one_label_and_scattered_or_thin_fluid_are_kept():
    labels = np.zeros((30, 10, 10), np.int32)
    labels[2:8, 2:6, 2:6], labels[20:25, 2:6, 2:6] = 1, 1
    labels[14, 8, 8] = 1
    labels[28, 0, 0], labels[0, 9, 9], labels[10:13, 0:3, 0:3] = 24, 24, 24
    labels[28, 4, 4], labels[26, 8, 8] = 5, 5
    names = {0: "background", 1: "hippocampus", 5: "left inferior lateral ventricle", 24: "CSF"}
    found = largest_pieces(labels, names)
    changed = np.argwhere(found != labels).tolist()
    assert changed == [[14, 8, 8]] and found[14, 8, 8] == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 4.0)])
def test_the_head_is_the_foreground_and_what_it_encloses(spacing):
    shape = [round(96 / mm) for mm in spacing]
    at = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) * mm - 48 for n, mm in zip(shape, spacing, strict=True)), indexing="ij")
    )
    radius = np.sqrt((at**2).sum(0))
    shell = (radius < 36) & (radius > 28)
    shell &= ~((np.abs(at[0]) < 1.2) & (np.abs(at[1]) < 1.2))  # a gap of two mm
    head = head_mask(shell, spacing)
    assert head[shell].all() and head[radius < 36].all() and not head[radius > 36 + 4 * 3**0.5].any()
    # A field of view that cuts the shell open: in the slices along the cut, the fluid is still enclosed.
    half = shell[:, :, : shape[2] // 2]
    inside = (radius < 28)[:, :, : shape[2] // 2]
    assert head_mask(half, spacing)[inside].all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.0, 2.0), (1.0, 1.0, 5.0)])
def test_intracranial_volume_of_a_ball_with_sulci_and_ventricles(spacing):
    """A ball of 40 mm with a hole in its middle and 6 mm wide cuts from outside, which are all inside the skull."""
    shape = [round(110 / mm) for mm in spacing]
    at = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) * mm - 55 for n, mm in zip(shape, spacing, strict=True)), indexing="ij")
    )
    radius = np.sqrt((at**2).sum(0))
    labels = np.where(radius < 40, 3, 0)
    labels[radius < 18] = 0
    labels[(np.abs(at[0] - 10) < 3) & (at[1] > 5)] = 0
    exact = 4 / 3 * np.pi * 4.0**3
    assert intracranial_ml(labels, spacing) == pytest.approx(exact, rel=0.035)
    assert np.prod(spacing) / 1000 * (labels > 0).sum() < 0.9 * exact
    assert intracranial_ml(np.zeros((8, 8, 8), np.int32), spacing) == 0


def test_labels_that_reach_the_edge_of_the_volume_are_not_cut_back():
    labels = np.ones((40, 40, 40), np.int32)
    assert intracranial_ml(labels, (1.0, 1.0, 1.0)) == pytest.approx(64.0, rel=0.01)
    # Nor do they grow into the gap before it.
    assert intracranial_ml(np.pad(labels, 6), (1.0, 1.0, 1.0)) == pytest.approx(64.0, rel=0.01)


def test_what_names_say():
    assert [side_of(n) for n in ("left hippocampus", "Right-Hippocampus", "leftover", "brain stem", "left")] == [
        "left", "right", None, None, None
    ]  # fmt: skip
    assert [without_side(n) for n in ("left ventral DC", "Right-Hippocampus", "left")] == [
        "ventral DC",
        "Hippocampus",
        "left",
    ]
    names = {0: "background", 4: "left lateral ventricle", 8: "left cerebellum cortex", 14: "third ventricle"}
    names |= {46: "right cerebellum white matter", 16: "brain stem"}
    groups = {"ventricles": [4, 14], "cerebellum": [8, 46], "brain stem": [16]}
    assert structure_groups(names) == groups
    assert not is_brain(names) and is_brain({2: "left cerebral white matter", 3: "cerebral cortex"})
