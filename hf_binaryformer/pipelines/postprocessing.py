"""What is done to labels after the network: stray pieces, labels in air, and the volume inside the skull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_binaryformer.pipelines.structure_names import side_of

# Edge of the blocks in which the head is looked for; gaps of up to this width in its surface are closed.
HEAD_BLOCK_MM = 4.0
# A structure that is labelled on both sides with one number has two pieces: each is kept that has this share of the larger.
PAIR_SHARE = 0.5
# Words of names whose structures keep all their pieces: they lie in many places, or are thin and often found in pieces.
ALL_PIECES = ("csf", "lesion", "inferior lateral ventricle")
# Sulci of up to twice this width count as inside the skull, in blocks of this edge.
CLOSING_MM, CLOSING_BLOCK_MM = 8.0, 2.0


def largest_pieces(labels: np.ndarray, label_names: Mapping[int, str]) -> np.ndarray:
    """Labels with the largest connected piece of each structure only; the rest becomes background.

    Voxels that share a corner are connected. If a name has no side, pieces of at least half the largest one's size are kept
    too, because one label may stand for a pair. Fluid outside the ventricles (CSF), the inferior lateral ventricles, which are
    thin, and lesions are left as they are.

    Args:
        labels: (I, J, K) int32.
        label_names: name of each label number.
    """
    from scipy import ndimage  # loaded when used

    result = labels.copy()
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        name = label_names.get(label, "")
        if box is None or any(word in name.lower() for word in ALL_PIECES):
            continue
        pieces, count = ndimage.label(labels[box] == label, np.ones((3, 3, 3)))
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        kept = np.arange(count + 1) == sizes.argmax()
        if side_of(name) is None:
            kept |= sizes >= PAIR_SHARE * sizes.max()
        kept[0] = True
        result[box][~kept[pieces]] = 0
    return result


def head_mask(foreground: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The head: the foreground of the image, and what it encloses in a sagittal, coronal or axial slice.

    The mask is made of blocks of about 4 mm, so that it reaches up to 4 mm beyond the foreground. Slices, not the volume, are
    filled, because a ventricle that the edge of the image cuts is open there.

    Args:
        foreground: bool (I, J, K), :func:`~hf_binaryformer.pipelines.grids.foreground_mask`.
        spacing: voxel size along I, J, K in mm.

    Returns:
        bool (I, J, K).
    """
    factors = _factors(HEAD_BLOCK_MM, spacing)
    blocks = _blocks(foreground, factors).max(axis=(1, 3, 5))
    inside = np.array(blocks)
    for axis in range(3):
        inside |= _filled(blocks, axis)
    for axis, factor in enumerate(factors):
        inside = inside.repeat(factor, axis)
    return inside[tuple(slice(size) for size in foreground.shape)]


def intracranial_ml(labels: np.ndarray, spacing: Sequence[float]) -> float:
    """An estimate of the volume inside the skull in ml: that of fill(close(all labels > 0)).

    "Close" is the morphological closing with a ball of 8 mm, "fill" adds enclosed holes; both on blocks of about 2 mm, each of
    which counts if labels fill at least half of it.

    It is made of labels, and the skull is not looked for. Fluid between brain and skull is in it as far as it is labelled, or
    lies in gaps of less than 16 mm: with strong atrophy, or where a model has no label for that fluid, the estimate is too low.
    The brain stem below the skull counts, and what the image does not show is missing.

    Args:
        labels: (I, J, K) whole numbers.
        spacing: voxel size along I, J, K in mm.
    """
    from scipy import ndimage  # loaded when used

    factors = _factors(CLOSING_BLOCK_MM, spacing)
    block_mm = [factor * mm for factor, mm in zip(factors, spacing, strict=True)]
    blocks = _blocks(labels > 0, factors).mean(axis=(1, 3, 5)) >= 0.5
    if not blocks.any():
        return 0.0
    # Room for the ball, so that the volume's edge does not count as brain when the dilated mask is eroded.
    blocks = np.pad(blocks, [(int(np.ceil(CLOSING_MM / mm)) + 1,) * 2 for mm in block_mm])
    dilated = ndimage.distance_transform_edt(~blocks, sampling=block_mm) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(dilated, sampling=block_mm) > CLOSING_MM
    return float(_filled(closed | blocks).sum() * np.prod(block_mm) / 1000)


def _factors(block_mm: float, spacing: Sequence[float]) -> list[int]:
    """Voxels along each edge of a block."""
    return [max(1, round(block_mm / mm)) for mm in spacing]


def _blocks(mask: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """View (I', fi, J', fj, K', fk) of a mask (I, J, K), padded with False to whole blocks."""
    padded = np.pad(mask, [(0, -size % factor) for size, factor in zip(mask.shape, factors, strict=True)])
    split = [n for size, factor in zip(padded.shape, factors, strict=True) for n in (size // factor, factor)]
    return padded.reshape(split)


def _filled(mask: np.ndarray, slice_axis: int | None = None) -> np.ndarray:
    """The mask with its holes, in 3D or slice by slice: what is dark and does not reach the edge of volume or slice."""
    from scipy import ndimage  # loaded when used

    structure = ndimage.generate_binary_structure(3, 1)
    if slice_axis is not None:
        np.moveaxis(structure, slice_axis, 0)[[0, 2]] = False
    pieces, count = ndimage.label(~mask, structure)
    outside = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        if axis != slice_axis:
            outside[pieces.take([0, -1], axis)] = True
    outside[0] = False  # the mask itself
    return ~outside[pieces]
