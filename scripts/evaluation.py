"""Dice of whole volumes on a split of a prepared folder, with the prior atlas as the row to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.ndimage import zoom

import hf_binaryformer as bf
from hf_binaryformer.pipelines.metrics import mask_dice
from slices import Case, PreparedFolder, read_label_array


def dice_by_label(pred: np.ndarray, truth: np.ndarray, labels: list[int]) -> list[float]:
    """Dice of each label; NaN where the truth lacks it."""
    return [mask_dice(pred == label, truth == label) for label in labels]


class PriorAtlas:
    """The majority label of each voxel over the training masks, all resized to their mean shape.

    Knows where things usually are and never looks at the image: a network that does not beat it has learned nothing.
    """

    def __init__(self, cases: list[Case], labels: list[int]) -> None:
        shapes = [read_label_array(case.label).shape for case in cases]
        shape = np.mean(shapes, axis=0).round().astype(int)
        votes = np.zeros((max(labels) + 1, *shape), dtype=np.uint16)
        for case in cases:
            resized = resize_nearest(read_label_array(case.label), shape)
            for label in [0, *labels]:
                votes[label] += resized == label
        self.majority = votes.argmax(0)

    def predict(self, shape: tuple[int, ...]) -> np.ndarray:
        """The atlas resized to a volume's shape."""
        return resize_nearest(self.majority, np.array(shape))


def resize_nearest(labels: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Labels stretched to another shape without interpolation."""
    return zoom(labels, np.array(shape) / labels.shape, order=0, grid_mode=True, mode="nearest")


def evaluate_split(model_folder: Path, folder: PreparedFolder, split: str, *, baseline: bool) -> dict[str, Any]:
    """Segment every volume of a split, print a table, and return the figures.

    Returns:
        ``split``, ``volumes``, and under ``rows`` for the network (and the prior atlas) the mean and standard deviation of
        each label's Dice over volumes, the number of NaN left out, and their mean over labels; ``cases`` for each volume.
    """
    pipeline = bf.VolumeSegmentationPipeline.from_pretrained(str(model_folder))
    labels = sorted(label for label in folder.label_names if label != 0)
    atlas = PriorAtlas(folder.split("train"), labels) if baseline else None
    rows: dict[str, list[list[float]]] = {"network": []}
    cases = folder.split(split)
    for case in cases:
        truth = read_label_array(case.label)
        rows["network"].append(network_dice(pipeline, case, truth, labels))
        if atlas is not None:
            rows.setdefault("prior atlas", []).append(dice_by_label(atlas.predict(truth.shape), truth, labels))
    summary = {name: summarise(np.array(dice), labels, folder.label_names) for name, dice in rows.items()}
    print_table(summary, folder.label_names, labels, f"Dice, {len(cases)} volumes of split '{split}'")
    return {
        "split": split,
        "volumes": len(cases),
        "attention_type": pipeline.model.config.attention_type,
        "bit_gradient": pipeline.model.config.resolved_bit_gradient,
        "rows": summary,
        "cases": {case.name: dice for case, dice in zip(cases, np.round(rows["network"], 4).tolist(), strict=True)},
    }


def mean_validation_dice(pipeline: bf.VolumeSegmentationPipeline, folder: PreparedFolder, volumes: int | None) -> float:
    """Mean Dice over labels and the first volumes of the validation split (None: all), to choose weights by."""
    labels = sorted(label for label in folder.label_names if label != 0)
    dice = []
    for case in folder.split("validation")[:volumes]:
        dice.append(network_dice(pipeline, case, read_label_array(case.label), labels))
    return float(np.nanmean(dice))


def network_dice(
    pipeline: bf.VolumeSegmentationPipeline, case: Case, truth: np.ndarray, labels: list[int]
) -> list[float]:
    """Dice of each label on one volume."""
    with torch.inference_mode():
        return dice_by_label(pipeline(case.image).labels, truth, labels)


def summarise(dice: np.ndarray, labels: list[int], names: dict[int, str]) -> dict[str, Any]:
    """Mean, deviation and NaN count for each label over volumes, from (volumes, labels) Dice."""
    per_label = {
        names[label]: {
            "mean": round(float(np.nanmean(column)), 4) if not np.isnan(column).all() else None,
            "sd": round(float(np.nanstd(column)), 4) if not np.isnan(column).all() else None,
            "nan": int(np.isnan(column).sum()),
        }
        for label, column in zip(labels, dice.T, strict=True)
    }
    means = [row["mean"] for row in per_label.values() if row["mean"] is not None]
    return {"mean": round(float(np.mean(means)), 4) if means else None, "labels": per_label}


def print_table(summary: dict[str, Any], names: dict[int, str], labels: list[int], title: str) -> None:
    """One row a label, one column a method."""
    table = Table("label", *summary, title=title)
    for label in labels:
        cells = [row["labels"][names[label]] for row in summary.values()]
        table.add_row(names[label], *(f"{c['mean']} ± {c['sd']}" for c in cells))
    table.add_row("mean", *(str(row["mean"]) for row in summary.values()), style="bold")
    Console().print(table)
