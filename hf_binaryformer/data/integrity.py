"""Checks of raw images and labels before anything is written: all problems of all files are gathered, then reported."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np

from hf_binaryformer.pipelines import itk, nifti
from hf_binaryformer.pipelines.grids import SAME_GRID_TOLERANCE, VolumeError, affine_spacing, check_shape, grid_distance
from hf_binaryformer.pipelines.label_values import label_numbers
from hf_binaryformer.pipelines.volumes import NIFTI_SUFFIXES

# The highest label of a prepared folder.
MOST = 255


def read_raw(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (I, J, K) in the file's own order and type, and its affine to mm.

    The only check is that the file holds one volume.

    Raises:
        VolumeError: not readable, or not one volume.
    """
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        array, affine, _ = nifti.image_values(path, nifti.read_file(path), own_type=True)
    else:
        array, affine = itk.read_file(path)
    check_shape(path, array.shape)
    return array.reshape(array.shape[:3]), affine


def pair_problems(image_path: Path, label_path: Path | None, known: Collection[int], root: Path) -> list[str]:
    """Problems of an image and its labels; an empty list if there are none. A warning tells which labels get rounded.

    Args:
        image_path, label_path: files below ``root``; without a label only the image is checked.
        known: values that a label file may hold.
        root: folder that the messages leave out.
    """
    name = image_path.relative_to(root).as_posix()
    problems, read = [], {}
    for kind, path in (("image", image_path), ("label", label_path)):
        if path is not None:
            try:
                read[kind] = read_raw(path)
            except VolumeError as error:
                problems.append(f"{name}: unreadable {kind} ({error})")
    if "image" in read:
        voxels, affine = read["image"]
        finite = np.isfinite(voxels)
        if bad := int((~finite).sum()):
            problems.append(f"{name}: {bad} voxels are NaN or infinite")
        elif voxels.min() == voxels.max():
            problems.append(f"{name}: all voxels are {voxels.flat[0]:g}, expected an image with contrast")
        spans_volume = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-9
        if not spans_volume:
            problems.append(f"{name}: the affine {affine.tolist()} spans no volume")
    if "label" in read:
        classes, label_affine = read["label"]
        assert label_path is not None
        label_name = label_path.relative_to(root).as_posix()
        try:
            numbers, notes = label_numbers(label_name, classes)
        except VolumeError as error:
            problems.append(f"{name}: {error}")
        else:
            for note in notes:
                warnings.warn(note, stacklevel=2)
            if unexpected := sorted(set(np.unique(numbers).tolist()) - set(known)):
                above = f"; labels end at {MOST}" if unexpected[-1] > MOST else ""
                problems.append(
                    f"{label_name}: unexpected label values {unexpected[:8]}; known are {spans(known)}{above}"
                )
        if "image" in read and voxels.shape != classes.shape:
            problems.append(f"{name}: image shape {voxels.shape}, label shape {classes.shape} ({label_name})")
        # Written so that a NaN in the label's affine counts as a difference too.
        elif (
            "image" in read
            and spans_volume
            and not (apart := grid_distance(affine, label_affine, voxels.shape)) <= SAME_GRID_TOLERANCE
        ):
            mm = apart * min(affine_spacing(affine))
            problems.append(f"{name}: image and label have different affines, up to {mm:.3g} mm apart ({label_name})")
    return problems


def spans(numbers: Collection[int]) -> str:
    """{0, 1, 2, 7} -> '0-2, 7'."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def raise_problems(source: Path, problems: list[str]) -> None:
    """Report all problems in one error.

    Raises:
        ValueError: there are any.
    """
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{count} in {source}; repair or remove these files:\n" + "\n".join(problems))
