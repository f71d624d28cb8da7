"""From a file's values to label numbers: whole numbers are taken, nearly whole ones rounded and told, others refused."""

from __future__ import annotations

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError

# Values this close to a whole number are one: scaling factors in file headers, and other tools' arithmetic, leave 0.9999.
ROUNDING = 0.01


def label_numbers(name: object, array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label numbers (int32) of an array of any shape, and a note if any had to be rounded.

    Args:
        name: the file, for messages.
        array: values of any real type.

    Raises:
        VolumeError: a value is NaN, infinite, negative, above what int32 holds, or more than ``ROUNDING`` off a whole
            number.
    """
    notes: tuple[str, ...] = ()
    if array.dtype.kind not in "iub":
        if bad := int((~np.isfinite(array)).sum()):
            raise VolumeError(
                f"{name} has {bad} NaN or infinite voxels of {array.size}, expected label numbers: write 0 where nothing "
                f"is labelled (numpy.nan_to_num)"
            )
        whole = np.rint(array)
        off = np.abs(array - whole)
        furthest = float(off.max())
        if furthest > ROUNDING:
            raise VolumeError(
                f"{name} has {int((off > ROUNDING).sum())} voxels of {array.size} that are no whole numbers, such as "
                f"{array.flat[off.argmax()]:.6g}, up to {furthest:.2g} off; expected label numbers: it was probably "
                f"interpolated, so resample the original labels with nearest neighbour; if it is an image, give a label map"
            )
        if furthest > 0:
            notes = (f"{name} has labels up to {furthest:.2g} off whole numbers, they were rounded",)
        array = whole
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise VolumeError(
            f"{name} has values from {low:g} to {high:g}, expected label numbers of at least 0: give a label map"
        )
    return array.astype(np.int32), notes
