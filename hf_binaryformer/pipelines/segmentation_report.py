"""What a segmentation gives: labels, their volumes, and what the user should know before using them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_binaryformer.pipelines.provenance import NOTICE, versions
from hf_binaryformer.pipelines.slice_results import view_names
from hf_binaryformer.pipelines.volumes import Volume, write_labels

# An image that shows less than this share of the smallest extent of the training images is told.
ENOUGH_OF_EXTENT = 0.9
WAYS = ("from left to right", "from back to front", "from bottom to top")


@dataclass(frozen=True, eq=False)
class VolumeSegmentationOutput:
    """What the network found in one volume.

    Args:
        labels: (I, J, K) int32, RAS order, on the grid of ``volume``; 0 is background.
        probabilities: (C, I, J, K) float16, 0 to 1, one for each label; None unless asked for.
        volume: the input, in canonical orientation.
        label_names: name of each label number.
        seconds: time taken, including reading.
        report: the same and more in machine-readable form: names and volumes in ml of all labels, "quality", "intracranial_ml"
            (None if the labels are no brain), "notes", grid, model, backend, versions.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None
    volume: Volume
    label_names: dict[int, str]
    seconds: float
    report: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the labels on the input's own grid: :func:`~hf_binaryformer.pipelines.volumes.write_labels`."""
        description = f"{self.report['model']}. {NOTICE}"
        return write_labels(path, self.labels, self.volume, label_names=self.label_names, description=description)


def segmentation_report(volume: Volume, labels: np.ndarray, label_names: dict[int, str]) -> dict[str, Any]:
    """Grid of a volume, and number of voxels and volume in ml of each label.

    Args:
        volume: the input.
        labels: (I, J, K), on its grid.
        label_names: name of each label number.
    """
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    counts = np.bincount(labels.ravel(), minlength=max(label_names) + 1)
    return {
        "notice": NOTICE,
        "input": volume.name,
        "shape": list(volume.array.shape),
        "orientation": "RAS",
        "spacing_mm": list(volume.spacing),
        "affine": volume.affine.tolist(),
        "labels": [
            {"label": label, "name": name, "voxels": int(counts[label]), "volume_ml": float(counts[label]) * voxel_ml}
            for label, name in label_names.items()
        ],
        "versions": versions(),
    }


def segmentation_notes(
    volume: Volume, labels: np.ndarray, extent: Sequence[float], views: Sequence[str], processor: Any
) -> list[str]:
    """What the user should know: choices of the reader, images or slices unlike those that were trained on, no labels.

    Args:
        volume: the input.
        labels: (I, J, K), on its grid.
        extent: of the image's foreground in mm, (R, A, S).
        views: names of those whose slices were labelled.
        processor: the network's, with ``slice_axes`` and, if it is known, ``foreground_extent``.
    """
    notes = list(volume.notes)
    usual = view_names(processor.slice_axes)
    if unusual := [view for view in views if view not in usual]:
        notes.append(
            f"the checkpoint takes {' and '.join(usual)} slices: with {' and '.join(unusual)} ones, labels are probably worse, "
            f"unless its network was trained on them too"
        )
    trained_extent = getattr(processor, "foreground_extent", None) or (0, 0, 0)
    for mm, least, way in zip(extent, trained_extent, WAYS, strict=True):
        if mm < ENOUGH_OF_EXTENT * least:
            notes.append(
                f"the image shows {mm:.0f} mm {way}, the training images at least {least:.0f} mm: what is cut off, and "
                f"what lies near the cut, is labelled badly or not at all"
            )
    if not labels.any():
        notes.append("nothing was found, all voxels are background: is this what the model was trained on?")
    return notes
