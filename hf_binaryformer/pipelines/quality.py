"""How sure a network was of what it found: a score for each group of structures and for the scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_binaryformer.pipelines.structure_names import structure_groups

# Below these, a group is told: the Dice that its score stands for, or the score itself where nothing is known of it.
LOW_DICE, LOW_SCORE = 0.6, 0.65
# Pairs for groups that a table does not name.
OTHERS = "all"
Table = Mapping[str, Sequence[Sequence[float]]]


def quality_report(
    labels: np.ndarray, confidence: np.ndarray, label_names: Mapping[int, str], table: Table | None = None
) -> dict[str, Any]:
    """Quality scores: the mean, over the voxels of a group of structures, of the probability of the label that won there.

    Args:
        labels: (I, J, K) int32.
        confidence: probability of the winning label, the same shape, 0 to 1.
        label_names: name of each label number, see :func:`~hf_binaryformer.pipelines.structure_names.structure_groups`.
        table: pairs of score and Dice for each group (:class:`~hf_binaryformer.modeling.configuration.BinaryFormerConfig`,
            ``quality``). None: not known.

    Returns:
        "groups", a row for each with its "name", "labels", "score" (None where nothing was found) and "expected_dice" (None
        where it is not known); "score", the mean over the groups that were found, and "expected_dice", likewise.
    """
    highest = max(label_names)
    sums = np.bincount(labels.ravel(), weights=confidence.ravel(), minlength=highest + 1)
    counts = np.bincount(labels.ravel(), minlength=highest + 1)
    rows: list[dict[str, Any]] = []
    for name, members in structure_groups(label_names).items():
        voxels = int(counts[members].sum())
        score = float(sums[members].sum() / voxels) if voxels else None
        rows.append(
            {"name": name, "labels": members, "score": score, "expected_dice": expected_dice(score, name, table)}
        )
    return {"score": _mean(rows, "score"), "expected_dice": _mean(rows, "expected_dice"), "groups": rows}


def expected_dice(score: float | None, group: str, table: Table | None) -> float | None:
    """The Dice that a score stood for on validation volumes, linear between the pairs of a table and constant beyond them."""
    pairs = (table or {}).get(group) or (table or {}).get(OTHERS)
    if score is None or not pairs:
        return None
    return float(np.interp(score, *np.transpose(pairs)))


def quality_notes(quality: Mapping[str, Any]) -> list[str]:
    """A plain warning for each group of low quality, or not found although others were.

    Args:
        quality: what :func:`quality_report` returned.
    """
    if quality["score"] is None:
        return []
    notes = []
    for row in quality["groups"]:
        score, dice = row["score"], row["expected_dice"]
        if score is None:
            notes.append(f"{row['name']}: not found, is it in the field of view?")
        elif dice is not None and dice < LOW_DICE:
            notes.append(
                f"{row['name']}: low confidence ({score:.2f}, expected Dice {dice:.2f}), is it in the field of view?"
            )
        elif dice is None and score < LOW_SCORE:
            notes.append(f"{row['name']}: low confidence ({score:.2f}), is it in the field of view?")
    return notes


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return float(np.mean(known)) if known else None
