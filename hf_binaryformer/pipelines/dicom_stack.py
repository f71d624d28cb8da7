"""DICOM frames as one stack: sorted along its normal, with one image at each of evenly spaced positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_binaryformer.pipelines.dicom_frames import CONVERT, TRAITS, Frame
from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.itk import LPS_TO_RAS

# Frames less than this apart along the normal, in mm, lie at one position.
POSITION_TOLERANCE = 1e-3
# Largest difference of direction cosines within a stack.
DIRECTION_TOLERANCE = 1e-3
# Largest difference of pixel spacings, as a share.
PIXEL_TOLERANCE = 1e-3
# Largest deviation of slices from even spacing, as a share of their distance.
STEP_TOLERANCE = 0.05
# Values, and traits, that a message lists.
LISTED_VALUES, LISTED_TRAITS = 6, 2


def sorted_stack(path: Path, frames: Sequence[Frame]) -> tuple[list[Frame], np.ndarray]:
    """The frames in the order of their positions along the normal, and the affine of their stack.

    With X and Y the directions along a row and along a column, d the spacings and P₀ … Pₙ₋₁ the sorted positions, the
    affine's columns are X · d(between columns), Y · d(between rows), (Pₙ₋₁ − P₀) / (n − 1), and P₀ (DICOM PS3.3
    C.7.6.2.1.1). The third is not at right angles to the slices if the gantry was tilted. One slice alone has its normal
    times its thickness there.

    Args:
        path: for messages.
        frames: in any order; at least one.

    Returns:
        Frames, and the affine (4, 4) of (column, row, frame), voxel to mm, RAS+.

    Raises:
        VolumeError: the frames have several orientations, sizes or pixel spacings; there are several at one position, or
            none where one should be; or one slice does not state its thickness.
    """
    _check_alike(path, frames)
    normal = frames[0].normal
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    _check_one_at_each_position(path, frames, np.array([frame.position @ normal for frame in frames]))
    first = frames[0]
    lps = np.eye(4)
    lps[:3, :3] = np.column_stack(
        [first.orientation[0] * first.spacing[1], first.orientation[1] * first.spacing[0], _step(path, frames)]
    )
    lps[:3, 3] = first.position
    return frames, LPS_TO_RAS @ lps


def _check_alike(path: Path, frames: Sequence[Frame]) -> None:
    """Refuse frames of several orientations, sizes or pixel spacings."""
    stacks: list[list[Frame]] = []
    for frame in frames:
        turned = (np.abs(frame.orientation - stack[0].orientation).max() for stack in stacks)
        same = next((i for i, most in enumerate(turned) if most <= DIRECTION_TOLERANCE), None)
        if same is None:
            stacks.append([frame])
        else:
            stacks[same].append(frame)
    if len(stacks) > 1:
        planes = _listed([f"{len(stack)} {_plane(stack[0])}" for stack in stacks])
        raise VolumeError(
            f"{path} holds slices of {len(stacks)} orientations ({planes}), expected one stack: {_remedy(frames)}"
        )
    sizes = sorted({frame.shape for frame in frames})
    if len(sizes) > 1:
        listed = _listed([f"{rows} x {columns}" for rows, columns in sizes])
        raise VolumeError(
            f"{path} holds slices of {len(sizes)} sizes ({listed} pixels), expected one: {_remedy(frames)}"
        )
    spacings = sorted({frame.spacing for frame in frames})
    if not np.allclose(spacings, spacings[0], rtol=PIXEL_TOLERANCE, atol=0):
        listed = _listed([f"{rows:g} x {columns:g}" for rows, columns in spacings])
        raise VolumeError(
            f"{path} holds slices of {len(spacings)} pixel spacings ({listed} mm), expected one: {_remedy(frames)}"
        )


def _check_one_at_each_position(path: Path, frames: Sequence[Frame], distances: np.ndarray) -> None:
    """Refuse sorted frames of which several lie at one position, and say what tells them apart."""
    starts = np.flatnonzero(np.diff(distances, prepend=-np.inf) > POSITION_TOLERANCE).tolist()
    groups = [list(frames[a:b]) for a, b in zip(starts, [*starts[1:], len(frames)], strict=True)]
    doubled = [group for group in groups if len(group) > 1]
    if not doubled:
        return
    differences = []
    for trait in TRAITS:
        if any(len({frame.traits[trait.name] for frame in group}) > 1 for group in doubled):
            found = {frame.traits[trait.name] for group in doubled for frame in group}
            # Numbers before texts, which Python does not compare with one another.
            values = sorted(found, key=lambda value: [(isinstance(part, str), part) for part in value])
            unit = f" {trait.unit}" if trait.unit else ""
            differences.append(f"{len(values)} {trait.name} ({_listed([_text(v) for v in values])}{unit})")
    where = f"each of {len(groups)}" if len(doubled) == len(groups) else f"{len(doubled)} of {len(groups)}"
    where = "one position" if len(groups) == 1 else f"{where} positions"
    if differences:
        what = " and ".join(differences[:LISTED_TRAITS])
        raise VolumeError(f"{path} holds {what} at {where}, expected one image at each: {_remedy(frames)}")
    most = max(len(group) for group in doubled)
    raise VolumeError(
        f"{path} holds {most} images at {where}, which their headers do not tell apart, expected one image at each: "
        f"remove those that are doubled, {_remedy(frames)}"
    )


def _step(path: Path, frames: Sequence[Frame]) -> np.ndarray:
    """From one slice to the next in mm, LPS; the same everywhere, or the frames are refused."""
    if len(frames) == 1:
        thickness = frames[0].thickness
        if thickness is None or thickness <= 0:
            raise VolumeError(
                f"{path} holds one slice without a SliceThickness of more than 0 mm, expected a volume: give the folder "
                f"of all its slices"
            )
        return frames[0].normal * thickness
    steps = np.diff([frame.position for frame in frames], axis=0)
    typical = np.median(steps, axis=0)
    lengths, length = np.linalg.norm(steps, axis=1), float(np.linalg.norm(typical))
    off = np.linalg.norm(steps - typical, axis=1)
    worst = int(off.argmax())
    if off[worst] > STEP_TOLERANCE * length:
        raise VolumeError(
            f"{path} has {len(frames)} slices {length:.3g} mm apart, but a gap of {lengths[worst]:.3g} mm between "
            f"{frames[worst].name} and {frames[worst + 1].name}, expected even steps: slices are missing, or several "
            f"volumes are mixed; export one complete series"
        )
    return steps.mean(axis=0)


def _remedy(frames: Sequence[Frame]) -> str:
    """How to get one stack out of several, some of which may have a multi-frame file of their own."""
    alone = "give any one file, " if 1 < len({frame.file for frame in frames}) < len(frames) else ""
    return f"{alone}export one of them alone, or {CONVERT}"


def _plane(frame: Frame) -> str:
    return ("sagittal", "coronal", "axial")[int(np.abs(frame.normal).argmax())]


def _text(values: Sequence[float | str]) -> str:
    return "\\".join(value if isinstance(value, str) else f"{value:g}" for value in values) or "none"


def _listed(texts: Sequence[str]) -> str:
    shown = [*texts[: LISTED_VALUES - 1], "…", texts[-1]] if len(texts) > LISTED_VALUES else texts
    return ", ".join(shown)
